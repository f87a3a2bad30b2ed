"""What is going to be quantized, and what each linear got. Frozen values that can be printed and saved."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from optimum_qvlm.spec import ActivationSpec, WeightSpec


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

    `activation_clip` is the ratio of the dynamic peak that the largest code stands for, `weight_clip` the mean
    over rows and groups of the same ratio for the weight (already contained in the scales). `activation_static`
    marks a scale fixed in calibration, `equalized` and `rotation` the transform of the site
    (`optimum_qvlm.quant.transform`), `two_level` weight scales that are multiples of one step per row.
    """

    in_features: int
    out_features: int
    bias: bool
    weight_bits: int
    weight_group: int | None
    symmetric: bool
    scale_dtype: str
    activation_bits: int | None
    activation_group: int | None
    activation_clip: float
    weight_clip: float
    site: str
    activation_static: bool = False
    equalized: bool = False
    rotation: int | None = None
    two_level: bool = False

    @property
    def weight(self) -> WeightSpec:
        """The weight's grid."""
        return WeightSpec(
            bits=self.weight_bits, group=self.weight_group, symmetric=self.symmetric, two_level=self.two_level
        )

    @property
    def activation(self) -> ActivationSpec | None:
        """The activation's grid."""
        if self.activation_bits is None:
            return None
        return ActivationSpec(bits=self.activation_bits, group=self.activation_group, static=self.activation_static)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModuleRecord":
        """Undo `to_dict`. Unknown or missing fields raise TypeError."""
        return cls(**values)
