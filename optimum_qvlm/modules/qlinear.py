"""A linear layer whose weight is stored as packed integers."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from optimum_qvlm.compat.torch import StateModule, own_parameters
from optimum_qvlm.compat.transformers import spared_by_initialisation
from optimum_qvlm.kernels import (
    CHECKPOINT_LAYOUTS,
    PACKED,
    TRANSIENT,
    LinearGrid,
    QuantizedWeight,
    Rounding,
    StoredWeight,
    dispatch,
    schema,
)
from optimum_qvlm.kernels.bound import BoundLinear, is_plain
from optimum_qvlm.modules.frozen import refuse_training
from optimum_qvlm.modules.read_only import ReadOnlyWeight, refusal
from optimum_qvlm.quant.affine import dequantize_weight
from optimum_qvlm.quant.packing import packed_width
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.spec import LinearFormat

__all__ = ["PACKED_PARAMETERS", "LinearFormat", "PackedLinear", "QuantLinear"]

PACKED_PARAMETERS = ("weight_packed", "weight_scale", "weight_zero_point", "input_equalizer", "input_scale")


_SETTINGS = ("in_features", "out_features", "format", "layout", "decode_tokens")


@spared_by_initialisation  # which would dequantize each weight, to fill a copy with random values
class PackedLinear(StateModule):
    """A product with packed integers: `y = Q(x T) dequantize(W)^T + b`.

    Parameters, of which only the bias can be trained:
        weight_packed: int32 [out_features, words], see `optimum_qvlm.quant.packing`.
        weight_scale: [out_features, groups], floating.
        weight_zero_point: int32 [words, groups], packed along the rows; None on a symmetric grid.
        input_equalizer: fp32 [in_features], the diagonal of T; None where the site is not equalized.
        input_scale: fp32 [1], the scale of a static activation; None on dynamic grids.
        bias: [out_features] or None.

    `format` holds the grids. `weight` is a property that dequantizes on demand, for code that looks at it. Up to
    `decode_tokens` tokens, activations are not rounded. `path` is where in a model it lies, for errors; `bound_linear`
    is kept of a call that could do without PyTorch's dispatcher, for the next one.

    The shapes above are those of the checkpoint, layout `"packed"`. `prepare` puts the first three parameters into the
    layout that is fastest on their device, in place, and `pack` back; `layout` names what they hold. Both lose nothing.
    """

    in_features: int
    out_features: int
    layout: str
    decode_tokens: int
    settings: str
    path = ""
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_equalizer: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None
    bound_linear: BoundLinear | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: LinearFormat,
        *,
        bias: bool = True,
        scale_dtype: torch.dtype = torch.float32,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.layout, self.decode_tokens = PACKED, 0
        bits, groups = format.weight.bits, format.weight.groups(in_features)
        words = packed_width(in_features, bits)
        self.weight_packed = _frozen(torch.empty(out_features, words, dtype=torch.int32, device=device))
        self.weight_scale = _frozen(torch.empty(out_features, groups, dtype=scale_dtype, device=device))
        zero = torch.empty(packed_width(out_features, bits), groups, dtype=torch.int32, device=device)
        self.register_parameter("weight_zero_point", None if format.weight.symmetric else _frozen(zero))
        equalizer = torch.empty(in_features, dtype=torch.float32, device=device)
        self.register_parameter("input_equalizer", _frozen(equalizer) if format.equalized else None)
        static = format.activation is not None and format.activation.static
        fixed = torch.empty(1, dtype=torch.float32, device=device)
        self.register_parameter("input_scale", _frozen(fixed) if static else None)
        shift = torch.empty(out_features, dtype=bias_dtype, device=device)
        self.register_parameter("bias", nn.Parameter(shift) if bias else None)

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedWeight,
        bias: Tensor | None,
        format: LinearFormat,
        *,
        input_equalizer: Tensor | None = None,
        input_scale: Tensor | None = None,
    ) -> Self:
        """Pack a rounded weight, in which the inverse of the site's transform is already folded.

        The bias is taken as it is. `input_equalizer` and `input_scale` go with `format.equalized` and a static
        activation.
        """
        assert format.equalized == (input_equalizer is not None)
        rows, columns = quantized.codes.shape
        module = cls(
            columns,
            rows,
            format,
            bias=bias is not None,
            scale_dtype=quantized.scale.dtype,
            device=torch.device("meta"),
        )
        weight = QuantizedWeight(quantized.codes, quantized.scale.detach().clone(), quantized.zero_point)
        module._hold(dispatch.store(weight, module.grid, PACKED))
        if input_equalizer is not None:
            module.input_equalizer = _frozen(input_equalizer.detach().float().clone())
        if module.input_scale is not None:
            assert input_scale is not None
            module.input_scale = _frozen(input_scale.detach().float().reshape(1).clone())
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return module

    @property
    def grid(self) -> LinearGrid:
        """The format as kernels read it."""
        return LinearGrid(
            in_features=self.in_features,
            out_features=self.out_features,
            weight=self.format.weight,
            activation=self.format.activation,
            scale_dtype=self.weight_scale.dtype,
            decode_tokens=self.decode_tokens,
        )

    def prepare(self, *, transient: bool = False) -> Self:
        """Put the weight into the layout that is fastest on its device; weights on the meta device stay packed.

        With `transient` the tensors stay as they are and are put into that layout for each call, for hooks that bring
        them from memory or disk: results are those of a prepared module.
        """
        if transient:
            self.pack().layout = TRANSIENT
            return self
        layout = PACKED if self.weight_packed.is_meta else dispatch.choose_layout(self.grid, self.weight_packed.device)
        return self if layout == self.layout else self.put_into(layout)

    def pack(self) -> Self:
        """Put the weight back into the layout of the checkpoint."""
        if not self._holds_checkpoint():
            self.put_into(PACKED)
        self.layout = PACKED
        return self

    def put_into(self, layout: str) -> Self:
        """Put the weight into a layout by its name, whatever is fastest here; nothing is lost."""
        self._hold(dispatch.store(dispatch.restore(self._stored(), self.grid), self.grid, layout))
        return self

    def packed_state(self) -> dict[str, Tensor]:
        """The parameters of the weight as the checkpoint holds them, by name, whatever the layout."""
        stored = self._stored()
        if not self._holds_checkpoint():
            stored = dispatch.store(dispatch.restore(stored, self.grid), self.grid, PACKED)
        named = {"weight_packed": stored.values.detach(), "weight_scale": stored.scale.detach()}
        return named if stored.zero_point is None else {**named, "weight_zero_point": stored.zero_point.detach()}

    def _holds_checkpoint(self) -> bool:
        return self.layout in CHECKPOINT_LAYOUTS

    def quantized(self) -> QuantizedWeight:
        """The codes, scales and zero points, unpacked."""
        return dispatch.restore(self._stored(), self.grid)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out_features, in_features] in the dtype of the scales, transform undone.

        To be read only: see `ReadOnlyWeight`, which dequantizes when values are needed. Compiled code dequantizes at
        once, into a plain tensor.
        """
        if torch.compiler.is_compiling():
            return self._weight_values()
        like = torch.empty(self.out_features, self.in_features, dtype=self.grid.scale_dtype, device="meta")
        return ReadOnlyWeight(self._weight_values, self.owner(), like, self._device())

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise refusal(self.owner())

    @weight.deleter
    def weight(self) -> None:
        raise refusal(self.owner())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter. What is packed asks for no gradients, and there is no weight beside it.

        Raises:
            ReadOnlyError: `name` is "weight".
        """
        if name == "weight":
            raise refusal(self.owner())
        if param is not None and name in PACKED_PARAMETERS:
            param.requires_grad_(False)
        super().register_parameter(name, param)
        if name == "weight_packed" and param is not None:
            refuse_training(param, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As of any module, for copies and pickles."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        packed = own_parameters(self).get("weight_packed")
        if packed is not None:
            refuse_training(packed, self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep `settings` in step: what the operation takes beside tensors, in one string.

        A compiled graph checks every value that it has read before each call. So it reads one and not eleven.
        """
        super().__setattr__(name, value)
        if name in _SETTINGS and all(each in self.__dict__ for each in _SETTINGS):
            sizes = self.in_features, self.out_features, self.decode_tokens
            self.__dict__["settings"] = schema.written(self.layout, *sizes, self.format)

    def forward(self, input: Tensor) -> Tensor:
        """Product of the rounded input [..., in_features] with the weight, plus bias, in the input's dtype."""
        held = own_parameters(self)
        bias = held["bias"]
        if is_plain(input, bias) and self.layout not in CHECKPOINT_LAYOUTS:
            bound = self.bound_linear
            if bound is None or not bound.is_of(self.settings, held):
                bound = self._bind()
            return bound(input)
        read = schema.parsed if torch.compiler.is_compiling() else schema.remembered
        zero, equalized, static, values = read(self.settings)
        y: Tensor = torch.ops.optimum_qvlm.linear.default(
            input,
            held["weight_packed"],
            held["weight_scale"],
            held["weight_zero_point"] if zero else None,
            bias,
            held["input_equalizer"] if equalized else None,
            held["input_scale"] if static else None,
            *values,
        )
        return y

    def _bind(self) -> BoundLinear:
        """The product as it is now."""
        rounding = Rounding.of(
            self.format.activation,
            clip=self.format.activation_clip,
            scale=self.input_scale,
            equalizer=self.input_equalizer,
            rotation=self.format.rotation,
        )
        self.bound_linear = BoundLinear(self._stored(), self.bias, rounding, self.grid, self.settings)
        return self.bound_linear

    def _stored(self) -> StoredWeight:
        return StoredWeight(self.layout, self.weight_packed, self.weight_scale, self.weight_zero_point)

    def _hold(self, stored: StoredWeight) -> None:
        """Replace the parameters of the weight by tensors of another layout."""
        self.layout, self.bound_linear = stored.layout, None
        self.weight_packed, self.weight_scale = _frozen(stored.values), _frozen(stored.scale)
        if stored.zero_point is not None:
            self.weight_zero_point = _frozen(stored.zero_point)

    def _device(self) -> torch.device:
        return self.weight_packed.device

    def owner(self) -> str:
        """What errors call it."""
        sizes = f"{self.out_features}x{self.in_features}"
        return f"{self.path} (quantized, {sizes})" if self.path else f"a quantized linear of {sizes}"

    def _weight_values(self) -> Tensor:
        return self._plain_weight().to(self.grid.scale_dtype)

    def _plain_weight(self) -> Tensor:
        transform = SiteTransform(self.input_equalizer, self.format.rotation)
        weight = dequantize_weight(self.quantized())
        return weight if transform.is_identity else transform.unfold(weight)

    def apply_to_tensors(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as any module, except that scales keep their dtype: codes were chosen for it.

        On a device of another type the layout is chosen anew.
        """
        here = self.weight_packed.device
        self.bound_linear = None
        prepared = not self._holds_checkpoint()
        moves = prepared and fn(torch.empty(0, dtype=torch.float32, device=here)).device.type != here.type
        if moves:
            self.pack()
        fixed = ("weight_scale", "input_equalizer", "input_scale")
        before = [(name, kept.detach()) for name in fixed if (kept := getattr(self, name)) is not None]
        super().apply_to_tensors(fn, recurse)
        for name, kept in before:
            found = getattr(self, name)
            if found.dtype != kept.dtype:
                setattr(self, name, _frozen(kept.to(found.device)))
        return self.prepare() if moves else self

    def take_state(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the weight in the layout of the checkpoint or in the one of this device, whichever is given."""
        found, prepared = state_dict.get(f"{prefix}weight_packed"), not self._holds_checkpoint()
        if found is not None and (found.dtype == torch.int32) == prepared:
            layout = PACKED if prepared else dispatch.choose_layout(self.grid, found.device)
            self._hold(dispatch.store(self._blank(), self.grid, layout))
        super().take_state(state_dict, prefix, *args)
        if prepared:
            self.prepare()

    def _blank(self) -> QuantizedWeight:
        """Zeros in place of the weight."""
        device, rows = self.weight_packed.device, self.out_features
        scale = torch.ones(rows, self.grid.groups, dtype=self.weight_scale.dtype, device=device)
        zero = None if self.format.weight.symmetric else torch.zeros_like(scale, dtype=torch.int8)
        return QuantizedWeight(torch.zeros(rows, self.in_features, dtype=torch.int8, device=device), scale, zero)

    def reset_parameters(self) -> None:
        """Nothing to initialise: packed weights only come from a rounding or a checkpoint."""

    def extra_repr(self) -> str:
        """Features and grids, for `print(model)`."""
        weight, activation = self.format.weight, self.format.activation
        shown = f"weight={weight.bits} bits/{weight.group or 'row'}"
        if activation is not None:
            extent = "static" if activation.static else activation.group or "token"
            shown += f", activation={activation.bits} bits/{extent}"
        if self.format.equalized:
            shown += ", equalized"
        if self.format.rotation is not None:
            shown += f", rotation={self.format.rotation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {shown}, bias={self.bias is not None}"
        )

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain linear with the dequantized weight."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(self._plain_weight().to(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear


class QuantLinear(PackedLinear, nn.Linear):  # type: ignore[misc]
    """A linear of a model: what looks for `nn.Linear` finds it."""


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
