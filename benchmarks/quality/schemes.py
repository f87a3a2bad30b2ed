"""What each scheme and method costs in quality, and what calibration costs in time.

    python -m benchmarks.quality.schemes --model smollm2 --schemes w4a8 w4a4 --methods rtn qvlm --json quality.json

Every number is measured beside full precision in the same run, on samples that calibration did not see. A method may be
followed by what it is to do without, as in `qvlm-transforms` or `qvlm-effort-freedom`: without `online` only transforms
that norms take up are left, without `freedom` scales are multiples of one step per row, without `data` the packaged
samples calibrate. Calibration time is a multiple of one full-precision pass over the calibration set, loading included.

`--text` names what smollm2 is calibrated and compared on: `texts.py` says where each comes from. Intervals are over
held-out chunks or questions. Judge by divergence: ratios of perplexity are noisy.
"""

import argparse
import itertools
import json
import math
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

from benchmarks import smollm2
from benchmarks.intervals import of_ratio
from benchmarks.measures import Rows, joined, perplexity, rows_of
from benchmarks.quality import texts
from benchmarks.timing import clock_of
from benchmarks.tiny_vlm import HELD_OUT_ROWS, labelled, make_samples, variant_folder
from optimum_qvlm import QVLMConfig
from optimum_qvlm.data.loader import Batch
from optimum_qvlm.evaluation.fidelity import answer_logits

SAMPLES = 16
ROWS = 8
CHUNK_ROWS = 4
WITHOUT: dict[str, dict[str, Any]] = {
    "transforms": {"search": {"transforms": "off"}},
    "equalization": {"search": {"transforms": "rotate"}},
    "rotation": {"search": {"transforms": "equalize"}},
    "online": {"servable": True},
    "feedback": {"search": {"error_feedback": False}},
    "weights": {"search": {"token_weights": False}},
    "effort": {"effort": "fast"},
    "freedom": {"two_level_scales": True},
    "data": {"dataset": None},
}
"""Settings that leave one ingredient out of the method before the dash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One scheme, method and calibration seed.

    `passes` is calibration time in full-precision passes, processor time of both on the CPU, where other programs may
    run, the clock's elsewhere. `rows` are the held-out chunks or questions.
    """

    model: str
    scheme: str
    method: str
    seed: int
    seconds: float
    passes: float
    peak_bytes: int
    rows: Rows

    def record(self) -> dict[str, Any]:
        """As JSON."""
        means = {name: self.rows.share(name) for name in ("kl", "loss", "reference_loss", "agreed")}
        rows = {field.name: getattr(self.rows, field.name).tolist() for field in fields(self.rows)}
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rows"}
        return values | {"means": means, "rows": rows}


@dataclass(frozen=True, slots=True)
class Case:
    """One seed's model, so many samples to calibrate it on, and held-out batches, whose rows have numbers."""

    name: str
    folder: Path
    load: Callable[..., Any]
    calibration: Any
    held_out: list[Batch]
    numbers: Tensor
    samples: int
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
    parser.add_argument("--tuning", action="store_true", help="draw from the part of the text kept for tuning")
    parser.add_argument("--text", choices=list(texts.TEXTS), default="topics", help="what smollm2 reads")
    parser.add_argument("--texts", type=Path, default=texts.FOLDER, help="folder with the Debian packages of texts")
    parser.add_argument("--held-out", type=int, default=SAMPLES, help="chunks that smollm2 is compared on, per seed")
    parser.add_argument("--tokens", type=int, default=512, help="of a chunk")
    parser.add_argument("--against", default="rtn", help="method that the others are compared with")
    parser.add_argument("--questions", type=int, default=4000, help="held-out questions of the tiny model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for all single results")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    settings = {method: method_settings(method) for method in arguments.methods}
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        make_case = prepare(arguments, Path(scratch))
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for result in run_seed(make_case(seed), seed, arguments.schemes, settings, arguments.device):
                results.append(result)
                if arguments.json is not None:
                    arguments.json.write_text(json.dumps([one.record() for one in results]))
    print_table(results, arguments.against)


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
        for setting, value in WITHOUT[ingredient].items():
            changes[setting] = {**changes.get(setting, {}), **value} if isinstance(value, dict) else value
    if name == "paper":
        return {"preset": "paper"} | changes
    if name not in ("rtn", "qvlm"):
        raise SystemExit(f"{method}: unknown method; use rtn, paper or qvlm")
    return {"method": name} | changes


