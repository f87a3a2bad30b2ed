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
from optimum_qvlm.plan import Block, PlannedPart, Site
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
        model: holds a `TrialLinear` for every linear of the block's sites; its layers are on the device.
        part: the part of the block.
        block: which layers.
        sites: candidates in execution order.
        chain: stands in front of the block with its quantized hidden states.
        wanted: full-precision output of the block per run, on the CPU.
        chosen: numbers of the runs that are looked at.
    """

    model: nn.Module
    part: PlannedPart
    block: Block
    sites: Sequence[SiteCandidates]
    chain: Chain
    wanted: Sequence[Tensor]
    chosen: Sequence[int]
    _entering: dict[int, list[Tensor]] = field(default_factory=dict)
    _held: Choice | None = None

    def error(self, choice: Choice) -> float:
        """Relative squared error of the block's output; not finite where the output is not."""
        start = self._install(choice)
        hidden = self._entering[start]
        for number in range(start, self.block.last + 1):
            self._entering[number] = hidden
            module = self.model.get_submodule(self.part.layers[number].path)
            hidden = [
                self.chain.output(module, number, index, states).cpu()
                for index, states in zip(self.chosen, hidden, strict=True)
            ]
        return self.chain.relative_error(zip(self.chosen, hidden, strict=True), self.wanted)

    def _install(self, choice: Choice) -> int:
        """Round as chosen. Returns the first layer that is not as it was in the last run."""
        if self._held is None:
            self._entering = {self.block.first: [self.chain.quantized[index] for index in self.chosen]}
        changed = [n for n in range(len(choice)) if self._held is None or self._held[n] != choice[n]]
        for number in changed:
            install(self.model, self.sites[number].site, self.sites[number].choices[choice[number]])
        self._held = choice
        first = self.block.first if not changed else self.sites[changed[0]].layer
        return first if first in self._entering else self.block.first


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


def search_jointly(
    model: nn.Module,
    part: PlannedPart,
    block: Block,
    sites: Sequence[SiteCandidates],
    chain: Chain,
    wanted: Sequence[Tensor],
    *,
    tokens: int,
    seed: int,
) -> tuple[Choice, BlockError]:
    """A candidate per site, chosen on runs of at least `tokens` tokens that are drawn with the seed.

    The chain stands in front of the block and stays there.
    """
    started = time.perf_counter()
    chosen = some_runs(chain.quantized, tokens, seed)
    trial = BlockTrial(model=model, part=part, block=block, sites=sites, chain=chain, wanted=wanted, chosen=chosen)
    with torch.no_grad():
        found = search_block([len(entry.choices) for entry in sites], trial.error)
    held = sum(chain.quantized[index].shape[:-1].numel() for index in chosen)
    error = BlockError(
        block=block,
        before=found.before,
        after=found.after,
        forwards=found.forwards,
        share=held / sum(states.shape[:-1].numel() for states in chain.quantized),
        seconds=time.perf_counter() - started,
    )
    return found.choice, error
