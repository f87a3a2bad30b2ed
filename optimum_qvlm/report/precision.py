"""What the parts of a quantized model consist of, read off its record: for cards and the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from optimum_qvlm.plan import ModuleRecord

BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}
"""Bits per element of the dtypes that safetensors names."""

BYTE_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRow:
    """Linears of one part that have the same precision.

    Attributes:
        part: leading components of their names, up to the first layer number.
        scheme: as in `w4a8`.
        weight_group: input channels that share a weight scale, None for whole rows.
        activation_group: channels of a token that share a scale, None for whole tokens or no rounding.
        activation_static: whether calibration fixed the range of activations.
        symmetric: whether weight grids have no zero points.
        two_level: whether weight scales are multiples of one step per row.
        weights: how many weights they hold.
        bytes: all their tensors on disk.
        error: of the output of the part's last layer, None where no calibration measured it.
    """

    part: str
    scheme: str
    weight_group: int | None
    activation_group: int | None
    activation_static: bool
    symmetric: bool
    two_level: bool
    linears: int
    weights: int
    bytes: int
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def scheme_of(record: ModuleRecord) -> str:
    """As in `w4a8`; 16 stands for activations that are not rounded."""
    return f"w{record.weight_bits}a{record.activation_bits or 16}"


def part_of(name: str) -> str:
    """The part that a linear belongs to.

    Example:
        >>> part_of("model.layers.3.mlp.up_proj"), part_of("multi_modal_projector.linear_1"), part_of("lm_head")
        ('model.layers', 'multi_modal_projector', 'lm_head')
    """
    components = name.split(".")
    numbers = [index for index, component in enumerate(components) if component.isdigit()]
    if numbers:
        return ".".join(components[: numbers[0]])
    return ".".join(components[:-1]) or name


def part_rows(
    modules: Mapping[str, ModuleRecord], manifest: Mapping[str, Any], layers: Sequence[Mapping[str, Any]] = ()
) -> list[PartRow]:
    """One row per part and precision, in the order of the record. `layers` are those of the report."""
    errors = {part_of(f"{layer['layer']}.last"): float(layer["error"]) for layer in layers}
    sizes = bytes_of_modules(manifest)
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, record in modules.items():
        activation = (record.activation_group, record.activation_static)
        grid = (record.symmetric, record.two_level)
        key = (part_of(name), scheme_of(record), record.weight_group, *activation, *grid)
        found.setdefault(key, []).append(name)
    return [
        PartRow(
            part=part,
            scheme=scheme,
            weight_group=weight_group,
            activation_group=activation_group,
            activation_static=activation_static,
            symmetric=symmetric,
            two_level=two_level,
            linears=len(names),
            weights=sum(modules[name].in_features * modules[name].out_features for name in names),
            bytes=sum(sizes.get(name, 0) for name in names),
            error=errors.get(part),
        )
        for (
            part,
            scheme,
            weight_group,
            activation_group,
            activation_static,
            symmetric,
            two_level,
        ), names in found.items()
    ]


def bytes_of_modules(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on disk of the tensors that lie directly in each module."""
    sizes: dict[str, int] = {}
    for tensor, entry in manifest.items():
        module = tensor.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + tensor_bytes(entry)
    return sizes


def tensor_bytes(entry: Sequence[Any]) -> int:
    """Bytes of one manifest entry, [dtype, shape]; 0 for a dtype that is not known."""
    dtype, shape = entry
    return int(BITS.get(dtype, 0) * prod(shape) // 8)


def readable_bytes(count: int | float) -> str:
    """`count` in the largest decimal unit that it reaches, as in `1.25 GB`."""
    for unit, factor in BYTE_UNITS.items():
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def readable_group(row: PartRow) -> str:
    """How weights share scales, as in `64, zero point`."""
    return readable_scales(row.weight_group, symmetric=row.symmetric, two_level=row.two_level)


def readable_scales(group: int | None, *, symmetric: bool, two_level: bool) -> str:
    """The same of a grid: the channels of a scale, and what is special about it."""
    shared = "row" if group is None else str(group)
    if two_level:
        return f"{shared}, two levels"
    return shared if symmetric else f"{shared}, zero point"


def readable_activation(row: PartRow) -> str:
    """What activations share a scale, as in `token, 64`; nothing where they are not rounded."""
    if row.scheme.endswith("a16"):
        return ""
    if row.activation_static:
        return "tensor, fixed"
    return "token" if row.activation_group is None else f"token, {row.activation_group}"
