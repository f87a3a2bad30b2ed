"""Tiny random vision-language models of families that vLLM has, with processors of their own."""

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from tests.jobs import ROOT
from tests.tiny_families import FAMILIES
from tests.tiny_models import IMAGE_SIDE, PATCH_SIDE

LENGTH = 512
CHAT = """{{ bos_token }}{% for message in messages %}{% for part in message.content %}\
{% if part.type == 'text' %}{{ part.text }}{% else %}PICTURE{% endif %}{% endfor %}{% endfor %}"""
PIXELS = {"shortest_edge": 2 * IMAGE_SIDE**2, "longest_edge": 4 * IMAGE_SIDE**2}
QWEN = {"patch_size": PATCH_SIDE, "merge_size": 2, "temporal_patch_size": 2, "size": PIXELS}


def tokenizer(picture, special):
    """That of the bundled model with the words of another family, and a template that puts `picture` for pictures."""
    made = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_vlm")
    made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = CHAT.replace("PICTURE", picture)
    return made


def qwen(name):
    words = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
    text = tokenizer("<|vision_start|><|image_pad|><|vision_end|>", words)
    video, whole = {
        "qwen2_5_vl": (transformers.Qwen2VLVideoProcessor, transformers.Qwen2_5_VLProcessor),
        "qwen3_vl": (transformers.Qwen3VLVideoProcessor, transformers.Qwen3VLProcessor),
    }[name]
    pictures = transformers.Qwen2VLImageProcessor(**QWEN)
    processor = whole(
        image_processor=pictures, tokenizer=text, video_processor=video(**QWEN), chat_template=text.chat_template
    )
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return processor, dict(zip(names, text.convert_tokens_to_ids(words[:4]), strict=True))


def smolvlm(_):
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    text, side = tokenizer("<image>", words), {"longest_edge": IMAGE_SIDE}
    processor = transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(size=side, max_image_size=side, do_image_splitting=False),
        video_processor=transformers.SmolVLMVideoProcessor(
            size=side,
            max_image_size=side,
            fps=1,
            num_frames=2,
            video_sampling={"fps": 1, "max_frames": 2, "video_size": side},
        ),
        tokenizer=text,
        image_seq_len=1,
        chat_template=text.chat_template,
    )
    return processor, {"image_token_id": text.convert_tokens_to_ids("<image>")}


def internvl(_):
    words = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    text, size = tokenizer("<IMG_CONTEXT>\n", list(words.values())), {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    for name, word in words.items():
        setattr(text, name, word)
        setattr(text, f"{name}_id", text.convert_tokens_to_ids(word))
    text.init_kwargs |= words
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=size, crop_to_patches=False, min_patches=1, max_patches=1
        ),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        tokenizer=text,
        image_seq_length=1,
        chat_template=text.chat_template,
    )
    return processor, {"image_token_id": text.context_image_token_id}


PROCESSORS = {"qwen2_5_vl": qwen, "qwen3_vl": qwen, "smolvlm": smolvlm, "internvl": internvl}


def save_family(name, folder):
    """A model whose heads have 32 channels: vLLM's attention on a processor has none of 16."""
    processor, ids = PROCESSORS[name](name)
    values = FAMILIES[name].config().to_dict() | ids
    values.pop("image_token_index", None)
    text = values["text_config"]
    text |= {"vocab_size": len(processor.tokenizer), "max_position_embeddings": LENGTH}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    text.pop("layer_types", None)
    if "mrope_section" in (text.get("rope_parameters") or {}):
        text["rope_parameters"]["mrope_section"] = [8, 4, 4]
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.for_model(**values), dtype=torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
