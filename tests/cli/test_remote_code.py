"""`--trust-remote-code`: code that lies beside a model runs with it, and never without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import contents

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
