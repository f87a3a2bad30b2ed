"""The way over the environment: HF_ENDPOINT, HF_TOKEN and a new process for each command, as a user's shell has it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub.server import serve
from tests.jobs import contents

ROOT = Path(__file__).parents[2]
REPO = "me/tiny"

pytestmark = [pytest.mark.integration, pytest.mark.slow]

LOAD = """
import sys
import optimum_qvlm
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
AutoProcessor.from_pretrained(sys.argv[1])
print(type(model).__name__)
"""

QUANTIZE = """
import sys
from transformers import AutoModelForImageTextToText
from optimum_qvlm import QVLMConfig
config = QVLMConfig("w4a8", method="layerwise", effort="fast", num_samples=2)
model = AutoModelForImageTextToText.from_pretrained("me/base", quantization_config=config, token=sys.argv[1])
model.push_to_hub("me/tiny", private=True, token=sys.argv[1])
"""

RELOAD = """
import sys
import optimum_qvlm
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("me/tiny", token=sys.argv[1])
model.save_pretrained(sys.argv[2])
print(type(AutoProcessor.from_pretrained(sys.argv[2])).__name__)
"""


@pytest.fixture
def hub(bundled_folder):
    """A Hub with the bundled model in full precision."""
    with serve() as running:
        there = {path: data for path, data in contents(bundled_folder).items() if not path.endswith((".py", ".pyc"))}
        running.add("org/base", there)
        yield running


@pytest.fixture
def environment(hub, tmp_path):
    """What a user's shell sets, and nothing from this machine's."""
    return os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_owner",
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }


def command(*words):
    return [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, words)]


def finish(words, environment):
    return subprocess.run([str(word) for word in words], env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.timeout(900)  # four processes, one after the other
def test_export_push_info_load_and_offline(hub, environment, tmp_path):
    words = ["--model", "org/base", "--method", "rtn", "--device", "cpu", "--push-to-hub", REPO, "--private", "--json"]
    done = finish(command("export", "qvlm", *words, tmp_path / "out"), environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == hub.repos[REPO].branches["main"]

    done = finish(command("qvlm", "info", REPO), environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(REPO)

    done = finish([sys.executable, "-c", LOAD, REPO], environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "LlavaForConditionalGeneration\n"

    before = len(hub.requests)
    done = finish([sys.executable, "-c", LOAD, REPO], environment | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == before


def test_private_models_with_nothing_but_the_token_argument(hub, environment, tmp_path):
    """Quantized and pushed, then loaded and saved: nobody is logged in, and the processor arrives."""
    hub.add("me/base", hub.files("org/base"), private=True)
    stranger = {name: value for name, value in environment.items() if name != "HF_TOKEN"}

    done = finish([sys.executable, "-c", QUANTIZE, "hf_owner"], stranger)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO].private
    assert hub.files(REPO)["tokenizer.json"] == hub.files("me/base")["tokenizer.json"]
    assert not any(b"hf_owner" in data for data in hub.files(REPO).values())

    stranger["HF_HOME"] = str(tmp_path / "another")
    done = finish([sys.executable, "-c", RELOAD, "hf_owner", tmp_path / "out"], stranger)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "LlavaProcessor\n"
    assert "could not be fetched" not in done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_upload_that_is_stopped_ends_at_once_and_commits_nothing(hub, environment, tmp_path, number, code):
    """Although a thread of the client still sends a large file."""
    hub.fail("PUT", "/lfs/", delay=60, times=10)
    words = ["--model", "org/base", "--method", "rtn", "--device", "cpu", "--push-to-hub", REPO]
    process = subprocess.Popen(
        command("export", "qvlm", *words, tmp_path / "out"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not hub.asked("PUT", "/lfs/") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert hub.asked("PUT", "/lfs/")
    stopped = time.monotonic()

    process.send_signal(number)
    _, said = process.communicate(timeout=60)

    assert process.returncode == code
    assert time.monotonic() - stopped < 10
    assert "interrupted; nothing was committed, what was saved stays" in said
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert "config.json" in contents(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf-home"] == ["out"]
