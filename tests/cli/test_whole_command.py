"""`optimum-cli export qvlm` as users run it, on the bundled model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "examples" / "tiny_vlm"


def export_qvlm(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, on the CPU."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "qvlm", "--device", "cpu"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=280)


@pytest.mark.integration
def test_the_saved_model_loads_and_answers(tmp_path):
    """The way from the shell to an answer: export, then load with nothing but transformers' own calls."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import optimum_qvlm  # noqa: F401

    done = export_qvlm("--model", MODEL, "--num-samples", 4, "--batch-size", 2, tmp_path / "out")

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"Saved the w4a8 model in {tmp_path / 'out'}: ")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "qvlm"

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    red = Image.new("RGB", (32, 32), "red")
    content = [{"type": "image", "image": red}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.integration
def test_users_own_samples_and_rounding_to_nearest(tmp_path):
    """Options that reach the loader and the search; the tower stays as it is."""
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    record = {"image": "red.png", "question": "What colour is it?", "answer": "red"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(record) + "\n")

    done = export_qvlm(
        *("--model", MODEL),
        *("--scheme", "w4a16"),
        *("--vision-scheme", "none"),
        *("--method", "rtn"),
        *("--dataset", tmp_path / "samples.jsonl"),
        tmp_path / "out",
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Saved the w4a16 model in ")


@pytest.mark.integration
@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", MODEL, "--scheme", "w3"], "unknown scheme 'w3'"),
        (["--model", MODEL, "--dataset", "missing.jsonl"], "dataset missing.jsonl: there is no such file"),
        (["--model", MODEL / "assets-that-are-not-there"], "there is no folder "),
        (["--model", MODEL, "--device", "gpu"], "'gpu' is no device"),
    ],
    ids=["scheme", "dataset", "model", "device"],
)
def test_refused_input_exits_with_two_and_no_traceback(tmp_path, words, message):
    done = export_qvlm(*words, tmp_path / "out")

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
