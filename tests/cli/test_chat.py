"""One question, one answer: on the bundled model, in this process."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from optimum_qvlm.cli import chat
from tests.jobs import edit_config, quantize


@pytest.fixture(scope="module")
def saved(bundled_folder, tmp_path_factory):
    """The bundled model at w8a8, rounded to nearest. Read only."""
    folder = tmp_path_factory.mktemp("chat")
    quantize(bundled_folder, scheme="w8a8", method="rtn", dataset=None).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path) -> Path:
    """A file that the model can look at."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def run(parser, capsys):
    """Runs the command; returns exit code, stdout, stderr."""

    def command(*words):
        args = parser.parse_args(["qvlm", "chat", "--device", "cpu", "--max-new-tokens", "5", *map(str, words)])
        code = chat.main(args)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return command


def test_an_answer_about_an_image_is_printed_alone(run, saved, picture):
    """Without the question, and without the marks of the chat template."""
    code, text, _ = run(saved, "--image", picture, "which digit is in the top left?")

    assert code == 0
    assert text.strip() != ""
    assert "which digit" not in text
    assert "<" not in text


def test_it_is_the_answer_of_generate(run, saved, picture):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, text, _ = run(saved, "--image", picture, "how many?")

    model, processor = AutoModelForImageTextToText.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    inputs = chat.render(processor, [Image.open(picture).convert("RGB")], "how many?")
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert text.strip() == processor.decode(tokens, skip_special_tokens=True).strip()


def test_a_question_without_an_image_is_answered(run, saved):
    code, text, _ = run(saved, "how many?")

    assert code == 0
    assert text != ""


def test_the_answer_streams(parser, saved, picture, monkeypatch):
    """Long answers are read while they are written."""
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: pieces.append(words))
    args = parser.parse_args(
        ["qvlm", "chat", "--device", "cpu", str(saved), "--image", str(picture), "spell the digits"]
    )

    chat.main(args)

    assert len(pieces) > 1


@pytest.mark.parametrize("name", ["missing.png", "samples.txt"])
def test_a_picture_that_cannot_be_read_is_refused(run, saved, tmp_path, name):
    (tmp_path / "samples.txt").write_text("no picture")

    code, _, error = run(saved, "--image", tmp_path / name, "?")

    assert code == 2
    assert f"{name} cannot be read" in error


def test_a_folder_without_processor_is_refused(run, llava_folder):
    code, _, error = run(llava_folder, "?")

    assert code == 2
    assert "no processor or tokenizer could be loaded" in error


def test_a_damaged_model_is_refused(run, saved, tmp_path):
    copied = shutil.copytree(saved, tmp_path / "copy")
    edit_config(Path(copied), scheme="w4a8")

    code, _, error = run(copied, "?")

    assert code == 2
    assert "quantization_config was changed after saving" in error


def test_a_model_of_another_kind_is_refused(run, saved, tmp_path):
    copied = Path(shutil.copytree(saved, tmp_path / "copy"))
    config = json.loads((copied / "config.json").read_text()) | {"model_type": "nothing"}
    (copied / "config.json").write_text(json.dumps(config))

    code, _, error = run(copied, "?")

    assert code == 2
    assert "Traceback" not in error


def test_images_are_refused_by_models_that_take_none(llama_folder, picture):
    from types import SimpleNamespace

    from optimum_qvlm.errors import DataError

    with pytest.raises(DataError, match="takes no images; ask without --image"):
        chat.answer(SimpleNamespace(), SimpleNamespace(), [picture], "?", 5)


def test_a_photograph_is_looked_at_upright(run, saved, tmp_path):
    """Telephones store it lying, with a note of how to turn it."""
    picture = Image.effect_noise((48, 32), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "lying.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")

    lying, upright = (chat.read_image(tmp_path / f"{name}.png") for name in ("lying", "upright"))

    assert lying.tobytes() == upright.tobytes()
    assert len({run(saved, "--image", tmp_path / f"{n}.png", "how many?")[:2] for n in ("lying", "upright")}) == 1


def test_a_pipe_as_image_is_refused(run, saved, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")

    code, _, error = run(saved, "--image", tmp_path / "pipe.png", "?")

    assert code == 2
    assert "pipe.png cannot be read (it is no regular file)" in error


def test_a_template_without_a_place_for_the_image_is_refused(run, saved, picture, tmp_path):
    """Rather than an answer about nothing."""
    copied = Path(shutil.copytree(saved, tmp_path / "copy"))
    (copied / "chat_template.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")

    code, _, error = run(copied, "--image", picture, "how many?")

    assert code == 2
    assert "the processor cannot take the question" in error and "image" in error


def test_a_processor_without_template_gets_the_image(run, saved, picture, tmp_path):
    copied = Path(shutil.copytree(saved, tmp_path / "copy"))
    (copied / "chat_template.jinja").unlink()

    code, _, _ = run(copied, "--image", picture, "how many?")

    assert code == 0
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(copied)
    inputs = chat.render(processor, [chat.read_image(picture)], "how many?")
    assert processor.chat_template is None
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 36


@pytest.mark.parametrize("device, tokens, compiles", [("cuda", 4096, True), ("cuda", 256, False), ("cpu", 4096, False)])
def test_only_a_long_answer_on_a_gpu_is_worth_compiling(device, tokens, compiles):
    """One question takes seconds, compiling a minute."""
    import torch

    options = chat.speed_options(torch.device(device), tokens)

    assert options == ({"cache_implementation": "static"} if compiles else {})
