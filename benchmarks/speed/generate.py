"""Tokens per second in prefill and decoding, quantized against the same model in bf16 and fp32.

All variants are in memory and take turns, so that whatever else the machine does hits all of them; medians over rounds,
and medians of the ratios within a round.
"""

import argparse
import ctypes
import fcntl
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, StaticCache

from benchmarks.shapes import SHAPES, random_model
from benchmarks.timing import clock_of, ratio
from optimum_qvlm import QVLMConfig
from optimum_qvlm.hf.format.modules import packed_bytes, quantized_modules
from optimum_qvlm.hf.fusion import fuse_sites
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.modules.fused import FusedLinear
from optimum_qvlm.modules.qlinear import PackedLinear, QuantLinear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(slots=True, kw_only=True)
class Speed:
    """One variant, batch and length of prompt: medians over all prompts of the batch, and memory in MB.

    `megabytes` are its tensors as they lie in memory, `checkpoint_megabytes` those that a save writes,
    `peak_megabytes` its tensors and the most that a round needed beside them.
    """

    variant: str
    batch: int
    prompt: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    megabytes: float
    checkpoint_megabytes: float
    peak_megabytes: float
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
    parser.add_argument("--prompt", type=int, nargs="+", default=[64], help="tokens of the prompt, one table for each")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="identical prompts, a table for each")
    parser.add_argument("--image", action="store_true", help="an image before the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, for a machine that is shared")
    parser.add_argument("--static-cache", action="store_true")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding step; with the static cache on a GPU it becomes a CUDA graph",
    )
    parser.add_argument("--exact-decode", action="store_true", help="round activations while decoding too")
    parser.add_argument("--rotated", action="store_true", help="random weights have rotations, as calibrated ones do")
    parser.add_argument("--turns", type=Path, help="file by which processes that share a GPU measure in turn")
    parser.add_argument("--fuse", action="store_true", help="each scheme also with its linears fused")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rotated and not arguments.random_init:
        parser.error("--rotated is for --random-init; linears of --model are rounded to nearest without a transform")
    torch.set_num_threads(arguments.threads)
    variants = build_all(arguments)
    found = []
    for batch, prompt in itertools.product(arguments.batch, arguments.prompt):
        speeds = measure(variants, prompt, batch, arguments)
        print_table(speeds)
        found += speeds
    if arguments.json is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        content = {"settings": settings, "torch": torch.__version__, "speeds": [asdict(speed) for speed in found]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def print_table(speeds: list[Speed]) -> None:
    """One line per variant."""
    memory = f"{'MB':>8} {'saved MB':>9} {'peak MB':>8}"
    heading = f"{'variant':12} {'batch':>5} {'prompt':>6} {'prefill tok/s':>14} {'decode tok/s':>13} {memory}"
    print(f"{heading}  decode against, prefill against")
    for speed in speeds:
        against = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in speed.decode_ratio.items())
        prefill = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in speed.prefill_ratio.items())
        print(
            f"{speed.variant:12} {speed.batch:5} {speed.prompt:6} {speed.prefill_tokens_per_second:14.1f} "
            f"{speed.decode_tokens_per_second:13.2f} {speed.megabytes:8.1f} {speed.checkpoint_megabytes:9.1f} "
            f"{speed.peak_megabytes:8.1f}  {against}; {prefill}",
            flush=True,
        )


