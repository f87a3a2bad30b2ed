"""Forms the blocks of a plan by the dependency that is measured on hidden states."""

from collections.abc import Mapping
from dataclasses import replace

from optimum_qvlm.pipeline.dependency import EntropyOptions, measure_part
from optimum_qvlm.pipeline.hidden_chains import Chain
from optimum_qvlm.pipeline.options import CalibrationOptions
from optimum_qvlm.plan import Block, QuantPlan
from optimum_qvlm.search.partition import default_threshold, partition


def form_blocks(plan: QuantPlan, fronts: Mapping[str, Chain], options: CalibrationOptions) -> QuantPlan:
    """The plan with the blocks that the measured dependency gives, or those that the options name.

    `fronts` are the chains of each part, at its front, in full precision.
    """
    entropy = _entropy(plan, options)
    measured = {part.name: measure_part(fronts[part.name], entropy) for part in plan.parts}
    dependencies = tuple(d for part in plan.parts for d in measured[part.name])
    threshold = default_threshold(dependencies) if options.threshold is None else options.threshold
    blocks: list[Block] = []
    for part in plan.parts:
        values = [d.entropy for d in measured[part.name]]
        blocks += partition(part.name, len(part.layers), values, threshold, options.max_block_depth)
    blocks = blocks if options.blocks is None else list(options.blocks)
    return replace(plan, blocks=tuple(blocks), dependencies=dependencies, threshold=threshold)


def form_blocks_of(plan: QuantPlan, front: Chain, options: CalibrationOptions) -> QuantPlan:
    """The plan with the blocks of one part formed again, by what enters it in `front` and the plan's threshold."""
    assert plan.threshold is not None
    part = front.part
    measured = measure_part(front, _entropy(plan, options))
    values = [d.entropy for d in measured]
    formed = partition(part.name, len(part.layers), values, plan.threshold, options.max_block_depth)
    if options.blocks is not None:
        formed = tuple(block for block in options.blocks if block.part == part.name)
    return plan.with_blocks(part.name, formed, tuple(measured))


def _entropy(plan: QuantPlan, options: CalibrationOptions) -> EntropyOptions:
    return EntropyOptions.of(plan, options.softness, options.search_tokens, options.seed)
