"""The three tables of `evidence.py`: the proxy, partitions, and the ablation. Each yields lines and fills a record."""

import copy
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.intervals import of_correlation, of_mean
from benchmarks.method.proxies import all_proxies
from benchmarks.method.subjects import Quantized, Subject
from benchmarks.method.workers import in_turn
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from optimum_qvlm.pipeline.capture import first_tensor
from optimum_qvlm.pipeline.dependency import EntropyOptions
from optimum_qvlm.plan import Block, PlannedPart, QuantPlan
from optimum_qvlm.search.partition import partition

SAMPLED_TOKENS = 256

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two consecutive layers on one sample: what searching them together gained, and what each proxy said."""

    sample: int
    part: str
    layer: int
    gain: float
    before: float
    proxies: dict[str, float]


def measure_pairs(subject: Subject, number: int, scheme: str) -> list[Pair]:
    """Every pair of layers on one sample alone, both the search and the proxies."""
    config = subject.config(scheme)
    plan = subject.plan(config)
    nearest = copy.deepcopy(subject.full)
    calibrate(nearest, plan, replace(config.options(), method="rtn"), None, torch.device(subject.device))
    options = EntropyOptions.of(plan, "step_squared", SAMPLED_TOKENS, 0)
    data = subject.data(batch=1)
    batch = data.batches[number]
    alone = CalibrationData(batches=[batch], recipe=data.recipe, labels=data.labels[number : number + 1])
    outputs = layer_outputs(nearest, plan, batch)
    pairs = []
    for shift in (0, 1):
        _, result, _ = subject.calibrated(config, alone, pairs_from(plan, shift))
        for error in result.joint:
            block = error.block
            if block.first == block.last:
                continue
            first, second = outputs[block.part][block.first], outputs[block.part][block.last]
            said = {name: proxy(first, second) for name, proxy in all_proxies(options).items()}
            change = float((second - first).norm() / first.norm())
            pairs.append(
                Pair(
                    sample=number,
                    part=block.part,
                    layer=block.first,
                    gain=error.before - error.after,
                    before=error.before,
                    proxies={**said, "error before": error.before, "change by the layer": change},
                )
            )
    return pairs


def pairs_from(plan: QuantPlan, shift: int) -> tuple[Block, ...]:
    """Blocks of two layers from layer `shift` on; what is left over is alone."""
    blocks = []
    for part in plan.parts:
        count = len(part.layers)
        starts = [*range(min(shift, count)), *range(shift, count, 2)]
        ends = [*starts[1:], count]
        blocks += [Block(part=part.name, first=a, last=b - 1) for a, b in zip(starts, ends, strict=True)]
    return tuple(blocks)


def layer_outputs(model: Any, plan: QuantPlan, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Real tokens [tokens, channels] that each layer of each part returns."""
    device = next(model.parameters()).device
    seen: dict[str, list[Tensor]] = {part.name: [] for part in plan.parts}
    handles = []
    for part in plan.parts:
        for layer in part.layers:
            handles.append(model.get_submodule(layer.path).register_forward_hook(_keeper(seen[part.name])))
    with torch.no_grad():
        model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def _keeper(kept: list[Tensor]) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = first_tensor(output)
        flat = hidden.reshape(-1, hidden.shape[-1])
        generator = torch.Generator().manual_seed(0)
        kept.append(flat[torch.randperm(flat.shape[0], generator=generator)[:SAMPLED_TOKENS]])

    return keep


