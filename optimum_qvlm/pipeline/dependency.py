"""Measures the dependency between consecutive layers of a part, rounded to nearest, before anything is searched."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimum_qvlm.modules.swap import replace_module
from optimum_qvlm.modules.trial import TrialLinear
from optimum_qvlm.pipeline.hidden_chains import Chain, some_runs
from optimum_qvlm.pipeline.layer_streaming import resident
from optimum_qvlm.pipeline.tokens import seeded_order
from optimum_qvlm.plan import Dependency, PlannedLayer, QuantPlan
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.quant.entropy import (
    Positions,
    Softness,
    conditional_entropy,
    grid_positions,
    joint_table,
    marginal_entropy,
)
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.spec import AUTO_GROUPS, ActivationSpec

MAX_BITS = 6
"""A joint table of more levels than 2^6 would need more elements than are drawn."""

TOKENS = 256
CHANNELS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyOptions:
    """How dependency is measured, the same for the whole model, so that its parts can be compared.

    Attributes:
        bits: of the grid that outputs are placed on.
        static: one step for all of an output in place of one per token and group of channels.
        softness: what squared distances are divided by.
        tokens: how many tokens a forward runs at least.
        seed: of the tokens and channels that are looked at.
    """

    bits: int
    static: bool
    softness: Softness
    tokens: int
    seed: int

    @classmethod
    def of(cls, plan: QuantPlan, softness: Softness, tokens: int, seed: int) -> "EntropyOptions":
        """Bits are the fewest of the plan's activations, at most `MAX_BITS`; static where they are."""
        specs = [site.activation for site in plan.sites() if site.activation is not None]
        bits = min([spec.bits for spec in specs] + [MAX_BITS])
        return cls(bits=bits, static=any(spec.static for spec in specs), softness=softness, tokens=tokens, seed=seed)


def measure_part(front: Chain, options: EntropyOptions) -> list[Dependency]:
    """Dependency of every consecutive pair of layers of a part, on outputs of layers that are rounded to nearest.

    Starts from the full-precision inputs of the part, where `front` stands and stays. The model is left as it was; one
    layer at a time is on the device.
    """
    chosen = some_runs(front.hidden, options.tokens, options.seed)
    chain = front.some(chosen, tokens=TOKENS)
    measured: list[Dependency] = []
    before: Tensor | None = None
    for number, layer in enumerate(chain.part.layers):
        with torch.no_grad(), resident(chain.model, layer.path, chain.device), _rounded(chain.model, layer):
            chain.advance()
        after = chain.sampled(chain.hidden)
        if before is not None:
            entropy, marginal = dependency(before, after, options)
            measured.append(Dependency(part=chain.part.name, layer=number - 1, entropy=entropy, marginal=marginal))
        before = after
    return measured


def dependency(first: Tensor, second: Tensor, options: EntropyOptions) -> tuple[float, bool]:
    """H(second | first) of two outputs [tokens, channels] in nats, and whether it is but the marginal H(second).

    The latter where shapes differ. Some channels are drawn with the seed, the same of both.
    """
    order = seeded_order(second.shape[1], options.seed)
    channels = order[:CHANNELS].sort().values.to(second.device)
    later = positions(second, options).columns(channels)
    if first.shape != second.shape:
        return marginal_entropy(later, options.softness), True
    return conditional_entropy(joint_table(positions(first, options).columns(channels), later, options.softness)), False


def positions(x: Tensor, options: EntropyOptions) -> Positions:
    """Where an output [tokens, channels] lies on the grid that dependency is measured on."""
    group = next((size for size in AUTO_GROUPS if x.shape[1] % size == 0), None)
    return grid_positions(x, options.bits, None if options.static else group, static=options.static)


@contextmanager
def _rounded(model: nn.Module, layer: PlannedLayer) -> Iterator[None]:
    """Inside, the linears of a layer are rounded to nearest; static activations over the range of each token."""
    plain: dict[str, nn.Module] = {}
    for site in layer.sites:
        dynamic = (
            None if site.activation is None else ActivationSpec(bits=site.activation.bits, group=site.activation.group)
        )
        for planned in site.linears:
            linear = model.get_submodule(planned.path)
            assert isinstance(linear, nn.Linear)
            plain[planned.path] = linear
            trial = TrialLinear.of(linear, dynamic)
            trial.set_rounding(quantize_weight(linear.weight.detach(), planned.weight), 1.0, SiteTransform(), None)
            replace_module(model, planned.path, trial)
    try:
        yield
    finally:
        for path, linear in plain.items():
            replace_module(model, path, linear)