def prepare(arguments: argparse.Namespace, scratch: Path) -> Callable[[int], Case]:
    """What makes the case of a seed, with the model written once."""
    if arguments.model == "smollm2":
        print(texts.described(arguments.text, arguments.texts), flush=True)
        folder = smollm2.write_checkpoint(scratch / "smollm2")
        chunked = texts.chunked(folder, arguments.text, folder=arguments.texts, tokens=arguments.tokens)

        def text_case(seed: int) -> Case:
            text = chunked.draw(SAMPLES, arguments.held_out, seed=seed, tuning=arguments.tuning)
            batches = [stacked(text.calibration[i : i + CHUNK_ROWS]) for i in range(0, SAMPLES, CHUNK_ROWS)]
            settings = {"group_size": 64}
            load = partial(AutoModelForCausalLM.from_pretrained, device_map=arguments.device)
            return Case("smollm2", folder, load, batches, text.held_out, text.numbers, SAMPLES, batches, settings)

        return text_case
    folder = variant_folder("outlier" if arguments.model == "tiny_vlm_outlier" else "plain", scratch)
    held_out = labelled(make_samples("heldout", arguments.questions, 0), folder, HELD_OUT_ROWS)

    def image_case(seed: int) -> Case:
        samples = make_samples("train", 64, seed)
        load = partial(AutoModelForImageTextToText.from_pretrained, device_map=arguments.device)
        numbers = torch.arange(arguments.questions)
        rows = labelled(samples, folder, ROWS)
        return Case(arguments.model, folder, load, samples, held_out, numbers, len(samples), rows, {})

    return image_case


def stacked(batches: list[Batch]) -> Batch:
    """Chunks of one length as rows of one batch."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def run_seed(
    case: Case, seed: int, schemes: list[str], methods: dict[str, dict[str, Any]], device: str
) -> Iterator[Result]:
    """Full precision, then every scheme and method."""
    full = case.load(case.folder).eval()
    reference = answer_logits(full, case.held_out)
    pass_seconds = full_precision_pass(full, case.pass_over)
    del full
    base = perplexity(reference, case.held_out)
    print(f"{case.name} seed {seed}: full precision {base:.4f}, one pass {pass_seconds:.2f} s", flush=True)
    clock = clock_of(device, cpu_time=True)
    for scheme, (method, settings) in itertools.product(schemes, methods.items()):
        started = clock()
        model = case.load(case.folder, quantization_config=configure(scheme, settings, case, seed)).eval()
        spent = clock() - started
        result = Result(
            model=case.name,
            scheme=scheme,
            method=method,
            seed=seed,
            seconds=model.hf_quantizer.report["seconds"],
            passes=spent / pass_seconds,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            rows=rows_of(model, reference, case.held_out, case.numbers),
        )
        del model
        print(f"{scheme} {method}: {result.rows.share('kl'):.5f}, {result.passes:.1f} passes", flush=True)
        yield result


def configure(scheme: str, settings: dict[str, Any], case: Case, seed: int) -> QVLMConfig:
    """The configuration of one run."""
    values = case.settings | {name: value for name, value in settings.items() if name != "preset"} | {"seed": seed}
    if settings.get("method") != "rtn":
        values = {"dataset": case.calibration, "num_samples": case.samples} | values
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


def print_table(results: list[Result], against: str) -> None:
    """Over all seeds and rows, with 95 % intervals over rows, of which all seeds of one row are drawn together."""
    head = f"{'scheme':7} {'method':20} {'perplexity to full, 95 %':>28} {'seeds':>7} {'KL, 95 %':>30}"
    print(f"{head} {f'KL to {against}, 95 %':>26} {'agreement':>9} {f'accuracy to {against}, 95 %':>31} {'passes':>6}")
    runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        runs.setdefault((result.scheme, result.method), []).append(result)
    for (scheme, method), several in runs.items():
        compared = None if method == against else runs.get((scheme, against))
        print(f"{scheme:7} {method:20} {line(several, compared)}")
    print(f"peak memory {max(result.peak_bytes for result in results) / 2**30:.2f} GiB")


def line(several: list[Result], against: list[Result] | None) -> str:
    """One scheme and method with all seeds, beside another method where there is one."""
    rows = joined([result.rows for result in several])
    ratio = of_ratio(rows.loss - rows.reference_loss, rows.tokens, rows.number).exp()
    ratios = [math.exp(result.rows.share("loss") - result.rows.share("reference_loss")) for result in several]
    spread = f"+-{stdev(ratios):.4f}" if len(ratios) > 1 else ""
    kl = of_ratio(rows.kl, rows.tokens, rows.number)
    to_kl = accuracy = ""
    if several[0].model != "smollm2":
        accuracy = f"{100 * float(rows.right.mean()):.2f}%"
    if against is not None:
        other = joined([result.rows for result in against])
        to_kl = of_ratio(rows.kl, other.kl, rows.number).text(3, sign="")
        if accuracy:
            difference = of_ratio(rows.right - other.right, torch.ones_like(rows.right), rows.number)
            accuracy += f" {difference.scaled(100).text()}"
    cells = f"{ratio.text(4, sign=''):>28} {spread:>7} {kl.text(5, sign=''):>30} {to_kl:>26}"
    return f"{cells} {100 * rows.share('agreed'):8.2f}% {accuracy:>31} {mean(r.passes for r in several):6.1f}"


if __name__ == "__main__":
    main()
