"""Hidden states of one part of a model, run by run, on their way from layer to layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from optimum_qvlm.pipeline.capture import LayerCall, Run, linear_inputs, observe_inputs, require_finite
from optimum_qvlm.pipeline.cost import Meter
from optimum_qvlm.pipeline.tokens import TokenSampler, seeded_order
from optimum_qvlm.plan import PlannedLayer, PlannedPart, Site


@dataclass(slots=True, kw_only=True)
class Chain:
    """Hidden states in front of one layer, which are moved on layer by layer and never back.

    A part has two while it is quantized: one that goes through its layers in full precision, and one that goes through
    them as they are by then. Whoever wants to look ahead moves a `fork`.

    Attributes:
        model: holds the layers; the one in front is on `device`.
        part: whose layers the chain goes through.
        hidden: hidden states [rows, tokens, channels] of each run, on the CPU.
        calls: per run and layer, with the arguments of this chain's own: what is added between layers may come from
            quantized parts.
        batches: number of the calibration batch of each run.
        sampler: draws tokens, and knows which are padding.
        device: where layers run.
        meter: what forwards take is noted there.
        position: number of the layer in front.
    """

    model: nn.Module
    part: PlannedPart
    hidden: list[Tensor]
    calls: list[list[LayerCall]]
    batches: list[int]
    sampler: TokenSampler
    device: torch.device
    meter: Meter
    position: int = 0

    @property
    def layer(self) -> PlannedLayer:
        """The layer in front."""
        return self.part.layers[self.position]

    @property
    def module(self) -> nn.Module:
        """The same in the model."""
        return self.model.get_submodule(self.layer.path)

    def runs(self) -> list[Run]:
        """The passes through the part, with the hidden states as they are now."""
        return [Run(*run) for run in zip(self.batches, self.hidden, self.calls, strict=True)]

    def fork(self) -> Self:
        """A chain at the same place that can be moved without this one; it takes no memory until then."""
        return replace(self, hidden=list(self.hidden))

    def with_runs(self, runs: Sequence[Run]) -> Self:
        """A chain at the front of the part with the same passes, as they enter there now."""
        return replace(self, hidden=[run.hidden for run in runs], calls=[run.calls for run in runs], position=0)

    def some(self, chosen: Sequence[int], *, tokens: int | None = None) -> Self:
        """A fork of the runs with these numbers alone, of which `tokens` are drawn if that is given."""
        return replace(
            self,
            hidden=[self.hidden[number] for number in chosen],
            calls=[self.calls[number] for number in chosen],
            batches=[self.batches[number] for number in chosen],
            sampler=self.sampler.some(chosen, tokens),
        )

    def forward(self, index: int) -> Tensor:
        """What the layer in front makes of one run, on the device; the chain stays where it is."""
        hidden = self.hidden[index].to(self.device)
        return self.calls[index][self.position](self.module, hidden, self.device)

    def advance(self, *, finite: bool = True) -> None:
        """Move on through the layer in front, and refuse what is not finite, if asked for.

        Raises:
            CalibrationError: names the layer and the batch.
        """
        with self.meter.timed("forward", self.part.name):
            for index, batch in enumerate(self.batches):
                output = self.forward(index)
                if finite:
                    require_finite(output, self.layer.name, batch)
                self.hidden[index] = output.cpu()
        self.position += 1

    def observe(self) -> dict[str, list[Tensor]]:
        """Move on through the layer in front. Returns what its sites saw on the way, by site, one tensor per run."""
        local = {site.name: self._local(site) for site in self.layer.sites}
        inputs: dict[str, list[Tensor]] = {name: [] for name in local}
        with self.meter.timed("forward", self.part.name):
            for index in range(len(self.hidden)):
                output, seen = observe_inputs(self.module, list(local.values()), self._bound(index))
                self.hidden[index] = output.cpu()
                for name, path in local.items():
                    inputs[name].append(seen[path].cpu())
        self.position += 1
        return inputs

    def first_run(self) -> Callable[[], Tensor]:
        """The layer in front on the first run, to be called as often as needed."""
        return self._bound(0)

    def site_inputs(self, site: Site) -> list[Tensor]:
        """What reaches a site of the layer in front, run by run, on the CPU; the chain stays where it is.

        Raises:
            CalibrationError: it is not finite.
        """
        local = self._local(site)
        inputs = []
        with self.meter.timed("forward", self.part.name):
            for index, batch in enumerate(self.batches):
                tensor = linear_inputs(self.module, [local], self._bound(index))[local]
                require_finite(tensor, site.name, batch)
                inputs.append(tensor.cpu())
        return inputs

    def sampled(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tokens [tokens, channels] that candidates are compared on."""
        return torch.cat([self.sampler.take(index, tensor) for index, tensor in enumerate(tensors)])

    def real(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All tokens but padding, run by run."""
        return [self.sampler.real(index, tensor) for index, tensor in enumerate(tensors)]

    def error(self, target: Sequence[Tensor]) -> float:
        """Relative squared difference of the hidden states from what they should be, padding left out."""
        error = norm = 0.0
        for index, (hidden, right) in enumerate(zip(self.hidden, target, strict=True)):
            change, size = self.sampler.relative_error(index, hidden.to(self.device), right.to(self.device))
            error, norm = error + change, norm + size
        return error / max(norm, 1e-30)

    def _bound(self, index: int) -> Callable[[], Tensor]:
        """The layer in front on the hidden states that a run has now, also after the chain has moved."""
        hidden, module = self.hidden[index].to(self.device), self.module
        call = self.calls[index][self.position]
        return lambda: call(module, hidden, self.device)

    def _local(self, site: Site) -> str:
        """The path of the site's first linear inside the layer in front, empty where the layer is that linear."""
        return site.linears[0].path.removeprefix(self.layer.path).removeprefix(".")


def some_runs(hidden: Sequence[Tensor], tokens: int, seed: int) -> list[int]:
    """Numbers of runs drawn with the seed until they hold at least `tokens` tokens together, in order."""
    chosen, held = [], 0
    for number in seeded_order(len(hidden), seed).tolist():
        if held >= tokens:
            break
        chosen.append(number)
        held += hidden[number].shape[:-1].numel()
    return sorted(chosen)
