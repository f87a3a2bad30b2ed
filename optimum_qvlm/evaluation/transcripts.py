"""Greedy answers of two models side by side, as texts, for people to read."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optimum_qvlm.data.picture import Picture
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.evaluation.compare import Observation

PROMPT = 600
"""Characters of a prompt, its end, that are kept."""

SIDE = 320
"""Pixels of the longer side of a picture that is kept."""

QUALITY = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One prompt and what both models answer, ends left out.

    Attributes:
        prompt: the question, or where it is not known the end of the model's input as text.
        reference: the answer in full precision.
        answer: that of the quantized model.
        images: `data:` addresses of the sample's pictures, made small.
    """

    prompt: str
    reference: str
    answer: str
    images: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {"prompt": self.prompt, "reference": self.reference, "answer": self.answer}
        return values | ({"images": list(self.images)} if self.images else {})


def transcripts(
    reference: Observation,
    answered: Observation,
    batches: Sequence[Mapping[str, Tensor]],
    samples: Sequence[Sequence[Sample | None]],
    tokenizer: Any,
    *,
    images: bool,
) -> list[Transcript]:
    """The answers of both observations of `batches` as texts.

    `samples` says for each row of each batch what it was rendered from; None, or no entry, where that is not known.
    """
    lines = []
    for (number, row), first, second in zip(reference.rows, reference.answers, answered.answers, strict=True):
        sample = samples[number][row] if number < len(samples) and row < len(samples[number]) else None
        lines.append(
            Transcript(
                prompt=_prompt(batches[number], row, sample, tokenizer),
                reference=_text(tokenizer, first),
                answer=_text(tokenizer, second),
                images=tuple(map(small_picture, sample.images)) if images and sample is not None else (),
            )
        )
    return lines


def small_picture(image: Any) -> str:
    """A JPEG of at most `SIDE` pixels as a `data:` address; nothing of the file it came from is kept but its colours.

    Raises:
        DataError: it can no longer be read.
    """
    opened = (image.open() if isinstance(image, Picture) else image).convert("RGB")
    opened.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    opened.save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _prompt(batch: Mapping[str, Tensor], row: int, sample: Sample | None, tokenizer: Any) -> str:
    if sample is not None and sample.text is None:
        return _end(sample.question())
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    answered = int((labels >= 0).int().argmax())
    return _end(_text(tokenizer, ids[:answered].tolist()))


def _end(text: str) -> str:
    text = text.strip()
    return text if len(text) <= PROMPT else f"…{text[-PROMPT:]}"


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
