"""What a calibration has decided for good: sites and blocks with their packed linears, to be put into the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.modules.swap import replace_module
from optimum_qvlm.pipeline.result import BlockError, LayerError, SiteError
from optimum_qvlm.plan import Block, ModuleRecord, PlannedLinear, Site
from optimum_qvlm.search.site_problem import SiteChoice
from optimum_qvlm.spec import WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSite:
    """A site with what its linears became.

    Attributes:
        modules: packed linears, by their paths.
        records: what each got, by disk name.
        error: None where nothing was measured.
    """

    modules: Mapping[str, QuantLinear]
    records: Mapping[str, ModuleRecord]
    error: SiteError | None = None

    def install(self, model: nn.Module) -> None:
        """Put the packed linears into the model."""
        for path, module in self.modules.items():
            replace_module(model, path, module)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedBlock:
    """A block with what was found for it.

    Attributes:
        block: which layers.
        sites: in execution order.
        layers: error of each layer.
        joint: the joint search, None where each site was searched alone.
        folded: path of the norm in the model that took up the equalizer of a site, by the name of the site.
        norms: tensors that such norms have now, by their paths in the model.
    """

    block: Block
    sites: tuple[FinishedSite, ...]
    layers: tuple[LayerError, ...]
    joint: BlockError | None = None
    folded: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)

    def install(self, model: nn.Module) -> None:
        """Put its packed linears into the model, and give norms what they have taken up."""
        for site in self.sites:
            site.install(model)
        with torch.no_grad():
            for path, tensor in self.norms.items():
                model.get_parameter(path).copy_(tensor)


def finish_site(model: nn.Module, site: Site, choice: SiteChoice, error: SiteError | None = None) -> FinishedSite:
    """Pack the linears of a site, as chosen, and put them into the model."""
    modules, records = {}, {}
    for linear in site.linears:
        format = _format(site, linear, choice)
        modules[linear.path] = _packed(plain_linear(model, linear.path), format, linear, choice)
        records[linear.name] = _record(site, format, linear, choice)
    finished = FinishedSite(modules=modules, records=records, error=error)
    finished.install(model)
    return finished


def site_weights(model: nn.Module, site: Site) -> tuple[dict[str, Tensor], dict[str, WeightSpec], torch.dtype]:
    """Weights [out_features, in_features] and grids by disk name, and the dtype of their scales."""
    weights = {linear.name: plain_linear(model, linear.path).weight.detach() for linear in site.linears}
    grids = {linear.name: linear.weight for linear in site.linears}
    return weights, grids, weights[site.name].dtype


def plain_linear(model: nn.Module, path: str) -> nn.Linear:
    """The linear at a path."""
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _format(site: Site, linear: PlannedLinear, choice: SiteChoice) -> LinearFormat:
    return LinearFormat(
        weight=linear.weight,
        activation=site.activation,
        activation_clip=choice.activation_clip,
        equalized=choice.transform.equalizer is not None,
        rotation=choice.transform.rotation,
    )


def _packed(plain: nn.Linear, format: LinearFormat, linear: PlannedLinear, choice: SiteChoice) -> QuantLinear:
    module: QuantLinear = QuantLinear.from_quantized(
        choice.weights[linear.name],
        plain.bias,
        format,
        input_equalizer=choice.transform.equalizer,
        input_scale=choice.input_scale,
    )
    return module


def _record(site: Site, format: LinearFormat, linear: PlannedLinear, choice: SiteChoice) -> ModuleRecord:
    return ModuleRecord(
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=linear.bias,
        format=format,
        scale_dtype=str(choice.weights[linear.name].scale.dtype).removeprefix("torch."),
        weight_clip=choice.weight_clips[linear.name],
        site=site.name,
    )
