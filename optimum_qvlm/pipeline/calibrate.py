"""The orchestrator: walks the parts of a model in order, searches each block, and swaps its linears."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.modules.swap import replace_module
from optimum_qvlm.pipeline import checks
from optimum_qvlm.pipeline.capture import Run, Tracer, linear_inputs, observe_inputs, require_finite
from optimum_qvlm.pipeline.options import CalibrationOptions
from optimum_qvlm.pipeline.result import CalibrationResult, LayerError, SiteError
from optimum_qvlm.pipeline.streaming import resident
from optimum_qvlm.pipeline.tokens import TokenSampler
from optimum_qvlm.search.plan import ModuleRecord, PlannedLayer, PlannedPart, QuantPlan, Site
from optimum_qvlm.search.problem import SiteChoice, SiteProblem
from optimum_qvlm.search.rounding import round_to_nearest, search_site


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationData:
    """Batches of model inputs on the CPU, and the record of where they come from."""

    batches: Sequence[Mapping[str, Tensor]]
    recipe: Recipe


def calibrate(
    model: nn.Module,
    plan: QuantPlan,
    options: CalibrationOptions,
    data: CalibrationData | None,
    device: torch.device,
) -> CalibrationResult:
    """Quantize the planned linears of `model` in place and return what was done.

    The model lies on the CPU; one layer at a time is moved to `device`. Each layer is searched on inputs that
    went through the quantized layers before it. Without data every linear is rounded to nearest.

    Raises:
        CalibrationError: NaN or infinite weights or activations.
        UnsupportedModelError: the layers do not form the chains that the plan says.
    """
    started = time.perf_counter()
    checks.require_finite_weights(model, plan)
    work = _Work(model, plan, options, device)
    with logging.tqdm(total=sum(len(part.layers) for part in plan.parts), unit="layer") as bar:
        if data is None:
            work.round_all(bar)
        else:
            work.search_all(data.batches, bar)
    return CalibrationResult(
        plan=plan,
        modules=work.modules,
        recipe=None if data is None else data.recipe,
        seconds=time.perf_counter() - started,
        sites=work.sites,
        layers=work.layers,
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

    def round_all(self, bar: Any) -> None:
        for part in self.plan.parts:
            for layer in part.layers:
                with resident(self.model, layer.path, self.device):
                    for site in layer.sites:
                        weights, specs = self._weights(site)
                        self._swap(site, round_to_nearest(weights, specs, self._scale_dtype(site)))
                bar.update()

    def search_all(self, batches: Sequence[Mapping[str, Tensor]], bar: Any) -> None:
        tracer = Tracer(self.model, self._forward(), self.plan.parts, self.device)
        bar.set_description("capturing inputs")
        captured = tracer.capture(batches)
        for part in self.plan.parts:
            checks.require_chain(self.model, part, captured[part.name][0], self.device)
            for number, layer in enumerate(part.layers):
                checks.require_shared_inputs(self.model, layer, captured[part.name][0], number, self.device)
        for index, part in enumerate(self.plan.parts):
            runs = captured.pop(part.name)
            inputs = [run.hidden for run in runs] if index == 0 else tracer.inputs(part, batches, runs)
            masks = [None if part.vision else batches[run.batch].get("attention_mask") for run in runs]
            sampler = TokenSampler(masks, self.options.search_tokens, self.options.seed)
            self._search_part(part, _Chain(runs, inputs, sampler, self.device), bar)

    def _forward(self) -> Callable[..., Any]:
        """The model's forward without a cache, and without logits where no part needs them."""
        whole = any(part.name == "head" for part in self.plan.parts)
        target: Any = self.model if whole else self.model.base_model

        def forward(**inputs: Tensor) -> Any:
            return target(**inputs, use_cache=False)

        return forward

    def _search_part(self, part: PlannedPart, chain: "_Chain", bar: Any) -> None:
        numbers = {(b.part, n): i for i, b in enumerate(self.plan.blocks) for n in range(b.first, b.last + 1)}
        for number, layer in enumerate(part.layers):
            block = numbers[part.name, number] + 1
            bar.set_description(f"block {block}/{len(self.plan.blocks)}, {part.name} layer {number}")
            with torch.no_grad(), resident(self.model, layer.path, self.device):
                wanted = chain.full_precision(self.model.get_submodule(layer.path), number, layer)
                for site in layer.sites:
                    self._search_site(site, layer, number, chain)
                error = chain.advance(self.model.get_submodule(layer.path), number, wanted, layer.name)
            self.layers.append(LayerError(part=part.name, layer=layer.name, error=error))
            bar.set_postfix_str(f"error {error:.2e}")
            bar.update()

    def _search_site(self, site: Site, layer: PlannedLayer, number: int, chain: "_Chain") -> None:
        weights, specs = self._weights(site)
        module = self.model.get_submodule(layer.path)
        inputs, references = chain.site_inputs(module, number, site, layer.path), chain.references.pop(site.name)
        problem = SiteProblem(
            inputs=chain.sampled(inputs).to(self.device),
            references=chain.sampled(references).to(self.device),
            all_inputs=chain.real(inputs),
            all_references=chain.real(references),
            weights=weights,
            specs=specs,
            activation=site.activation,
            scale_dtype=self._scale_dtype(site),
        )
        choice = search_site(problem, self.options.search)
        self.sites.append(SiteError(site=site.name, nearest=choice.nearest_error, found=choice.error))
        self._swap(site, choice)

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
            )


