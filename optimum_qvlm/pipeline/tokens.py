"""Which tokens the search looks at."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


def seeded_order(count: int, seed: int, run: int | None = None) -> Tensor:
    """The numbers below `count` in an order drawn on the CPU with the seed, a new one for each `run` if one is given.

    int64 [count], also where torch's default device is another one.
    """
    mixed = seed if run is None else (seed * 1_000_003 + run) % 2**63  # torch takes no larger one
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed), device="cpu")


class TokenSampler:
    """Draws the same tokens of a run for every site that sees as many of them; padding is never drawn.

    `masks` has one entry per run of a part: the attention mask [rows, tokens] of its batch, or None where every
    token is real.
    """

    def __init__(self, masks: Sequence[Tensor | None], budget: int, seed: int) -> None:
        self._masks, self._budget, self._seed = masks, budget, seed
        self._share = -(-budget // max(len(masks), 1))

    def some(self, runs: Sequence[int], budget: int | None = None) -> Self:
        """A sampler of the runs with these numbers, which are counted anew, with as many tokens or `budget` of them."""
        masks = [self._masks[number] for number in runs]
        return type(self)(masks, self._budget if budget is None else budget, self._seed)

    def valid(self, number: int, rows: int, tokens: int) -> Tensor | None:
        """Mask [rows * tokens] of tokens that are not padding in a run, None where all are real."""
        mask = self._masks[number]
        if mask is None or mask.shape != (rows, tokens):
            return None
        return mask.reshape(-1).bool()

    def real(self, number: int, hidden: Tensor) -> Tensor:
        """The tokens of `hidden` [..., channels] that are not padding, as [tokens, channels]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        mask = self.valid(number, *hidden.shape[:2]) if hidden.dim() == 3 else None
        return flat if mask is None else flat[mask.to(flat.device)]

    def take(self, number: int, hidden: Tensor) -> Tensor:
        """Some of the tokens of `hidden` [..., channels] as [chosen tokens, channels]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        mask = self.valid(number, *hidden.shape[:2]) if hidden.dim() == 3 else None
        candidates = torch.arange(flat.shape[0], device="cpu") if mask is None else mask.nonzero().squeeze(1)
        order = seeded_order(len(candidates), self._seed, number)[: self._share]
        return flat[candidates[order.sort().values].to(flat.device)]

    def relative_error(self, number: int, found: Tensor, wanted: Tensor) -> tuple[float, float]:
        """Squared difference and squared norm of the real tokens of a run, both [rows, tokens, channels]."""
        mask = self.valid(number, *wanted.shape[:2]) if wanted.dim() == 3 else None
        found, wanted = (x.reshape(-1, x.shape[-1]).float() for x in (found, wanted))
        if mask is not None:
            found, wanted = found[mask.to(found.device)], wanted[mask.to(wanted.device)]
        return float((found - wanted).square().sum()), float(wanted.square().sum())
