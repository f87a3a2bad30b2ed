"""The packaged calibration set against samples of the task itself, on both variants of the tiny VLM.

Held-out divergence from full precision and right answers, for round-to-nearest, for the packaged samples that are used
where no dataset is given, and for 64 samples of the training questions.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from benchmarks import tiny_vlm
from optimum_qvlm import QVLMConfig
from optimum_qvlm.evaluation.fidelity import answer_logits, compare, right_answers


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=("plain", "outlier"), default=["plain", "outlier"])
    parser.add_argument("--schemes", nargs="+", default=["w4a8", "w4a4"])
    parser.add_argument("--questions", type=int, default=1000, help="held out")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    samples = tiny_vlm.make_samples("heldout", arguments.questions, 0)
    data: dict[str, dict[str, Any]] = {
        "rtn": {"method": "rtn"},
        "packaged": {},
        "in-domain": {"dataset": tiny_vlm.make_samples("train", 64, 0)},
    }
    print(f"{'model':8} {'scheme':7} {'calibrated on':14} {'accuracy':>9} {'KL':>8} {'agreement':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        for variant in arguments.variants:
            folder = tiny_vlm.variant_folder(variant, Path(scratch))
            batches = tiny_vlm.held_out(samples, folder)
            reference = answer_logits(AutoModelForImageTextToText.from_pretrained(folder), batches)
            print(f"{variant:8} {'full':7} {'':14} {accuracy(reference, batches):8.2f}%", flush=True)
            for scheme in arguments.schemes:
                for name, settings in data.items():
                    found = tiny_vlm.quantized_logits(folder, QVLMConfig(scheme, **settings), batches, "cpu")
                    close = compare(reference, found)
                    print(
                        f"{variant:8} {scheme:7} {name:14} {accuracy(found, batches):8.2f}% {close.mean_kl:8.4f} "
                        f"{100 * close.top1_agreement:9.2f}%",
                        flush=True,
                    )


def accuracy(logits: list[Any], batches: list[Any]) -> float:
    """Answers that are right, in percent."""
    return 100 * tiny_vlm.share(right_answers(logits, batches))


if __name__ == "__main__":
    main()
