"""What the parts of a quantized model consist of, read off its record: for cards and the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.spec import ActivationSpec, Scheme, WeightSpec, flat_grids

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
        weight: the grid of their weights.
        activation: the grid of their activations, None where these are not rounded.
        linears: how many they are.
        weights: how many weights they hold.
        bytes: all their tensors on disk.
        error: of the output of the part's last layer, None where no calibration measured it.
    """

    part: str
    weight: WeightSpec
    activation: ActivationSpec | None
    linears: int
    weights: int
    bytes: int
    error: float | None = None

    @property
    def scheme(self) -> str:
        """As in `w4a8`."""
        return str(Scheme.of(self.weight, self.activation))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values in one flat row, bits as the scheme."""
        grids = flat_grids(self.weight, self.activation)
        rest = {name: getattr(self, name) for name in ("linears", "weights", "bytes", "error")}
        shown = {name: value for name, value in grids.items() if name not in ("weight_bits", "activation_bits")}
        return {"part": self.part, "scheme": self.scheme} | shown | rest


def scheme_of(record: ModuleRecord) -> str:
    """As in `w4a8`; 16 stands for activations that are not rounded."""
    return str(Scheme.of(record.weight, record.activation))


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
    alike: dict[tuple[str, WeightSpec, ActivationSpec | None], list[str]] = {}
    for name, record in modules.items():
        alike.setdefault((part_of(name), record.weight, record.activation), []).append(name)
    return [
        PartRow(
            part=part,
            weight=weight,
            activation=activation,
            linears=len(names),
            weights=sum(modules[name].in_features * modules[name].out_features for name in names),
            bytes=sum(sizes.get(name, 0) for name in names),
            error=errors.get(part),
        )
        for (part, weight, activation), names in alike.items()
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


def readable_scales(weight: WeightSpec) -> str:
    """How weights share scales, as in `64, zero point`: the channels of a scale, and what is special about it."""
    shared = "row" if weight.group is None else str(weight.group)
    if weight.two_level:
        return f"{shared}, two levels"
    return shared if weight.symmetric else f"{shared}, zero point"


def readable_activation(activation: ActivationSpec | None) -> str:
    """What activations share a scale, as in `token, 64`; nothing where they are not rounded."""
    if activation is None:
        return ""
    if activation.static:
        return "tensor, fixed"
    return "token" if activation.group is None else f"token, {activation.group}"
