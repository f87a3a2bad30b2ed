"""The hidden states of one part, run by run: the full-precision chain and the quantized one, on the CPU."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimum_qvlm.pipeline.capture import Run, linear_inputs, require_finite
from optimum_qvlm.pipeline.tokens import TokenSampler
from optimum_qvlm.search.plan import Site


@dataclass(slots=True)
class Chain:
    """Both chains stand in front of one layer and are moved on layer by layer.

    Attributes:
        runs: passes through the part; their `hidden` is the full-precision chain.
        quantized: hidden states [rows, tokens, channels] that went through the quantized layers, one per run.
        sampler: draws tokens, and knows which are padding.
        device: where layers run.
    """

    runs: list[Run]
    quantized: list[Tensor]
    sampler: TokenSampler
    device: torch.device

    def full_precision(self, module: nn.Module, number: int) -> list[Tensor]:
        """Outputs of the layer before it is quantized, on full-precision inputs, which they replace."""
        for run in self.runs:
            run.hidden = run.calls[number](module, run.hidden.to(self.device), self.device).cpu()
        return [run.hidden for run in self.runs]

    def site_inputs(self, module: nn.Module, number: int, site: Site, layer_path: str) -> Tensor:
        """Sampled tokens [tokens, in_features] that reach the site through the quantized prefix."""
        local = site.linears[0].path.removeprefix(layer_path).removeprefix(".")
        taken = []
        for index, (run, hidden) in enumerate(zip(self.runs, self.quantized, strict=True)):
            run_layer = _bind(run, number, module, hidden.to(self.device), self.device)
            tensor = linear_inputs(module, [local], run_layer)[local]
            tokens = self.sampler.take(index, tensor)
            require_finite(tokens, site.name, run.batch)
            taken.append(tokens)
        return torch.cat(taken)

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
        return self.runs[index].calls[number](module, hidden.to(self.device), self.device)

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
    for number in torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed)).tolist():
        if held >= tokens:
            break
        chosen.append(number)
        held += hidden[number].shape[:-1].numel()
    return sorted(chosen)


def _bind(run: Run, number: int, module: nn.Module, hidden: Tensor, device: torch.device) -> Callable[[], Tensor]:
    return lambda: run.calls[number](module, hidden, device)