def build_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every variant by its name, baselines first."""
    build = random_variant if arguments.random_init else loaded_variant
    variants = {name: build(arguments, None, DTYPES[name]) for name in arguments.baselines}
    for scheme in arguments.schemes:
        variants[scheme] = build(arguments, scheme, DTYPES[arguments.dtype])
        if arguments.fuse:
            fused = variants[f"{scheme} fused"] = build(arguments, scheme, DTYPES[arguments.dtype])
            fuse_sites(fused, sites_of(fused))
    return variants


def sites_of(model: Any) -> list[list[str]]:
    """Paths of the quantized linears that read one tensor, as the adapter of the model says."""
    adapter, linears = adapter_for(model), quantized_modules(model)
    layers = [layer for part in adapter.parts() for layer in part.layers]
    return [[path for path in site if path in linears] for layer in layers for site in adapter.sites(layer)]


def random_variant(arguments: argparse.Namespace, scheme: str | None, dtype: torch.dtype) -> Any:
    """Random weights."""
    settings = {"exact_decode": arguments.exact_decode, "rotated": arguments.rotated}
    return random_model(arguments.random_init, scheme, dtype, arguments.device, **settings)


def loaded_variant(arguments: argparse.Namespace, scheme: str | None, dtype: torch.dtype) -> Any:
    """Weights of a checkpoint, rounded to nearest: speed does not depend on the search."""
    config = AutoConfig.from_pretrained(arguments.model)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype, "device_map": arguments.device}
    if scheme is not None:
        options["quantization_config"] = QVLMConfig(
            scheme, method="rtn", **({"decode_tokens": 0} if arguments.exact_decode else {})
        )
    return auto.from_pretrained(arguments.model, **options).eval()


def measure(variants: dict[str, Any], prompt: int, batch: int, arguments: argparse.Namespace) -> list[Speed]:
    """Rounds in which the variants take turns; the first round warms up and is not counted."""
    inputs = {name: prompt_of(model, prompt, batch, arguments) for name, model in variants.items()}
    decoders = {name: Decoder(model, inputs[name], arguments) for name, model in variants.items()}
    prefill: dict[str, list[float]] = {name: [] for name in variants}
    decode: dict[str, list[float]] = {name: [] for name in variants}
    working: dict[str, float] = dict.fromkeys(variants, math.nan)
    for number in range(arguments.rounds + 1):
        for name, decoder in decoders.items():
            with turn(arguments.turns, alone=number > 0):
                before = start_of_peak(arguments)
                first, rest = decoder.round()
            if number > 0:
                prefill[name].append(first)
                decode[name].append(rest)
                working[name] = max(peak(arguments) - before, working[name])
    return [
        Speed(
            variant=name,
            batch=batch,
            prompt=inputs[name]["input_ids"].shape[1],
            prefill_tokens_per_second=inputs[name]["input_ids"].numel() / statistics.median(prefill[name]),
            decode_tokens_per_second=batch * arguments.tokens / statistics.median(decode[name]),
            megabytes=packed_bytes(model) / 1e6,
            checkpoint_megabytes=checkpoint_bytes(model) / 1e6,
            peak_megabytes=(packed_bytes(model) + working[name]) / 1e6,
            decode_ratio={base: ratio(decode[base], decode[name]) for base in arguments.baselines},
            prefill_ratio={base: ratio(prefill[base], prefill[name]) for base in arguments.baselines},
        )
        for name, model in variants.items()
    ]


@contextmanager
def turn(file: Path | None, *, alone: bool) -> Iterator[None]:
    """Hold a lock: with all others that warm up, or alone. So nobody measures while somebody compiles."""
    if file is None:
        yield
        return
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


class Decoder:
    """Greedy decoding of one variant with batches of one size, from a prompt of one length.

    With the static cache and compilation on a CUDA device, a step is compiled whole and replayed as one CUDA graph.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], arguments: argparse.Namespace) -> None:
        self.model, self.inputs, self.arguments = model, inputs, arguments
        self.clock = clock_of(arguments.device, cpu_time=arguments.cpu_time)
        batch, self.length = inputs["input_ids"].shape
        self.cache: Any = None
        self.cache_name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        if arguments.static_cache:
            room = self.length + arguments.tokens
            self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=room)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=arguments.device)
        self.position = torch.zeros_like(self.token)
        self.step: Callable[[Any], Tensor] = self.next_token
        if arguments.compile:
            self.step = torch.compile(self.next_token, fullgraph=True, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None

    def prefill(self) -> Any:
        """Read the prompt; the first token is there afterwards. Returns the cache."""
        if self.cache is not None:
            self.cache.reset()
        output = self.model(**self.inputs, **{self.cache_name: self.cache}, use_cache=True, logits_to_keep=1)
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        self.position.fill_(self.length)
        return getattr(output, self.cache_name)

    def decode(self, cache: Any) -> None:
        """As many tokens as were asked for."""
        if self.graph is None and self.cache is not None and self.arguments.compile and self.token.is_cuda:
            self.capture(cache)
        for _ in range(self.arguments.tokens):
            if self.graph is None:
                self.advance(cache)
            else:
                self.graph.replay()

    def advance(self, cache: Any) -> None:
        """One token."""
        self.token.copy_(self.step(cache))
        self.position.add_(1)

    def next_token(self, cache: Any) -> Tensor:
        """What follows the tokens at the positions, [batch, 1]."""
        cached = {self.cache_name: cache, "use_cache": True}
        output = self.model(input_ids=self.token, position_ids=self.position, **cached)
        following: Tensor = output.logits[:, -1:].argmax(-1)
        return following

    def capture(self, cache: Any) -> None:
        """Make the graph of a step, and read the prompt again: trying the step out went on in the cache."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.advance(cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.advance(cache)
        self.prefill()

    def round(self) -> tuple[float, float]:
        """Seconds of the prefill, and of all decoding steps."""
        with torch.inference_mode():
            started = self.clock()
            cache = self.prefill()
            prefilled = self.clock()
            self.decode(cache)
            return prefilled - started, self.clock() - prefilled


def prompt_of(model: Any, tokens: int, batch: int, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Seeded tokens, after an image where one is asked for."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (1, tokens), generator=generator)
    inputs = {}
    if arguments.image:
        vision = model.config.vision_config
        count = (vision.image_size // vision.patch_size) ** 2
        ids = torch.cat([torch.full((1, count), model.config.image_token_id), ids], dim=1)
        pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
        inputs["pixel_values"] = pixels.to(arguments.device, model.dtype).repeat(batch, 1, 1, 1)
    return {"input_ids": ids.to(arguments.device).repeat(batch, 1), **inputs}


def checkpoint_bytes(model: Any) -> int:
    """Bytes of all tensors of a model in the form of the checkpoint."""
    total = packed_bytes(model)
    for module in model.modules():
        if isinstance(module, PackedLinear) and not isinstance(module, FusedLinear):
            held = (module.weight_packed, module.weight_scale, module.weight_zero_point)
            total -= sum(tensor.nbytes for tensor in held if tensor is not None)
    for module in quantized_modules(model).values():
        dtype, bare = module.grid.scale_dtype, replace(module.format, activation=None, equalized=False)
        saved = QuantLinear(module.in_features, module.out_features, bare, bias=False, scale_dtype=dtype, device="meta")
        total += packed_bytes(saved)
    return total


def start_of_peak(arguments: argparse.Namespace) -> float:
    """Bytes in use now, from where `peak` counts anew."""
    if arguments.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier rounds freed would be used again without being counted
        CLEAR_PEAK.write_text("5")
    except (AttributeError, OSError, TypeError):  # not Linux with glibc, or not allowed
        return math.nan
    return resident("VmRSS")


def peak(arguments: argparse.Namespace) -> float:
    """The most bytes in use since `start_of_peak`: tensors on a CUDA device, pages of the process otherwise."""
    return torch.cuda.max_memory_allocated() if arguments.device.startswith("cuda") else resident("VmHWM")


def resident(kind: str) -> float:
    """A figure of this process in bytes; NaN where the system does not give it."""
    found = re.search(rf"{kind}:\s+(\d+)", STATUS.read_text()) if STATUS.exists() else None
    return math.nan if found is None else 1024.0 * int(found[1])


if __name__ == "__main__":
    main()
