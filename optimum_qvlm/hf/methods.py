"""Methods of models that transformers' own would get wrong where linears are quantized."""

from types import MethodType
from typing import Any

from optimum_qvlm.compat.torch import own_parameters
from optimum_qvlm.errors import ConfigError
from optimum_qvlm.hf.format.modules import quantized_modules
from optimum_qvlm.modules.qlinear import PackedLinear

STORED = ("weight_packed", "weight_scale", "weight_zero_point", "input_equalizer", "input_scale")
"""Parameters of a quantized linear that stand for its weight or serve its arithmetic."""


def wrap_methods(model: Any) -> None:
    """Give the instance our methods; a deep copy of the model gets ones bound to the copy."""
    for method in METHODS:
        setattr(model, method.__name__, MethodType(method, model))


def unwrap_methods(model: Any) -> None:
    """Undo `wrap_methods`."""
    for method in METHODS:
        vars(model).pop(method.__name__, None)


def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """How many parameters the model has, as in full precision: a quantized weight counts by its values.

    Of `only_trainable` parameters quantized weights are none.
    """
    counted: int = type(self).num_parameters(self, only_trainable, exclude_embeddings)
    if only_trainable:
        return counted
    packed = [module for module in self.modules() if isinstance(module, PackedLinear)]
    parameters = [entry for module in packed for entry in own_parameters(module).items()]
    held = {id(tensor): tensor.numel() for name, tensor in parameters if name in STORED and tensor is not None}
    values = sum(module.in_features * module.out_features for module in quantized_modules(self).values())
    return counted - sum(held.values()) + values


def resize_token_embeddings(
    self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    """As transformers' method, which would replace a quantized output embedding by a plain one.

    Raises:
        ConfigError: the output embedding is quantized, and its size would change.
    """
    head = self.get_output_embeddings()
    if isinstance(head, PackedLinear):
        tokens = head.out_features if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            tokens = -(-tokens // pad_to_multiple_of) * pad_to_multiple_of
        if tokens != head.out_features:
            raise ConfigError(
                f"the output embedding is quantized with {head.out_features} tokens and cannot be resized to {tokens}; "
                "resize the full-precision model and quantize that, quantize without an override for the output "
                "embedding, or resize what dequantize() returns"
            )
    return type(self).resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, mean_resizing)


METHODS = (num_parameters, resize_token_embeddings)
