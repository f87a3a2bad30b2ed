"""What a user's own `model.generate` takes on a GPU: plain, and with the static cache whose step transformers compiles.

    python -m benchmarks.speed.gpu_generate --shapes llava-1.5-7b --variants bf16 w4a8-rotated w4a8-rotated-fused

Models have random weights and, where they are ours, the quantizer that `from_pretrained` attaches. A variant is `bf16`,
`bnb-nf4`, `torchao-int4`, or a scheme of ours with `-rotated` (as calibrated models are) and `-fused` (as loaded ones
are) behind it. Each is a process of its own. All warm up at the same time; then they are asked in turns, so that each
measures alone on the card and whatever else the machine does hits all of them. Figures are medians over rounds, ratios
those of pairs of one round.

Per token: `host ms` is processor time of a process that sleeps while it waits, `GPU ms` the time of all kernels.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.shapes import SHAPES, random_model
from benchmarks.speed.generate import prompt_of, sites_of
from benchmarks.timing import copy_bandwidth, machine, ratio, wait
from optimum_qvlm import QVLMConfig
from optimum_qvlm.hf.format.modules import packed_bytes
from optimum_qvlm.hf.fusion import fuse_sites
from optimum_qvlm.hf.quantizer import QVLMQuantizer

MODES: dict[str, dict[str, Any]] = {"plain": {}, "static": {"cache_implementation": "static"}}
PEERS = ("bnb-nf4", "torchao-int4")
BASELINE = "bf16"
SLEEPS = 4
"""CUDA's flag for a process that sleeps while it waits for the device."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llava-1.5-7b"])
    parser.add_argument("--variants", nargs="+", default=[BASELINE, "w4a8-rotated", "w4a8-rotated-fused"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--text", type=int, default=24, help="tokens of text, behind an image if the model takes one")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded after the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        serve(arguments)
        return
    device = torch.device(arguments.device)
    print(f"{machine(device)}; copy {copy_bandwidth(device) / 1e9:.0f} GB/s", flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    asked = [Asked(shape, variant) for shape in arguments.shapes for variant in arguments.variants]
    measure({each.name: each for each in asked}, arguments)


class Asked:
    """The process of one variant: a line to it says what to do, a line from it what came out."""

    def __init__(self, shape: str, variant: str) -> None:
        command = [sys.executable, "-m", "benchmarks.speed.gpu_generate", *sys.argv[1:], "--one", shape, variant]
        self.name, self.base = f"{shape} {variant}", f"{shape} {BASELINE}"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, request: str) -> bool:
        """Ask; False where the process ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def receive(self) -> Any:
        """The next answer; None where the process ended without one."""
        assert self.process.stdout is not None
        return next((json.loads(line) for line in self.process.stdout if line.startswith("{")), None)

    def ask(self, request: str) -> Any:
        """The answer to a request."""
        return self.receive() if self.send(request) else None

    def end(self) -> None:
        """Let the process end."""
        self.process.communicate()


def measure(variants: dict[str, Asked], arguments: argparse.Namespace) -> None:
    """A table for each mode, once all variants are warm. One that fails is a line and no end."""
    held = ask_all(variants, "memory plain")
    for mode in arguments.modes:
        warm = ask_all(variants, f"warm {mode}")
        found: dict[str, list[Any]] = {name: [] for name, took in warm.items() if took is not None}
        for number in range(arguments.rounds):
            for name, rounds in found.items():
                rounds.append(variants[name].ask(f"round {mode}"))
                print(f"{mode} {name}, round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
        costs = {name: variants[name].ask(f"cost {mode}") for name in found}
        print(HEADING)
        for name, rounds in found.items():
            if None in rounds or costs[name] is None:
                print(f"{mode:6} {name:33} ended early")
            else:
                base = found.get(variants[name].base, rounds)
                print(line(mode, name, rounds, base) + line_of_costs(held[name] | warm[name] | costs[name]), flush=True)
    for asked in variants.values():
        asked.end()


def ask_all(variants: dict[str, Asked], request: str) -> dict[str, Any]:
    """Ask all that are alive at the same time."""
    alive = [asked for asked in variants.values() if asked.send(request)]
    return {asked.name: asked.receive() for asked in alive}


HEADING = (
    f"{'mode':6} {'variant':33} {'first ms':>8} {'x bf16':>7} {'tok/s':>6} {'x bf16':>7} {'ms':>6} {'lowest':>6}"
    f" {'host ms':>7} {'GPU ms':>7} {'kernels':>7} {'GB':>6} {'peak GB':>7} {'warm s':>6}"
)


def line(mode: str, name: str, rounds: list[Any], base: list[Any]) -> str:
    """Medians; ratios are against bf16 of the same round, more is faster. `lowest` is a token of the best round."""
    first, token = (statistics.median(each[field] for each in rounds) for field in ("first", "token"))
    ratios = [ratio([each[field] for each in base], [each[field] for each in rounds]) for field in ("first", "token")]
    lowest = min(each["token"] for each in rounds)
    return (
        f"{mode:6} {name:33} {first * 1e3:8.1f} {ratios[0]:6.2f}x {1 / token:6.1f} {ratios[1]:6.2f}x {token * 1e3:6.2f}"
        f" {lowest * 1e3:6.2f}"
    )


def line_of_costs(costs: dict[str, float]) -> str:
    """What one measurement is enough for."""
    return (
        f" {costs['host'] * 1e3:7.2f} {costs['kernel_seconds'] * 1e3:7.2f} {costs['kernels']:7.1f}"
        f" {costs['bytes'] / 1e9:6.2f} {costs['peak_bytes'] / 1e9:7.2f} {costs['warm']:6.1f}"
    )


def serve(arguments: argparse.Namespace) -> None:
    """Make a model, and do what lines from the parent process say."""
    model = make(*arguments.one, arguments.device)
    generation = Generation(model, arguments)
    for asked in sys.stdin:
        request, mode = asked.split()
        print(json.dumps(getattr(generation, request)(mode)), flush=True)


def make(shape: str, variant: str, device: str) -> Any:
    """The model of a variant, as `from_pretrained` would have left it."""
    if variant == BASELINE:
        return random_model(shape, None, torch.bfloat16, device)
    if variant in PEERS:
        model = random_model(shape, None, torch.bfloat16, device)
        (nf4 if variant == "bnb-nf4" else torchao)(model, device)
        return model
    scheme, *marks = variant.split("-")
    model = random_model(shape, scheme, torch.bfloat16, device, rotated="rotated" in marks)
    model.hf_quantizer = QVLMQuantizer(QVLMConfig(scheme, method="rtn"))
    if "fused" in marks:
        fuse_sites(model, sites_of(model))
    return model


def nf4(model: Any, device: str) -> None:
    """Replace all linears but the head by bitsandbytes' four-bit ones."""
    library: Any = import_module("bitsandbytes.nn")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                bias = child.bias is not None
                linear = library.Linear4bit(
                    child.in_features, child.out_features, bias, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                linear.weight = library.Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                linear.bias = child.bias
                setattr(parent, name, linear.to(device))


def torchao(model: Any, device: str) -> None:
    """Four-bit weights in groups of 128, in the language model."""
    library: Any = import_module("torchao.quantization")
    config = library.Int4WeightOnlyConfig(
        group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    library.quantize_(model.get_decoder(), config)


class Generation:
    """`model.generate` of one prompt, timed."""

    def __init__(self, model: Any, arguments: argparse.Namespace) -> None:
        self.model, self.device, self.tokens = model, torch.device(arguments.device), arguments.tokens
        arguments.image = hasattr(model.config, "vision_config")
        self.inputs = prompt_of(model, arguments.text, 1, arguments)
        self.inputs["attention_mask"] = torch.ones_like(self.inputs["input_ids"])
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def memory(self, _mode: str) -> dict[str, int]:
        """Bytes of the model on the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {"bytes": torch.cuda.memory_allocated() if self.device.type == "cuda" else packed_bytes(self.model)}

    def warm(self, mode: str) -> dict[str, float]:
        """Seconds of compiling what is compiled, for a cache of one size."""
        started = time.perf_counter()
        for tokens in (1 + self.tokens, 1 + self.tokens, 1, 1 + self.tokens):
            self.generate(tokens, mode)
        return {"warm": time.perf_counter() - started}

    def round(self, mode: str) -> dict[str, float]:
        """Seconds until the first token and for each of the others."""
        first, whole = (self.generate(tokens, mode)[0] for tokens in (1, 1 + self.tokens))
        return {"first": first, "token": (whole - first) / self.tokens}

    def cost(self, mode: str) -> dict[str, float]:
        """Processor time, time of kernels and their number for a token, and the most memory in use at a time."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with asleep_while_waiting(self.device):
            first, whole = (self.generate(tokens, mode)[1] for tokens in (1, 1 + self.tokens))
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        few = min(self.tokens, 8)
        less, more = (kernel_times(partial(self.generate, tokens, mode), self.device) for tokens in (1, 1 + few))
        return {
            "host": (whole - first) / self.tokens,
            "peak_bytes": peak,
            "kernel_seconds": (sum(more) - sum(less)) / few,
            "kernels": (len(more) - len(less)) / few,
        }

    def generate(self, tokens: int, mode: str) -> tuple[float, float]:
        """Seconds, and seconds of the processor."""
        wait(self.device)
        started, worked = time.perf_counter(), time.process_time()
        options = MODES[mode]
        output = self.model.generate(
            **self.inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options
        )
        wait(self.device)
        taken = time.perf_counter() - started, time.process_time() - worked
        assert output.shape[1] == self.inputs["input_ids"].shape[1] + tokens
        return taken


@contextmanager
def asleep_while_waiting(device: torch.device) -> Iterator[None]:
    """Let this process sleep while it waits for the device. It looks at the clock all the time otherwise."""
    driver = ctypes.CDLL("libcuda.so.1") if device.type == "cuda" else None
    if driver is not None and driver.cuDevicePrimaryCtxSetFlags_v2(0, SLEEPS) != 0:
        print("waiting counts as processor time here", file=sys.stderr)
    yield
    if driver is not None:
        driver.cuDevicePrimaryCtxSetFlags_v2(0, 0)


def kernel_times(run: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of every kernel and copy on the device that `run` starts."""
    if device.type != "cuda":
        run()
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.time_range.elapsed_us() / 1e6 for event in on_device]


if __name__ == "__main__":
    main()