@dataclass(slots=True)
class _Chain:
    """Hidden states of one part, run by run: the full-precision chain and the quantized one, on the CPU."""

    runs: list[Run]
    quantized: list[Tensor]
    sampler: TokenSampler
    device: torch.device
    references: dict[str, list[Tensor]] = field(default_factory=dict)

    def full_precision(self, module: nn.Module, number: int, layer: PlannedLayer) -> list[Tensor]:
        """Outputs of the layer before it is quantized, on full-precision inputs, which they replace.

        What its sites see on the way is kept in `references`, by the site's name.
        """
        local = {site.name: _local(site, layer.path) for site in layer.sites}
        self.references = {name: [] for name in local}
        for run in self.runs:
            run_layer = _bind(run, number, module, run.hidden.to(self.device), self.device)
            output, seen = observe_inputs(module, list(local.values()), run_layer)
            run.hidden = output.cpu()
            for name, path in local.items():
                self.references[name].append(seen[path].cpu())
        return [run.hidden for run in self.runs]

    def site_inputs(self, module: nn.Module, number: int, site: Site, layer_path: str) -> list[Tensor]:
        """What reaches the site through the quantized prefix, run by run, on the CPU."""
        local = _local(site, layer_path)
        found = []
        for run, hidden in zip(self.runs, self.quantized, strict=True):
            run_layer = _bind(run, number, module, hidden.to(self.device), self.device)
            tensor = linear_inputs(module, [local], run_layer)[local]
            require_finite(tensor, site.name, run.batch)
            found.append(tensor.cpu())
        return found

    def sampled(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tokens [tokens, channels] that candidates are compared on."""
        return torch.cat([self.sampler.take(index, tensor) for index, tensor in enumerate(tensors)])

    def real(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All tokens but padding, run by run."""
        return [self.sampler.real(index, tensor) for index, tensor in enumerate(tensors)]

    def advance(self, module: nn.Module, number: int, wanted: Sequence[Tensor], name: str) -> float:
        """Push the quantized chain through the quantized layer. Returns the relative squared error."""
        error = norm = 0.0
        for index, run in enumerate(self.runs):
            output = run.calls[number](module, self.quantized[index].to(self.device), self.device)
            require_finite(output, name, run.batch)
            change, size = self.sampler.relative_error(index, output, wanted[index].to(self.device))
            error, norm = error + change, norm + size
            self.quantized[index] = output.cpu()
        return error / max(norm, 1e-30)


def _bind(run: Run, number: int, module: nn.Module, hidden: Tensor, device: torch.device) -> Callable[[], Tensor]:
    return lambda: run.calls[number](module, hidden, device)


def _local(site: Site, layer_path: str) -> str:
    """The path of the site's first linear inside its layer, empty where the layer is that linear."""
    return site.linears[0].path.removeprefix(layer_path).removeprefix(".")
