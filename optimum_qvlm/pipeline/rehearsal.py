"""A small part of a calibration, run for real, to see that all of it would work and to estimate what it would cost."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.pipeline import checks
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from optimum_qvlm.pipeline.capture import Run, Tracer
from optimum_qvlm.pipeline.options import CalibrationOptions
from optimum_qvlm.pipeline.partitioning import form_blocks, make_chain
from optimum_qvlm.plan import Block, ModuleRecord, PlannedPart, QuantPlan
from optimum_qvlm.settings import EncoderOptions

COPIES = 4
"""How often the one sample is repeated at most, so that the search sees about as many tokens as it really would."""

FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a calibration is expected to take.

    Attributes:
        seconds: wall clock, without loading the model, rendering data and comparing held-out samples.
        answer_seconds: the part of it that goes into writing missing answers.
        host_bytes: the model, the hidden states of both chains and the arguments of all calls, on the CPU.
        device_bytes: the largest layer with the hidden states of a batch and the workspace of its largest site. On
            a CPU it comes on top of `host_bytes`.
    """

    seconds: float
    answer_seconds: float
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What was seen in one.

    Attributes:
        chain: relative difference of the layers, run alone on one sample, to the real forward, by part.
        modules: records of the linears that were searched, by disk name.
        plan: the plan with the blocks that this one sample gives; all samples may give others.
        rest: the same with the layers that were searched left without sites, to round the rest to nearest.
        cost: of the whole calibration.
    """

    chain: dict[str, float]
    modules: dict[str, ModuleRecord]
    plan: QuantPlan
    rest: QuantPlan
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The data that the calibration would use, and one sample of it.

    Attributes:
        sample: model inputs of one sample (of ready batches, the first that holds an image), on the CPU.
        batches: all of them.
        answer_seconds: estimate for the answers that are missing.
    """

    sample: Mapping[str, Tensor]
    batches: Sequence[Mapping[str, Tensor]] = field(default_factory=tuple)
    answer_seconds: float = 0.0

    @property
    def times(self) -> float:
        """How many times the tokens of the sample all batches hold, padding included."""
        return sum(batch["input_ids"].numel() for batch in self.batches) / self.sample["input_ids"].numel()


