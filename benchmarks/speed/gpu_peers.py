"""Weight-only linears in 4 bits of other libraries beside ours and bf16 on a GPU, timed as `gpu_linears` does.

torchao packs for the kernel that torch itself holds (`_weight_int4pack_mm`); gemlite multiplies with Triton kernels,
whose tiles it holds for these shapes on some cards and looks for on others. Groups are of 128 channels, activations in
bf16. A peer that is not installed or raises is a line of its own, and does not end the run.

    python -m benchmarks.speed.gpu_peers --device cuda
"""

import argparse
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.gpu_linears import activations, call, dense_weights, make_linear, sizes, weight_bytes
from benchmarks.timing import COLD_BYTES, copy_bandwidth, machine, microseconds

GROUP = 128
BYTES_PER_WEIGHT = 0.5 + 4 / GROUP
"""Of the peers: codes, and a scale and a zero point in bf16 per group."""

Linear = Callable[[Tensor], Tensor]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "5120x5120", "27648x5120", "5120x13824"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sets", type=int, help="weight sets; by default as many as leave the cache cold")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    bandwidth = copy_bandwidth(device)
    versions = [f"{peer} {metadata.version(peer)}" for peer in arguments.peers if find_spec(peer) is not None]
    print("; ".join([machine(device), *versions, f"copy {bandwidth / 1e9:.0f} GB/s"]))
    print(f"{'library':10} {'out x in':>14} {'tokens':>6} {'us':>8} {'x bf16':>7} {'of copy':>7}")
    base: dict[tuple[str, int], float] = {}
    for name in ("bf16", "ours", *arguments.peers):
        for shape in arguments.shapes:
            measure(name, shape, arguments, device, bandwidth, base)


def measure(
    name: str,
    shape: str,
    arguments: argparse.Namespace,
    device: torch.device,
    bandwidth: float,
    base: dict[tuple[str, int], float],
) -> None:
    """A line for each number of tokens; the first name to be measured is what the others are compared with."""
    rows, channels = sizes(shape)
    wanted = arguments.sets or max(2, -(-COLD_BYTES // (rows * channels // 2)))
    sets = max(2, wanted // 4) if name == "bf16" else wanted
    try:
        linears, held = make(name, rows, channels, sets, device)
        for tokens in arguments.tokens:
            x = activations(tokens, channels, device)
            found = microseconds([call(linear, x) for linear in linears], arguments.rounds, device)
            against = base.setdefault((shape, tokens), found) / found
            share = held / found * 1e6 / bandwidth
            place = f"{name:10} {f'{rows} x {channels}':>14} {tokens:6}"
            print(f"{place} {found:8.1f} {against:6.2f}x {share:7.2f}", flush=True)
    except Exception as error:  # whatever a library of others raises is its result
        if name not in PEERS:
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"{name:10} {f'{rows} x {channels}':>14}: {type(error).__name__}: {reason[:160]}", flush=True)


def make(name: str, rows: int, channels: int, sets: int, device: torch.device) -> tuple[list[Linear], float]:
    """Linears with weights of their own, and the bytes of one weight."""
    if name == "ours":
        modules = [make_linear("w4a16", rows, channels, device) for _ in range(sets)]
        return list(modules), weight_bytes(modules[0])
    if name == "bf16":
        weights = dense_weights(rows, channels, sets, device)
        return [_product(weight) for weight in weights], weights[0].nbytes
    build = PEERS[name]
    return [build(weight) for weight in dense_weights(rows, channels, sets, device)], rows * channels * BYTES_PER_WEIGHT


def _product(weight: Tensor) -> Linear:
    return lambda x: F.linear(x, weight)


def torchao_linear(weight: Tensor) -> Linear:
    """`Int4WeightOnlyConfig`, packed for torch's own kernel."""
    quantization: Any = import_module("torchao.quantization")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    config = quantization.Int4WeightOnlyConfig(
        group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    quantization.quantize_(layer, config)
    return layer


def gemlite_linear(weight: Tensor) -> Linear:
    """`A16W4_HQQ_INT` on codes of plain rounding."""
    gemlite: Any = import_module("gemlite.helper")
    grouped = weight.float().view(-1, GROUP)
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    scale = (high - low) / 15
    zero = -low / scale
    codes = torch.round(grouped / scale + zero).clamp(0, 15).to(torch.uint8).view(weight.shape)
    builder = gemlite.A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
    shape = (weight.shape[0], -1)
    linear: Linear = builder.from_weights(codes, scale.view(shape), zero.view(shape))
    return linear


PEERS: dict[str, Callable[[Tensor], Linear]] = {"torchao": torchao_linear, "gemlite": gemlite_linear}


if __name__ == "__main__":
    main()
