"""One block while it is searched: candidates per site, tried on whole batches by the error of the block's output."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optimum_qvlm.modules.swap import replace_module
from optimum_qvlm.modules.trial import TrialLinear
from optimum_qvlm.pipeline.hidden_chains import Chain, some_runs
from optimum_qvlm.pipeline.result import BlockError
from optimum_qvlm.plan import Block, PlannedLayer, Site
from optimum_qvlm.search.block import Choice, search_block
from optimum_qvlm.search.site_problem import SiteChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCandidates:
    """Rounding functions of one site, the layer-wise optimum first. `layer` is the number of its layer in the part."""

    site: Site
    layer: int
    choices: Sequence[SiteChoice]


@dataclass(slots=True, kw_only=True)
class BlockTrial:
    """Runs a block with any choice of candidates.

    Layers before the first that a choice changes are not run again.

    Attributes:
        block: which layers. They are on the device, and hold a `TrialLinear` for every linear of the sites.
        sites: candidates in execution order.
        entering: the runs that are looked at, in front of the block, where it stays.
        target: full-precision output of the block for each of them, on the CPU.
    """

    block: Block
    sites: Sequence[SiteCandidates]
    entering: Chain
    target: Sequence[Tensor]
    _before: dict[int, Chain] = field(default_factory=dict)
    _held: Choice | None = None

    def error(self, choice: Choice) -> float:
        """Relative squared error of the block's output; not finite where the output is not."""
        start = self._install(choice)
        chain = self._before[start]
        while chain.position <= self.block.last:
            self._before[chain.position] = chain
            chain = chain.fork()
            chain.advance(finite=False)
        return chain.error(self.target)

    def _install(self, choice: Choice) -> int:
        """Round as chosen. Returns the first layer that is not as it was in the last run."""
        if self._held is None:
            self._before = {self.block.first: self.entering}
        changed = [n for n in range(len(choice)) if self._held is None or self._held[n] != choice[n]]
        for number in changed:
            install(self.entering.model, self.sites[number].site, self.sites[number].choices[choice[number]])
        self._held = choice
        first = self.block.first if not changed else self.sites[changed[0]].layer
        return first if first in self._before else self.block.first


def install(model: nn.Module, site: Site, choice: SiteChoice) -> None:
    """Let the linears of a site round as chosen; they become `TrialLinear` if they are not yet."""
    for planned in site.linears:
        linear = model.get_submodule(planned.path)
        assert isinstance(linear, nn.Linear)
        if not isinstance(linear, TrialLinear):
            linear = TrialLinear.of(linear, site.activation)
            replace_module(model, planned.path, linear)
        weight = choice.weights[planned.name]
        linear.set_rounding(weight, choice.activation_clip, choice.transform, choice.input_scale)


def held_bytes(model: nn.Module, layers: Sequence[PlannedLayer], sites: Sequence[SiteCandidates]) -> int:
    """What layers under trial take on the device, with the values that their linears use and all candidates."""
    modules = [module for layer in layers for module in model.get_submodule(layer.path).modules()]
    tensors = [tensor for module in modules for tensor in (*module.parameters(False), *module.buffers(False))]
    tensors += [module.dense for module in modules if isinstance(module, TrialLinear)]
    for weight in (weight for site in sites for choice in site.choices for weight in choice.weights.values()):
        tensors += [weight.codes, weight.scale]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def search_jointly(
    block: Block, sites: Sequence[SiteCandidates], chain: Chain, target: Sequence[Tensor], *, tokens: int, seed: int
) -> tuple[Choice, BlockError]:
    """A candidate per site, chosen on runs of at least `tokens` tokens that are drawn with the seed.

    Args:
        block: which layers.
        sites: candidates in execution order, the first of which are installed.
        chain: stands in front of the block and stays there.
        target: full-precision output of the block per run, on the CPU.
    """
    started = time.perf_counter()
    chosen = some_runs(chain.hidden, tokens, seed)
    trial = BlockTrial(
        block=block, sites=sites, entering=chain.some(chosen), target=[target[number] for number in chosen]
    )
    with torch.no_grad():
        outcome = search_block([len(entry.choices) for entry in sites], trial.error)
    held = sum(chain.hidden[number].shape[:-1].numel() for number in chosen)
    error = BlockError(
        block=block,
        before=outcome.before,
        after=outcome.after,
        forwards=outcome.forwards,
        share=held / sum(states.shape[:-1].numel() for states in chain.hidden),
        seconds=time.perf_counter() - started,
    )
    return outcome.choice, error