def proxy_table(subject: Subject, scheme: str, samples: int, workers: int, record: Record) -> Iterator[str]:
    """Correlation of each proxy with the gain of the joint search, over samples and layers."""
    pairs = [pair for found in in_turn(measure_pairs, subject, range(samples), workers, scheme) for pair in found]
    record["pairs"] = [
        {"sample": p.sample, "part": p.part, "layer": p.layer, "gain": p.gain, "before": p.before, **p.proxies}
        for p in pairs
    ]
    layers = sorted({(p.part, p.layer) for p in pairs})
    yield f"{subject.name} {scheme}: {len(pairs)} pairs, {samples} samples, {len(layers)} pairs of layers"
    yield f"{'proxy':22} {'Pearson, 95 %':>26} {'Spearman, 95 %':>26} {'between layers':>15} {'within a layer':>26}"
    gain, clusters = torch.tensor([p.gain for p in pairs]), torch.tensor([p.sample for p in pairs])
    record["correlations"] = {}
    for name in pairs[0].proxies:
        said = torch.tensor([p.proxies[name] for p in pairs])
        places = torch.tensor([layers.index((p.part, p.layer)) for p in pairs])
        means = [torch.stack([x[places == n].mean() for n in range(len(layers))]) for x in (said, gain)]
        centred = [x - m[places] for x, m in zip((said, gain), means, strict=True)]
        found = {
            "pearson": of_correlation(said, gain, ranks=False, clusters=clusters),
            "spearman": of_correlation(said, gain, ranks=True, clusters=clusters),
            "between": of_correlation(*means, ranks=True),
            "within": of_correlation(centred[0], centred[1], ranks=True, clusters=clusters),
        }
        record["correlations"][name] = {kind: [i.value, i.low, i.high] for kind, i in found.items()}
        yield (
            f"{name:22} {found['pearson'].text():>26} {found['spearman'].text():>26} "
            f"{found['between'].value:>+15.2f} {found['within'].text():>26}"
        )


def partition_table(
    subject: Subject, scheme: str, seeds: int, draws: int, workers: int, record: Record
) -> Iterator[str]:
    """Error and cost at depths 1 to 4, and for other partitions at depth 3, against that by entropy."""
    sizes = subject.sizes
    yield f"{subject.name} {scheme}: {sizes.samples} samples, {seeds} seeds, {sizes.questions} questions"
    yield (
        f"{'partition':12} {'blocks':>7} {'final error':>12} {'KL':>9} {'KL to entropy, 95 %':>36} "
        f"{'layer passes':>13} {'seconds':>8}"
    )
    runs: dict[str, list[Quantized]] = {}
    for found in in_turn(partitioned, subject, range(seeds), workers, scheme, draws):
        for name, run in found.items():
            runs.setdefault(name, []).append(run)
    base = torch.stack([run.kl for run in runs["entropy 3"]]).mean(0)
    for name, alike in runs.items():
        kl = torch.stack([run.kl for run in alike]).mean(0)
        cells = {
            "blocks": mean(len(run.result.plan.blocks) for run in alike),
            "final_error": mean(run.final_error for run in alike),
            "kl": float(kl.mean()),
            "kl_of_seeds": [float(run.kl.mean()) for run in alike],
            "layer_passes": mean(run.layer_forwards() for run in alike),
            "seconds": mean(run.seconds for run in alike),
        }
        gain = of_mean(kl - base)
        record[name] = {**cells, "kl_to_entropy": [gain.value, gain.low, gain.high]}
        yield (
            f"{name:12} {cells['blocks']:7.1f} {cells['final_error']:12.5f} {cells['kl']:9.5f} "
            f"{'' if name == 'entropy 3' else gain.text(5):>36} {cells['layer_passes']:13.1f} {cells['seconds']:8.1f}"
        )


def partitioned(subject: Subject, seed: int, scheme: str, draws: int) -> dict[str, Quantized]:
    """What each partition that is compared leads to, with one calibration set. Each is told on stderr when done."""
    data = subject.data(seed)
    runs: dict[str, Quantized] = {}

    def run(name: str, depth: int, blocks: tuple[Block, ...] | None = None) -> None:
        config = subject.config(scheme, search={"max_block_depth": depth}, seed=seed)
        runs[name] = found = subject.quantized(config, data, blocks)
        cells = f"KL {float(found.kl.mean()):.5f}, {found.seconds:.0f} s"
        print(f"seed {seed}, {name}: {cells}", file=sys.stderr, flush=True)

    for depth in (1, 2, 3, 4):
        run(f"entropy {depth}", depth)
    plan = runs["entropy 3"].result.plan
    errors = {p.name: [e.error for e in runs["entropy 1"].result.layers if e.part == p.name] for p in plan.parts}
    run("error", 3, by_error(plan.parts, errors))
    for draw in range(draws):
        run(f"random {draw}" if draws > 1 else "random", 3, shuffled(plan.parts, plan, seed * 100 + draw))
    run("fixed", 3, tuple(block for part in plan.parts for block in tiles(part, 3)))
    return runs


