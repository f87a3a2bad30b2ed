"""What each scheme and method costs in quality, and what calibration costs in time.

    python -m benchmarks.quality.schemes --model smollm2 --schemes w4a8 w4a4 --methods rtn qvlm --json quality.json

Every number is measured beside full precision in the same run, on samples that calibration did not see. A method may be
followed by what it is to do without, as in `qvlm-transforms` or `qvlm-effort-freedom`: without `online` only transforms
that norms take up are left, without `freedom` scales are multiples of one step per row, without `data` the packaged
samples calibrate. Calibration time is a multiple of one full-precision pass over the calibration set, loading included.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

from benchmarks import smollm2
from benchmarks.intervals import of_mean
from benchmarks.measures import perplexity
from benchmarks.timing import clock_of
from benchmarks.tiny_vlm import HELD_OUT_ROWS, labelled, make_samples, variant_folder
from optimum_qvlm import QVLMConfig
from optimum_qvlm.data.loader import Batch
from optimum_qvlm.evaluation.fidelity import answer_logits, compare, right_answers

SAMPLES = 16
ROWS = 8
CHUNK_ROWS = 4
WITHOUT: dict[str, dict[str, Any]] = {
    "transforms": {"transforms": "off"},
    "equalization": {"transforms": "rotate"},
    "rotation": {"transforms": "equalize"},
    "online": {"servable": True},
    "feedback": {"error_feedback": False},
    "effort": {"effort": "fast"},
    "freedom": {"two_level_scales": True},
    "data": {"dataset": None},
}
"""Settings that leave one ingredient out of the method before the dash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One scheme, method and calibration seed.

    `passes` is calibration time in full-precision passes: processor time of both on the CPU, where other programs may
    run, the clock's elsewhere.
    """

    model: str
    scheme: str
    method: str
    seed: int
    perplexity: float
    ratio: float
    kl: float
    agreement: float
    accuracy: float | None
    seconds: float
    passes: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Case:
    """One seed's model, calibration set and held-out batches."""

    name: str
    folder: Path
    load: Callable[..., Any]
    calibration: Any
    held_out: list[Batch]
    pass_over: list[Batch]
    settings: dict[str, Any]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny_vlm", "tiny_vlm_outlier", "smollm2"), default="tiny_vlm")
    parser.add_argument("--schemes", nargs="+", default=["w4a8", "w4a4"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "qvlm"], help="rtn, paper, qvlm or qvlm-INGREDIENT-...")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tuning", action="store_true", help="draw from the text that nothing is reported on, smollm2")
    parser.add_argument("--questions", type=int, default=4000, help="held-out questions of the tiny model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for all single results")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    settings = {method: method_settings(method) for method in arguments.methods}
    results: list[Result] = []
    right: dict[tuple[str, str], list[Tensor]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        make_case = prepare(arguments, Path(scratch))
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            run_seed(make_case(seed), seed, arguments.schemes, settings, results, right)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print_table(results, right)


def method_settings(method: str) -> dict[str, Any]:
    """Arguments of `QVLMConfig` for a method's name.

    Raises:
        SystemExit: this release has no such method or ingredient.
    """
    name, *without = method.split("-")
    changes: dict[str, Any] = {}
    for ingredient in without:
        if ingredient not in WITHOUT:
            raise SystemExit(f"{method}: {ingredient!r} is no ingredient; use one of {', '.join(WITHOUT)}")
        changes |= WITHOUT[ingredient]
    if name == "paper":
        return {"preset": "paper"} | changes
    if name not in ("rtn", "qvlm"):
        raise SystemExit(f"{method}: unknown method; use rtn, paper or qvlm")
    return {"method": name} | changes


def prepare(arguments: argparse.Namespace, scratch: Path) -> Callable[[int], Case]:
    """What makes the case of a seed, with the model written once."""
    if arguments.model == "smollm2":
        folder = smollm2.write_checkpoint(scratch / "smollm2")

        def text_case(seed: int) -> Case:
            text = smollm2.read_text(
                folder,
                calibration_chunks=SAMPLES,
                held_out_chunks=SAMPLES,
                seed=seed,
                tuning=arguments.tuning,
            )
            batches = [stacked(text.calibration[i : i + CHUNK_ROWS]) for i in range(0, SAMPLES, CHUNK_ROWS)]
            settings = {"group_size": 64, "num_samples": SAMPLES}
            load = partial(AutoModelForCausalLM.from_pretrained, device_map=arguments.device)
            return Case("smollm2", folder, load, batches, text.held_out, batches, settings)

        return text_case
    folder = variant_folder("outlier" if arguments.model == "tiny_vlm_outlier" else "plain", scratch)
    held_out = labelled(make_samples("heldout", arguments.questions, 0), folder, HELD_OUT_ROWS)

    def image_case(seed: int) -> Case:
        samples = make_samples("train", 64, seed)
        load = partial(AutoModelForImageTextToText.from_pretrained, device_map=arguments.device)
        return Case(arguments.model, folder, load, samples, held_out, labelled(samples, folder, ROWS), {})

    return image_case


def stacked(batches: list[Batch]) -> Batch:
    """Chunks of one length as rows of one batch."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def run_seed(
    case: Case,
    seed: int,
    schemes: list[str],
    methods: dict[str, dict[str, Any]],
    results: list[Result],
    right: dict[tuple[str, str], list[Tensor]],
) -> None:
    """Full precision, then every scheme and method; appends to `results` and `right`."""
    full = case.load(case.folder).eval()
    reference = answer_logits(full, case.held_out)
    wanted = perplexity(reference, case.held_out)
    pass_seconds = full_precision_pass(full, case.pass_over)
    del full
    print(f"{case.name} seed {seed}: full precision {wanted:.4f}, one pass {pass_seconds:.2f} s", flush=True)
    for scheme in schemes:
        for method, settings in methods.items():
            config = configure(scheme, settings, case, seed)
            started = time.process_time()
            model = case.load(case.folder, quantization_config=config).eval()
            spent = time.process_time() - started
            logits = answer_logits(model, case.held_out)
            found = perplexity(logits, case.held_out)
            close = compare(reference, logits)
            answers = right_answers(logits, case.held_out)
            seconds = model.hf_quantizer.report["seconds"]
            on_cpu = model.device.type == "cpu"
            result = Result(
                model=case.name,
                scheme=scheme,
                method=method,
                seed=seed,
                perplexity=found,
                ratio=found / wanted,
                kl=close.mean_kl,
                agreement=close.top1_agreement,
                accuracy=None if case.name == "smollm2" else sum(answers) / len(answers),
                seconds=seconds,
                passes=(spent if on_cpu else seconds) / pass_seconds,
                peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )
            results.append(result)
            right.setdefault((scheme, method), []).append(torch.tensor(answers).double())
            print(f"{scheme} {method}: {result.ratio:.4f}, {result.passes:.1f} passes", flush=True)


def configure(scheme: str, settings: dict[str, Any], case: Case, seed: int) -> QVLMConfig:
    """The configuration of one run."""
    values = case.settings | {name: value for name, value in settings.items() if name != "preset"} | {"seed": seed}
    if settings.get("method") != "rtn":
        values.setdefault("dataset", case.calibration)
    if settings.get("preset") == "paper":
        return QVLMConfig.paper(**(values | {"scheme": scheme, "vision_scheme": scheme}))
    return QVLMConfig(scheme, **values)


def full_precision_pass(model: Any, batches: list[Batch]) -> float:
    """Seconds of one forward over the calibration set, the second of two; processor time on the CPU."""
    clock = clock_of(model.device, cpu_time=True)
    for _ in range(2):
        started = clock()
        with torch.inference_mode():
            for batch in batches:
                inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
                model(**inputs, use_cache=False)
        seconds = clock() - started
    return seconds


def print_table(results: list[Result], right: dict[tuple[str, str], list[Tensor]]) -> None:
    """Means over seeds, spread where there are several, accuracy with its paired interval to round-to-nearest."""
    head = f"{'scheme':7} {'method':20} {'ratio':>16} {'KL':>9} {'agreement':>10}"
    print(f"{head} {'accuracy to rtn, 95 %':>31} {'passes':>7}")
    for scheme, method in right:
        rows = [r for r in results if (r.scheme, r.method) == (scheme, method)]
        ratios = [r.ratio for r in rows]
        spread = f"+-{stdev(ratios):.4f}" if len(ratios) > 1 else ""
        accuracy = ""
        if rows[0].accuracy is not None:
            accuracy = f"{100 * mean(float(r.accuracy or 0) for r in rows):.2f}%"
            if (scheme, "rtn") in right and method != "rtn":
                difference = torch.stack(right[scheme, method]).mean(0) - torch.stack(right[scheme, "rtn"]).mean(0)
                accuracy += f" {of_mean(100 * difference).text()}"
        print(
            f"{scheme:7} {method:20} {mean(ratios):8.4f}{spread:>8} {mean(r.kl for r in rows):9.5f} "
            f"{100 * mean(r.agreement for r in rows):9.2f}% {accuracy:>31} {mean(r.passes for r in rows):7.1f}"
        )
    print(f"peak memory {max(r.peak_bytes for r in results) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
