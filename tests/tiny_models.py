"""Random models of the supported families that are small enough to build in every test."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

VOCABULARY = 50
IMAGE_TOKEN = 49
PAD_TOKEN = 0
IMAGE_SIDE = 16
PATCH_SIDE = 8
PATCHES = (IMAGE_SIDE // PATCH_SIDE) ** 2


def llama_config(**changes: Any) -> LlamaConfig:
    """Two layers of 64 channels with grouped queries; 96 channels inside the MLP."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD_TOKEN,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(values | changes))


def clip_config(**changes: Any) -> CLIPVisionConfig:
    """Three layers of 64 channels over four patches."""
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIDE,
        "patch_size": PATCH_SIDE,
        "projection_dim": 32,
    }
    return CLIPVisionConfig(**(values | changes))


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A text model. `changes` go into its configuration; the weights are always the same."""
    return _seeded(LlamaForCausalLM, llama_config(**changes))


def tiny_llava(**changes: Any) -> LlavaForConditionalGeneration:
    """A vision-language model: CLIP, a projector, Llama. `changes` go into its configuration.

    `text` and `vision` are dicts of changes for the two configurations inside.
    """
    text = llama_config(**changes.pop("text", {}))
    vision = clip_config(**changes.pop("vision", {}))
    values: dict[str, Any] = {
        "image_token_id": IMAGE_TOKEN,
        "image_seq_length": PATCHES,
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
    }
    return _seeded(
        LlavaForConditionalGeneration, LlavaConfig(vision_config=vision, text_config=text, **(values | changes))
    )


def llama_batch(rows: int = 2, tokens: int = 12, *, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Random text. The last row ends in `padding` pad tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, IMAGE_TOKEN, (rows, tokens), generator=generator)
    mask = torch.ones_like(input_ids)
    if padding > 0:
        input_ids[-1, -padding:] = PAD_TOKEN
        mask[-1, -padding:] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def llava_batch(rows: int = 2, tokens: int = 12, *, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """As `llama_batch`, with one random image per row whose tokens follow the first token."""
    batch = llama_batch(rows, tokens, padding=padding, seed=seed)
    batch["input_ids"][:, 1 : 1 + PATCHES] = IMAGE_TOKEN
    generator = torch.Generator().manual_seed(seed + 1)
    batch["pixel_values"] = torch.randn(rows, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator)
    return batch


def _seeded(model_class: type, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()
