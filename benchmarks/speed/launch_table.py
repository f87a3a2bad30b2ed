"""Measure launch shapes of the Triton kernels on the GPU that is here, and write its lines of the table anew.

    python -m benchmarks.speed.launch_table --kernels digits decode prefill bytes levels floats

Every line of `optimum_qvlm/kernels/tiles.json` for this architecture is tried against candidates, on shapes of a 13B
model. A line changes only where a candidate is faster by `--margin`, so that noise does not. Candidates are compiled
beforehand by several processes.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import COLD_BYTES, microseconds
from optimum_qvlm.kernels.triton import bytes as triton_bytes
from optimum_qvlm.kernels.triton import decode as triton_decode
from optimum_qvlm.kernels.triton import digits as triton_digits
from optimum_qvlm.kernels.triton import floats as triton_floats
from optimum_qvlm.kernels.triton import levels as triton_levels
from optimum_qvlm.kernels.triton import prefill as triton_prefill
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.layout import PackedWeight, padded_width
from optimum_qvlm.kernels.triton.quantize import split
from optimum_qvlm.kernels.weights import Rounding
from optimum_qvlm.spec import WeightSpec

TABLE = Path(tiles.__file__).with_name(tiles.TABLE)
SHAPE = ("tokens", "rows", "slices", "warps", "stages", "registers", "busy", "share")
SHARED = ("busy", "share")
"""What every candidate of a line has as the line has it: whether programs share the channels of a tile."""

SHAPES = {"few": ((5120, 5120), (5120, 13824)), "many": ((27648, 5120), (15360, 5120))}
"""Rows and channels: those of attention and the second linear of the MLP, and of fused first linears."""

BEHIND = {"few": 256, "many": 600}
"""Tokens at which a line without a bound is measured."""

Shape = dict[str, int]


@dataclass(frozen=True, slots=True)
class Trial:
    """A line of the table with one launch shape, on a weight [rows, channels]."""

    line: dict[str, Any]
    shape: tuple[tuple[str, int], ...]
    rows: int
    channels: int

    @property
    def tokens(self) -> int:
        """How many it is measured with."""
        up_to = self.line.get("up_to", "any")
        if (self.line["kernel"], up_to) in (("decode", 8), ("digits", 2)):
            return 1
        return BEHIND[size_of(self.line)] if up_to == "any" else up_to


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["digits", "decode", "prefill", "bytes", "levels", "floats"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 6, 8], help="of the weight")
    parser.add_argument("--margin", type=float, default=0.03, help="share of time that a change must save")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=TABLE, help="where the table is written")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("launch shapes can only be measured on a CUDA device")
    architecture = tiles.architecture(torch.device("cuda"))
    lines = own_lines(list(tiles.table()), architecture)
    chosen = [
        line
        for line in lines
        if line["kernel"] in arguments.kernels and line.get("bits", 8) in (*arguments.bits, "any")
    ]
    usable = compile_all([trial for line in chosen for trial in trials(line)], arguments.workers)
    changed = {}
    for line in chosen:
        best, gain = choose(line, lambda trial: measured(trial, usable, arguments.rounds), arguments.margin)
        print(f"{described(line)}: {shown(line)} -> {shown(best)}, {100 * gain:.0f} % faster", flush=True)
        changed[id(line)] = best
    others = [line for line in tiles.table() if line["architecture"] != architecture]
    write_table([*others, *(changed.get(id(line), line) for line in lines)], arguments.output)
    print(f"{architecture}: {len(chosen)} lines measured, written to {arguments.output}")


def own_lines(table: list[Any], architecture: int) -> list[dict[str, Any]]:
    """Lines of this architecture; where a kernel has none, those that it takes today, made its own."""
    found = []
    for kernel in dict.fromkeys(line["kernel"] for line in table):
        known = {line["architecture"] for line in table if line["kernel"] == kernel}
        taken = max((number for number in known if number <= architecture), default=None)
        found += [
            dict(line) | {"architecture": architecture}
            for line in table
            if line["kernel"] == kernel and line["architecture"] == taken
        ]
    return found


def candidates(line: dict[str, Any]) -> Iterator[Shape]:
    """Launch shapes to try for a line, its own first."""
    own = {name: line[name] for name in SHAPE if name in line}
    yield own
    if line["kernel"] == "digits":
        for rows, warps, stages in itertools.product((16, 32), (1, 2, 4, 8), (1, 2, 3, 5)):
            if rows == 16 or stages < 3:
                yield own | {"rows": rows, "slices": warps, "warps": warps, "stages": stages}
        return
    if line["kernel"] == "decode":
        shapes = itertools.product((16, 32, 64), ((4, 4), (8, 4), (8, 8), (2, 2)), (2, 3, 4))
        for rows, (slices, warps), stages in shapes:
            if rows * slices * own["tokens"] <= 8192:
                yield own | {"rows": rows, "slices": slices, "warps": warps, "stages": stages}
        return
    bound = line.get("up_to", "any")
    shared = {name: own[name] for name in SHARED if name in own}
    for rows, tokens, warps, stages in itertools.product((64, 128, 256), (16, 32, 64, 128), (4, 8), (3, 4)):
        if bound != "any" and tokens > bound:
            continue
        if rows * tokens <= 128 * 256 and warps * 32 * 128 >= rows * tokens:
            yield {"tokens": tokens, "rows": rows, "warps": warps, "stages": stages} | shared


def trials(line: dict[str, Any]) -> list[Trial]:
    """Every candidate of a line on every weight that it is for."""
    shapes = dict.fromkeys(tuple(candidate.items()) for candidate in candidates(line))
    return [Trial(line, shape, *weight) for shape in shapes for weight in SHAPES[size_of(line)]]


def size_of(line: dict[str, Any]) -> str:
    """Lines for all sizes are measured as those for few."""
    size: str = line.get("size", "any")
    return "few" if size == "any" else size


def choose(line: dict[str, Any], measure: Callable[[Trial], float], margin: float) -> tuple[dict[str, Any], float]:
    """The line with the candidate of least mean time, and the share of its own time that this saves.

    Times are averaged geometrically over the weights; the line's own shape stays unless the gain reaches the margin.
    """
    times: dict[tuple[tuple[str, int], ...], float] = {}
    for shape, group in itertools.groupby(trials(line), key=lambda trial: trial.shape):
        logs = [math.log(time) if (time := measure(trial)) < math.inf else math.inf for trial in group]
        times[shape] = statistics.mean(logs)
    own = next(iter(times))
    best = min(times, key=times.__getitem__)
    gain = 1 - math.exp(times[best] - times[own]) if times[own] < math.inf else 1.0
    return (line | dict(best), gain) if gain >= margin else (line, 0.0)


def call_of(trial: Trial, weights: list[PackedWeight]) -> Callable[[int], Tensor]:
    """What launches the kernel on one of the weights, with the shape of the trial."""
    line, shape = trial.line, dict(trial.shape)
    tokens, width = trial.tokens, weights[0].width
    if line["kernel"] == "digits":
        # With the pass that makes the digits, which it starts beside.
        tile = tiles.DecodeTile(**shape)
        x = torch.randn(tokens, trial.channels, device="cuda", dtype=torch.bfloat16)
        run = lambda n: triton_digits.linear_digits(*split(x, Rounding(), width), weights[n], None, x.dtype)  # noqa: E731
        return with_tile("digits_tile", tile, run)
    if line["kernel"] == "decode":
        tile = tiles.DecodeTile(**shape)
        x = torch.randn(tokens, trial.channels, device="cuda", dtype=torch.bfloat16)
        return with_tile("decode_tile", tile, lambda n: triton_decode.linear_decode(x, weights[n], None))
    prefill = tiles.PrefillTile(**shape)
    if line["kernel"] == "floats":
        x = torch.randn(tokens, trial.channels, device="cuda", dtype=torch.bfloat16)
        return with_tile("floats_tile", prefill, lambda n: triton_floats.linear_floats(x, weights[n], None))
    if line.get("operand", 8) == 8:
        x = torch.randint(-127, 128, (tokens, width), device="cuda", dtype=torch.int8)
        scale = torch.rand(tokens, 1, device="cuda")
        if line["kernel"] == "bytes":
            run = lambda n: triton_bytes.linear_bytes(x, scale, weights[n], None, torch.bfloat16)  # noqa: E731
            return with_tile("bytes_tile", prefill, run)
        if line["kernel"] == "levels":
            run = lambda n: triton_levels.linear_in_registers(x, scale, weights[n], None, torch.bfloat16)  # noqa: E731
            return with_tile("levels_tile", prefill, run)
        run = lambda n: triton_prefill.linear_prefill(x, scale, weights[n], None, torch.bfloat16)  # noqa: E731
        return with_tile("prefill_tile", prefill, run)
    dtype = torch.float32 if line["operand"] == 32 else torch.bfloat16
    x = torch.randn(tokens, trial.channels, device="cuda", dtype=dtype)
    return with_tile("prefill_tile", prefill, lambda n: triton_prefill.linear_prefill(x, None, weights[n], None, dtype))


def with_tile(name: str, tile: Any, call: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """`call` while the function of `tiles` called `name` answers `tile`."""

    def run(number: int) -> Tensor:
        usual = getattr(tiles, name)
        setattr(tiles, name, lambda *_: tile)
        try:
            return call(number)
        finally:
            setattr(tiles, name, usual)

    return run


def random_weight(line: dict[str, Any], rows: int, channels: int) -> PackedWeight:
    """Random codes as the kernel of a line reads them."""
    levels = line["kernel"] == "levels"
    four = line["kernel"] in ("digits", "levels", "floats") or "group" in line or line.get("bits", 8) == "any"
    bits = 4 if four else line.get("bits", 8)
    usual = None if bits == 8 else 32 if line.get("sums") == "several" else 128
    group = line.get("group", usual)
    width = padded_width(channels)
    codes = torch.randint(-128, 128, (rows, width * bits // 8), dtype=torch.int8, device="cuda")
    groups = 1 if group is None else width // group + levels
    scale = torch.rand(groups, rows, device="cuda", dtype=torch.bfloat16) / 64
    spec = WeightSpec(bits=bits, group=group, two_level=levels)
    return PackedWeight(codes=codes, scale=scale, zero_point=None, grid=spec, in_features=channels)


def compile_all(wanted: list[Trial], workers: int) -> set[str]:
    """Compile every kernel in several processes, which share the cache on disk; keys of what can be launched."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        launched = pool.map(can_be_launched, wanted, chunksize=4)
    print(f"{sum(launched)} of {len(wanted)} can be launched", flush=True)
    return {key(trial) for trial, fine in zip(wanted, launched, strict=True) if fine}


