"""The orchestrator: walks the parts of a model in order, searches each block, and swaps its linears."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.modules.swap import replace_module
from optimum_qvlm.pipeline import checks
from optimum_qvlm.pipeline.block_trial import SiteCandidates, install, search_jointly
from optimum_qvlm.pipeline.capture import Run, Tracer
from optimum_qvlm.pipeline.encoder.step import EncoderResult, EncoderStep
from optimum_qvlm.pipeline.folding import FoldingNorm, folding_norms
from optimum_qvlm.pipeline.hidden_chains import Chain
from optimum_qvlm.pipeline.layer_streaming import resident
from optimum_qvlm.pipeline.options import CalibrationOptions
from optimum_qvlm.pipeline.partitioning import form_blocks, form_blocks_of, make_chain
from optimum_qvlm.pipeline.result import BlockError, CalibrationResult, LayerError, SiteError
from optimum_qvlm.pipeline.token_weights import SiteWeights, token_weights
from optimum_qvlm.plan import Block, ModuleRecord, PlannedLayer, PlannedPart, QuantPlan, Site
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.block import Choice, near_clips
from optimum_qvlm.search.site import round_site, round_to_nearest, search_site
from optimum_qvlm.search.site_problem import SiteChoice, SiteProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationData:
    """Batches of model inputs on the CPU, and the record of where they come from.

    `labels` are needed where the encoder is optimised: per batch the token ids of the answers, -100 elsewhere.
    `held_out` are batches with such labels of samples that are not calibrated on, for whoever measures afterwards.
    """

    batches: Sequence[Mapping[str, Tensor]]
    recipe: Recipe
    labels: Sequence[Tensor] = ()
    held_out: Sequence[Mapping[str, Tensor]] = ()


def calibrate(
    model: nn.Module,
    plan: QuantPlan,
    options: CalibrationOptions,
    data: CalibrationData | None,
    device: torch.device,
) -> CalibrationResult:
    """Quantize the planned linears of `model` in place and return what was done.

    The model lies on the CPU; the layers of one block at a time are moved to `device`. Each block is searched on
    inputs that went through the quantized layers before it. Without data every linear is rounded to nearest.

    Raises:
        CalibrationError: NaN or infinite weights or activations.
        UnsupportedModelError: the layers do not form the chains that the plan says.
    """
    started = time.perf_counter()
    checks.require_sound_parameters(model, plan)
    work = _Work(model, plan, options, device)
    with logging.tqdm(total=sum(len(part.layers) for part in plan.parts), unit="layer") as bar:
        if data is None:
            work.round_all(bar)
        else:
            work.search_all(data, bar)
    return CalibrationResult(
        plan=work.plan,
        modules=work.modules,
        recipe=None if data is None else data.recipe,
        seconds=time.perf_counter() - started,
        sites=work.sites,
        layers=work.layers,
        joint=work.joint,
        encoder=work.encoder,
        folded=work.folded,
    )


@dataclass(slots=True)
class _Work:
    model: nn.Module
    plan: QuantPlan
    options: CalibrationOptions
    device: torch.device
    modules: dict[str, ModuleRecord] = field(default_factory=dict)
    sites: list[SiteError] = field(default_factory=list)
    layers: list[LayerError] = field(default_factory=list)
    joint: list[BlockError] = field(default_factory=list)
    encoder: EncoderResult | None = None
    folded: dict[str, str] = field(default_factory=dict)
    token_weights: SiteWeights = field(default_factory=dict)

    def round_all(self, bar: Any) -> None:
        for part in self.plan.parts:
            for layer in part.layers:
                self._round(layer)
                bar.update()
        for layer in self.plan.unused:
            self._round(layer)

    def _round(self, layer: PlannedLayer) -> None:
        with resident(self.model, layer.path, self.device):
            for site in layer.sites:
                weights, specs = self._weights(site)
                self._swap(site, round_to_nearest(weights, specs, self._scale_dtype(site)))

    def search_all(self, data: CalibrationData, bar: Any) -> None:
        batches = data.batches
        tracer = Tracer.of(self.model, self.plan, self.device)
        bar.set_description("capturing inputs")
        captured = tracer.capture(batches)
        for part in self.plan.parts:
            checks.require_chain(self.model, part, captured[part.name][0], self.device)
            for number, layer in enumerate(part.layers):
                checks.require_shared_inputs(self.model, layer, captured[part.name][0], number, self.device)
        checks.require_unused(tracer, self.plan.unused, captured, batches)
        chains = {
            part.name: make_chain(part, captured.pop(part.name), batches, self.options, self.device)
            for part in self.plan.parts
        }
        if self.options.joint:
            bar.set_description("measuring dependency")
            self.plan = form_blocks(self.model, self.plan, chains, self.options)
        if self.options.weighs_tokens and data.labels:
            bar.set_description("weighing tokens")
            self.token_weights = token_weights(
                self.model, self.plan, batches, data.labels, device=self.device, seed=self.options.seed
            )
        step = EncoderStep.of(self.model, self.plan, self.options, self.device)
        if step is not None:
            step.note(batches)
        for index, part in enumerate(self.plan.parts):
            chain = chains.pop(part.name)
            if step is not None and self.encoder is None and not part.vision:
                bar.set_description("optimising the encoder")
                self._optimise_encoder(step, data, part, chain, tracer)
            if index > 0:
                chain.enter(tracer.enter(part, batches, chain.runs))
            self._search_part(part, chain, bar)
        for layer in self.plan.unused:
            self._round(layer)

    def _optimise_encoder(
        self, step: EncoderStep, data: CalibrationData, part: PlannedPart, chain: Chain, tracer: Tracer
    ) -> None:
        """Between the vision parts and `part`, whose blocks are formed again on the features that it gets now."""
        depths: list[float] = []
        if self.options.joint:
            depths.append(self.plan.mean_depth(part.name))
            self._form_blocks_again(part, chain, tracer.enter(part, data.batches, chain.runs))
            depths.append(self.plan.mean_depth(part.name))
        found = step.learn(data.batches, data.labels, self.modules)
        self.modules |= found.records
        if self.options.joint:
            self._form_blocks_again(part, chain, tracer.enter(part, data.batches, chain.runs))
            depths.append(self.plan.mean_depth(part.name))
        self.encoder = replace(found, mean_depths=tuple(depths))

    def _form_blocks_again(self, part: PlannedPart, chain: Chain, entering: list[Run]) -> None:
        """The partition of one part on what enters it now, with the threshold as it is."""
        now = Chain.of(entering, chain.sampler, self.device)
        self.plan = form_blocks_of(self.model, self.plan, part, now, self.options)

    def _search_part(self, part: PlannedPart, chain: Chain, bar: Any) -> None:
        for number, block in enumerate(self.plan.blocks, start=1):
            if block.part != part.name:
                continue
            span = f"{block.first}" if block.first == block.last else f"{block.first}-{block.last}"
            bar.set_description(f"block {number}/{len(self.plan.blocks)}, {part.name} layer {span}")
            with torch.no_grad(), ExitStack() as stack:
                for layer in part.layers[block.first : block.last + 1]:
                    stack.enter_context(resident(self.model, layer.path, self.device))
                self._search_block(part, block, chain)
            bar.set_postfix_str(f"error {self.layers[-1].error:.2e}")
            bar.update(block.last - block.first + 1)

    def _search_block(self, part: PlannedPart, block: Block, chain: Chain) -> None:
        """Layer-wise first, then jointly; the chain moves from the front of the block to its end."""
        layers = [(number, part.layers[number]) for number in range(block.first, block.last + 1)]
        entering, sites, wanted = list(chain.quantized), [], []
        for number, layer in layers:
            norms = self._folding_norms(part, layer, number, chain)
            wanted.append(chain.full_precision(self._module(layer), number, layer))
            for site in layer.sites:
                choices = self._search_site(site, layer, number, chain, norms.get(site.name))
                install(self.model, site, choices[0])
                sites.append(SiteCandidates(site=site, layer=number, choices=choices))
            if number < block.last:
                chain.advance(self._module(layer), number, layer.name)
        chain.quantized = entering
        chosen: Choice = (0,) * len(sites)
        if self.options.joint and sites:
            tokens, seed = self.options.search_tokens, self.options.seed
            chosen, error = search_jointly(self.model, part, block, sites, chain, wanted[-1], tokens=tokens, seed=seed)
            checks.require_finite_error(error.before, f"the block up to {layers[-1][1].name}")
            self.joint.append(error)
        for entry, number in zip(sites, chosen, strict=True):
            self._finish_site(entry, number)
        for (number, layer), output in zip(layers, wanted, strict=True):
            chain.advance(self._module(layer), number, layer.name)
            found = checks.require_finite_error(chain.error(output), layer.name)
            self.layers.append(LayerError(part=part.name, layer=layer.name, error=found))

    def _folding_norms(
        self, part: PlannedPart, layer: PlannedLayer, number: int, chain: Chain
    ) -> dict[str, FoldingNorm]:
        """Empty where no transform is searched, and where the encoder step will learn from the weights as they were."""
        searched = self.options.fold and self.options.search.transforms is not None
        if not searched or (part.vision and self.options.encoder.epochs > 0):
            return {}
        return folding_norms(self.model, layer, chain.first_run(self._module(layer), number))

    def _search_site(
        self, site: Site, layer: PlannedLayer, number: int, chain: Chain, norm: FoldingNorm | None
    ) -> list[SiteChoice]:
        """Candidates for a site, the layer-wise optimum first. A norm that is given takes up the equalizer."""
        weights, specs = self._weights(site)
        inputs = chain.site_inputs(self._module(layer), number, site, layer.path)
        references = chain.references.pop(site.name)
        problem = SiteProblem(
            inputs=chain.sampled(inputs).to(self.device),
            references=chain.sampled(references).to(self.device),
            all_inputs=chain.real(inputs),
            all_references=chain.real(references),
            token_weights=chain.real(self.token_weights.get(site.name, ())),
            weights=weights,
            specs=specs,
            activation=site.activation,
            scale_dtype=self._scale_dtype(site),
            snap=None if norm is None else norm.snap,
        )
        search = self.options.search
        if self.options.fold and norm is None:
            search = replace(search, transforms=None)
        checks.require_moderate((problem.inputs, problem.wanted_inputs), site.name)
        try:
            best = search_site(problem, search)
        except CalibrationError as error:
            raise CalibrationError(f"{site.name}: {error}; the checkpoint is damaged, or a sample is") from error
        for value in (best.error, best.nearest_error):
            checks.require_finite_error(value, site.name)
        choices = [best]
        if site.activation is not None and self.options.joint:
            clips = near_clips(search.clips.activation, best.activation_clip)
            choices += [round_site(problem, search, activation_clip=c, transform=best.transform) for c in clips]
        equalizer = best.transform.equalizer
        if norm is None or equalizer is None:
            return choices
        norm.take_up(equalizer)
        self.folded[site.name] = f"{layer.name}.{norm.path}"
        return [replace(choice, transform=SiteTransform()) for choice in choices]

    def _finish_site(self, entry: SiteCandidates, number: int) -> None:
        first, choice = entry.choices[0], entry.choices[number]
        self.sites.append(
            SiteError(site=entry.site.name, nearest=first.nearest_error, found=first.error, chosen=choice.error)
        )
        self._swap(entry.site, choice)

    def _module(self, layer: PlannedLayer) -> nn.Module:
        return self.model.get_submodule(layer.path)

    def _weights(self, site: Site) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights = {linear.name: self._linear(linear.path).weight.detach() for linear in site.linears}
        return weights, {linear.name: linear.weight for linear in site.linears}

    def _linear(self, path: str) -> nn.Linear:
        module = self.model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module

    def _scale_dtype(self, site: Site) -> torch.dtype:
        return self._linear(site.linears[0].path).weight.dtype

    def _swap(self, site: Site, choice: SiteChoice) -> None:
        for linear in site.linears:
            quantized = choice.weights[linear.name]
            bias = self._linear(linear.path).bias
            format = LinearFormat(
                weight=linear.weight,
                activation=site.activation,
                activation_clip=choice.activation_clip,
                equalized=choice.transform.equalizer is not None,
                rotation=choice.transform.rotation,
            )
            module = QuantLinear.from_quantized(
                quantized,
                bias,
                format,
                input_equalizer=choice.transform.equalizer,
                input_scale=choice.input_scale,
            )
            replace_module(self.model, linear.path, module)
            self.modules[linear.name] = ModuleRecord(
                in_features=linear.in_features,
                out_features=linear.out_features,
                bias=linear.bias,
                weight_bits=linear.weight.bits,
                weight_group=linear.weight.group,
                symmetric=linear.weight.symmetric,
                scale_dtype=str(quantized.scale.dtype).removeprefix("torch."),
                activation_bits=None if site.activation is None else site.activation.bits,
                activation_group=None if site.activation is None else site.activation.group,
                activation_clip=choice.activation_clip,
                weight_clip=choice.weight_clips[linear.name],
                site=site.name,
                activation_static=site.activation is not None and site.activation.static,
                equalized=format.equalized,
                rotation=format.rotation,
                two_level=linear.weight.two_level,
            )
