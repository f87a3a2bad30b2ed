"""One small random model per family, with batches of ready model inputs that reach every part of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from tests.tiny_models import (
    IMAGE_SIDE,
    IMAGE_TOKEN,
    PAD_TOKEN,
    PATCH_SIDE,
    PATCHES,
    clip_config,
    llama_batch,
    llama_config,
    llava_batch,
)

VIDEO_TOKEN = 48
VISION_START = 47
VISION_END = 46

ODD_WIDTH = 90
"""Channels inside the Qwen towers' MLP: divided by no group size, as the 3420 of the real ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to build and feed the tiny model of a family.

    Attributes:
        model_type: what config.json says.
        config: makes its configuration.
        batch: makes model inputs of some rows from a seed.
        language: the disk name of the linear of the decoder that tests single out.
        vision: the same for the tower, None for a text model.
    """

    model_type: str
    config: Callable[[], PreTrainedConfig]
    batch: Callable[..., dict[str, Tensor]]

    @property
    def auto_class(self) -> Any:
        """What users load it with."""
        return AutoModelForCausalLM if self.batch is llama_batch else AutoModelForImageTextToText

    @property
    def takes_images(self) -> bool:
        """Whether it has a tower."""
        return self.batch is not llama_batch

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model; the same weights each time, norms and biases moved off the values of a fresh model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.auto_class.from_config(self.config(), dtype=dtype).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model


def _text(model_type: str, **changes: Any) -> dict[str, Any]:
    """Values of a decoder's configuration: one full and grouped attention, 64 channels, 96 inside the MLP."""
    return llama_config(**changes).to_diff_dict() | {"model_type": model_type}


def _text_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    values = _text(model_type, **changes)
    return AutoConfig.for_model(**values)


def _vision_language(model_type: str, *, text: dict[str, Any], vision: dict[str, Any], **values: Any) -> Any:
    shared = {"tie_word_embeddings": False, "image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **(shared | values))


def _siglip() -> dict[str, Any]:
    values = clip_config(num_hidden_layers=2).to_diff_dict()
    return values | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 64}


def _llava() -> Any:
    return _vision_language(
        "llava",
        text=_text("llama"),
        vision=clip_config().to_diff_dict() | {"model_type": "clip_vision_model"},
        vision_feature_layer=-2,
        image_seq_length=PATCHES,
    )


def _llava_next() -> Any:
    return _vision_language(
        "llava_next",
        text=_text("llama"),
        vision=clip_config().to_diff_dict() | {"model_type": "clip_vision_model"},
        vision_feature_layer=-2,
        image_grid_pinpoints=[[IMAGE_SIDE, 2 * IMAGE_SIDE]],
        image_seq_length=PATCHES,
    )


def _paligemma() -> Any:
    text = _text("gemma", head_dim=16, num_key_value_heads=1)
    return _vision_language("paligemma", text=text, vision=_siglip(), projection_dim=64, hidden_size=64)


def _gemma3() -> Any:
    text = _text("gemma3_text", head_dim=16) | {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    }
    return _vision_language("gemma3", text=text, vision=_siglip(), mm_tokens_per_image=PATCHES)


def _idefics3(model_type: str) -> Any:
    vision = clip_config(num_hidden_layers=2).to_diff_dict() | {"model_type": f"{model_type}_vision"}
    if model_type == "idefics3":
        vision["model_type"] = "idefics3_vision"
    return _vision_language(model_type, text=_text("llama"), vision=vision, scale_factor=2, pad_token_id=PAD_TOKEN)


def _internvl() -> Any:
    vision = {
        "model_type": "internvl_vision",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": [IMAGE_SIDE, IMAGE_SIDE],
        "patch_size": [PATCH_SIDE, PATCH_SIDE],
        "use_qk_norm": True,
    }
    return _vision_language("internvl", text=_text("qwen2"), vision=vision, image_seq_length=1, downsample_ratio=0.5)


