"""`--trust-remote-code`: code that lies beside a model runs with it, and never without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.jobs import contents, run_python

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""

MODELING = """
import os

from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

open(os.environ["RAN"], "w").close()


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""

PROCESSING = """
import os

from transformers import LlavaProcessor

open(os.environ["RAN"], "w").close()


class OwnProcessor(LlavaProcessor):
    pass
"""

LOAD_PROCESSOR = """
import sys
from transformers import AutoProcessor
print(type(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(llama_folder, tmp_path) -> Path:
    """A text model whose classes come with it."""
    target = tmp_path / "own"
    target.mkdir()
    for name, data in contents(llama_folder).items():
        (target / name).write_bytes(data)
    (target / "configuration_own.py").write_text(CONFIGURATION)
    (target / "modeling_own.py").write_text(MODELING)
    config = json.loads((target / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture
def run(tmp_path):
    """Runs optimum-cli in a fresh process, which nobody answers; says whether the model's code ran."""

    def command(*words):
        mark = tmp_path / "ran"
        mark.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, words)],
            env=os.environ | {"RAN": str(mark), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
        )
        return done, mark.exists()

    return command


def test_without_the_option_nothing_runs(run, folder, tmp_path):
    done, ran = run("export", "qvlm", "--model", folder, "--method", "rtn", "--device", "cpu", tmp_path / "out")

    assert done.returncode == 2
    assert "contains custom code which must be executed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not ran
    assert not (tmp_path / "out").exists()


def test_with_it_the_model_is_quantized_and_takes_its_code_along(run, folder, tmp_path):
    """What was saved must load elsewhere; looking at it runs nothing."""
    words = ["--model", folder, "--method", "rtn", "--device", "cpu", "--trust-remote-code", "--json"]

    done, ran = run("export", "qvlm", *words, tmp_path / "out")

    assert done.returncode == 0, done.stderr
    assert ran
    assert {"configuration_own.py", "modeling_own.py"} <= set(contents(tmp_path / "out"))
    done, ran = run("qvlm", "info", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert ": OwnModel" in done.stdout
    assert not ran


@pytest.fixture
def own_processor(bundled_folder, tmp_path) -> Path:
    """A model of a known family whose processor has code of its own, and one sample for it."""
    target = tmp_path / "own-processor"
    target.mkdir()
    for name, data in contents(bundled_folder).items():
        if not name.endswith(".py"):
            (target / name).write_bytes(data)
    (target / "processing_own.py").write_text(PROCESSING)
    config = json.loads((target / "processor_config.json").read_text())
    config |= {"auto_map": {"AutoProcessor": "processing_own.OwnProcessor"}, "processor_class": "OwnProcessor"}
    (target / "processor_config.json").write_text(json.dumps(config))
    Image.new("RGB", (32, 32), "red").save(target / "red.png")
    sample = {"image": "red.png", "question": "what colour?", "answer": "red"}
    (target / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return target


@pytest.mark.parametrize("named", [False, True], ids=["beside the weights", "named"])
def test_a_processor_is_trusted_as_far_as_the_model(run, own_processor, bundled_folder, tmp_path, named):
    """It renders the samples, so its code decides what is calibrated on; asking at the prompt would hang a job."""
    words = ["--model", bundled_folder, "--processor", own_processor] if named else ["--model", own_processor]
    words += ["--dataset", own_processor / "samples.jsonl", "--effort", "fast", "--device", "cpu"]

    plain, ran_plain = run("export", "qvlm", *words, tmp_path / "plain")
    trusted, ran = run("export", "qvlm", *words, "--trust-remote-code", tmp_path / "out")

    assert not ran_plain and ran, trusted.stderr
    assert trusted.returncode == 0, trusted.stderr
    assert "Do you wish to run the custom code" not in plain.stdout + plain.stderr


def test_its_code_goes_along(run, own_processor, tmp_path):
    """The folder names it, and would be half without; nobody who did not trust it carries it on."""
    words = ["export", "qvlm", "--model", own_processor, "--method", "rtn", "--device", "cpu"]

    run(*words, tmp_path / "plain")
    done, _ = run(*words, "--trust-remote-code", tmp_path / "out")

    assert done.returncode == 0, done.stderr
    assert "processing_own.py" in contents(tmp_path / "out")
    assert "processing_own.py" not in contents(tmp_path / "plain")
    cache = {"HF_MODULES_CACHE": str(tmp_path / "other"), "RAN": str(tmp_path / "ran")}
    assert run_python(LOAD_PROCESSOR, tmp_path / "out", **cache).stdout.strip() == "OwnProcessor"
