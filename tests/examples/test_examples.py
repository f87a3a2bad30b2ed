"""The scripts under examples/ run as they stand, on the bundled model."""

import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from optimum_qvlm.cli.chat import load_processor
from tests.hub.server import serve

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.integration


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script in a folder of its own, in this process, as `python examples/NAME` does; returns its stdout."""

    def script(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """What quantize_and_push.py saves."""
    folder = tmp_path_factory.mktemp("examples") / "quantized"
    argv, sys.argv = sys.argv, ["quantize_and_push.py", "--out", str(folder), "--samples", "2"]
    try:
        runpy.run_path(str(EXAMPLES / "quantize_and_push.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return folder


def test_the_quantized_model_is_saved_whole(quantized):
    names = {path.name for path in quantized.iterdir()}

    assert {"config.json", "model.safetensors", "processor_config.json", "qvlm_report.json", "README.md"} <= names


def test_a_loaded_model_answers(run, quantized):
    text = run("load_and_chat.py", quantized)

    assert text.startswith("how many digits are there? ")
    assert len(text.split()) > 5


def test_it_answers_about_a_file(run, quantized, tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 20), "blue").save(tmp_path / "blue.png")

    assert run("load_and_chat.py", quantized, "--image", tmp_path / "blue.png", "--question", "what?").startswith(
        "what?"
    )


def test_a_pipeline_answers(run, quantized):
    assert run("with_pipeline.py", quantized).strip() != ""


def test_a_text_model(run, tmp_path):
    text = run("text_only.py", tmp_path / "text")

    assert text.startswith("how many digits are there?")
    assert (tmp_path / "text" / "tokenizer.json").exists()
    where = {"revision": "main", "subfolder": None, "cache_dir": None}
    args = Namespace(model=str(tmp_path / "text"), trust_remote_code=False, **where)
    assert load_processor(args).encode("how many")  # although the tokenizer is that of an image processor's files


@pytest.mark.slow
def test_a_dataset_of_ones_own(run, tmp_path):
    text = run("own_dataset.py", tmp_path / "samples", tmp_path / "out")

    assert text.startswith("Calibrated on 16 samples, fingerprint ")
    assert len((tmp_path / "samples" / "samples.jsonl").read_text().splitlines()) == 16
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_upload(tmp_path):
    """In a process of its own, which finds the Hub by HF_ENDPOINT."""
    with serve() as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_owner",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        words = ["--samples", "2", "--out", "out", "--repo", "me/tiny"]
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "quantize_and_push.py"), *words],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        assert f"Pushed to {hub.url}/me/tiny/commit/" in done.stdout
        assert hub.repos["me/tiny"].private


@pytest.mark.slow
def test_the_command_line(tmp_path):
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(EXAMPLES / "command_line.sh"), str(tmp_path / "out")],
        env=os.environ | {"PATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode == 0, done.stderr
    assert "Saved the w4a8 model in " in done.stdout
    assert "LlavaForConditionalGeneration" in done.stdout
