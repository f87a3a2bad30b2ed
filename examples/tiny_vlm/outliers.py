"""The outlier variant: the same function, but with a few channels that dwarf the others.

Large language models grow such channels by themselves; a model this small does not. They are what makes
low-bit activations hard, so a variant with them shows what a quantizer does about it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

FACTORS = (16.0, 8.0)
GROUP = 128


def norm_sites(model: Any) -> Iterator[tuple[Any, list[nn.Linear]]]:
    """Every norm whose output only linears read, with those linears: decoder layers, then encoder layers."""
    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]
    tower = model.model.vision_tower  # some transformers releases nest the encoder one level deeper
    for layer in getattr(tower, "vision_model", tower).encoder.layers:
        attention = layer.self_attn
        yield layer.layer_norm1, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.layer_norm2, [layer.mlp.fc1]


@torch.no_grad()
def add_outliers(model: Any, factors: tuple[float, ...] = FACTORS, group: int = GROUP, seed: int = 0) -> Any:
    """Rescales one random channel per factor in every `group` channels of each norm; returns the model.

    The norm's gain and bias are multiplied by the factor, the columns of the linears behind it divided by
    it. Factors must be powers of two, 1..64: then no product changes by a single bit, and neither do the
    model's outputs in floating point.
    """
    for factor in factors:
        if factor not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"factors hold {factor}; use powers of two in 1..64, which rescale exactly")
    if len(factors) > group:
        raise ValueError(f"{len(factors)} factors do not fit a group of {group} channels; use fewer")
    generator = torch.Generator().manual_seed(seed)
    for norm, linears in norm_sites(model):
        scale = _channel_scale(norm.weight.numel(), factors, group, generator).to(norm.weight)
        norm.weight.mul_(scale)
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(scale)
        for linear in linears:
            linear.weight.div_(scale)
    return model


def _channel_scale(channels: int, factors: tuple[float, ...], group: int, generator: torch.Generator) -> torch.Tensor:
    """1 for ordinary channels, the factor for the chosen ones."""
    scale = torch.ones(channels)
    for start in range(0, channels, group):
        size = min(group, channels - start)
        chosen = start + torch.randperm(size, generator=generator)[: len(factors)]
        scale[chosen] = torch.tensor(factors)[: len(chosen)]
    return scale


def main() -> None:
    """Command line: writes the outlier variant of a model folder, processor files included."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--model", default=str(Path(__file__).parent), help="model folder (default: this)")
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS), help="powers of two")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.model)
    add_outliers(model, tuple(arguments.factors), seed=arguments.seed).save_pretrained(arguments.output)
    AutoProcessor.from_pretrained(arguments.model).save_pretrained(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
