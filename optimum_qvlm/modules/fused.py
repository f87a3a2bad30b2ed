"""Linears that read the same tensor as one product: the first that is called computes it, the others take their rows.

What is stored once is a `JointLinear` over all their rows. Each linear stays a module of its own, a `FusedLinear`, in
its place in the model, so that no code of the model changes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from optimum_qvlm.compat.accelerate import HOOK, offloads
from optimum_qvlm.compat.torch import StateModule, has_hooks, own_modules, own_parameters, tensor_version
from optimum_qvlm.errors import ConfigError
from optimum_qvlm.kernels import PACKED, TRANSIENT, LinearGrid, QuantizedWeight, StoredWeight, dispatch
from optimum_qvlm.modules.qlinear import PackedLinear, QuantLinear

CANNOT_OFFLOAD = "fused linears cannot be offloaded; call optimum_qvlm.unfuse_linears(model) first"


class JointLinear(PackedLinear):
    """The rows of several linears as one weight, and the product of its last call while some have not taken theirs.

    It holds the parameters, but none of the state, which the linears write under their own names. It is no `nn.Linear`:
    nothing that looks for the linears of a model should find it.
    """

    handover: "Handover"
    sizes: list[int]

    @classmethod
    def of(cls, linears: Sequence[QuantLinear]) -> Self:
        """Join linears of which `why_apart` says nothing, in the layout that they are in or the one for their sum."""
        first = linears[0]
        weights = [dispatch.restore(linear._stored(), linear.grid) for linear in linears]
        joint = cls(
            first.in_features,
            sum(linear.out_features for linear in linears),
            first.format,
            bias=first.bias is not None,
            scale_dtype=first.weight_scale.dtype,
            device="meta",
        )
        joint.handover, joint.decode_tokens = Handover(), first.decode_tokens
        joint.sizes = [linear.out_features for linear in linears]
        joint.path = ", ".join(linear.path for linear in linears if linear.path)
        zeros = [weight.zero_point for weight in weights if weight.zero_point is not None]
        weight = QuantizedWeight(
            torch.cat([weight.codes for weight in weights]),
            torch.cat([weight.scale for weight in weights]),
            torch.cat(zeros) if zeros else None,
        )
        layout = first.layout if first.layout == PACKED else dispatch.choose_layout(joint.grid, weight.codes.device)
        joint._hold(dispatch.store(weight, joint.grid, layout))
        joint.input_equalizer, joint.input_scale = first.input_equalizer, first.input_scale
        if first.bias is not None:
            shifts = [linear.bias.detach() for linear in linears if linear.bias is not None]
            joint.bias = nn.Parameter(torch.cat(shifts), requires_grad=first.bias.requires_grad)
        return joint.train(first.training)

    def put(self, start: int, linear: QuantLinear) -> None:
        """Replace the rows from `start` by those of a linear of this format, and what all share by its own."""
        weight, other = dispatch.restore(self._stored(), self.grid), dispatch.restore(linear._stored(), linear.grid)
        rows = slice(start, start + linear.out_features)
        codes, scale = weight.codes.clone(), weight.scale.clone()
        zero = None if weight.zero_point is None else weight.zero_point.clone()
        codes[rows], scale[rows] = other.codes, other.scale
        if zero is not None and other.zero_point is not None:
            zero[rows] = other.zero_point
        self._hold(dispatch.store(QuantizedWeight(codes, scale, zero), self.grid, self.layout))
        for name in ("input_equalizer", "input_scale"):
            shared, given = getattr(self, name), getattr(linear, name)
            if shared is not None:
                shared.data.copy_(given)
        if self.bias is not None and linear.bias is not None:
            self.bias.data[rows] = linear.bias.detach()

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: see the linears."""
        return {} if destination is None else destination

    def take_state(self, *args: Any) -> None:
        """The linears say that they take none."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse the hook of accelerate that would look for its weights under a name that no state has."""
        if name == HOOK and offloads(value):
            raise ConfigError(f"{CANNOT_OFFLOAD}, and load the model again, as its weights were taken away already")
        super().__setattr__(name, value)


