"""Time of each operation against `F.linear` in bf16 and fp32, per number of tokens.

Several sets of weights take turns, so that they come from memory as in a model, and the operations take turns, so that
whatever else the machine does hits all of them. Ratios are medians over pairs.

    python -m benchmarks.speed.kernels --device cpu --json kernels.json
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import format_of
from benchmarks.timing import Clock, clock_of, copy_bandwidth, ratio
from optimum_qvlm.kernels import NOTHING, Rounding, StoredWeight, dispatch
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.spec import NAMED_SCHEMES, WeightSpec

TOKENS = (1, 4, 16, 64, 256, 600)
WIDTH = 26
INT4PACK_GROUP = 128
Call = Callable[[int], Any]


@dataclass(slots=True, kw_only=True)
class Timing:
    """One operation at one number of tokens."""

    operation: str
    tokens: int
    milliseconds: float
    against_bf16: float
    against_fp32: float
    megabytes: float
    copy_fraction: float


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=4096, help="in_features and out_features")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--schemes", nargs="+", default=NAMED_SCHEMES)
    parser.add_argument("--dtype", default="float32", help="of activations and scales of quantized operations")
    parser.add_argument("--decode-tokens", type=int, default=0, help="up to how many tokens no activation is rounded")
    parser.add_argument("--sets", type=int, default=3, help="sets of weights that take turns")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, for a machine that is shared")
    parser.add_argument("--peers", action="store_true", help="torchao and optimum-quanto, where installed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = clock_of(arguments.device, cpu_time=arguments.cpu_time)
    bandwidth = copy_bandwidth(torch.device(arguments.device), clock)
    calls, sizes = operations(arguments)
    found: list[Timing] = []
    print(f"copy {bandwidth / 1e9:.1f} GB/s; {arguments.size} x {arguments.size}, {arguments.threads} threads")
    print(f"{'operation':{WIDTH}} {'tokens':>6} {'ms':>9} {'bf16':>7} {'fp32':>7} {'MB':>7} {'of copy':>8}")
    for tokens in arguments.tokens:
        x = torch.randn(tokens, arguments.size, device=arguments.device)
        ready = {name: make(x) for name, make in calls.items()}
        for timing in compare(ready, sizes, tokens, clock, bandwidth, arguments):
            found.append(timing)
            print(
                f"{timing.operation:{WIDTH}} {timing.tokens:6} {timing.milliseconds:9.3f} {timing.against_bf16:6.2f}x "
                f"{timing.against_fp32:6.2f}x {timing.megabytes:7.1f} {timing.copy_fraction:8.2f}",
                flush=True,
            )
    if arguments.json is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        machine = {"torch": torch.__version__, "cpu": torch.cpu.get_capabilities().get("cpu_name"), "copy": bandwidth}
        content = {"settings": settings, "machine": machine, "timings": [asdict(timing) for timing in found]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def operations(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[Tensor], Call]], dict[str, int]]:
    """What makes a call for given activations, and the bytes of one weight, by name. Baselines come first."""
    size, device = arguments.size, arguments.device
    generator = torch.Generator(device).manual_seed(0)
    dense = [torch.randn(size, size, device=device, generator=generator) * 0.02 for _ in range(arguments.sets)]
    made: dict[str, Callable[[Tensor], Call]] = {}
    sizes: dict[str, int] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weights = [weight.to(dtype) for weight in dense]
        made[name], sizes[name] = plain_calls(weights, dtype), weights[0].nbytes
    dtype = getattr(torch, arguments.dtype)
    for text in arguments.schemes:
        modules = [quantized(weight, text, arguments) for weight in dense]
        bytes_of_weight = sum(parameter.nbytes for parameter in modules[0].parameters())
        made[f"{text} op"], made[f"{text} module"] = op_calls(modules, dtype), module_calls(modules, dtype)
        sizes[f"{text} op"] = sizes[f"{text} module"] = bytes_of_weight
        rotated = [quantized(weight, text, arguments, rotation=64) for weight in dense]
        made[f"{text} rotated"], sizes[f"{text} rotated"] = module_calls(rotated, dtype), bytes_of_weight
        print(f"{text}: layout {modules[0].layout}")
    if device == "cpu":
        made["torch int4pack"], sizes["torch int4pack"] = int4pack_calls(dense), bytes_of_int4pack(size)
    if arguments.peers:
        made |= peer_calls(dense, sizes)
    return made, sizes


def quantized(weight: Tensor, text: str, arguments: argparse.Namespace, rotation: int | None = None) -> QuantLinear:
    """A module in the layout of its device."""
    format = format_of(text, weight.shape[1])
    format = format if rotation is None else replace(format, rotation=rotation)
    rounded = quantize_weight(weight, format.weight, scale_dtype=getattr(torch, arguments.dtype))
    module = QuantLinear.from_quantized(rounded, None, format)
    module.decode_tokens = arguments.decode_tokens
    return module.prepare()


def plain_calls(weights: list[Tensor], dtype: torch.dtype) -> Callable[[Tensor], Call]:
    """`F.linear`."""

    def make(x: Tensor) -> Call:
        cast = x.to(dtype)
        return lambda turn: F.linear(cast, weights[turn % len(weights)])

    return make


def module_calls(modules: list[QuantLinear], dtype: torch.dtype) -> Callable[[Tensor], Call]:
    """The whole module."""

    def make(x: Tensor) -> Call:
        cast = x.to(dtype)
        return lambda turn: modules[turn % len(modules)](cast)

    return make


def op_calls(modules: list[QuantLinear], dtype: torch.dtype) -> Callable[[Tensor], Call]:
    """The product alone, in the arithmetic of the scheme, without transform and module."""
    stored = [StoredWeight(m.layout, m.weight_packed, m.weight_scale, m.weight_zero_point) for m in modules]
    grid = modules[0].grid

    def make(x: Tensor) -> Call:
        rounding = NOTHING if x.shape[0] <= grid.decode_tokens else Rounding.of(grid.activation)
        cast = x.to(dtype)
        return lambda turn: dispatch.linear(cast, stored[turn % len(stored)], None, rounding, grid)

    return make


def int4pack_calls(dense: list[Tensor]) -> Callable[[Tensor], Call]:
    """PyTorch's own operator for four bits in groups of 128 and bf16 activations, without anything around it."""
    packed = []
    for weight in dense:
        rounded = quantize_weight(weight, WeightSpec(bits=4, group=INT4PACK_GROUP), scale_dtype=torch.bfloat16)
        values = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.codes.int() + 8, 1)
        scale = rounded.scale.T
        packed.append((values, torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()))

    def make(x: Tensor) -> Call:
        cast = x.bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu

        def call(turn: int) -> Tensor:
            values, pairs = packed[turn % len(packed)]
            product: Tensor = multiply(cast, values, INT4PACK_GROUP, pairs)
            return product

        return call

    return make


