"""Linears of Humming beside ours and bf16 on a GPU, by scheme and number of tokens.

    pip install humming-kernels
    python -m benchmarks.speed.gpu_humming --shapes 5120x5120 --schemes w4a16 w4a8-rotated

Whole calls, with rotation and rounding of activations; weights are cold, calls replayed as one CUDA graph. A cell is
ours and Humming's as multiples of bf16's speed, with a star where ours is slower. What Humming raises is a line.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import ROTATED
from benchmarks.speed.gpu_linears import SHAPES, activations, call, dense_weights, make_linear, sizes
from benchmarks.timing import COLD_BYTES, copy_bandwidth, machine, microseconds
from optimum_qvlm.spec import Scheme

GROUP = 128
SCHEMES = ("w4a16", "w4a8-rotated", "w4a8-levels-rotated", "w8a8-rotated")

Linear = Callable[[Tensor], Tensor]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="OUTxIN")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 600])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{machine(device)}; copy {copy_bandwidth(device) / 1e9:.0f} GB/s")
    print(f"{'out x in':>14} {'tokens':>6} {'bf16 us':>8} | " + " | ".join(f"{name:>19}" for name in arguments.schemes))
    for shape in arguments.shapes:
        measure(shape, arguments, device)


def measure(shape: str, arguments: argparse.Namespace, device: torch.device) -> None:
    """A line for each number of tokens."""
    rows, channels = sizes(shape)
    sets = max(2, -(-COLD_BYTES // (rows * channels // 2)))
    dense = dense_weights(rows, channels, max(2, sets // 4), device)
    ours = {name: [make_linear(name, rows, channels, device) for _ in range(sets)] for name in arguments.schemes}
    theirs = {name: peers(name, rows, channels, sets, device) for name in arguments.schemes}
    for tokens in arguments.tokens:
        x = activations(tokens, channels, device)
        base = microseconds([call(F.linear, x, weight) for weight in dense], arguments.rounds, device)
        cells = []
        for name in arguments.schemes:
            mine = base / microseconds([call(linear, x) for linear in ours[name]], arguments.rounds, device)
            calls = [call(linear, x) for linear in theirs[name]]
            other = base / microseconds(calls, arguments.rounds, device) if calls else float("nan")
            cells.append(f"{mine:8.2f} / {other:6.2f}{'*' if mine < other else ' '}")
        print(f"{shape:>14} {tokens:6} {base:8.1f} | " + " | ".join(f"{cell:>19}" for cell in cells), flush=True)


def peers(name: str, rows: int, channels: int, sets: int, device: torch.device) -> list[Linear]:
    """Humming's linears with weights of their own; none where it raises."""
    try:
        return [humming_linear(name, rows, channels, device) for _ in range(sets)]
    except Exception as error:  # whatever a library of others raises is its result
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"Humming, {name}, {rows} x {channels}: {type(error).__name__}: {reason[:160]}", flush=True)
        return []


def humming_linear(name: str, rows: int, channels: int, device: torch.device) -> Linear:
    """One of Humming's for a scheme such as `w4a8-rotated`: groups of weights in four bits, one scale per token."""
    layers: Any = import_module("humming.layer")
    scheme = Scheme.parse(name.split("-")[0])
    weight: dict[str, Any] = {"dtype": f"int{scheme.weight_bits}"}
    weight |= {"group_size": GROUP} if scheme.weight_bits < 8 else {}
    inputs = None if scheme.activation_bits is None else {"dtype": f"int{scheme.activation_bits}"}
    layer = layers.HummingLayer(
        shape_n=rows, shape_k=channels, weight_config=weight, input_config=inputs, torch_dtype=torch.bfloat16
    ).to(device)
    layer.load_from_unquantized(dense_weights(rows, channels, 1, device)[0])
    layer.transform()
    rotation = GROUP if ROTATED in name else None
    return lambda x: layer(x, hadamard_block_size=rotation)


if __name__ == "__main__":
    main()
