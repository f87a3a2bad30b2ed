"""The bundled model and its questions, for benchmarks to share."""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from optimum_qvlm.data.loader import Batch, LoaderOptions, make_labelled_batches
from optimum_qvlm.data.sample import read_sample

MODEL = Path(__file__).parent.parent / "examples" / "tiny_vlm"
sys.path.insert(0, str(MODEL))

from outliers import add_outliers  # noqa: E402
from questions import make_samples  # noqa: E402

__all__ = ["HELD_OUT_ROWS", "MODEL", "labelled", "make_samples", "variant_folder"]

HELD_OUT_ROWS = 50


def labelled(samples: list[dict[str, Any]], folder: Path, rows: int, seed: int = 0) -> list[Batch]:
    """Batches of `rows` questions with labelled answers."""
    options = LoaderOptions(num_samples=len(samples), batch_size=rows, max_length=2048, seed=seed)
    records = [read_sample(sample, "question") for sample in samples]
    return make_labelled_batches(records, AutoProcessor.from_pretrained(folder), options)


def variant_folder(variant: str, scratch: Path) -> Path:
    """The bundled model, or its outlier variant written to a scratch folder."""
    if variant == "plain":
        return MODEL
    folder = scratch / variant
    add_outliers(AutoModelForImageTextToText.from_pretrained(MODEL)).save_pretrained(folder)
    AutoProcessor.from_pretrained(MODEL).save_pretrained(folder)
    return folder
