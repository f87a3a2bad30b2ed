"""What is going to be quantized, and what each linear got. Frozen values that can be printed and saved."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from optimum_qvlm.spec import (
    ACTIVATION_NAMES,
    WEIGHT_NAMES,
    ActivationSpec,
    LinearFormat,
    WeightSpec,
    flat_grids,
    read_flat_grids,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLinear:
    """One linear that will be quantized.

    Attributes:
        path: dotted name of the module in the model at run time.
        name: dotted name of its tensors on disk, which is what users see and match.
    """

    path: str
    name: str
    in_features: int
    out_features: int
    bias: bool
    weight: WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Linears that read one input tensor and so share everything about its quantization."""

    linears: tuple[PlannedLinear, ...]
    activation: ActivationSpec | None

    @property
    def name(self) -> str:
        """The disk name of the first linear, which stands for the site."""
        return self.linears[0].name


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """One layer of a part, with its sites in execution order."""

    path: str
    name: str
    sites: tuple[Site, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPart:
    """A chain of layers: each reads what the one before returned. `vision` ones see no text tokens."""

    name: str
    layers: tuple[PlannedLayer, ...]
    vision: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive layers of one part that are searched together. `first` and `last` are layer numbers in it."""

    part: str
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependency:
    """How much the quantized output of a layer leaves open about that of the next: H(next | layer), in nats.

    `layer` is its number in `part`. `marginal` marks outputs of unequal width, where the entropy of the next layer's
    output alone stands in, which is an upper bound.
    """

    part: str
    layer: int
    entropy: float
    marginal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantPlan:
    """Parts in execution order, their blocks, and the linears that stay as they are.

    `dependencies` and `threshold` are what the blocks were formed by; empty and None where nothing was measured, and
    each layer is a block of its own.

    `unused` layers run, but nothing reads what they return: they are in no part and no block, and their linears are
    rounded to nearest.
    """

    parts: tuple[PlannedPart, ...]
    blocks: tuple[Block, ...]
    kept: tuple[str, ...]
    dependencies: tuple[Dependency, ...] = ()
    threshold: float | None = None
    unused: tuple[PlannedLayer, ...] = ()

    def with_blocks(self, part: str, blocks: tuple[Block, ...], dependencies: tuple[Dependency, ...]) -> "QuantPlan":
        """Another partition of one part, and what it was formed by, in the order of the parts."""
        names = [p.name for p in self.parts]
        kept = [b for b in self.blocks if b.part != part], [d for d in self.dependencies if d.part != part]
        return replace(
            self,
            blocks=tuple(sorted([*kept[0], *blocks], key=lambda b: (names.index(b.part), b.first))),
            dependencies=tuple(sorted([*kept[1], *dependencies], key=lambda d: (names.index(d.part), d.layer))),
        )

    def mean_depth(self, part: str) -> float:
        """Layers per block of a part."""
        depths = [block.last - block.first + 1 for block in self.blocks if block.part == part]
        return sum(depths) / len(depths)

    def sites(self) -> list[Site]:
        """All sites, those of the parts in execution order, then those of unused layers."""
        layers = [layer for part in self.parts for layer in part.layers]
        return [site for layer in (*layers, *self.unused) for site in layer.sites]

    def linears(self) -> list[PlannedLinear]:
        """All linears that will be quantized, in the order of their sites."""
        return [linear for site in self.sites() for linear in site.linears]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRecord:
    """What one linear got: its effective precision. Saved in the checkpoint and asserted at load.

    `weight_clip` is the mean over rows and groups of the ratio of the peak that the weight's grid covers; it is already
    contained in the scales. `site` names the first linear of its site.
    """

    in_features: int
    out_features: int
    bias: bool
    format: LinearFormat
    scale_dtype: str
    weight_clip: float
    site: str

    @property
    def weight(self) -> WeightSpec:
        """The weight's grid."""
        return self.format.weight

    @property
    def activation(self) -> ActivationSpec | None:
        """The activation's grid."""
        return self.format.activation

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values in one flat row, under the names of `RECORD_TYPES`."""
        own = {name: getattr(self, name) for name in _OWN_TYPES}
        return (
            own
            | {name: getattr(self.format, name) for name in _FORMAT_TYPES}
            | flat_grids(self.weight, self.activation)
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModuleRecord":
        """Undo `to_dict`.

        Raises:
            TypeError: a field is unknown, or one is missing that every release wrote.
            SpecError: a grid that cannot be.
        """
        unknown, missing = values.keys() - RECORD_TYPES.keys(), REQUIRED_FIELDS - values.keys()
        if unknown or missing:
            kind, names = ("unknown", unknown) if unknown else ("missing", missing)
            raise TypeError(f"{kind} fields: {', '.join(sorted(names))}")
        weight, activation = read_flat_grids(values)
        own, format = ({n: values[n] for n in types if n in values} for types in (_OWN_TYPES, _FORMAT_TYPES))
        return cls(**own, format=LinearFormat(weight=weight, activation=activation, **format))


def _types(kind: type, names: Mapping[str, str]) -> dict[str, Any]:
    """Annotations by flat name."""
    hints = get_type_hints(kind)
    return {flat: hints[name] for flat, name in names.items()}


def _own_types(kind: type, *nested: str) -> dict[str, Any]:
    """Annotations of the fields that hold plain values."""
    return _types(kind, {field.name: field.name for field in fields(kind) if field.name not in nested})


_OWN_TYPES = _own_types(ModuleRecord, "format")
_FORMAT_TYPES = _own_types(LinearFormat, "weight", "activation")

RECORD_TYPES: dict[str, Any] = {
    **_OWN_TYPES,
    **_FORMAT_TYPES,
    **_types(WeightSpec, WEIGHT_NAMES),
    **_types(ActivationSpec, ACTIVATION_NAMES),
    "activation_bits": int | None,
}
"""The fields of a record in JSON, and their types."""

REQUIRED_FIELDS = {
    "in_features", "out_features", "bias", "weight_bits", "weight_group", "symmetric", "scale_dtype",
    "activation_bits", "activation_group", "activation_clip", "weight_clip", "site",
}  # fmt: skip
"""Those that the first release wrote. Later ones are missing in its checkpoints, and as usual there."""
