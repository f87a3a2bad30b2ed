"""Time of one quantized linear of each scheme against a compiled bf16 one on a GPU, by number of tokens.

Weights rotate among several sets, so that a device's cache holds none of them, and calls are replayed as one CUDA
graph: launches do not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.quant.spec import NAMED_SCHEMES, Scheme

COLD_BYTES = 200 * 2**20
"""What the weight sets of a GPU's run hold together: four times the largest cache."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--schemes", nargs="+", default=list(NAMED_SCHEMES))
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "15360x5120", "5120x13824"], help="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 600])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sets", type=int, help="weight sets; by default as many as leave the cache cold")
    arguments = parser.parse_args()
    lines = []
    for shape in arguments.shapes:
        rows, channels = map(int, shape.split("x"))
        lines += measure(rows, channels, arguments)
    print(f"{'out x in':>14} {'tokens':>6} {'bf16 us':>9}  scheme us (against bf16)")
    print("\n".join(lines))


def measure(rows: int, channels: int, arguments: argparse.Namespace) -> list[str]:
    """One line for each number of tokens."""
    device = torch.device(arguments.device)
    sets = arguments.sets or max(2, -(-COLD_BYTES // (rows * channels // 2)))
    dense = [torch.randn(rows, channels, device=device).to(torch.bfloat16) / 64 for _ in range(max(2, sets // 4))]
    product = torch.compile(F.linear) if device.type == "cuda" else F.linear
    modules = {
        scheme: [make_linear(scheme, rows, channels, device) for _ in range(sets)] for scheme in arguments.schemes
    }
    lines = []
    for tokens in arguments.tokens:
        x = torch.randn(tokens, channels, device=device).to(torch.bfloat16)
        base = microseconds([_call(product, x, weight) for weight in dense], arguments.rounds, device)
        cells = []
        for scheme, linears in modules.items():
            found = microseconds([_call(linear, x) for linear in linears], arguments.rounds, device)
            cells.append(f"{scheme} {found:.1f} ({base / found:.2f}x)")
        lines.append(f"{f'{rows} x {channels}':>14} {tokens:6} {base:9.1f}  {', '.join(cells)}")
    return lines


def make_linear(scheme: str, rows: int, channels: int, device: torch.device) -> QuantLinear:
    """A quantized linear with random codes, in the layout of its device."""
    parsed = Scheme.parse(scheme)
    spec = parsed.weight_spec(channels, "auto", symmetric=True)
    format = LinearFormat(weight=spec, activation=parsed.activation_spec(spec))
    module = QuantLinear(channels, rows, format, bias=False, scale_dtype=torch.bfloat16, device=device)
    module.weight_packed.data.random_(-(2**31), 2**31 - 1)
    module.weight_scale.data.fill_(0.01)
    module.decode_tokens = 16 if scheme != "w8a8" else 0
    return module.prepare()


def microseconds(calls: list[Callable[[], Tensor]], rounds: int, device: torch.device) -> float:
    """Median over rounds of the mean time of a call; on a GPU the calls of a round are one replayed CUDA graph."""
    with torch.inference_mode():
        for call in calls[:2]:
            call()
        run = _captured(calls) if device.type == "cuda" else lambda: [call() for call in calls]
        times = []
        for _ in range(rounds + 1):
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            times.append((time.perf_counter() - started) / len(calls) * 1e6)
    return statistics.median(times[1:])


def _captured(calls: list[Callable[[], Tensor]]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _call(function: Callable[..., Tensor] | nn.Module, *arguments: Tensor) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
