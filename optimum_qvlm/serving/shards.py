"""Which rows and input channels of a stored linear one process of a tensor-parallel group holds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qvlm.errors import SpecError
from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.quant.packing import pack_codes, unpack_codes


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows and input channels of a linear as it lies on disk. Rows come in the order of the spans."""

    rows: tuple[range, ...]
    columns: range

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return sum(map(len, self.rows))

    def take_rows(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The rows of a tensor that has all of them along `dim`, as a copy."""
        return torch.cat([tensor.narrow(dim, span.start, len(span)) for span in self.rows], dim)

    def take_columns(self, tensor: Tensor, size: int = 1) -> Tensor:
        """The columns [..., columns / size] of a tensor that has one for each `size` input channels."""
        return tensor[..., self.columns.start // size : self.columns.stop // size]


def require_divisible(name: str, entry: ModuleRecord, shard: Shard, processes: int) -> None:
    """Refuse to split input channels within a group or a rotation block.

    Raises:
        SpecError: names the module, and how many processes it can be served by.
    """
    if len(shard.columns) == entry.in_features:
        return
    size = len(shard.columns)
    groups, rotated = "a group_size that divides {size}", 'search={{"transforms": "off"}}'
    blocks = {
        ("weights in groups", groups): entry.weight.group,
        ("activations in groups", groups): None if entry.activation is None else entry.activation.group,
        ("rotations in blocks", rotated): entry.format.rotation,
    }
    for (what, way_out), block in blocks.items():
        if block is not None and size % block != 0:
            raise SpecError(
                f"{name} cannot be split over {processes} processes: each would hold {size} of its "
                f"{entry.in_features} input channels, and it has {what} of {block}, which have to stay whole; serve it "
                f"with --tensor-parallel-size 1, or quantize with {way_out.format(size=size)}"
            )


def take(kind: str, tensor: Tensor, entry: ModuleRecord | None, shard: Shard) -> Tensor:
    """The part of one stored tensor that belongs to a shard, in the form that a smaller linear would be stored in.

    Args:
        kind: the last component of its name, as `"weight_packed"`.
        tensor: as it lies on disk.
        entry: the record of the linear; None for one in full precision.
        shard: what to take.
    """
    if kind == "weight" or entry is None:
        return shard.take_columns(shard.take_rows(tensor)).contiguous()
    if kind == "weight_packed":
        return _take_packed(shard.take_rows(tensor), entry, shard)
    if kind == "weight_scale":
        return _take_groups(shard.take_rows(tensor), entry, shard)
    if kind == "weight_zero_point":
        codes = unpack_codes(tensor.T, entry.weight.bits, entry.out_features)
        return pack_codes(_take_groups(shard.take_rows(codes, 1).T, entry, shard).T, entry.weight.bits).T.contiguous()
    if kind == "input_equalizer":
        return shard.take_columns(tensor).clone()
    return tensor.clone()


def _take_packed(rows: Tensor, entry: ModuleRecord, shard: Shard) -> Tensor:
    """Whole words where the shard starts and ends at one; codes are packed anew where it does not."""
    if len(shard.columns) == entry.in_features:
        return rows
    first, last = (edge * entry.weight.bits for edge in (shard.columns.start, shard.columns.stop))
    if first % 32 == 0 and last % 32 == 0:
        return rows[:, first // 32 : last // 32].contiguous()
    codes = unpack_codes(rows, entry.weight.bits, entry.in_features)
    return pack_codes(shard.take_columns(codes), entry.weight.bits)


def _take_groups(rows: Tensor, entry: ModuleRecord, shard: Shard) -> Tensor:
    """Scales or zero points [rows, groups] of the columns; one of a whole row belongs to each of its parts."""
    if entry.weight.group is None:
        return rows.contiguous()
    return shard.take_columns(rows, entry.weight.group).contiguous()
