"""Layer-wise search against joint search of blocks of up to 1, 2 and 3 layers, on the tiny VLM and on real weights.

Per run: the mean over blocks of the error that the joint search starts from and ends at, the error of the last layer,
held-out divergence from full precision, and the processor time of the whole calibration, loading included, in seconds
and in full-precision passes over the calibration set. Processor time, since wall-clock time on a shared machine says
little; so run it on one thread.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from benchmarks import smollm2, tiny_vlm
from optimum_qvlm import QVLMConfig
from optimum_qvlm.data.loader import LoaderOptions, make_labelled_batches
from optimum_qvlm.data.sample import read_sample
from optimum_qvlm.evaluation.fidelity import answer_logits, compare

SEARCHES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "layerwise": {"method": "layerwise"},
    "depth 1": {"max_block_depth": 1},
    "depth 2": {"max_block_depth": 2},
    "depth 3": {"max_block_depth": 3},
}
HEADER = (
    f"{'model':9} {'scheme':7} {'search':10} {'blocks':>6} {'before':>9} {'after':>9} {'last':>9} {'KL':>8} "
    f"{'agreement':>9} {'seconds':>8} {'passes':>7}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to quantize, with the data that it is calibrated and compared on."""

    name: str
    folder: Path
    load: Callable[..., Any]
    dataset: list[Any]
    calibration: Sequence[dict[str, Tensor]]
    held_out: Sequence[dict[str, Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=("plain", "outlier", "smollm2"), default=["plain", "outlier"])
    parser.add_argument("--schemes", nargs="+", default=["w4a4"])
    parser.add_argument("--searches", nargs="+", choices=tuple(SEARCHES), default=list(SEARCHES))
    parser.add_argument("--paper", action="store_true", help="the paper's mode, with the bits of the scheme")
    parser.add_argument("--questions", type=int, default=1000, help="held out, tiny VLM")
    parser.add_argument("--chunks", type=int, default=16, help="to calibrate on, and as many held out, SmolLM2")
    parser.add_argument("--tokens", type=int, default=512, help="of a chunk")
    parser.add_argument("--layers", type=int, help="quantize only the first so many, SmolLM2; default: all")
    parser.add_argument("--tuning", action="store_true", help="compare on samples that nothing is reported on")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    print(HEADER)
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.models:
            compare_searches(subject(name, Path(scratch), arguments), arguments)


def subject(name: str, scratch: Path, arguments: argparse.Namespace) -> Subject:
    """The model of that name."""
    if name == "smollm2":
        folder = smollm2.write_checkpoint(scratch / name)
        text = smollm2.read_text(
            folder,
            calibration_chunks=arguments.chunks,
            held_out_chunks=arguments.chunks,
            tokens=arguments.tokens,
            tuning=arguments.tuning,
        )
        layers = AutoConfig.from_pretrained(folder).num_hidden_layers
        kept = [] if arguments.layers is None else [f"layers.{number}" for number in range(arguments.layers, layers)]
        return Subject(
            name=name,
            folder=folder,
            settings={"modules_to_not_convert": kept},
            load=AutoModelForCausalLM.from_pretrained,
            dataset=text.calibration,
            calibration=text.calibration,
            held_out=text.held_out,
        )
    folder = tiny_vlm.variant_folder(name, scratch)
    samples = tiny_vlm.make_samples("train", 64, 0)
    split, seed = ("train", 1000) if arguments.tuning else ("heldout", 0)
    questions = tiny_vlm.make_samples(split, arguments.questions, seed)
    options = LoaderOptions(num_samples=64, batch_size=8, max_length=2048, seed=0)
    records = [read_sample(sample, "question") for sample in samples]
    return Subject(
        name=name,
        folder=folder,
        load=AutoModelForImageTextToText.from_pretrained,
        dataset=samples,
        calibration=make_labelled_batches(records, AutoProcessor.from_pretrained(folder), options),
        held_out=tiny_vlm.held_out(questions, folder),
    )


def compare_searches(subject: Subject, arguments: argparse.Namespace) -> None:
    """Print a line for every scheme and search."""
    full = subject.load(subject.folder)
    reference = answer_logits(full, subject.held_out)
    one_pass = seconds_of_a_pass(full, subject.calibration)
    print(f"{subject.name}: one full-precision pass over the calibration set takes {one_pass:.2f} s", flush=True)
    for scheme in arguments.schemes:
        for name in arguments.searches:
            config = config_of(scheme, name, subject, paper=arguments.paper)
            if config is None:
                continue
            started = time.process_time()
            model = subject.load(subject.folder, quantization_config=config)
            seconds = time.process_time() - started
            report = model.hf_quantizer.report
            close = compare(reference, answer_logits(model, subject.held_out))
            joint = [block for block in report["blocks"] if "before" in block]
            last = report["layers"][-1]["error"] if report["layers"] else float("nan")
            print(
                f"{subject.name:9} {scheme:7} {name:10} {len(report['blocks']):6d} {mean(joint, 'before'):9.5f} "
                f"{mean(joint, 'after'):9.5f} {last:9.5f} {close.mean_kl:8.4f} {100 * close.top1_agreement:8.2f}% "
                f"{seconds:8.1f} {seconds / one_pass:7.1f}",
                flush=True,
            )


def config_of(scheme: str, search: str, subject: Subject, *, paper: bool) -> QVLMConfig | None:
    """The configuration of one run, None where the paper's mode has no such search."""
    data = {"dataset": subject.dataset, "num_samples": len(subject.dataset)}
    settings = SEARCHES[search] | subject.settings | data
    if not paper:
        return QVLMConfig(scheme, **settings)
    return None if search == "rtn" else QVLMConfig.paper(int(scheme[-1]), **settings)


def seconds_of_a_pass(model: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    """Processor time of the model's forward over all batches, the faster of two."""
    times = []
    for _ in range(2):
        started = time.process_time()
        with torch.inference_mode():
            for batch in batches:
                model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False)
        times.append(time.process_time() - started)
    return min(times)


def mean(blocks: Sequence[dict[str, Any]], field: str) -> float:
    """Over blocks; NaN where none was searched jointly."""
    return sum(block[field] for block in blocks) / len(blocks) if blocks else float("nan")


if __name__ == "__main__":
    main()
