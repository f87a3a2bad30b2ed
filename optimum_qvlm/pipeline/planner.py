"""From a model and options to a plan: which linear gets which grid, in which site and block."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from optimum_qvlm.compat.transformers import tied_keys
from optimum_qvlm.errors import ConfigError, SpecError, UnsupportedModelError
from optimum_qvlm.models.adapter import Adapter, Part
from optimum_qvlm.pipeline.options import CalibrationOptions, LinearChoice, keeps, matches, require_matches
from optimum_qvlm.plan import Block, PlannedLayer, PlannedLinear, PlannedPart, QuantPlan, Site
from optimum_qvlm.spec import TWO_LEVEL_BITS, ActivationSpec, WeightSpec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose weights have more than two dimensions without being several linears."""


def make_plan(adapter: Adapter, options: CalibrationOptions, disk_names: Mapping[str, str]) -> QuantPlan:
    """Resolve every linear of the model. `disk_names` maps run-time paths to the names of tensors on disk.

    Raises:
        SpecError: a group does not fit a linear, named in the message.
        ConfigError: a pattern matches nothing, or asks for what cannot be (a tied output embedding).
        UnsupportedModelError: nothing would be quantized, or a layer chooses among experts.
    """
    planner = _Planner(adapter, options, disk_names)
    parts, unused = planner.parts()
    plan = QuantPlan(
        parts=parts,
        blocks=tuple(Block(part=p.name, first=n, last=n) for p in parts for n in range(len(p.layers))),
        kept=(),
        unused=unused,
    )
    chosen = {linear.path for linear in plan.linears()}
    if not chosen:
        raise UnsupportedModelError("nothing is left to quantize: every linear is kept in full precision")
    kept = tuple(name for path, name in disk_names.items() if path not in chosen)
    return replace(plan, kept=kept)


def require_no_experts(model: nn.Module, layers: Sequence[str]) -> None:
    """Refuse layers that choose among experts: most of their weights would stay as they are, or be rounded unseen.

    Experts in one tensor [experts, ...] are no linears, and those in lists see few or none of the samples' tokens.

    Raises:
        UnsupportedModelError: names the first such module.
    """
    for layer in layers:
        for name, module in model.get_submodule(layer).named_modules():
            fused = not isinstance(module, CONVOLUTIONS) and any(
                parameter.dim() > 2 and parameter.shape[0] > 1 for parameter in module.parameters(recurse=False)
            )
            listed = isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts"
            if fused or listed:
                raise UnsupportedModelError(
                    f"{layer}.{name} holds the experts of a mixture ({type(module).__name__}), which cannot be "
                    "quantized yet; use a dense model of this family"
                )


def on_two_levels(weight: WeightSpec, activation: ActivationSpec | None, in_features: int) -> WeightSpec:
    """The grid with scales that are multiples of one step per row, where that makes its product one of bytes."""
    whole = activation is not None and activation.group is None
    fits = weight.symmetric and weight.bits <= TWO_LEVEL_BITS and weight.groups(in_features) > 1
    return replace(weight, two_level=True) if whole and fits else weight


class _Planner:
    def __init__(self, adapter: Adapter, options: CalibrationOptions, disk_names: Mapping[str, str]) -> None:
        self.adapter, self.options, self.names = adapter, options, disk_names
        self.model = adapter.model

    def parts(self) -> tuple[tuple[PlannedPart, ...], tuple[PlannedLayer, ...]]:
        """The parts, and the layers that nothing reads."""
        found = self.adapter.parts()
        for part in found:
            require_no_experts(self.model, (*part.layers, *part.unused))
        head = self._head()
        if head is not None:
            found = (*found, head)
        require_matches(self.options.keep, self.names.values(), "modules_to_not_convert", keeps)
        require_matches((pattern for pattern, _ in self.options.overrides), self.names.values(), "overrides")
        unused = tuple(self._layer(path, part) for part in found for path in part.unused)
        return tuple(self._part(part) for part in found), unused

    def _head(self) -> Part | None:
        """The output embedding as a part of its own, where an override asks for it."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        path = next((name for name, module in self.model.named_modules() if module is head), None)
        if head is None or path is None or path not in self.names:
            return None
        choice = self._override(self.names[path])
        if choice is None or choice.scheme is None:
            return None
        tied = tied_keys(self.model)
        if f"{path}.weight" in {*tied.keys(), *tied.values()}:
            raise ConfigError(
                f"{self.names[path]} shares its weight with the input embedding and cannot be quantized alone; "
                "remove its override"
            )
        return Part(name="head", layers=(path,))

    def _part(self, part: Part) -> PlannedPart:
        layers = tuple(self._layer(path, part) for path in part.layers)
        return PlannedPart(name=part.name, layers=layers, vision=part.vision)

    def _layer(self, path: str, part: Part) -> PlannedLayer:
        return PlannedLayer(path=path, name=self._display(path), sites=self._sites(path, part))

    def _display(self, path: str) -> str:
        """The disk name of a layer, read off one of its linears."""
        for linear, name in self.names.items():
            if linear == path or linear.startswith(f"{path}."):
                return name.removesuffix(linear.removeprefix(path))
        return path

    def _sites(self, layer: str, part: Part) -> tuple[Site, ...]:
        sites: list[Site] = []
        for members in self.adapter.sites(layer):
            split: dict[ActivationSpec | None, list[PlannedLinear]] = {}
            for path in members:
                planned = self._linear(path, part)
                if planned is not None:
                    split.setdefault(planned[1], []).append(planned[0])
            sites += [Site(linears=tuple(linears), activation=spec) for spec, linears in split.items()]
        return tuple(sites)

    def _linear(self, path: str, part: Part) -> tuple[PlannedLinear, ActivationSpec | None] | None:
        name = self.names[path]
        choice = self._choice(name, part)
        if choice.scheme is None:
            return None
        module = self.model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        try:
            weight = choice.scheme.weight_spec(module.in_features, choice.group_size, symmetric=choice.symmetric)
            unseen = any(path.startswith(f"{layer}.") for layer in part.unused)  # nothing is measured there
            activation = choice.scheme.activation_spec(
                weight, static=choice.static and not unseen, fitted=choice.fitted
            )
            if choice.two_level and not part.vision:
                weight = on_two_levels(weight, activation, module.in_features)
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from error
        linear = PlannedLinear(
            path=path,
            name=name,
            in_features=module.in_features,
            out_features=module.out_features,
            bias=module.bias is not None,
            weight=weight,
        )
        return linear, activation

    def _choice(self, name: str, part: Part) -> LinearChoice:
        override = self._override(name)
        if override is not None:
            return override
        if any(keeps(pattern, name) for pattern in self.options.keep):
            return LinearChoice(scheme=None)
        return self.options.vision if part.vision else self.options.language

    def _override(self, name: str) -> LinearChoice | None:
        return next((choice for pattern, choice in self.options.overrides if matches(pattern, name)), None)
