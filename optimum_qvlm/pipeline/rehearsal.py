"""A small part of a calibration, run for real, to see that all of it would work and to estimate what it would cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from optimum_qvlm.pipeline.cost import Cost, Meter
from optimum_qvlm.pipeline.options import CalibrationOptions
from optimum_qvlm.pipeline.result import CalibrationResult
from optimum_qvlm.plan import PlannedPart, QuantPlan

COPIES = 4
"""How often the one sample is repeated at most, so that the search sees about as many tokens as it really would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What was done in one, with the blocks that one sample gives, and what a whole calibration would cost."""

    result: CalibrationResult
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The data that the calibration would use, and one sample of it.

    Attributes:
        sample: model inputs of one sample (of ready batches, the first that holds an image), on the CPU.
        labels: its token ids that are to be predicted, -100 elsewhere; needed where the encoder is optimised.
        batches: all of them.
        answer_seconds: estimate for the answers that are missing.
    """

    sample: Mapping[str, Tensor]
    labels: Tensor | None = None
    batches: Sequence[Mapping[str, Tensor]] = field(default_factory=tuple)
    answer_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the sample."""
        return self.sample["input_ids"].numel()

    @property
    def largest_batch(self) -> int:
        """Tokens of the largest batch."""
        return max((batch["input_ids"].numel() for batch in self.batches), default=self.tokens)

    @property
    def times(self) -> float:
        """How many times the tokens of the sample all batches hold, padding included."""
        return sum(batch["input_ids"].numel() for batch in self.batches) / self.tokens


def rehearse(
    model: nn.Module, plan: QuantPlan, options: CalibrationOptions, workload: Workload, device: torch.device
) -> Rehearsal:
    """Calibrate on one sample in place: the first block of each part is searched, the others are rounded to nearest.

    The encoder is optimised for one epoch, if it is to be.

    Raises:
        CalibrationError, UnsupportedModelError: as the calibration would.
    """
    model_bytes = _bytes(model)
    copies = min(COPIES, -(-options.search_tokens // workload.tokens), max(1, round(workload.times)))
    short = replace(options, encoder=replace(options.encoder, epochs=min(1, options.encoder.epochs)))
    meter = Meter(device, weighing=min(options.search_tokens, max(1, round(workload.times * workload.tokens))))
    result = calibrate(model, plan, short, _repeated(workload, copies), device, meter=meter, first_blocks=True)
    seconds = meter.expected(
        tokens=max(1.0, workload.times / copies),
        weights={part.name: _elements(part) / max(1, _searched(part, result)) for part in plan.parts},
        epochs=options.encoder.epochs,
    )
    return Rehearsal(
        result=result,
        cost=Cost(
            seconds=seconds + workload.answer_seconds,
            answer_seconds=workload.answer_seconds,
            host_bytes=round(result.captured_bytes / copies * workload.times) + model_bytes,
            device_bytes=_device_bytes(meter, workload),
        ),
    )


def _repeated(workload: Workload, copies: int) -> CalibrationData:
    return CalibrationData(
        batches=[workload.sample] * copies,
        recipe=Recipe(source="", samples=0, seed=0, fingerprint=""),
        labels=() if workload.labels is None else [workload.labels] * copies,
    )


def _device_bytes(meter: Meter, workload: Workload) -> int:
    """The largest block under trial, and beside it the search of a site or a batch in a layer, whichever takes more."""
    forward = meter.workspace.get("forward", 0) * workload.largest_batch / workload.tokens
    return meter.block_bytes + max(meter.workspace.get("search", 0), round(forward))


def _elements(part: PlannedPart) -> int:
    """Weights of a part that are to be searched."""
    return sum(
        linear.in_features * linear.out_features
        for layer in part.layers
        for site in layer.sites
        for linear in site.linears
    )


def _searched(part: PlannedPart, result: CalibrationResult) -> int:
    """Weights of a part that were."""
    names = {error.layer for error in result.layers}
    return _elements(replace(part, layers=tuple(layer for layer in part.layers if layer.name in names)))


def _bytes(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
