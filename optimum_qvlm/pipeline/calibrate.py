"""The orchestrator: captures what reaches the parts of a model, forms blocks, and searches them one by one."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.pipeline import checks
from optimum_qvlm.pipeline.block_search import quantize_block
from optimum_qvlm.pipeline.captured import Bench, Captured, capture
from optimum_qvlm.pipeline.cost import Meter
from optimum_qvlm.pipeline.encoder.step import EncoderResult, EncoderStep
from optimum_qvlm.pipeline.finished import FinishedBlock, FinishedSite, finish_site, site_weights
from optimum_qvlm.pipeline.hidden_chains import Chain
from optimum_qvlm.pipeline.journal import Journal
from optimum_qvlm.pipeline.layer_streaming import resident
from optimum_qvlm.pipeline.options import CalibrationOptions
from optimum_qvlm.pipeline.partitioning import form_blocks, form_blocks_of
from optimum_qvlm.pipeline.result import CalibrationResult
from optimum_qvlm.pipeline.resuming import (
    read_block,
    read_encoder,
    read_partition,
    write_block,
    write_encoder,
    write_partition,
)
from optimum_qvlm.pipeline.token_weights import token_weights
from optimum_qvlm.plan import Block, ModuleRecord, PlannedLayer, QuantPlan
from optimum_qvlm.search.site import round_to_nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationData:
    """Batches of model inputs on the CPU, and the record of where they come from.

    `labels` are per batch the token ids of the answers, or of all text, -100 elsewhere; without them the encoder is not
    optimised, and all tokens count the same.
    `held_out` are batches with such labels of samples that are not calibrated on, for whoever measures afterwards;
    `held_out_samples` what each of their rows was rendered from, None for ready model inputs.
    """

    batches: Sequence[Mapping[str, Tensor]]
    recipe: Recipe
    labels: Sequence[Tensor] = ()
    held_out: Sequence[Mapping[str, Tensor]] = ()
    held_out_samples: Sequence[Sequence[Sample | None]] = ()


def calibrate(
    model: nn.Module,
    plan: QuantPlan,
    options: CalibrationOptions,
    data: CalibrationData | None,
    device: torch.device,
    *,
    meter: Meter | None = None,
    first_blocks: bool = False,
    journal: Journal | None = None,
) -> CalibrationResult:
    """Quantize the planned linears of `model` in place and return what was done.

    The model lies on the CPU; the layers of one block at a time are moved to `device`. Each block is searched on
    inputs that went through the quantized layers before it. Without data every linear is rounded to nearest.

    Args:
        model: in full precision.
        plan: what to quantize.
        options: how to search.
        data: what to search on.
        device: where to compute.
        meter: what steps take is noted there.
        first_blocks: search the first block of each part, and round the others to nearest.
        journal: keeps each block that is finished; those that it holds already are taken from there.

    Raises:
        CalibrationError: NaN or infinite weights or activations.
        UnsupportedModelError: the layers do not form the chains that the plan says.
    """
    started = time.perf_counter()
    checks.require_sound_parameters(model, plan)
    meter = Meter() if meter is None else meter
    bench = Bench(model=model, options=options, device=device, meter=meter, journal=journal)
    with logging.tqdm(total=sum(len(part.layers) for part in plan.parts), unit="layer") as bar:
        done = _round_parts(bench, plan, bar) if data is None else _search_parts(bench, plan, data, bar, first_blocks)
    done.add(*_rounded(bench, plan.unused))
    return CalibrationResult(
        plan=done.plan,
        modules=done.records,
        recipe=None if data is None else data.recipe,
        seconds=time.perf_counter() - started,
        sites=[site.error for site in done.sites if site.error is not None],
        layers=[error for block in done.blocks for error in block.layers],
        joint=[block.joint for block in done.blocks if block.joint is not None],
        encoder=done.encoder,
        folded={site: norm for block in done.blocks for site, norm in block.folded.items()},
        differences=done.differences,
        captured_bytes=done.captured_bytes,
    )


@dataclass(slots=True)
class _Done:
    """What has been finished so far, in order."""

    plan: QuantPlan
    sites: list[FinishedSite] = field(default_factory=list)
    blocks: list[FinishedBlock] = field(default_factory=list)
    records: dict[str, ModuleRecord] = field(default_factory=dict)
    encoder: EncoderResult | None = None
    differences: Mapping[str, float] = field(default_factory=dict)
    captured_bytes: int = 0

    def add(self, *sites: FinishedSite) -> None:
        """Note sites that are in no block, or those of one."""
        for site in sites:
            self.sites.append(site)
            self.records |= site.records

    def take_encoder(
        self, model: nn.Module, learned: EncoderResult, plan: QuantPlan, sites: Sequence[FinishedSite]
    ) -> None:
        """Put an encoder of the journal into the model, with the blocks that were formed on what it gives."""
        for site in sites:
            site.install(model)
        self.plan, self.encoder = plan, learned
        self.records |= learned.records

    def add_block(self, block: FinishedBlock) -> None:
        """Note a block with its sites."""
        self.blocks.append(block)
        self.add(*block.sites)


def _round_parts(bench: Bench, plan: QuantPlan, bar: Any) -> _Done:
    """All parts rounded to nearest."""
    done = _Done(plan)
    for part in plan.parts:
        done.add(*_rounded(bench, part.layers, bar))
    return done


def _rounded(bench: Bench, layers: Sequence[PlannedLayer], bar: Any = None) -> Iterator[FinishedSite]:
    """Sites of layers, rounded to nearest one after the other."""
    for layer in layers:
        with resident(bench.model, layer.path, bench.device):
            for site in layer.sites:
                choice = round_to_nearest(*site_weights(bench.model, site))
                if site.activation is not None and site.activation.static:
                    choice = replace(choice, input_scale=torch.ones(1, device=bench.device))  # nothing was measured
                yield finish_site(bench.model, site, choice)
        if bar is not None:
            bar.update()


def _search_parts(bench: Bench, plan: QuantPlan, data: CalibrationData, bar: Any, first_blocks: bool) -> _Done:
    """All parts in order; between the vision parts and the next one, the encoder is optimised if that is asked for."""
    bar.set_description("capturing inputs")
    captured = capture(bench, plan, data.batches)
    if bench.options.joint:
        bar.set_description("measuring dependency")
        plan = _partition(bench, plan, captured)
    if bench.options.weighs_tokens and data.labels:
        bar.set_description("weighing tokens")
        with bench.meter.timed("weigh"):
            bench = replace(bench, token_weights=token_weights(bench, plan, data.batches, data.labels))
    done = _Done(plan, differences=captured.differences, captured_bytes=captured.bytes)
    step = EncoderStep.of(bench.model, plan, bench.options, bench.device, bench.meter)
    learned = None if step is None or bench.journal is None else read_encoder(bench.journal, bench.model, plan)
    if step is not None and learned is None:
        step.note(data.batches)
    for part in plan.parts:
        full = captured.fronts.pop(part.name)
        if step is not None and done.encoder is None and not part.vision:
            bar.set_description("optimising the encoder")
            if learned is None:
                _optimise_encoder(bench, step, data, captured, full, done)
            else:
                done.take_encoder(bench.model, *learned)
        blocks = [block for block in done.plan.blocks if block.part == part.name]
        _search_part(bench, captured, full, blocks[:1] if first_blocks else blocks, done, bar)
        done.add(*_rounded(bench, part.layers[blocks[0].last + 1 :] if first_blocks else (), bar))
    return done


def _partition(bench: Bench, plan: QuantPlan, captured: Captured) -> QuantPlan:
    """The plan with its blocks, from the journal where they are there."""
    formed = None if bench.journal is None else read_partition(bench.journal, plan)
    if formed is None:
        with bench.meter.timed("dependency"):
            formed = form_blocks(plan, captured.fronts, bench.options)
        if bench.journal is not None:
            write_partition(bench.journal, formed)
    return formed


def _search_part(bench: Bench, captured: Captured, full: Chain, blocks: Sequence[Block], done: _Done, bar: Any) -> None:
    """Blocks of one part in order. Where the journal holds them all, nothing has to run through the part."""
    part, journal = full.part, bench.journal
    held = [None if journal is None else read_block(journal, bench.model, part, block) for block in blocks]
    quantized = None
    if None in held:
        first = part.name == done.plan.parts[0].name
        quantized = full.fork() if first else captured.entering(full)
    for block, finished in zip(blocks, held, strict=True):
        bar.set_description(_place(done.plan, block))
        if finished is not None:
            _take(bench, finished, full, quantized)
        else:
            assert quantized is not None
            finished = quantize_block(bench, block, full, quantized)
            if journal is not None:
                write_block(journal, finished)
        done.add_block(finished)
        bar.set_postfix_str(f"error {finished.layers[-1].error:.2e}")
        bar.update(block.last - block.first + 1)


def _take(bench: Bench, finished: FinishedBlock, full: Chain, quantized: Chain | None) -> None:
    """Put a block of the journal into the model, and move the chains to its end, if there is more to search."""
    layers = full.part.layers[finished.block.first : finished.block.last + 1]
    if quantized is not None:
        _pass_through(bench, layers, lambda: full.advance(finite=False))
    finished.install(bench.model)
    if quantized is not None:
        _pass_through(bench, layers, quantized.advance)


def _pass_through(bench: Bench, layers: Sequence[PlannedLayer], advance: Callable[[], None]) -> None:
    for layer in layers:
        with torch.no_grad(), resident(bench.model, layer.path, bench.device):
            advance()


def _place(plan: QuantPlan, block: Block) -> str:
    """Where the search is, for the progress bar."""
    span = f"{block.first}" if block.first == block.last else f"{block.first}-{block.last}"
    return f"block {plan.blocks.index(block) + 1}/{len(plan.blocks)}, {block.part} layer {span}"


def _optimise_encoder(
    bench: Bench, step: EncoderStep, data: CalibrationData, captured: Captured, front: Chain, done: _Done
) -> None:
    """Between the vision parts and that of `front`, whose blocks are formed again on the features that it gets now."""
    depths: list[float] = []
    if bench.options.joint:
        depths.append(done.plan.mean_depth(front.part.name))
        _form_blocks_again(bench, captured, front, done)
        depths.append(done.plan.mean_depth(front.part.name))
    learned = step.learn(data.batches, data.labels, done.records, bench.journal)
    done.records |= learned.records
    if bench.options.joint:
        _form_blocks_again(bench, captured, front, done)
        depths.append(done.plan.mean_depth(front.part.name))
    done.encoder = replace(learned, mean_depths=tuple(depths))
    if bench.journal is not None:
        write_encoder(bench.journal, done.encoder, done.plan, step.modules())


def _form_blocks_again(bench: Bench, captured: Captured, front: Chain, done: _Done) -> None:
    """The partition of one part on what enters it now, with the threshold as it is."""
    entering = captured.entering(front)
    with bench.meter.timed("dependency"):
        done.plan = form_blocks_of(done.plan, entering, bench.options)
