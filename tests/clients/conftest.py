"""Programs that know nothing of this package, started by `python -m optimum_qvlm`: on the bundled model."""

import os
import subprocess
import sys

import pytest
from transformers import AutoProcessor, LlamaForCausalLM

from tests.jobs import ROOT, load, quantize


@pytest.fixture(scope="session")
def environment():
    """What a user has, without a network."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture
def python(environment, tmp_path):
    """Runs a fresh Python to its end."""

    def run(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)

    return run


@pytest.fixture(scope="session")
def vision_folder(bundled_folder, tmp_path_factory):
    """The bundled model at w8a8. Read only."""
    folder = tmp_path_factory.mktemp("clients") / "vision"
    quantize(bundled_folder, scheme="w8a8", method="rtn", dataset=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(bundled_folder, tmp_path_factory):
    """The decoder of the bundled model as a text model at w8a8, with its tokenizer. Read only."""
    source, folder = (tmp_path_factory.mktemp("clients") / name for name in ("text-source", "text"))
    whole = load(bundled_folder)
    text = LlamaForCausalLM(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(source)
    tokenizer = AutoProcessor.from_pretrained(bundled_folder).tokenizer
    tokenizer.save_pretrained(source)
    quantize(source, scheme="w8a8", method="rtn", dataset=None).save_pretrained(folder)
    return folder