def _qwen(model_type: str, text_type: str, **vision: Any) -> Any:
    text = _text(text_type, head_dim=16) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    }
    tower = {
        "model_type": f"{model_type}_vision" if model_type == "qwen3_vl" else model_type,
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": ODD_WIDTH,
        "num_heads": 4,
        "patch_size": PATCH_SIDE,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
    }
    return _vision_language(
        model_type,
        text=text,
        vision=tower | vision,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _qwen2_5_vl() -> Any:
    return _qwen("qwen2_5_vl", "qwen2_5_vl_text", window_size=2 * PATCH_SIDE, fullatt_block_indexes=[1])


def _qwen3_vl() -> Any:
    return _qwen("qwen3_vl", "qwen3_vl_text", num_position_embeddings=16, deepstack_visual_indexes=[0, 1])


def qwen2_vl() -> Any:
    """Configuration of a family without adapter: Qwen2-VL, built as its successor."""
    config = _qwen("qwen2_5_vl", "qwen2_5_vl_text").to_dict()
    text = config["text_config"] | {"model_type": "qwen2_vl_text"}
    vision = {"embed_dim": 64, "mlp_ratio": 2} | {
        name: config["vision_config"][name]
        for name in ("depth", "hidden_size", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size")
    }
    return _vision_language("qwen2_vl", text=text, vision=vision, video_token_id=VIDEO_TOKEN)


def vipllava() -> Any:
    """Configuration of a family without adapter: ViP-LLaVA, whose projector reads several layers of the tower."""
    vision = clip_config().to_diff_dict() | {"model_type": "clip_vision_model"}
    layers = [-2, -3]
    return _vision_language("vipllava", text=_text("llama"), vision=vision, vision_feature_layers=layers)


def _with_image_tokens(count: int, **shape: int) -> dict[str, Tensor]:
    batch = llama_batch(**shape)
    batch["input_ids"][:, 1 : 1 + count] = IMAGE_TOKEN
    return batch


def _images(batch: dict[str, Tensor], *shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch["input_ids"].shape[0], *shape, generator=generator)


def llava_next_batch(*, seed: int = 0, **shape: int) -> dict[str, Tensor]:
    """Each image once whole and in two tiles; of the unpadded tiles each row ends in a newline feature."""
    batch = _with_image_tokens(PATCHES + 2 * (2 * 2 + 1), **({"tokens": 20, "seed": seed} | shape))
    batch["pixel_values"] = _images(batch, 3, 3, IMAGE_SIDE, IMAGE_SIDE, seed=seed)
    batch["image_sizes"] = torch.tensor([[IMAGE_SIDE, 2 * IMAGE_SIDE]]).repeat(batch["input_ids"].shape[0], 1)
    return batch


def typed_batch(*, seed: int = 0, **shape: int) -> dict[str, Tensor]:
    """Image tokens see each other in both directions, which `token_type_ids` says."""
    batch = llava_batch(seed=seed, **shape)
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    return batch


def idefics_batch(*, seed: int = 0, **shape: int) -> dict[str, Tensor]:
    """Two images a row, four patches of each folded into one token."""
    batch = _with_image_tokens(2, **({"seed": seed} | shape))
    batch["pixel_values"] = _images(batch, 2, 3, IMAGE_SIDE, IMAGE_SIDE, seed=seed)
    batch["pixel_attention_mask"] = torch.ones(batch["input_ids"].shape[0], 2, IMAGE_SIDE, IMAGE_SIDE).long()
    return batch


def internvl_batch(*, seed: int = 0, **shape: int) -> dict[str, Tensor]:
    """Four patches folded into one token."""
    batch = _with_image_tokens(1, **({"seed": seed} | shape))
    batch["pixel_values"] = _images(batch, 3, IMAGE_SIDE, IMAGE_SIDE, seed=seed)
    return batch


def qwen_batch(*, seed: int = 0, **shape: int) -> dict[str, Tensor]:
    """One image of 4 x 6 patches a row, folded into six tokens."""
    batch = _with_image_tokens(6, **({"seed": seed} | shape))
    rows = batch["input_ids"].shape[0]
    batch["pixel_values"] = _images(batch, 24, 3 * 2 * PATCH_SIDE**2, seed=seed).flatten(0, 1)
    batch["image_grid_thw"] = torch.tensor([[1, 4, 6]]).repeat(rows, 1)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    return batch


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llava", config=_llava, batch=llava_batch),
        Family(model_type="llava_next", config=_llava_next, batch=llava_next_batch),
        Family(model_type="qwen2_5_vl", config=_qwen2_5_vl, batch=qwen_batch),
        Family(model_type="qwen3_vl", config=_qwen3_vl, batch=qwen_batch),
        Family(model_type="smolvlm", config=lambda: _idefics3("smolvlm"), batch=idefics_batch),
        Family(model_type="idefics3", config=lambda: _idefics3("idefics3"), batch=idefics_batch),
        Family(model_type="internvl", config=_internvl, batch=internvl_batch),
        Family(model_type="paligemma", config=_paligemma, batch=typed_batch),
        Family(model_type="gemma3", config=_gemma3, batch=typed_batch),
        Family(model_type="llama", config=lambda: _text_config("llama"), batch=llama_batch),
        Family(model_type="qwen2", config=lambda: _text_config("qwen2"), batch=llama_batch),
        Family(model_type="qwen3", config=lambda: _text_config("qwen3", head_dim=16), batch=llama_batch),
        Family(model_type="mistral", config=lambda: _text_config("mistral"), batch=llama_batch),
    )
}
