"""The packaged calibration set, used where the user passes none."""

import json
from importlib.resources import files

from optimum_qvlm.data.picture import read_picture
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.errors import DataError

FOLDER = files("optimum_qvlm.data") / "default"


def image_samples() -> list[Sample]:
    """Image, question and answer triples: photographs, charts, rendered text and documents."""
    samples = []
    for number, record in enumerate(_records("samples.jsonl")):
        where = f"packaged sample {number}"
        content = [
            {"type": "image", "image": read_picture(_content(record["image"], where), where)},
            {"type": "text", "text": record["question"]},
        ]
        samples.append(Sample(messages=({"role": "user", "content": content},), answer=record["answer"], where=where))
    return samples


def text_samples() -> list[Sample]:
    """Text passages for models without vision."""
    records = enumerate(_records("passages.jsonl"))
    return [Sample(text=record["text"], where=f"packaged passage {number}") for number, record in records]


def _records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines() if line.strip()]


def _content(name: str, where: str) -> bytes:
    """The bytes of an image file, which may lie in an archive."""
    try:
        return (FOLDER / name).read_bytes()
    except OSError as error:
        raise DataError(f"{where}: the image {name} cannot be read ({error}); install the package again") from error
