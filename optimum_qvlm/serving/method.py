"""A linear of vLLM, fused or split over processes, that computes with our operations."""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from optimum_qvlm.errors import CheckpointError, SpecError
from optimum_qvlm.modules.fused import JointLinear, why_apart
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.serving.shards import Shard, require_divisible, take

STORED = {
    "weight": torch.float32,
    "weight_packed": torch.int32,
    "weight_scale": torch.float32,
    "weight_zero_point": torch.int32,
    "weight_shape": torch.int64,
    "input_equalizer": torch.float32,
    "input_scale": torch.float32,
}
"""Tensors of a linear on disk."""

QKV = ("q", "k", "v")
PartId = int | str | None
"""What vLLM calls a part of a fused linear; None for the whole."""

PARTS = "qvlm_parts"
"""Attribute of a linear of vLLM that holds the modules which compute it."""


class ServedLinearMethod(LinearMethodBase):
    """Takes the tensors of one linear of vLLM as they are loaded, and makes modules of them once all are there.

    A fused linear has as many modules as its parts have different formats: one where they share a site, as query, key
    and value do.
    """

    def __init__(self, entries: Mapping[str, ModuleRecord | None], decode_tokens: int) -> None:
        """`entries` are the parts of the linear by name and in their order, None for one in full precision."""
        self.names, self.entries, self.decode_tokens = list(entries), list(entries.values()), decode_tokens
        self.taken: list[dict[str, Tensor]] = [{} for _ in entries]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register empty parameters whose loaders take what is theirs of each tensor.

        Raises:
            SpecError: the processes would share a group of input channels.
        """
        self.dtype, self.shards = params_dtype, shards_of(layer, len(self.names))
        for name, entry, shard in zip(self.names, self.entries, self.shards, strict=True):
            if entry is not None:
                require_divisible(name, entry, shard, layer.tp_size)
        scale = next(entry.scale_dtype for entry in self.entries if entry is not None)
        for kind, dtype in (STORED | {"weight_scale": getattr(torch, scale)}).items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self._take, kind)  # type: ignore[attr-defined]
            layer.register_parameter(kind, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the modules, in the layout that is fastest on the device.

        Raises:
            CheckpointError: a tensor is missing, or is not what the record says.
        """
        if hasattr(layer, PARTS):
            return
        device, shift = layer.weight.device, _added_bias(layer)
        linears: list[nn.Linear] = []
        for number, shard in enumerate(self.shards):
            rows = shard.out_features
            start = sum(linear.out_features for linear in linears)
            linears.append(self._linear(number, device, None if shift is None else shift[start : start + rows]))
        setattr(layer, PARTS, nn.ModuleList(map(self._module, _runs(linears))))
        for kind in STORED.keys() - {"weight"}:  # code of vLLM looks at the dtype and device of a weight
            delattr(layer, kind)
        self.taken = [{} for _ in self.names]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product of `x` [tokens, in_features] with the rows of this process, plus bias, in the dtype of `x`.

        `bias` is in the modules already.
        """
        outputs = [part(x) for part in getattr(layer, PARTS)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _take(self, kind: str, _: nn.Parameter, loaded: Tensor, part: PartId = None) -> None:
        """Keep what this process holds of a tensor. The loader of one of the parameters."""
        number = self._number(part)
        entry = self.entries[number]
        if kind == "weight_shape" or (kind == "weight" and entry is not None):
            return  # the record has the sizes, and the guard is empty
        self.taken[number][kind] = take(kind, loaded, entry, self.shards[number])

    def _number(self, part: PartId) -> int:
        if part is None and len(self.names) == 1:
            return 0
        number = QKV.index(part) if part in QKV else part
        if not isinstance(number, int) or len(self.names) == 1:
            raise CheckpointError(
                f"{', '.join(self.names)}: vLLM loads part {part!r} of it, which is not a linear of the checkpoint; "
                "keep it in full precision with modules_to_not_convert"
            )
        return number

    def _linear(self, number: int, device: torch.device, bias: Tensor | None) -> nn.Linear:
        """One part, packed."""
        name, entry, shard, taken = self.names[number], self.entries[number], self.shards[number], self.taken[number]
        if entry is None:
            linear = nn.Linear(len(shard.columns), shard.out_features, device="meta", dtype=self.dtype, bias=False)
        else:
            linear = QuantLinear(
                len(shard.columns),
                shard.out_features,
                entry.format,
                bias=False,
                scale_dtype=getattr(torch, entry.scale_dtype),
                device="meta",
            )
            linear.decode_tokens = self.decode_tokens
        for kind, parameter in list(linear.named_parameters()):
            tensor = taken.get(kind)
            if tensor is None or tensor.shape != parameter.shape:
                found = "was not loaded" if tensor is None else f"has the shape {list(tensor.shape)}"
                raise CheckpointError(f"{name}.{kind} {found}, expected {list(parameter.shape)}; fetch it again")
            values = tensor.to(device=device, dtype=parameter.dtype)
            linear.register_parameter(kind, nn.Parameter(values, requires_grad=False))
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def _module(self, run: list[nn.Linear]) -> nn.Module:
        """Parts in a row that have one format, as one module."""
        if not isinstance(run[0], QuantLinear):
            return run[0]
        try:
            return JointLinear.of(run).prepare()  # type: ignore[arg-type]
        except SpecError as error:
            raise CheckpointError(f"{', '.join(self.names)}: {error}") from error


def shards_of(layer: Any, parts: int) -> list[Shard]:
    """What this process holds of each of the linears on disk that make up `layer`: its parts, or one whole."""
    columns = range(layer.input_size)
    if isinstance(layer, RowParallelLinear):
        size = layer.input_size_per_partition
        columns = range(layer.tp_rank * size, (layer.tp_rank + 1) * size)
    spans, start = [], 0
    for size, held in _spans(layer):
        spans.append((start, held))
        start += size
    if parts == len(spans):
        return [Shard((held,), columns) for _, held in spans]
    return [Shard(tuple(range(start + held.start, start + held.stop) for start, held in spans), columns)]


def _spans(layer: Any) -> list[tuple[int, range]]:
    """For each part of a fused linear its rows on disk, and which of them this process holds."""
    rank, processes = layer.tp_rank, layer.tp_size
    if isinstance(layer, RowParallelLinear | ReplicatedLinear):
        return [(layer.output_size, range(layer.output_size))]
    if isinstance(layer, QKVParallelLinear):
        heads, group = layer.total_num_kv_heads, layer.num_kv_head_replicas
        return [
            (layer.total_num_heads * layer.head_size, _piece(rank, layer.num_heads * layer.head_size)),
            (heads * layer.head_size, _piece(rank // group, layer.num_kv_heads * layer.head_size)),
            (heads * layer.v_head_size, _piece(rank // group, layer.num_kv_heads * layer.v_head_size)),
        ]
    sizes = layer.output_sizes if isinstance(layer, MergedColumnParallelLinear) else [layer.output_size]
    return [(size, _piece(rank, size // processes)) for size in sizes]


def _piece(number: int, size: int) -> range:
    return range(number * size, (number + 1) * size)


def _added_bias(layer: Any) -> Tensor | None:
    """The bias that the product of this process gets: of several that are summed up, the first one's has it."""
    later = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    shift: Tensor | None = layer.bias
    return None if shift is None or layer.skip_bias_add or later else shift.detach()


def _runs(linears: list[nn.Linear]) -> list[list[nn.Linear]]:
    """Neighbours that can be one module together."""
    runs = [[linears[0]]]
    for before, linear in pairwise(linears):
        if isinstance(before, QuantLinear) and isinstance(linear, QuantLinear) and why_apart([before, linear]) is None:
            runs[-1].append(linear)
        else:
            runs.append([linear])
    return runs
