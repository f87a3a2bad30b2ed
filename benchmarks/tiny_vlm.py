"""The bundled model and its questions, for benchmarks to share."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from optimum_qvlm import QVLMConfig
from optimum_qvlm.data.loader import Batch, LoaderOptions, make_labelled_batches
from optimum_qvlm.data.sample import read_sample
from optimum_qvlm.evaluation.fidelity import answer_logits

MODEL = Path(__file__).parent.parent / "examples" / "tiny_vlm"
sys.path.insert(0, str(MODEL))

from outliers import add_outliers  # noqa: E402
from questions import make_samples  # noqa: E402

__all__ = ["MODEL", "held_out", "make_samples", "quantized_logits", "share", "variant_folder"]


def quantized_logits(folder: Path, config: QVLMConfig, batches: list[Batch], device: str) -> list[Tensor]:
    """Quantize a model and run it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, device_map=device)
    return answer_logits(model, batches)


def held_out(samples: list[dict[str, Any]], folder: Path) -> list[Batch]:
    """Batches of held-out questions with labelled answers."""
    processor = AutoProcessor.from_pretrained(folder)
    options = LoaderOptions(num_samples=len(samples), batch_size=50, max_length=2048, seed=0)
    records = [read_sample(sample, "question") for sample in samples]
    return make_labelled_batches(records, processor, options)


def variant_folder(variant: str, scratch: Path) -> Path:
    """The bundled model, or its outlier variant written to a scratch folder."""
    if variant == "plain":
        return MODEL
    folder = scratch / variant
    add_outliers(AutoModelForImageTextToText.from_pretrained(MODEL)).save_pretrained(folder)
    AutoProcessor.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def share(right: list[bool]) -> float:
    """Part of the answers that are right, in 0..1."""
    return sum(right) / len(right)
