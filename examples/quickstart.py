"""Quantize the bundled vision-language model, reload it in a fresh process, and compare it with full precision.

Two variants of one trained model: `plain`, and `outlier`, which computes the same function but has the outlier
channels that make large models hard to quantize. Both are quantized at w4a8 and w4a4, by plain rounding to nearest
and by this package, and asked held-out questions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from optimum_qvlm import QVLMConfig
from optimum_qvlm.data.loader import LoaderOptions, make_labelled_batches
from optimum_qvlm.data.sample import read_sample
from optimum_qvlm.evaluation.fidelity import answer_logits, compare, right_answers

MODEL = Path(__file__).parent / "tiny_vlm"
sys.path.insert(0, str(MODEL))

from evaluate import answer_questions  # noqa: E402
from outliers import add_outliers  # noqa: E402
from questions import make_samples  # noqa: E402

SCHEMES = ("w4a8", "w4a4")
HEADER = (
    f"{'model':8} {'scheme':7} {'on disk':>16} {'in memory':>16}   {'full':>6} {'rtn':>6} {'qvlm':>6}   "
    f"{'KL rtn':>8} {'KL qvlm':>8}   {'agree rtn':>9} {'agree qvlm':>10}   {'seconds':>7}"
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500, help="held-out questions to ask")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration samples")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--reference", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), Path(arguments.reference), arguments.questions)))
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for variant in ("plain", "outlier") for row in compare_variant(variant, Path(scratch), arguments)]
    print(f"\n{HEADER}\n" + "\n".join(rows))
    print(
        f"\n{arguments.questions} held-out questions. full, rtn, qvlm: accuracy in %. KL: mean divergence from full "
        "precision per answer token.\nagree: share of answer tokens with the same first choice. seconds: time that "
        f"qvlm took to calibrate. Took {time.perf_counter() - started:.0f} s."
    )


def compare_variant(variant: str, scratch: Path, arguments: argparse.Namespace) -> list[str]:
    """Rows of the table for one variant of the model."""
    folder, reference = MODEL, scratch / f"{variant}.safetensors"
    if variant == "outlier":
        folder = scratch / "outlier"
        add_outliers(AutoModelForImageTextToText.from_pretrained(MODEL)).save_pretrained(folder)
        AutoProcessor.from_pretrained(MODEL).save_pretrained(folder)
    full = in_fresh_process(folder, reference, arguments.questions)
    say(variant, "full precision", full)
    rows = []
    for scheme in SCHEMES:
        found = {}
        for method in ("rtn", "qvlm"):
            out = scratch / f"{variant}-{scheme}-{method}"
            seconds = quantize(folder, out, scheme, method, arguments.seed)
            found[method] = in_fresh_process(out, reference, arguments.questions) | {"seconds": seconds}
            say(variant, f"{scheme} by {method}", found[method])
        rows.append(table_row(variant, scheme, full, found))
    return rows


def say(variant: str, how: str, found: dict[str, Any]) -> None:
    """One line as soon as something is known."""
    print(f"{variant}, {how}: {found['accuracy']:.1f} % right. {found['spoken']}", flush=True)


def quantize(folder: Path, out: Path, scheme: str, method: str, seed: int) -> float:
    """Quantize and save a model. Returns seconds of calibration."""
    data = {} if method == "rtn" else {"dataset": make_samples("train", 64, seed), "seed": seed}
    config = QVLMConfig(scheme, method=method, **data)
    started = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    seconds = time.perf_counter() - started
    model.save_pretrained(out)
    return seconds


def in_fresh_process(folder: Path, reference: Path, questions: int) -> dict[str, Any]:
    """What `measure` finds when a new process loads the folder."""
    command = [sys.executable, __file__, "--measure", folder, "--reference", reference, "--questions", str(questions)]
    output = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure(folder: Path, reference: Path, questions: int) -> dict[str, Any]:
    """Accuracy, sizes, and fidelity to the logits in `reference`, which the first model to come writes.

    One forward over questions with their answers tells all of it: an answer is right where each of its tokens is the
    first choice, which is when greedy generation gives it.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    samples = make_samples("heldout", questions, 0)
    options = LoaderOptions(num_samples=questions, batch_size=50, max_length=2048, seed=0)
    records = [read_sample(sample, "question") for sample in samples]
    batches = make_labelled_batches(records, processor, options, (model.config.image_token_id,))
    logits = answer_logits(model, batches)
    right = right_answers(logits, batches)
    found: dict[str, Any] = {
        "accuracy": 100 * sum(right) / len(right),
        "disk": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "memory": model.get_memory_footprint(),
        "spoken": f"{samples[0]['question']} {answer_questions(model, processor, samples[:1])[0]}",
    }
    if reference.exists():
        wanted = load_file(reference)
        close = compare([wanted[str(number)] for number in range(len(wanted))], logits)
        found |= {"kl": close.mean_kl, "agreement": close.top1_agreement}
    else:
        save_file({str(number): values for number, values in enumerate(logits)}, reference)
    return found


def table_row(variant: str, scheme: str, full: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """One line under `HEADER`."""
    rtn, qvlm = found["rtn"], found["qvlm"]
    disk = f"{qvlm['disk'] / 1e6:.2f} MB ({full['disk'] / qvlm['disk']:.2f}x)"
    memory = f"{qvlm['memory'] / 1e6:.2f} MB ({full['memory'] / qvlm['memory']:.2f}x)"
    return (
        f"{variant:8} {scheme:7} {disk:>16} {memory:>16}   "
        f"{full['accuracy']:6.1f} {rtn['accuracy']:6.1f} {qvlm['accuracy']:6.1f}   "
        f"{rtn['kl']:8.4f} {qvlm['kl']:8.4f}   "
        f"{100 * rtn['agreement']:8.1f}% {100 * qvlm['agreement']:9.1f}%   {qvlm['seconds']:7.1f}"
    )


if __name__ == "__main__":
    main()