def rehearse(
    model: nn.Module, plan: QuantPlan, options: CalibrationOptions, workload: Workload, device: torch.device
) -> Rehearsal:
    """Run one sample through the model, make all checks, and search the first block of each part in place.

    Raises:
        CalibrationError, UnsupportedModelError: as the calibration would.
    """
    checks.require_sound_parameters(model, plan)
    tracer = Tracer.of(model, plan, device)
    captured = tracer.capture([workload.sample])
    chain, forward_seconds = {}, 0.0
    for part in plan.parts:
        started = time.perf_counter()
        chain[part.name] = checks.require_chain(model, part, captured[part.name][0], device)
        forward_seconds += time.perf_counter() - started
        for number, layer in enumerate(part.layers):
            checks.require_shared_inputs(model, layer, captured[part.name][0], number, device)
    checks.require_unused(tracer, plan.unused, captured, [workload.sample])
    if options.joint:
        batches = [workload.sample]
        chains = {p.name: make_chain(p, captured[p.name], batches, options, device) for p in plan.parts}
        plan = form_blocks(model, plan, chains, options)
    host_bytes = _held(captured.values()) * workload.times + _bytes(model)
    depth = max(block.last - block.first + 1 for block in plan.blocks)
    device_bytes = max(_layer_bytes(model, part, workload, options, depth) for part in plan.parts)

    first = _first_blocks(plan)
    tokens = workload.sample["input_ids"].numel()
    copies = min(COPIES, -(-options.search_tokens // tokens), max(1, round(workload.times)))
    data = CalibrationData(
        batches=[workload.sample] * copies, recipe=Recipe(source="", samples=0, seed=0, fingerprint="")
    )
    searching = replace(options, blocks=first.blocks, encoder=EncoderOptions(epochs=0))
    result = calibrate(model, first, searching, data, device)
    seconds = result.seconds * _elements(plan) / max(1, _elements(first))
    seconds += max(0.0, workload.times - copies) * forward_seconds * _passes(plan)
    seconds += workload.times * forward_seconds * _encoder_passes(options.encoder)
    return Rehearsal(
        chain=chain,
        modules=result.modules,
        plan=plan,
        rest=_without(plan, set(result.modules)),
        cost=Cost(
            seconds=seconds + workload.answer_seconds,
            answer_seconds=workload.answer_seconds,
            host_bytes=round(host_bytes),
            device_bytes=device_bytes,
        ),
    )


def _first_blocks(plan: QuantPlan) -> QuantPlan:
    """The plan of nothing but the first block of each part."""
    blocks = tuple(block for block in plan.blocks if block.first == 0)
    depth = {block.part: block.last + 1 for block in blocks}
    parts = tuple(replace(part, layers=part.layers[: depth[part.name]]) for part in plan.parts)
    return replace(plan, parts=parts, blocks=tuple(Block(part=b.part, first=0, last=b.last) for b in blocks), unused=())


def _without(plan: QuantPlan, done: set[str]) -> QuantPlan:
    """The plan with those sites left out whose linears are done."""
    parts = tuple(
        replace(
            part,
            layers=tuple(
                replace(layer, sites=tuple(site for site in layer.sites if site.name not in done))
                for layer in part.layers
            ),
        )
        for part in plan.parts
    )
    return replace(plan, parts=parts)


def _elements(plan: QuantPlan) -> int:
    """Weights that are searched; its cost grows with them."""
    sites = [site for part in plan.parts for layer in part.layers for site in layer.sites]
    return sum(linear.in_features * linear.out_features for site in sites for linear in site.linears)


def _passes(plan: QuantPlan) -> float:
    """How often a sample runs through a layer: captured, full precision, quantized, on the way to later parts, and up
    to each of its sites, which is half a pass on average."""
    layers = sum(len(part.layers) for part in plan.parts)
    sites = sum(len(layer.sites) for part in plan.parts for layer in part.layers)
    entered = sum((len(plan.parts) - 1 - n) * len(part.layers) for n, part in enumerate(plan.parts))
    return 3 + (sites / 2 + entered) / layers


def _encoder_passes(options: EncoderOptions) -> int:
    """Forwards that optimising the encoder costs: an epoch steps (a forward, a recomputation, a backward that counts
    for two) and evaluates; before the first, targets are noted, slopes measured and the start evaluated."""
    return 0 if options.epochs == 0 else 5 * options.epochs + 6


def _held(parts: Iterable[Sequence[Run]]) -> int:
    """Bytes of what a sample leaves on the CPU: arguments once, hidden states for both chains."""
    tensors: dict[int, Tensor] = {}
    hidden = 0
    for runs in parts:
        for run in runs:
            hidden += 2 * run.hidden.numel() * run.hidden.element_size()
            for call in run.calls:
                _collect((call.args, call.kwargs, None if call.mixing is None else call.mixing.arguments), tensors)
    return hidden + sum(t.numel() * t.element_size() for t in tensors.values())


def _collect(value: object, found: dict[int, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif isinstance(value, dict):
        _collect(tuple(value.values()), found)
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, found)


def _layer_bytes(
    model: nn.Module, part: PlannedPart, workload: Workload, options: CalibrationOptions, depth: int
) -> int:
    """The part's largest layer as often as a block has layers, the hidden states of the largest batch in it, and the
    workspace of a site.

    That are fp32 copies: of the sampled inputs as they are, rounded, and their difference; of the outputs, wanted
    and found; of the weight as it is, rounded, and their difference.
    """
    weights = depth * max(_bytes(model.get_submodule(layer.path)) for layer in part.layers)
    rows = max((batch["input_ids"].numel() for batch in workload.batches), default=workload.sample["input_ids"].numel())
    linears = [linear for layer in part.layers for site in layer.sites for linear in site.linears]
    widest = max((linear.in_features + linear.out_features for linear in linears), default=0)
    sampled = options.search_tokens
    workspace = max(
        (
            3 * sampled * linear.in_features
            + 2 * sampled * linear.out_features
            + 3 * linear.in_features * linear.out_features
            for linear in linears
        ),
        default=0,
    )
    return weights + FP32 * (rows * widest + workspace)


def _bytes(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