class Handover:
    """Where the product lies between the calls of the linears. Copies and pickles of a model start with none.

    Attributes:
        kept: a joint output whose rows have not all been taken, or None: the very tensor that it is the product of;
            what else must be the same for it to be valid, see `_moment`; the rows of each linear; and a bit for each
            that has not taken its own.
    """

    kept: tuple[Tensor, tuple[Any, ...], Sequence[Tensor], int] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Handover, ()


_ROWS = {"weight_packed": "values", "weight_scale": "scale", "weight_zero_point": "zero_point"}
_SHARED = ("decode_tokens", "input_equalizer", "input_scale")


class FusedLinear(QuantLinear):
    """A linear whose rows lie in a `JointLinear`. Its parameters are computed from there, as the checkpoint has them.

    Called with the tensor that another linear of the group was just called with, it returns its rows of that product;
    with any other tensor, or a second time, it computes the product anew. The product is let go when each has taken its
    rows. On a GPU the rows are a view. They are a copy where gradients are recorded, as views would share a version
    counter and refuse to be changed in place, and on a CPU: PyTorch's elementwise functions (SiLU, GELU) round the last
    elements of a strided row with other code than those of a contiguous tensor, so that a view would change the model
    by a bit.
    """

    joint: JointLinear

    def __init__(self, joint: JointLinear, index: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = joint.in_features, joint.sizes[index], joint.format
        self.joint, self.start = joint, sum(joint.sizes[:index])
        self.index, self.layout = index, PACKED
        self.training = joint.training

    def forward(self, input: Tensor) -> Tensor:
        """Product of the rounded input [..., in_features] with the weight, plus bias, in the input's dtype."""
        joint: JointLinear = own_modules(self)["joint"]  # type: ignore[assignment]
        handover, moment, bit = joint.handover, _moment(input), 1 << self.index
        kept = handover.kept
        if kept is not None and kept[0] is input and kept[1] == moment and kept[3] & bit:
            rows, waiting = kept[2], kept[3] & ~bit
        else:
            rows = joint(input).split_with_sizes(joint.sizes, -1)
            waiting = (1 << len(rows)) - 1 & ~bit
        handover.kept = (input, moment, rows, waiting) if waiting else None
        mine = rows[self.index]
        if torch.is_grad_enabled():
            return mine.clone(memory_format=torch.contiguous_format)
        return mine.contiguous() if mine.device.type == "cpu" else mine

    def quantized_rows(self) -> QuantizedWeight:
        """Codes, scales and zero points of its own rows."""
        weight = dispatch.restore(self.joint._stored(), self.joint.grid)
        rows = slice(self.start, self.start + self.out_features)
        zero = None if weight.zero_point is None else weight.zero_point[rows]
        return QuantizedWeight(weight.codes[rows], weight.scale[rows].clone(), zero)

    def apart(self) -> QuantLinear:
        """The linear as it was before it was fused."""
        alone = QuantLinear(
            self.in_features,
            self.out_features,
            self.format,
            bias=self.bias is not None,
            scale_dtype=self.grid.scale_dtype,
            device="meta",
        )
        alone.decode_tokens, alone.path = self.decode_tokens, self.path
        alone._hold(self._stored())
        for name in ("input_equalizer", "input_scale"):
            shared = getattr(self, name)
            if shared is not None:
                setattr(alone, name, nn.Parameter(shared.detach().clone(), requires_grad=False))
        if self.bias is not None:
            alone.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        alone.train(self.training)
        return alone if self.joint.layout == PACKED else alone.prepare()

    @property
    def grid(self) -> LinearGrid:
        """The format as kernels read it."""
        return dataclasses.replace(self.joint.grid, out_features=self.out_features)

    def __getattr__(self, name: str) -> Any:
        """What it does not hold: its rows of the joint weight as the checkpoint has them, its part of the joint bias (a
        view), and what the whole group shares."""
        if name in _ROWS:
            return getattr(self._stored(), _ROWS[name])
        if name in _SHARED:
            return getattr(self.joint, name)
        if name == "bias":
            shift = self.joint.bias
            return None if shift is None else shift.narrow(0, self.start, self.out_features)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set `decode_tokens` for the whole group."""
        if name == "decode_tokens":
            self.joint.decode_tokens = value
        else:
            super().__setattr__(name, value)

    def prepare(self, *, transient: bool = False) -> Self:
        """Put the joint weight into the layout that is fastest on its device.

        Raises:
            ConfigError: `transient` is asked for, which offloading needs.
        """
        if transient:
            raise ConfigError(CANNOT_OFFLOAD)
        self.joint.prepare()
        return self

    def pack(self) -> Self:
        """Put the joint weight into the layout of the checkpoint."""
        self.joint.pack()
        return self

    def _device(self) -> torch.device:
        return self.joint.weight_packed.device

    def _stored(self) -> StoredWeight:
        return dispatch.store(self.quantized_rows(), self.grid, PACKED)

    def give_state(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The tensors of the linear before it was fused, in their order, none of which share memory."""
        destination.update({f"{prefix}{name}": tensor for name, tensor in self.packed_state().items()})
        for name in ("input_equalizer", "input_scale", "bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                destination[f"{prefix}{name}"] = tensor.detach().clone()

    def take_state(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the weight of the linear into its rows; a state without it, as that of adapters, changes nothing."""
        if not any(f"{prefix}{name}" in state_dict for name in self._written_names()):
            _, strict, missing, *_ = args
            missing.extend(f"{prefix}{name}" for name in self._written_names() if strict)
            return
        alone = self.apart()
        alone.take_state(state_dict, prefix, *args)
        self.joint.put(self.start, alone)

    def _written_names(self) -> list[str]:
        """Names of the tensors in a state of the linear."""
        given = ("weight_zero_point", "input_equalizer", "input_scale", "bias")
        held = own_parameters(self.joint)
        return ["weight_packed", "weight_scale", *(name for name in given if held[name] is not None)]

    def apply_to_tensors(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast the joint weight; for the second of a group there is nothing left to do."""
        StateModule.apply_to_tensors(self, fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Features and grids, for `print(model)`."""
        return f"{super().extra_repr()}, fused"


def fuse(linears: Sequence[QuantLinear]) -> list[FusedLinear]:
    """Linears over one joint weight in place of these, of which `why_apart` says nothing."""
    joint = JointLinear.of(linears)
    fused = [FusedLinear(joint, index) for index in range(len(linears))]
    for linear, apart in zip(fused, linears, strict=True):
        linear.path = apart.path
    return fused


def why_apart(linears: Sequence[QuantLinear]) -> str | None:
    """Why linears cannot be fused; None where they can."""
    if any(linear.layout == TRANSIENT or linear.weight_packed.is_meta for linear in linears):
        return "their weights are not in memory"
    if any(has_hooks(linear) for linear in linears):
        return "they have hooks"
    for what, values in _properties(linears).items():
        if any(value != values[0] for value in values):
            return f"their {what} differ"
    for what in ("input_equalizer", "input_scale"):
        tensors = [getattr(linear, what) for linear in linears]
        if tensors[0] is not None and not all(torch.equal(tensors[0], tensor) for tensor in tensors):
            return f"their {what} differ in value"
    return None


def _properties(linears: Sequence[QuantLinear]) -> dict[str, list[Any]]:
    """What must be the same in all of a group, in words."""
    formats = [linear.format for linear in linears]
    biases = [linear.bias for linear in linears]
    return {
        "devices": [linear.weight_packed.device for linear in linears],
        "weight grids": [format.weight for format in formats],
        "activation grids": [format.activation for format in formats],
        "clips": [format.activation_clip for format in formats],
        "transforms": [(format.equalized, format.rotation) for format in formats],
        "scale dtypes": [linear.weight_scale.dtype for linear in linears],
        "input sizes": [linear.in_features for linear in linears],
        "decode_tokens": [linear.decode_tokens for linear in linears],
        "layouts": [linear.layout == PACKED for linear in linears],
        "biases": [None if bias is None else (bias.dtype, bias.requires_grad) for bias in biases],
    }


def _moment(input: Tensor) -> tuple[Any, ...]:
    """What a product depends on beside the identity of its input: how gradients are recorded, and changes in place.

    The latter cannot be seen of inference tensors, nor while compiling.
    """
    recorded = torch.is_grad_enabled(), input.requires_grad
    if torch.compiler.is_compiling():
        return recorded
    return *recorded, torch.is_inference_mode_enabled(), None if input.is_inference() else tensor_version(input)