def bytes_of_int4pack(size: int) -> int:
    """Half a byte per weight, and two bf16 per group."""
    return size * size // 2 + 4 * size * size // INT4PACK_GROUP


def peer_calls(dense: list[Tensor], sizes: dict[str, int]) -> dict[str, Callable[[Tensor], Call]]:
    """Weight-only linears in bf16 of the libraries that are installed; one that fails says so and is left out."""
    made: dict[str, Callable[[Tensor], Call]] = {}
    for package, module, title, build in PEERS:
        if find_spec(module) is None:
            print(f"{package} is not installed, so it is not compared")
            continue
        name = f"{title} {metadata.version(package)}"
        try:
            layers = [build(plain_layer(weight)) for weight in dense]
            layers[0](torch.zeros(1, dense[0].shape[1], dtype=torch.bfloat16, device=dense[0].device))
        except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            print(f"{name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        sizes[name] = dense[0].numel() if "int8" in title else dense[0].numel() // 2
        made[name] = layer_calls(layers)
    return made


def plain_layer(weight: Tensor) -> torch.nn.Linear:
    """A bf16 linear without bias, for a peer to quantize."""
    layer = torch.nn.Linear(*weight.T.shape, bias=False, dtype=torch.bfloat16, device=weight.device)
    layer.weight.data.copy_(weight)
    return layer


def layer_calls(layers: list[Any]) -> Callable[[Tensor], Call]:
    """Modules that take bf16."""

    def make(x: Tensor) -> Call:
        cast = x.bfloat16()
        return lambda turn: layers[turn % len(layers)](cast)

    return make


def torchao_int8(layer: torch.nn.Linear) -> Any:
    """torchao's int8 weights."""
    quantization: Any = import_module("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


def torchao_int4(layer: torch.nn.Linear) -> Any:
    """torchao's int4 weights in its packing for CPUs."""
    quantization: Any = import_module("torchao.quantization")
    workflow: Any = import_module("torchao.prototype.quantization.int4")
    quantization.quantize_(layer, workflow.PrototypeInt4WeightOnlyConfig(group_size=INT4PACK_GROUP))
    return layer


def quanto(bits: str) -> Callable[[torch.nn.Linear], Any]:
    """optimum-quanto's weights of some bits."""

    def build(layer: torch.nn.Linear) -> Any:
        library: Any = import_module("optimum.quanto")
        model = torch.nn.Sequential(layer)
        library.quantize(model, weights=getattr(library, bits))
        library.freeze(model)
        return model

    return build


PEERS: tuple[tuple[str, str, str, Callable[[torch.nn.Linear], Any]], ...] = (
    ("torchao", "torchao", "torchao int8", torchao_int8),
    ("torchao", "torchao", "torchao int4", torchao_int4),
    ("optimum-quanto", "optimum.quanto", "quanto int8", quanto("qint8")),
    ("optimum-quanto", "optimum.quanto", "quanto int4", quanto("qint4")),
)
"""Package, module, title and how a layer is quantized."""


def compare(
    calls: dict[str, Call],
    sizes: dict[str, int],
    tokens: int,
    clock: Clock,
    bandwidth: float,
    arguments: argparse.Namespace,
) -> list[Timing]:
    """Medians over turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(arguments.repeats + 1):
            for name, call in calls.items():
                started = clock()
                call(turn)
                if turn > 0:
                    taken[name].append(clock() - started)
    found = []
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        element = 4 if name == "fp32" or (arguments.dtype == "float32" and is_own(name, arguments)) else 2
        moved = sizes[name] + 2 * tokens * arguments.size * element
        timing = Timing(
            operation=name,
            tokens=tokens,
            milliseconds=1e3 * median,
            against_bf16=ratio(taken["bf16"], seconds),
            against_fp32=ratio(taken["fp32"], seconds),
            megabytes=moved / 1e6,
            copy_fraction=moved / median / bandwidth,
        )
        found.append(timing)
    return found


def is_own(name: str, arguments: argparse.Namespace) -> bool:
    """Whether an operation is one of this library's, which take activations of the dtype that was asked for."""
    return name.partition(" ")[0] in arguments.schemes


if __name__ == "__main__":
    main()
