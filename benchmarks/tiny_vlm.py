"""Accuracy and fidelity of the bundled model under each scheme, against full precision and round-to-nearest.

Both variants of the model, several calibration seeds, one set of held-out questions. Differences in accuracy to
round-to-nearest are paired by question; their interval is a bootstrap over questions of the mean over seeds.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from optimum_qvlm import QVLMConfig
from optimum_qvlm.data.loader import Batch, LoaderOptions, make_labelled_batches
from optimum_qvlm.data.sample import read_sample
from optimum_qvlm.report.fidelity import answer_logits, compare, right_answers

MODEL = Path(__file__).parent.parent / "examples" / "tiny_vlm"
sys.path.insert(0, str(MODEL))

from outliers import add_outliers  # noqa: E402
from questions import make_samples  # noqa: E402

RESAMPLES = 2000


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", default=["w4a8", "w4a4"])
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds 0..N-1")
    parser.add_argument("--questions", type=int, default=4000)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    samples = make_samples("heldout", arguments.questions, 0)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for variant in ("plain", "outlier"):
            folder = variant_folder(variant, Path(scratch))
            batches = held_out(samples, folder)
            lines += compare_schemes(variant, folder, batches, arguments)
    print(f"{'model':8} {'scheme':7} {'method':7} {'accuracy':>9} {'to rtn, 95 %':>24} {'KL':>8} {'agreement':>10}")
    print("\n".join(lines))


def compare_schemes(variant: str, folder: Path, batches: list[Batch], arguments: argparse.Namespace) -> list[str]:
    """Lines of the table for one variant."""
    full = AutoModelForImageTextToText.from_pretrained(folder, device_map=arguments.device)
    reference = answer_logits(full, batches)
    lines = [f"{variant:8} {'full':7} {'':7} {100 * share(right_answers(reference, batches)):8.2f}%"]
    for scheme in arguments.schemes:
        nearest = quantized_logits(folder, QVLMConfig(scheme, method="rtn"), batches, arguments.device)
        nearest_right = torch.tensor(right_answers(nearest, batches)).double()
        lines.append(table_line(variant, scheme, "rtn", [nearest], reference, batches, None))
        runs = []
        for seed in range(arguments.seeds):
            config = QVLMConfig(scheme, dataset=make_samples("train", 64, seed), seed=seed)
            runs.append(quantized_logits(folder, config, batches, arguments.device))
        lines.append(table_line(variant, scheme, "qvlm", runs, reference, batches, nearest_right))
    return lines


def table_line(
    variant: str,
    scheme: str,
    method: str,
    runs: list[list[Tensor]],
    reference: list[Tensor],
    batches: list[Batch],
    nearest: Tensor | None,
) -> str:
    """Means over seeds, with the paired difference to round-to-nearest."""
    right = torch.tensor([right_answers(run, batches) for run in runs]).double().mean(dim=0)
    close = [compare(reference, run) for run in runs]
    gain = "" if nearest is None else "{:+.2f} ({:+.2f} .. {:+.2f})".format(*interval(100 * (right - nearest)))
    kl = sum(c.mean_kl for c in close) / len(close)
    agreement = sum(c.top1_agreement for c in close) / len(close)
    accuracy = 100 * float(right.mean())
    return f"{variant:8} {scheme:7} {method:7} {accuracy:8.2f}% {gain:>24} {kl:8.4f} {100 * agreement:9.2f}%"


def interval(differences: Tensor) -> Iterator[float]:
    """Mean, and the 95 % bootstrap interval of the mean over questions."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(differences), (RESAMPLES, len(differences)), generator=generator)
    means = differences[drawn].mean(dim=1)
    yield float(differences.mean())
    yield float(means.quantile(0.025))
    yield float(means.quantile(0.975))


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


if __name__ == "__main__":
    main()