def by_error(parts: Sequence[PlannedPart], errors: dict[str, list[float]]) -> tuple[Block, ...]:
    """As by entropy, with the error that each layer adds in place of dependency."""
    added = {name: [max(b - a, 0.0) for a, b in pairwise(e)] for name, e in errors.items()}
    flat = sorted(value for values in added.values() for value in values)
    threshold = flat[len(flat) // 2] if flat else 0.0
    return tuple(
        block for part in parts for block in partition(part.name, len(part.layers), added[part.name], threshold, 3)
    )


def shuffled(parts: Sequence[PlannedPart], plan: QuantPlan, seed: int) -> tuple[Block, ...]:
    """The block sizes of a plan in random order."""
    rng, blocks = random.Random(seed), []
    for part in parts:
        sizes = [block.last - block.first + 1 for block in plan.blocks if block.part == part.name]
        rng.shuffle(sizes)
        first = 0
        for size in sizes:
            blocks.append(Block(part=part.name, first=first, last=first + size - 1))
            first += size
    return tuple(blocks)


def tiles(part: PlannedPart, depth: int) -> list[Block]:
    """Blocks of `depth` layers from the first on."""
    count = len(part.layers)
    return [Block(part=part.name, first=n, last=min(n + depth, count) - 1) for n in range(0, count, depth)]


def ablation_table(subject: Subject, scheme: str, seeds: int, encoder: dict[str, Any], record: Record) -> Iterator[str]:
    """Baseline, dependency alone, encoder step alone, both; paired by question, over seeds."""
    rows: dict[str, dict[str, Any]] = {
        "baseline": {"search": {"max_block_depth": 1}},
        "+ dependency": {"search": {"max_block_depth": 3}},
        "+ encoder": {"search": {"max_block_depth": 1}, "encoder": encoder},
        "both": {"search": {"max_block_depth": 3}, "encoder": encoder},
    }
    sizes = subject.sizes
    yield f"{subject.name} {scheme}: {sizes.samples} samples, {seeds} seeds, {sizes.questions} questions"
    yield (
        f"{'':13} {'accuracy':>9} {'to baseline, 95 %':>26} {'KL':>9} {'to baseline, 95 %':>33} "
        f"{'depth':>17} {'passes':>7} {'seconds':>8}"
    )
    base: dict[str, Tensor] = {}
    for name, settings in rows.items():
        runs = [
            subject.quantized(subject.config(scheme, seed=seed, **settings), subject.data(seed))
            for seed in range(seeds)
        ]
        right = 100 * torch.stack([run.right for run in runs]).mean(0)
        kl = torch.stack([run.kl for run in runs]).mean(0)
        base = base or {"right": right, "kl": kl}
        gain, less = of_mean(right - base["right"]), of_mean(kl - base["kl"])
        steps = [run.result.encoder for run in runs if run.result.encoder is not None]
        depths = [mean(values) for values in zip(*(step.mean_depths for step in steps), strict=True)]
        depths = depths or [mean(run.result.plan.mean_depth("language") for run in runs)]
        record[name] = {
            "accuracy": float(right.mean()),
            "accuracy_gain": [gain.value, gain.low, gain.high],
            "kl": float(kl.mean()),
            "kl_change": [less.value, less.low, less.high],
            "mean_depths": depths,
            "layer_passes": mean(run.layer_forwards("language") for run in runs),
            "seconds": mean(run.seconds for run in runs),
            "losses": [step.to_dict()["losses"] for step in steps],
        }
        first = name == "baseline"
        yield (
            f"{name:13} {float(right.mean()):8.2f}% {'' if first else gain.text():>26} {float(kl.mean()):9.5f} "
            f"{'' if first else less.text(5):>33} {' > '.join(f'{d:.2f}' for d in depths):>17} "
            f"{record[name]['layer_passes']:7.1f} {record[name]['seconds']:8.1f}"
        )


def mean(values: Any) -> float:
    """Of any numbers; NaN where there are none."""
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
