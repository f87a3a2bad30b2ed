"""What a calibration starts from: the hidden states in front of every part, captured and found to be right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optimum_qvlm.pipeline import checks
from optimum_qvlm.pipeline.capture import Run, Tracer, held_bytes
from optimum_qvlm.pipeline.cost import Meter
from optimum_qvlm.pipeline.hidden_chains import Chain
from optimum_qvlm.pipeline.journal import Journal
from optimum_qvlm.pipeline.options import CalibrationOptions
from optimum_qvlm.pipeline.tokens import TokenSampler
from optimum_qvlm.plan import PlannedPart, QuantPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where a calibration works.

    Attributes:
        model: lies on the CPU; layers are moved to `device` and back.
        options: how to search.
        device: where to compute.
        meter: what steps take is noted there.
        token_weights: what tokens count at each site, by its name and run by run, see
            `optimum_qvlm.pipeline.token_weights`; all the same where a site is missing.
        journal: keeps what is finished, None to keep nothing.
    """

    model: nn.Module
    options: CalibrationOptions
    device: torch.device
    meter: Meter
    journal: Journal | None = None
    token_weights: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Hidden states in front of all parts, in full precision.

    Attributes:
        tracer: runs the model up to a part once more.
        batches: model inputs, on the CPU.
        fronts: by part, a chain at its front. Whoever takes one out moves it.
        differences: relative difference of the layers, run alone on one sample, to the real forward, by part.
        bytes: of hidden states and arguments, on the CPU.
    """

    tracer: Tracer
    batches: Sequence[Mapping[str, Tensor]]
    fronts: dict[str, Chain]
    differences: Mapping[str, float]
    bytes: int

    def entering(self, front: Chain) -> Chain:
        """A chain at the front of the same part, with what enters there now that parts before it are quantized."""
        with front.meter.timed("enter"):
            return front.with_runs(self.tracer.enter(front.part, self.batches, front.runs()))


def capture(bench: Bench, plan: QuantPlan, batches: Sequence[Mapping[str, Tensor]]) -> Captured:
    """Run all batches through the model, and check that its parts are the chains that the plan says.

    Raises:
        CalibrationError, UnsupportedModelError: see `checks`.
    """
    tracer = Tracer.of(bench.model, plan, bench.device)
    with bench.meter.timed("capture"):
        runs = tracer.capture(batches)
    with bench.meter.timed("check"):
        differences = {part.name: _check(bench, part, runs[part.name][0]) for part in plan.parts}
        checks.require_unused(tracer, plan.unused, runs, batches)
    held = held_bytes(runs.values())
    fronts = {part.name: _front(bench, part, runs.pop(part.name), batches) for part in plan.parts}
    return Captured(tracer=tracer, batches=batches, fronts=fronts, differences=differences, bytes=held)


def _check(bench: Bench, part: PlannedPart, run: Run) -> float:
    difference = checks.require_chain(bench.model, part, run, bench.device)
    for number, layer in enumerate(part.layers):
        checks.require_shared_inputs(bench.model, layer, run, number, bench.device)
    return difference


def _front(bench: Bench, part: PlannedPart, runs: Sequence[Run], batches: Sequence[Mapping[str, Tensor]]) -> Chain:
    masks = [None if part.vision else batches[run.batch].get("attention_mask") for run in runs]
    return Chain(
        model=bench.model,
        part=part,
        hidden=[run.hidden for run in runs],
        calls=[run.calls for run in runs],
        batches=[run.batch for run in runs],
        sampler=TokenSampler(masks, bench.options.search_tokens, bench.options.seed),
        device=bench.device,
        meter=bench.meter,
    )
