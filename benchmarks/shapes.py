"""Models of real shapes with random weights, made without a download: speed and memory do not depend on the values."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from optimum_qvlm import QVLMConfig
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.modules.swap import replace_module
from optimum_qvlm.pipeline.planner import make_plan
from optimum_qvlm.spec import Scheme

SPREAD = 0.02
"""Standard deviation of the weights."""

LEVELS = "-levels"
"""Behind a scheme: with scales that are multiples of one step per row."""

ROTATED = "-rotated"
"""Behind a scheme: activations are rotated first, as those of calibrated models are."""


def llama(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> LlamaConfig:
    """A text model. Those of small vocabulary tables tie them, as the originals do."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=hidden < 2048,
        max_position_embeddings=4096,
    )


def llava(text: LlamaConfig) -> LlavaConfig:
    """LLaVA-1.5 around a text model: CLIP-L at 336 pixels, 576 tokens per image."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)


SHAPES: dict[str, Callable[[], Any]] = {
    "smollm2-135m": lambda: llama(576, 1536, 30, 9, 3, 49152),
    "smollm2-360m": lambda: llama(960, 2560, 32, 15, 5, 49152),
    "llava-1.5-small": lambda: llava(llama(1024, 2816, 12, 16, 16, 32064)),
    "llava-1.5-7b": lambda: llava(llama(4096, 11008, 32, 32, 32, 32064)),
    "llava-1.5-13b": lambda: llava(llama(5120, 13824, 40, 40, 40, 32064)),
}


def random_model(shape: str, scheme: str | None, dtype: torch.dtype, device: str, **settings: Any) -> Any:
    """A model of `shape`, its linears quantized to `scheme` or left as they are where it is None."""
    return model_of(SHAPES[shape](), scheme, dtype, device, **settings)


def model_of(
    config: Any, scheme: str | None, dtype: torch.dtype, device: str, *, rotated: bool = False, **settings: Any
) -> Any:
    """As `random_model`, of a configuration. With `rotated` every site has a rotation, as calibrated ones have.

    Tensors are made one module at a time: a full-precision copy of a quantized linear never exists.
    """
    auto = AutoModelForCausalLM if isinstance(config, LlamaConfig) else AutoModelForImageTextToText
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype)
    if scheme is not None:
        swap_in_empty(model, QVLMConfig(scheme, method="rtn", **settings), dtype, rotated=rotated)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        fill(module, device, generator)
    model.tie_weights()
    return model.to(device).eval()


def swap_in_empty(model: Any, config: QVLMConfig, dtype: torch.dtype, *, rotated: bool = False) -> None:
    """Put empty quantized linears where the plan says; `rotated` over as many channels of a group as fit."""
    names = {path: path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for site in make_plan(adapter_for(model), config.options(), names).sites():
        for linear in site.linears:
            rotation = math.gcd(linear.in_features, linear.weight.group or 128) if rotated else None
            format = LinearFormat(weight=linear.weight, activation=site.activation, rotation=rotation)
            module = QuantLinear(
                linear.in_features,
                linear.out_features,
                format,
                bias=linear.bias,
                scale_dtype=dtype,
                bias_dtype=dtype,
                device="meta",
            )
            module.decode_tokens = config.weight_only_tokens()
            replace_module(model, linear.path, module)


def fill(module: nn.Module, device: str, generator: torch.Generator) -> None:
    """Give the own parameters of a module random values on `device`."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not parameter.is_meta:
            continue
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if value.dtype == torch.int32:
            value.random_(-(2**31), 2**31 - 1, generator=generator)
        elif name == "weight_scale":
            value.fill_(SPREAD / 2 ** (module.format.weight.bits - 2))  # type: ignore[union-attr]
        elif value.dim() == 1:
            value.fill_(0.0 if name == "bias" else 1.0)
        else:
            value.normal_(0.0, SPREAD, generator=generator)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    if isinstance(module, QuantLinear):
        module.prepare()


def format_of(name: str, channels: int) -> LinearFormat:
    """The format of a linear over `channels`, of a scheme with `-levels` and `-rotated` behind it or not."""
    scheme = Scheme.parse(name.replace(LEVELS, "").replace(ROTATED, ""))
    weight = scheme.weight_spec(channels, "auto", symmetric=True)
    weight = replace(weight, two_level=True) if LEVELS in name else weight
    rotation = math.gcd(channels, 128) if ROTATED in name else None
    return LinearFormat(weight=weight, activation=scheme.activation_spec(weight), rotation=rotation)
