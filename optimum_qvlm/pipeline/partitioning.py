"""Forms the blocks of a plan by the dependency that is measured on hidden states."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from optimum_qvlm.pipeline.capture import Run
from optimum_qvlm.pipeline.dependency import EntropyOptions, measure_part
from optimum_qvlm.pipeline.hidden_chains import Chain
from optimum_qvlm.pipeline.options import CalibrationOptions
from optimum_qvlm.pipeline.tokens import TokenSampler
from optimum_qvlm.plan import Block, PlannedPart, QuantPlan
from optimum_qvlm.search.partition import default_threshold, partition


def make_chain(
    part: PlannedPart,
    runs: list[Run],
    batches: Sequence[Mapping[str, Tensor]],
    options: CalibrationOptions,
    device: torch.device,
) -> Chain:
    """Both chains of a part at its front, on what was captured there."""
    masks = [None if part.vision else batches[run.batch].get("attention_mask") for run in runs]
    return Chain.of(runs, TokenSampler(masks, options.search_tokens, options.seed), device)


def form_blocks(
    model: nn.Module, plan: QuantPlan, chains: Mapping[str, Chain], options: CalibrationOptions
) -> QuantPlan:
    """The plan with the blocks that the measured dependency gives, or those that the options name.

    `chains` are those of each part, at its front, in full precision.
    """
    entropy = _entropy(plan, options)
    found = {part.name: measure_part(model, part, chains[part.name], entropy) for part in plan.parts}
    dependencies = tuple(d for part in plan.parts for d in found[part.name])
    threshold = default_threshold(dependencies) if options.threshold is None else options.threshold
    blocks: list[Block] = []
    for part in plan.parts:
        values = [d.entropy for d in found[part.name]]
        blocks += partition(part.name, len(part.layers), values, threshold, options.max_block_depth)
    blocks = blocks if options.blocks is None else list(options.blocks)
    return replace(plan, blocks=tuple(blocks), dependencies=dependencies, threshold=threshold)


def form_blocks_of(
    model: nn.Module, plan: QuantPlan, part: PlannedPart, chain: Chain, options: CalibrationOptions
) -> QuantPlan:
    """The plan with the blocks of one part formed again, by what enters `chain` now and the plan's threshold."""
    assert plan.threshold is not None
    found = measure_part(model, part, chain, _entropy(plan, options))
    values = [d.entropy for d in found]
    formed = partition(part.name, len(part.layers), values, plan.threshold, options.max_block_depth)
    if options.blocks is not None:
        formed = tuple(block for block in options.blocks if block.part == part.name)
    return plan.with_blocks(part.name, formed, tuple(found))


def _entropy(plan: QuantPlan, options: CalibrationOptions) -> EntropyOptions:
    return EntropyOptions.of(plan, options.softness, options.search_tokens, options.seed)