def can_be_launched(trial: Trial) -> bool:
    """Whether the kernel compiles and has the room it needs, tried on a weight of few rows."""
    try:
        call_of(trial, [random_weight(trial.line, 512, trial.channels)])(0)
        torch.cuda.synchronize()
    except Exception as error:  # what a launch shape can ask for too much of differs between releases
        print(f"{described(trial.line)} {dict(trial.shape)}: {type(error).__name__}")
        return False
    return True


def key(trial: Trial) -> str:
    """Something to look a trial up by."""
    return json.dumps([trial.line, trial.shape, trial.rows, trial.channels])


def measured(trial: Trial, usable: set[str], rounds: int) -> float:
    """Microseconds of a launch, the median of replayed graphs in which cold weights take turns."""
    if key(trial) not in usable:
        return math.inf
    size = random_weight(trial.line, 16, trial.channels).codes.nbytes // 16 * trial.rows
    count = max(2, min(24, -(-COLD_BYTES // size))) if trial.tokens < 512 else 2
    weights = [random_weight(trial.line, trial.rows, trial.channels) for _ in range(count)]
    call = call_of(trial, weights)
    return microseconds([partial(call, number) for number in range(count)], rounds, torch.device("cuda"))


def described(line: dict[str, Any]) -> str:
    """What a line is for."""
    return " ".join(f"{name} {value}" for name, value in line.items() if name not in (*SHAPE, "architecture"))


def shown(line: dict[str, Any]) -> str:
    """The launch shape of a line."""
    return ", ".join(f"{name} {line[name]}" for name in SHAPE if name in line)


def write_table(lines: list[Any], path: Path) -> None:
    """A line of the file for each of the table, by kernel and architecture; the old file stays until all is there."""
    order = {kernel: number for number, kernel in enumerate(dict.fromkeys(line["kernel"] for line in lines))}
    ordered = sorted(lines, key=lambda line: (order[line["kernel"]], line["architecture"]))
    whole = path.with_suffix(".new")
    whole.write_text("[\n" + ",\n".join(json.dumps(line) for line in ordered) + "\n]\n")
    whole.replace(path)


if __name__ == "__main__":
    main()
