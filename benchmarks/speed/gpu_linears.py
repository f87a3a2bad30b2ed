"""Time of one quantized linear of each scheme against a bf16 one on a GPU, by number of tokens.

Weights rotate among several sets, so that a device's cache holds none of them, and calls are replayed as one CUDA
graph: launches do not count. The baseline is `F.linear`, that is cuBLAS, which a compiled `F.linear` calls too; the
first shape is measured compiled as well, to show it. `of copy` is the bytes of the weight by the time, as a share of
the bytes per second that a copy reads and writes.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shapes import LEVELS, format_of
from benchmarks.timing import COLD_BYTES, copy_bandwidth, machine, microseconds
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.spec import NAMED_SCHEMES

SHAPES = ("5120x5120", "15360x5120", "27648x5120", "5120x13824")
"""LLaVA-1.5-13B's decoder: output; query, key and value as one; gate and up as one; down."""

TOKENS = (1, 4, 16, 64, 256, 600, 2048)


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
    format = format_of(scheme, channels)
    module = QuantLinear(channels, rows, format, bias=False, scale_dtype=torch.bfloat16, device=device)
    module.weight_packed.data.random_(-(2**31), 2**31 - 1)
    module.weight_scale.data.fill_(0.01)
    module.decode_tokens = 16
    return module.prepare()


def weight_bytes(module: nn.Module) -> int:
    """Codes and scales."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def call(function: Callable[..., Tensor] | nn.Module, *arguments: Tensor) -> Callable[[], Tensor]:
    """The function with these arguments."""
    return lambda: function(*arguments)


if __name__ == "__main__":
    main()
