"""Norms that take up the equalizer of the site behind them: no forward pays for it, and any runtime can run it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qvlm.pipeline.capture import first_tensor, hooking
from optimum_qvlm.plan import PlannedLayer, Site

CLOSE = 1e-4
CLOSE_IN_HALF = 2e-2
"""How far a fold may move the output of a layer in fp32 and in narrower dtypes, relative to its norm. What it moves in
truth is the order of rounding; a norm whose output is read elsewhere moves much more, since every channel is doubled
or halved in the trial."""


@dataclass(frozen=True, slots=True)
class FoldingNorm:
    """A norm whose output is what the linears of one site read, and nothing else.

    Attributes:
        path: dotted path in the layer.
        module: multiplies its normalised input by `weight + offset`, and adds `bias` if it has one.
        offset: 0, or 1 where the weight is stored as the difference from 1.
    """

    path: str
    module: Any
    offset: float

    def snap(self, equalizer: Tensor) -> Tensor:
        """What becomes of an equalizer [channels] in the dtype of the norm's weight, fp32."""
        gain: Tensor = self.module.weight.detach().float() + self.offset
        factor = (self._weight(equalizer).float() + self.offset) / gain
        return torch.where(torch.isfinite(factor) & (factor > 0), factor, equalizer)

    def take_up(self, equalizer: Tensor) -> None:
        """Multiply what the norm returns by `equalizer` [channels] from now on."""
        with torch.no_grad():
            self.module.weight.copy_(self._weight(equalizer))
            bias = getattr(self.module, "bias", None)
            if isinstance(bias, Tensor):
                bias.copy_(bias.float() * equalizer)

    def tensors(self) -> dict[str, Tensor]:
        """What `take_up` changes, by path in the layer."""
        held = {name: getattr(self.module, name, None) for name in ("weight", "bias")}
        return {f"{self.path}.{name}": tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}

    def _weight(self, equalizer: Tensor) -> Tensor:
        weight: Tensor = self.module.weight.detach()
        return ((weight.float() + self.offset) * equalizer - self.offset).to(weight.dtype)


def folding_norms(model: nn.Module, layer: PlannedLayer, run: Callable[[], Tensor]) -> dict[str, FoldingNorm]:
    """By the name of the site, the norm that can take up its equalizer; sites without one are left out.

    Found by what happens in a forward, not by names: the norm returns the very tensor that the linears of the site
    read, no other module of the layer reads it, and the layer returns the same as before when norm and linears are
    scaled against each other. Everything is left as it was.

    Args:
        model: the model, with the layer in full precision and on its device.
        layer: as planned.
        run: one forward of the layer.
    """
    module = model.get_submodule(layer.path)
    made, read, wanted = _trace(module, run)
    found = {}
    for site in layer.sites:
        linears = {linear.path.removeprefix(f"{layer.path}.") for linear in site.linears}
        if not linears <= read.keys():
            continue
        tensor = read[next(iter(linears))][0]
        readers = {path for path, tensors in read.items() if any(other is tensor for other in tensors)}
        maker = next((path for path, output in made.items() if output is tensor), None)
        if maker is None or readers != linears:
            continue
        norm = module.get_submodule(maker)
        offset = _offset(norm, tensor.shape[-1])
        if offset is None or _shared(model, norm):
            continue
        candidate = FoldingNorm(maker, norm, offset)
        if _leaves_output(model, site, candidate, run, wanted):
            found[site.name] = candidate
    return found


def _trace(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], Tensor]:
    """What each innermost module of the layer returned and what it read, by path, and what the layer returned."""
    made: dict[str, Tensor] = {}
    read: dict[str, list[Tensor]] = {}
    with hooking() as hooks:
        for path, module in layer.named_modules():
            if path == "" or next(module.children(), None) is not None:
                continue

            def note(
                _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, path: str = path
            ) -> None:
                read.setdefault(path, []).extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
                if isinstance(output, Tensor):
                    made[path] = output

            hooks.append(module.register_forward_hook(note, with_kwargs=True))
        return made, read, run()


def _offset(norm: nn.Module, channels: int) -> float | None:
    """What the norm adds to its weight before it multiplies by it; None where it does neither 0 nor 1."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != (channels,):
        return None
    probe = torch.randn(4, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(
        weight
    )
    factor = _powers(channels).to(weight.device)
    plain = first_tensor(norm(probe)).float()
    for offset in (0.0, 1.0):
        with _scaled(FoldingNorm("", norm, offset), factor):
            scaled = first_tensor(norm(probe)).float()
        if _close(scaled, plain * factor, weight.dtype):
            return offset
    return None


def _leaves_output(model: nn.Module, site: Site, norm: FoldingNorm, run: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Whether the layer returns what it did, with the norm scaled and the linears scaled back."""
    weights: list[Tensor] = [model.get_submodule(linear.path).weight for linear in site.linears]  # type: ignore[misc]
    factor = _powers(weights[0].shape[1]).to(weights[0].device)
    kept = [weight.detach().clone() for weight in weights]
    with _scaled(norm, factor):
        try:
            for weight in weights:
                weight.data.copy_(weight.data / factor)
            return _close(run().float(), wanted.float(), weights[0].dtype)
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.data.copy_(before)


@contextmanager
def _scaled(norm: FoldingNorm, factor: Tensor) -> Iterator[None]:
    """Inside, the norm has taken up the factor."""
    kept = [parameter.detach().clone() for parameter in norm.module.parameters()]
    norm.take_up(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(norm.module.parameters(), kept, strict=True):
                parameter.copy_(before)


def _shared(model: nn.Module, norm: nn.Module) -> bool:
    """Whether another module of the model holds the norm's weight too."""
    return sum(getattr(module, "weight", None) is norm.weight for module in model.modules()) > 1


def _powers(channels: int) -> Tensor:
    """Factors 0.5 and 2 in turn at random, exact in every floating dtype."""
    bits = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(1), device="cpu")
    return torch.exp2(bits.float().mul(2).sub(1))


def _close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    limit = CLOSE if dtype == torch.float32 else CLOSE_IN_HALF
    return float((found - wanted).norm()) <= limit * float(wanted.norm())
