"""Frozen descriptions of calibration data: named presets, and the record of what was used."""

from dataclasses import dataclass
from typing import Any

from optimum_qvlm.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A dataset on the Hub and the columns that hold image, question and answer.

    `answer_index` names a column of choices when the answer column holds an index into it.
    """

    path: str
    split: str
    question: str
    answer: str
    image: str | None = "image"
    choices: str | None = None
    name: str | None = None
    revision: str = "main"


PRESETS: dict[str, Preset] = {
    "scienceqa": Preset(
        path="derek-thomas/ScienceQA", split="train", question="question", answer="answer", choices="choices"
    ),
    "textvqa": Preset(path="lmms-lab/textvqa", split="train", question="question", answer="answers"),
    "chartqa": Preset(path="HuggingFaceM4/ChartQA", split="train", question="query", answer="label"),
}
"""Presets that `dataset="name"` downloads through the `datasets` library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a calibration used: recorded in the checkpoint, without the data itself.

    `fingerprint` is the SHA-256 over names, dtypes, shapes and bytes of all model inputs, in order.
    """

    source: str
    samples: int
    seed: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def find_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        DataError: there is none.
    """
    if name not in PRESETS:
        raise DataError(
            f"dataset {name!r} is not a preset; presets: {', '.join(sorted(PRESETS))}. "
            "For your own data pass a list of dicts with image, question and answer"
        )
    return PRESETS[name]
