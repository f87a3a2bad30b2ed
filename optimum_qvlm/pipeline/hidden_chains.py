"""The hidden states of one part, run by run: the full-precision chain and the quantized one, on the CPU."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from optimum_qvlm.pipeline.capture import LayerCall, Run, linear_inputs, observe_inputs, require_finite
from optimum_qvlm.pipeline.tokens import TokenSampler, seeded_order
from optimum_qvlm.plan import PlannedLayer, Site


@dataclass(slots=True)
class Chain:
    """Both chains stand in front of one layer and are moved on layer by layer.

    Attributes:
        runs: passes through the part; their `hidden` is the full-precision chain.
        quantized: hidden states [rows, tokens, channels] that went through the quantized layers, one per run.
        calls: of the quantized chain, per run and layer: what is added between layers may come from quantized parts.
        sampler: draws tokens, and knows which are padding.
        device: where layers run.
        references: full-precision inputs of the sites of the layer that was run last, by site, one tensor per run.
    """

    runs: list[Run]
    quantized: list[Tensor]
    calls: list[list[LayerCall]]
    sampler: TokenSampler
    device: torch.device
    references: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: list[Run], sampler: TokenSampler, device: torch.device) -> Self:
        """Both chains at the front of a part, with nothing quantized before it."""
        return cls(runs, [run.hidden for run in runs], [run.calls for run in runs], sampler, device)

    def enter(self, runs: Sequence[Run]) -> None:
        """Put the quantized chain at the front of the part, with what enters there now."""
        self.quantized, self.calls = [run.hidden for run in runs], [run.calls for run in runs]

    def full_precision(self, module: nn.Module, number: int, layer: PlannedLayer) -> list[Tensor]:
        """Outputs of the layer before it is quantized, on full-precision inputs, which they replace.

        What its sites see on the way is kept in `references`.
        """
        local = {site.name: _local(site, layer.path) for site in layer.sites}
        self.references = {name: [] for name in local}
        for run in self.runs:
            run_layer = _bind(run.calls[number], module, run.hidden.to(self.device), self.device)
            output, seen = observe_inputs(module, list(local.values()), run_layer)
            run.hidden = output.cpu()
            for name, path in local.items():
                self.references[name].append(seen[path].cpu())
        return [run.hidden for run in self.runs]

    def first_run(self, module: nn.Module, number: int) -> Callable[[], Tensor]:
        """The full-precision layer on the first run, whose hidden states stand in front of it."""
        run = self.runs[0]
        return _bind(run.calls[number], module, run.hidden.to(self.device), self.device)

    def site_inputs(self, module: nn.Module, number: int, site: Site, layer_path: str) -> list[Tensor]:
        """What reaches the site through the quantized prefix, run by run, on the CPU."""
        local = _local(site, layer_path)
        found = []
        for index, (run, hidden) in enumerate(zip(self.runs, self.quantized, strict=True)):
            run_layer = _bind(self.calls[index][number], module, hidden.to(self.device), self.device)
            tensor = linear_inputs(module, [local], run_layer)[local]
            require_finite(tensor, site.name, run.batch)
            found.append(tensor.cpu())
        return found

    def sampled(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tokens [tokens, channels] that candidates are compared on."""
        return torch.cat([self.sampler.take(index, tensor) for index, tensor in enumerate(tensors)])

    def real(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All tokens but padding, run by run."""
        return [self.sampler.real(index, tensor) for index, tensor in enumerate(tensors)]

    def step(self, module: nn.Module, number: int, index: int, hidden: Tensor, name: str) -> Tensor:
        """One layer on the hidden states of one run; the output stays on the device.

        Raises:
            CalibrationError: it is not finite.
        """
        output = self.output(module, number, index, hidden)
        require_finite(output, name, self.runs[index].batch)
        return output

    def output(self, module: nn.Module, number: int, index: int, hidden: Tensor) -> Tensor:
        """As `step`, whatever comes out."""
        return self.calls[index][number](module, hidden.to(self.device), self.device)

    def advance(self, module: nn.Module, number: int, name: str) -> None:
        """Push the quantized chain through a layer."""
        for index, hidden in enumerate(self.quantized):
            self.quantized[index] = self.step(module, number, index, hidden, name).cpu()

    def error(self, wanted: Sequence[Tensor]) -> float:
        """Relative squared difference of the quantized chain from what it should be, padding left out."""
        return self.relative_error(enumerate(self.quantized), wanted)

    def relative_error(self, found: Iterable[tuple[int, Tensor]], wanted: Sequence[Tensor]) -> float:
        """The same for the runs whose numbers are given with their hidden states."""
        error = norm = 0.0
        for index, hidden in found:
            change, size = self.sampler.relative_error(index, hidden.to(self.device), wanted[index].to(self.device))
            error, norm = error + change, norm + size
        return error / max(norm, 1e-30)


def some_runs(hidden: Sequence[Tensor], tokens: int, seed: int) -> list[int]:
    """Numbers of runs drawn with the seed until they hold at least `tokens` tokens together, in order."""
    chosen, held = [], 0
    for number in seeded_order(len(hidden), seed).tolist():
        if held >= tokens:
            break
        chosen.append(number)
        held += hidden[number].shape[:-1].numel()
    return sorted(chosen)


def _bind(call: LayerCall, module: nn.Module, hidden: Tensor, device: torch.device) -> Callable[[], Tensor]:
    return lambda: call(module, hidden, device)


def _local(site: Site, layer_path: str) -> str:
    """The path of the site's first linear inside its layer, empty where the layer is that linear."""
    return site.linears[0].path.removeprefix(layer_path).removeprefix(".")
