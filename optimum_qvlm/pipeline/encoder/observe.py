"""What the optimisation of the encoder reads off a forward: errors of two outputs, samples of every layer's output."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qvlm.pipeline.capture import first_tensor
from optimum_qvlm.pipeline.tokens import seeded_order
from optimum_qvlm.plan import PlannedPart, QuantPlan
from optimum_qvlm.search.encoder_loss import relative_error

TOKENS = 128
"""Tokens of a layer's output that its dependency is taken over in one step."""


@dataclass(slots=True)
class Seen:
    """What one forward showed.

    Attributes:
        samples: per part and layer, some tokens [tokens, channels] of each of its calls.
        ends: outputs of the encoder's and of the model's last layer, if asked for.
        vision, final: their errors against full precision.
        slopes: squared norms of the gradient at each layer's output, filled by a backward pass if asked for.
    """

    samples: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    ends: dict[str, list[Tensor]] = field(default_factory=dict)
    errors: dict[str, list[Tensor]] = field(default_factory=dict)
    slopes: dict[str, list[float]] = field(default_factory=dict)


class Observer:
    """Hooks on the layers of all parts. The last vision part and the last part of all are the two ends.

    Up to `TOKENS` real tokens of a call are drawn with the seed and the batch's number, the same for every layer that
    has as many.
    """

    def __init__(self, model: nn.Module, plan: QuantPlan, seed: int) -> None:
        self.model, self.seed = model, seed
        self.parts: Sequence[PlannedPart] = [part for part in plan.parts if part.name != "head"]
        vision = [part.name for part in self.parts if part.vision]
        self.ends = {vision[-1]: "vision", self.parts[-1].name: "final"}

    def take(self, hidden: Tensor, valid: Tensor | None, number: int) -> Tensor:
        """[tokens, channels] of `hidden` [..., channels]; `valid` [...] marks real tokens, None where all are."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        real = (
            torch.arange(flat.shape[0], device="cpu") if valid is None else valid.reshape(-1).cpu().nonzero().squeeze(1)
        )
        return flat[real[seeded_order(len(real), self.seed, number)[:TOKENS]].to(flat.device)]

    @contextmanager
    def watching(
        self,
        number: int,
        mask: Tensor | None,
        targets: Mapping[str, Sequence[Tensor]] | None = None,
        *,
        slopes: bool = False,
    ) -> Iterator[Seen]:
        """What a forward of batch `number` inside shows. `mask` [rows, tokens] marks its real text tokens.

        With `targets`, errors of the ends against these outputs of theirs; else the outputs themselves, on the CPU.
        """
        seen = Seen()
        handles: list[Any] = []
        try:
            for part in self.parts:
                seen.samples[part.name] = [[] for _ in part.layers]
                seen.slopes[part.name] = [0.0] * len(part.layers)
                for place, layer in enumerate(part.layers):
                    look = _Look(self, part, place, number, mask, targets, slopes, seen)
                    handles.append(self.model.get_submodule(layer.path).register_forward_hook(look))
            yield seen
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, slots=True)
class _Look:
    """The hook of one layer. Keeps no whole output on the device, so that layers can come and go."""

    observer: Observer
    part: PlannedPart
    place: int
    number: int
    mask: Tensor | None
    targets: Mapping[str, Sequence[Tensor]] | None
    slopes: bool
    seen: Seen

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        hidden, name = first_tensor(output), self.part.name
        valid = None if self.part.vision or self.mask is None or self.mask.shape != hidden.shape[:-1] else self.mask
        calls = self.seen.samples[name][self.place]
        calls.append(self.observer.take(hidden, valid, self.number))
        if self.slopes and hidden.requires_grad:
            hidden.register_hook(self._note_slope)
        end = self.observer.ends.get(name)
        if end is None or self.place != len(self.part.layers) - 1:
            return
        real = hidden if valid is None else hidden[valid.bool().to(hidden.device)]
        if self.targets is None:
            self.seen.ends.setdefault(end, []).append(real.detach().cpu())
        else:
            target = self.targets[end][len(calls) - 1].to(real.device)
            self.seen.errors.setdefault(end, []).append(relative_error(real, target))

    def _note_slope(self, gradient: Tensor) -> None:
        self.seen.slopes[self.part.name][self.place] += float(gradient.float().square().sum())
