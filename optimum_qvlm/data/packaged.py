"""The packaged calibration set, used where the user passes none."""

import json
from importlib.resources import as_file, files

from optimum_qvlm.data.sample import Sample, open_image

FOLDER = files("optimum_qvlm.data") / "default"


def image_samples() -> list[Sample]:
    """Image, question and answer triples: photographs, charts, rendered text and documents."""
    samples = []
    for number, record in enumerate(_records("samples.jsonl")):
        with as_file(FOLDER / record["image"]) as path:
            image = open_image(path, f"packaged sample {number}")
        content = [{"type": "image", "image": image}, {"type": "text", "text": record["question"]}]
        samples.append(Sample(messages=({"role": "user", "content": content},), answer=record["answer"]))
    return samples


def text_samples() -> list[Sample]:
    """Text passages for models without vision."""
    return [Sample(text=record["text"]) for record in _records("passages.jsonl")]


def _records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines() if line.strip()]
