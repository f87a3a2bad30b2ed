"""What stands in for the gain of searching two layers together: the paper's entropy, and what else could.

Each proxy is a function of the outputs [tokens, channels] of two consecutive layers that are rounded to nearest.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from optimum_qvlm.pipeline.dependency import EntropyOptions, dependency, positions
from optimum_qvlm.quant.entropy import marginal_entropy

Proxy = Callable[[Tensor, Tensor], float]

CHANNEL_TABLES = 16


def all_proxies(options: EntropyOptions) -> dict[str, Proxy]:
    """By name; the first is the one that blocks are formed by."""

    def entropy(**changes: object) -> Proxy:
        changed = replace(options, **changes)  # type: ignore[arg-type]
        return lambda first, second: dependency(first, second, changed)[0]

    other = "step" if options.softness == "step_squared" else "step_squared"
    return {
        "H(next | layer)": entropy(),
        "H(layer | next)": lambda first, second: dependency(second, first, options)[0],
        "H(next)": lambda _, second: marginal_entropy(positions(second, options), options.softness),
        "mutual information": lambda first, second: (
            marginal_entropy(positions(second, options), options.softness) - dependency(first, second, options)[0]
        ),
        "pairs shuffled": lambda first, second: dependency(first, _shuffled(second), options)[0],
        "a table per channel": lambda first, second: _per_channel(first, second, options),
        "3 bits": entropy(bits=3),
        "6 bits": entropy(bits=6),
        "one step for all": entropy(static=not options.static),
        f"softness {other}": entropy(softness=other),
    }


def _shuffled(x: Tensor) -> Tensor:
    """A control: what remains is not about which elements belong together."""
    generator = torch.Generator().manual_seed(0)
    return x[torch.randperm(x.shape[0], generator=generator)][:, torch.randperm(x.shape[1], generator=generator)]


def _per_channel(first: Tensor, second: Tensor, options: EntropyOptions) -> float:
    """Mean over some channels of the entropy from a table of that channel alone, on one step per channel."""
    channels = torch.linspace(0, second.shape[1] - 1, min(CHANNEL_TABLES, second.shape[1])).long().tolist()
    static = replace(options, static=True)
    values = [dependency(first[:, c : c + 1], second[:, c : c + 1], static)[0] for c in channels]
    return sum(values) / len(values)
