"""Time of one quantized linear of each scheme against a bf16 one on a GPU, by number of tokens.

Weights rotate among several sets, so that a device's cache holds none of them, and calls are replayed as one CUDA
graph: launches do not count. The baseline is `F.linear`, that is cuBLAS, which a compiled `F.linear` calls too; the
first shape is measured compiled as well, to show it. `of copy` is the bytes of the weight by the time, as a share of
the bytes per second that a copy reads and writes.
"""

import argparse
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.spec import NAMED_SCHEMES, Scheme

COLD_BYTES = 200 * 2**20
"""What the weight sets of a GPU's run hold together: four times the largest cache."""

SHAPES = ("5120x5120", "15360x5120", "27648x5120", "5120x13824")
"""LLaVA-1.5-13B's decoder: output; query, key and value as one; gate and up as one; down."""

LEVELS = "-levels"
"""Behind a scheme: with scales that are multiples of one step per row."""

ROTATED = "-rotated"
"""Behind a scheme: activations are rotated first, as those of calibrated models are."""

TOKENS = (1, 4, 16, 64, 256, 600, 2048)
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**26}
COPIES = 8
"""In a row, between two looks at the clock."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--schemes", nargs="+", default=[*NAMED_SCHEMES, f"w4a8{LEVELS}"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sets", type=int, help="weight sets; by default as many as leave the cache cold")
    parser.add_argument("--launch-only", action="store_true", help="run every kernel once, so that it is compiled")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.launch_only:
        launch_once(arguments, device)
        return
    bandwidth = copy_bandwidth(device)
    print(f"{machine(device)}; copy {bandwidth / 1e9:.0f} GB/s")
    if device.type == "cuda":
        compile_kernels(arguments)
        print(compiled_baseline(arguments, device), flush=True)
    columns = "".join(f" | {scheme:>11} us {'x bf16':>6} {'of copy':>7}" for scheme in arguments.schemes)
    print(f"{'out x in':>14} {'tokens':>6} {'bf16 us':>8} {'of copy':>7}{columns}")
    for shape in arguments.shapes:
        measure(shape, arguments, device, bandwidth)


def measure(shape: str, arguments: argparse.Namespace, device: torch.device, bandwidth: float) -> None:
    """One line for each number of tokens."""
    rows, channels = sizes(shape)
    sets = arguments.sets or max(2, -(-COLD_BYTES // (rows * channels // 2)))
    dense = dense_weights(rows, channels, max(2, sets // 4), device)
    modules = {
        scheme: [make_linear(scheme, rows, channels, device) for _ in range(sets)] for scheme in arguments.schemes
    }
    for tokens in arguments.tokens:
        x = activations(tokens, channels, device)
        base = microseconds([call(F.linear, x, weight) for weight in dense], arguments.rounds, device)
        share = dense[0].nbytes / base * 1e6 / bandwidth
        line = f"{f'{rows} x {channels}':>14} {tokens:6} {base:8.1f} {share:7.2f}"
        for linears in modules.values():
            found = microseconds([call(linear, x) for linear in linears], arguments.rounds, device)
            share = weight_bytes(linears[0]) / found * 1e6 / bandwidth
            line += f" | {found:14.1f} {base / found:5.2f}x {share:7.2f}"
        print(line, flush=True)


def compile_kernels(arguments: argparse.Namespace) -> None:
    """Fill the cache of compiled kernels: one process per scheme, at the same time."""
    command = [sys.executable, "-m", "benchmarks.speed.gpu_linears", "--launch-only", "--device", arguments.device]
    command += ["--shapes", *arguments.shapes, "--tokens", *map(str, arguments.tokens)]
    running = {scheme: subprocess.Popen([*command, "--schemes", scheme]) for scheme in arguments.schemes}
    for scheme, process in running.items():
        if process.wait() != 0:
            print(f"{scheme}: compiling its kernels beforehand ended with status {process.returncode}")


def launch_once(arguments: argparse.Namespace, device: torch.device) -> None:
    """Every kernel that will be timed."""
    with torch.inference_mode():
        for shape in arguments.shapes:
            rows, channels = sizes(shape)
            for scheme in arguments.schemes:
                linear = make_linear(scheme, rows, channels, device)
                for tokens in arguments.tokens:
                    linear(activations(tokens, channels, device))


def compiled_baseline(arguments: argparse.Namespace, device: torch.device) -> str:
    """The first shape and number of tokens, with `F.linear` as it is and compiled."""
    rows, channels = sizes(arguments.shapes[0])
    dense = dense_weights(rows, channels, 4, device)
    x = activations(arguments.tokens[0], channels, device)
    plain = microseconds([call(F.linear, x, weight) for weight in dense], arguments.rounds, device)
    compiled = torch.compile(F.linear, dynamic=False)
    found = microseconds([call(compiled, x, weight) for weight in dense], arguments.rounds, device)
    return f"F.linear, bf16, {rows} x {channels}, {len(x)} tokens: {plain:.1f} us, compiled {found:.1f} us"


def sizes(shape: str) -> tuple[int, int]:
    """Rows and channels of `OUTxIN`."""
    rows, channels = map(int, shape.split("x"))
    return rows, channels


def activations(tokens: int, channels: int, device: torch.device) -> Tensor:
    """Random, bf16."""
    return torch.randn(tokens, channels, device=device).to(torch.bfloat16)


def dense_weights(rows: int, channels: int, sets: int, device: torch.device) -> list[Tensor]:
    """Random, bf16."""
    return [torch.randn(rows, channels, device=device).to(torch.bfloat16) / 64 for _ in range(sets)]


def make_linear(scheme: str, rows: int, channels: int, device: torch.device) -> QuantLinear:
    """A quantized linear with random codes, in the layout of its device."""
    parsed = Scheme.parse(scheme.replace(LEVELS, "").replace(ROTATED, ""))
    spec = parsed.weight_spec(channels, "auto", symmetric=True)
    if LEVELS in scheme:
        spec = replace(spec, two_level=True)
    rotation = math.gcd(channels, 128) if ROTATED in scheme else None
    format = LinearFormat(weight=spec, activation=parsed.activation_spec(spec), rotation=rotation)
    module = QuantLinear(channels, rows, format, bias=False, scale_dtype=torch.bfloat16, device=device)
    module.weight_packed.data.random_(-(2**31), 2**31 - 1)
    module.weight_scale.data.fill_(0.01)
    module.decode_tokens = 16
    return module.prepare()


def weight_bytes(module: nn.Module) -> int:
    """Codes and scales."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def microseconds(calls: list[Callable[[], Tensor]], rounds: int, device: torch.device) -> float:
    """Median over rounds of the mean time of a call; on a GPU the calls of a round are one replayed CUDA graph."""
    with torch.inference_mode():
        for one in calls[:2]:
            one()
        run = _captured(calls) if device.type == "cuda" else lambda: [one() for one in calls]
        times = []
        for _ in range(rounds + 1):
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            times.append((time.perf_counter() - started) / len(calls) * 1e6)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by copies of a large tensor.

    Each is a call of its own: as a node of a CUDA graph a copy reaches four fifths of the rate.
    """
    source = torch.zeros(COPIED_BYTES.get(device.type, COPIED_BYTES["cpu"]), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        _wait(device)
        times.append((time.perf_counter() - started) / COPIES)
    return 2 * source.nbytes / statistics.median(times[1:])


def machine(device: torch.device) -> str:
    """Device and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, torch {torch.__version__}, triton {import_module('triton').__version__}"


def call(function: Callable[..., Tensor] | nn.Module, *arguments: Tensor) -> Callable[[], Tensor]:
    """The function with these arguments."""
    return lambda: function(*arguments)


def _captured(calls: list[Callable[[], Tensor]]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for one in calls:
            one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in calls:
            one()
    return graph.replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
