"""Tokens per second in prefill and decoding, quantized against the same model in bf16 and fp32.

All variants are in memory and take turns, so that whatever else the machine does hits all of them; medians over rounds,
and medians of the ratios within a round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, random_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, StaticCache

from optimum_qvlm import QVLMConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True, kw_only=True)
class Speed:
    """One variant: medians, and the memory of its tensors."""

    variant: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    megabytes: float
    decode_ratio: dict[str, float]
    prefill_ratio: dict[str, float]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder or repository of an unquantized model")
    which.add_argument("--random-init", choices=SHAPES, help="this shape with random weights")
    parser.add_argument("--schemes", nargs="*", default=["w4a16", "w8a8"])
    parser.add_argument("--baselines", nargs="*", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="dtype of what is not quantized")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--image", action="store_true", help="an image before the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, for a machine that is shared")
    parser.add_argument("--static-cache", action="store_true")
    parser.add_argument("--compile", action="store_true", help="with the static cache: compile the decoding step")
    parser.add_argument("--exact-decode", action="store_true", help="round activations while decoding too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(build_all(arguments), arguments)
    print(f"{'variant':12} {'prefill tok/s':>14} {'decode tok/s':>13} {'MB':>8}  decode against, prefill against")
    for speed in found:
        against = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in speed.decode_ratio.items())
        prefill = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in speed.prefill_ratio.items())
        print(
            f"{speed.variant:12} {speed.prefill_tokens_per_second:14.1f} {speed.decode_tokens_per_second:13.2f} "
            f"{speed.megabytes:8.1f}  {against}; {prefill}"
        )
    if arguments.json is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        content = {"settings": settings, "torch": torch.__version__, "speeds": [asdict(speed) for speed in found]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def build_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every variant by its name, baselines first."""
    build = random_variant if arguments.random_init else loaded_variant
    variants = {name: build(arguments, None, DTYPES[name]) for name in arguments.baselines}
    for scheme in arguments.schemes:
        variants[scheme] = build(arguments, scheme, DTYPES[arguments.dtype])
    return variants


def random_variant(arguments: argparse.Namespace, scheme: str | None, dtype: torch.dtype) -> Any:
    """Random weights."""
    settings = {"exact_decode": arguments.exact_decode}
    return random_model(arguments.random_init, scheme, dtype, arguments.device, **settings)


def loaded_variant(arguments: argparse.Namespace, scheme: str | None, dtype: torch.dtype) -> Any:
    """Weights of a checkpoint, rounded to nearest: speed does not depend on the search."""
    config = AutoConfig.from_pretrained(arguments.model)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype, "device_map": arguments.device}
    if scheme is not None:
        options["quantization_config"] = QVLMConfig(scheme, method="rtn", exact_decode=arguments.exact_decode)
    return auto.from_pretrained(arguments.model, **options).eval()


def measure(variants: dict[str, Any], arguments: argparse.Namespace) -> list[Speed]:
    """Rounds in which the variants take turns; the first round warms up and is not counted."""
    steps = {name: decoder(model, arguments) for name, model in variants.items()}
    prefill: dict[str, list[float]] = {name: [] for name in variants}
    decode: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds + 1):
        for name, model in variants.items():
            first, rest = one_round(model, steps[name], arguments)
            if number > 0:
                prefill[name].append(first)
                decode[name].append(rest)
    return [
        Speed(
            variant=name,
            prefill_tokens_per_second=prompt_of(model, arguments)["input_ids"].shape[1]
            / statistics.median(prefill[name]),
            decode_tokens_per_second=arguments.tokens / statistics.median(decode[name]),
            megabytes=tensor_bytes(model) / 1e6,
            decode_ratio={base: ratio(decode[base], decode[name]) for base in arguments.baselines},
            prefill_ratio={base: ratio(prefill[base], prefill[name]) for base in arguments.baselines},
        )
        for name, model in variants.items()
    ]


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def one_round(model: Any, step: Callable[..., Tensor], arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the prefill, and of all decoding steps."""
    inputs = prompt_of(model, arguments)
    length = inputs["input_ids"].shape[1]
    cache = None
    if arguments.static_cache:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + arguments.tokens)
    with torch.inference_mode():
        started = now(arguments)
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        prefilled = now(arguments)
        cache = output.past_key_values
        for position in range(length, length + arguments.tokens):
            token = step(token, cache, torch.tensor([[position]], device=arguments.device))
        decoded = now(arguments)
    return prefilled - started, decoded - prefilled


def decoder(model: Any, arguments: argparse.Namespace) -> Callable[..., Tensor]:
    """One greedy step: token [1, 1], cache, position [1, 1] -> token."""

    def step(token: Tensor, cache: Any, position: Tensor) -> Tensor:
        output = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        following: Tensor = output.logits[:, -1:].argmax(-1)
        return following

    return torch.compile(step, mode="reduce-overhead", fullgraph=True) if arguments.compile else step


def prompt_of(model: Any, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Seeded tokens, after an image where one is asked for."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (1, arguments.prompt), generator=generator)
    inputs = {}
    if arguments.image:
        vision = model.config.vision_config
        count = (vision.image_size // vision.patch_size) ** 2
        ids = torch.cat([torch.full((1, count), model.config.image_token_id), ids], dim=1)
        pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
        inputs["pixel_values"] = pixels.to(arguments.device, model.dtype)
    return {"input_ids": ids.to(arguments.device), **inputs}


def tensor_bytes(model: Any) -> int:
    """Bytes of all tensors of a model, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def now(arguments: argparse.Namespace) -> float:
    """Seconds, once the device has done what it was asked."""
    if arguments.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if arguments.cpu_time else time.perf_counter()


if __name__ == "__main__":
    main()
