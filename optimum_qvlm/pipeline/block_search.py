"""The search of one block: each site alone, then all of them together, then packed for good."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.pipeline import checks
from optimum_qvlm.pipeline.block_trial import SiteCandidates, held_bytes, install, search_jointly
from optimum_qvlm.pipeline.captured import Bench
from optimum_qvlm.pipeline.finished import FinishedBlock, finish_site, site_weights
from optimum_qvlm.pipeline.folding import FoldingNorm, folding_norms
from optimum_qvlm.pipeline.hidden_chains import Chain
from optimum_qvlm.pipeline.layer_streaming import resident
from optimum_qvlm.pipeline.result import BlockError, LayerError, SiteError
from optimum_qvlm.plan import Block, Site
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.block import Choice, near_clips
from optimum_qvlm.search.site import round_site, search_site
from optimum_qvlm.search.site_problem import SiteChoice, SiteProblem


def quantize_block(bench: Bench, block: Block, full: Chain, quantized: Chain) -> FinishedBlock:
    """Search a block, put the packed linears into the model, and move both chains to its end.

    Args:
        bench: where to work.
        block: which layers.
        full: the full-precision chain, in front of the block.
        quantized: the chain through what is quantized, there too.

    Raises:
        CalibrationError: what is measured is not finite.
    """
    layers = full.part.layers[block.first : block.last + 1]
    with torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(resident(bench.model, layer.path, bench.device))
        searched = _search_sites(bench, block, full, quantized.fork())
        bench.meter.note_block(held_bytes(bench.model, layers, searched.candidates))
        choice, joint = _choose(bench, block, searched, quantized)
        sites = [
            finish_site(bench.model, entry.site, entry.choices[number], _site_error(entry, number))
            for entry, number in zip(searched.candidates, choice, strict=True)
        ]
        errors = [_move_on(quantized, target) for target in searched.targets]
    return FinishedBlock(
        block=block,
        sites=tuple(sites),
        layers=tuple(errors),
        joint=joint,
        folded=searched.folded,
        norms=searched.norms,
    )


@dataclass(slots=True)
class _Searched:
    """Candidates of the sites of a block in execution order, and full-precision outputs of each layer and run; which
    norms took up an equalizer, and their tensors, as in `FinishedBlock`."""

    candidates: list[SiteCandidates] = field(default_factory=list)
    targets: list[list[Tensor]] = field(default_factory=list)
    folded: dict[str, str] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)


def _search_sites(bench: Bench, block: Block, full: Chain, ahead: Chain) -> _Searched:
    """Each site alone. `full` is moved to the end of the block, `ahead` through layers that try the best of each."""
    searched = _Searched()
    for number in range(block.first, block.last + 1):
        layer, norms = full.layer, _folding_norms(bench, full)
        references = full.observe()
        searched.targets.append(list(full.hidden))
        for site in layer.sites:
            norm = norms.get(site.name)
            choices = _search_site(bench, site, ahead, references.pop(site.name), norm)
            equalizer = choices[0].transform.equalizer
            if norm is not None and equalizer is not None:
                norm.take_up(equalizer)
                searched.folded[site.name] = f"{layer.name}.{norm.path}"
                searched.norms |= {f"{layer.path}.{name}": tensor for name, tensor in norm.tensors().items()}
                choices = [replace(choice, transform=SiteTransform()) for choice in choices]
            install(bench.model, site, choices[0])
            searched.candidates.append(SiteCandidates(site=site, layer=number, choices=choices))
        if number < block.last:
            ahead.advance()
    return searched


def _folding_norms(bench: Bench, full: Chain) -> dict[str, FoldingNorm]:
    """Empty where no transform is searched, and where the encoder step will learn from the weights as they were."""
    options = bench.options
    searched = options.fold and options.search.transforms is not None
    if not searched or (full.part.vision and options.encoder.epochs > 0):
        return {}
    return folding_norms(bench.model, full.layer, full.first_run())


def _search_site(
    bench: Bench, site: Site, chain: Chain, references: Sequence[Tensor], norm: FoldingNorm | None
) -> list[SiteChoice]:
    """Candidates for a site of the layer in front of `chain`, the layer-wise optimum first.

    `references` are what the site sees at full precision, run by run; a `norm` is to take up the equalizer.
    """
    options = bench.options
    problem = _problem(bench, site, chain, references, norm)
    checks.require_moderate((problem.inputs, problem.wanted_inputs), site.name)
    search = replace(options.search, transforms=None) if options.fold and norm is None else options.search
    with bench.meter.timed("search", chain.part.name):
        try:
            best = search_site(problem, search)
        except CalibrationError as error:
            raise CalibrationError(f"{site.name}: {error}; the checkpoint is damaged, or a sample is") from error
        for value in (best.error, best.nearest_error):
            checks.require_finite_error(value, site.name)
        choices = [best]
        if site.activation is not None and options.joint:
            clips = near_clips(search.clips.activation, best.activation_clip)
            choices += [round_site(problem, search, activation_clip=c, transform=best.transform) for c in clips]
    meter = bench.meter
    meter.weigh("search", problem.inputs.shape[1], lambda: search_site(problem.repeated(meter.weighing), search))
    return choices


def _problem(
    bench: Bench, site: Site, chain: Chain, references: Sequence[Tensor], norm: FoldingNorm | None
) -> SiteProblem:
    weights, grids, scale_dtype = site_weights(bench.model, site)
    inputs = chain.site_inputs(site)
    return SiteProblem(
        inputs=chain.sampled(inputs).to(bench.device),
        references=chain.sampled(references).to(bench.device),
        all_inputs=chain.real(inputs),
        all_references=chain.real(references),
        token_weights=chain.real(bench.token_weights.get(site.name, ())),
        weights=weights,
        specs=grids,
        activation=site.activation,
        scale_dtype=scale_dtype,
        snap=None if norm is None else norm.snap,
    )


def _choose(bench: Bench, block: Block, searched: _Searched, quantized: Chain) -> tuple[Choice, BlockError | None]:
    """The number of a candidate per site: the best of each, or what is best together, where that is searched."""
    candidates, options = searched.candidates, bench.options
    if not options.joint or not candidates:
        return (0,) * len(candidates), None
    with bench.meter.timed("joint", quantized.part.name):
        choice, error = search_jointly(
            block,
            candidates,
            quantized,
            searched.targets[-1],
            tokens=options.search_tokens,
            seed=options.seed,
        )
    checks.require_finite_error(error.before, f"the block up to {quantized.part.layers[block.last].name}")
    return choice, error


def _site_error(entry: SiteCandidates, number: int) -> SiteError:
    first, choice = entry.choices[0], entry.choices[number]
    return SiteError(site=entry.site.name, nearest=first.nearest_error, found=first.error, chosen=choice.error)


def _move_on(quantized: Chain, target: Sequence[Tensor]) -> LayerError:
    """Push the quantized chain through the packed layer in front of it. Returns how far it ends from the target."""
    part, layer = quantized.part, quantized.layer
    quantized.meter.weigh("forward", quantized.hidden[0].nbytes, lambda: quantized.forward(0))
    quantized.advance()
    error = checks.require_finite_error(quantized.error(target), layer.name)
    return LayerError(part=part.name, layer=layer.name, error=error)
