"""Answers side by side as people read them, and what of a sample is kept."""

import base64
import io

import pytest
import torch
from PIL import Image

from optimum_qvlm.data.picture import read_picture
from optimum_qvlm.data.sample import read_sample
from optimum_qvlm.evaluation.compare import Observation
from optimum_qvlm.evaluation.fidelity import IGNORED
from optimum_qvlm.evaluation.transcripts import PROMPT, SIDE, small_picture, transcripts


def rendered(processor, *texts):
    """A batch of texts whose last three tokens are the answer, and their ids."""
    rows = [processor.tokenizer(text).input_ids for text in texts]
    ids = torch.tensor([row[-12:] for row in rows])
    labels = torch.where(torch.arange(12) < 9, IGNORED, ids)
    return {"input_ids": ids, "labels": labels}


def said(processor, *texts):
    return [processor.tokenizer(text).input_ids for text in texts]


def test_answers_stand_beside_those_of_full_precision(processor):
    """A row that could not be continued is passed over."""
    batch = rendered(processor, "how many digits are there? 1 2 3", "what is the sum of all digits? 4 5 6")
    sample = read_sample({"question": "What is the sum?", "answer": "6"}, "here")
    reference = Observation(answers=said(processor, "six"), rows=[(0, 1)])
    answered = Observation(answers=said(processor, "seven"), rows=[(0, 1)])

    (line,) = transcripts(reference, answered, [batch], [[None, sample]], processor.tokenizer, images=True)

    assert line.to_dict() == {"prompt": "What is the sum?", "reference": "six", "answer": "seven"}


def test_without_its_sample_the_prompt_is_what_the_model_read(processor):
    """Ready model inputs, and the end of a long text."""
    batch = rendered(processor, "how many digits are there? 1 2 3")
    seen = Observation(answers=said(processor, "six"), rows=[(0, 0)])

    (line,) = transcripts(seen, seen, [batch], [], processor.tokenizer, images=True)

    expected = processor.tokenizer.decode(batch["input_ids"][0, :9], skip_special_tokens=True).strip()
    assert line.prompt == expected and expected != ""
    assert "1 2 3" not in line.prompt


def test_a_long_question_loses_its_beginning(processor):
    sample = read_sample({"question": "a" * 1000 + " and now?", "answer": "6"}, "here")
    seen = Observation(answers=said(processor, "six"), rows=[(0, 0)])

    (line,) = transcripts(seen, seen, [rendered(processor, "x" * 40)], [[sample]], processor.tokenizer, images=False)

    assert line.prompt.endswith("and now?") and len(line.prompt) == PROMPT + 1


@pytest.mark.parametrize("size", [(2000, 100), (40, 30), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_picture_is_small_and_has_nothing_but_its_colours(tmp_path, size, mode):
    """No place where a photograph was taken, no comment."""
    image = Image.new(mode, size)
    exif = Image.Exif()
    exif[0x010E] = "a secret description"
    image.save(tmp_path / "a.png", exif=exif, comment="secret")

    address = small_picture(read_picture(tmp_path / "a.png", "here"))

    content = base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))
    kept = Image.open(io.BytesIO(content))
    assert max(kept.size) <= SIDE and kept.size[0] <= size[0]
    assert b"secret" not in content and not kept.getexif()
