"""Resources of every kernel with its shipped tile on every architecture, compiled without a GPU.

`python -m tests.kernels.resources` prints the table and ends with status 1 where a kernel spills, or does not fit.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from optimum_qvlm.kernels.reference import fitted_shift
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.bytes import bytes_kernel
from optimum_qvlm.kernels.triton.decode import decode_kernel
from optimum_qvlm.kernels.triton.dequantize import dequantize_kernel
from optimum_qvlm.kernels.triton.digits import RUN, digits_kernel
from optimum_qvlm.kernels.triton.floats import floats_kernel
from optimum_qvlm.kernels.triton.levels import levels_kernel, write_bytes_kernel
from optimum_qvlm.kernels.triton.prefill import prefill_kernel
from optimum_qvlm.kernels.triton.quantize import quantize_kernel, split_kernel
from optimum_qvlm.kernels.triton.sums import ROWS as SUMMED_ROWS
from optimum_qvlm.kernels.triton.sums import sums_kernel
from tests.kernels.ahead_of_time import Resources, compile_kernel, read_resources

ARCHITECTURES = (80, 86, 89, 90, 100)

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one program may take."""

TENSOR_COLUMNS = 512
"""Tensor memory of a multiprocessor. Triton compiles a kernel that wants more to a trap, and refuses to launch it."""

EXCHANGES = {"SHFL", "LDS", "LDSM", "STS", "STSM", "BAR"}
"""Instructions by which threads get what others have."""

CHANNELS = 5120
ROWS = 5120
MANY_ROWS = 28672
"""A weight that keeps every device busy with large tiles."""

DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "i8": tl.int8}

QUANTIZED = ((None, None), (None, 128), (128, 128), (32, 32))
"""Groups and rotations of activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel, its tile and the matrix instructions that it has to use.

    `weights` counts the weights of one step of its loop, None where that says nothing; `load_bits` is how wide the
    widest load has to be then. `limit` is how many registers a thread may have. `renames` says that nothing is
    exchanged in the loop, where no thread needs what another one has read.
    """

    name: str
    architecture: int
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    matrix: tuple[str, ...]
    weights: int | None = None
    load_bits: int = 128
    limit: int | None = None
    renames: bool = False

    def resources(self) -> Resources:
        """Compile and read."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        options |= {} if self.limit is None else {"maxnreg": self.limit}
        compiled = compile_kernel(self.kernel, self.types, self.constants, self.architecture, **options)
        return read_resources(compiled)

    def faults(self, found: Resources) -> list[str]:
        """What is wrong with the binary, in words."""
        faults = []
        if found.stack_bytes:
            faults.append(f"{found.stack_bytes} bytes of stack")
        if found.registers * self.warps * 32 > 65536:
            faults.append(f"{found.registers} registers")
        if found.shared_bytes > SHARED_BYTES[self.architecture]:
            faults.append(f"{found.shared_bytes} bytes of shared memory")
        if found.tensor_columns > TENSOR_COLUMNS:
            faults.append(f"{found.tensor_columns} columns of tensor memory")
        if self.matrix and not any(name.startswith(self.matrix) for name in found.matrix):
            faults.append(f"{dict(found.matrix)} instead of {self.matrix}")
        if found.open_products:
            faults.append(f"{found.open_products} products from registers are open when a step ends")
        if self.renames and (exchanged := EXCHANGES & {name.split(".")[0] for name in found.body}):
            faults.append(f"{sorted(exchanged)} in the loop")
        if self.weights is not None and max(found.load_bits, default=0) < self.load_bits:
            faults.append(f"loads of {found.load_bits} bits")
        return faults


def decode_case(
    architecture: int, tokens: int, bits: int, group: int | None, dtype: str = "fp16", **changes: Any
) -> Case:
    """`triton.decode` for a weight of ROWS x CHANNELS."""
    tile = tiles.decode_tile(architecture, bits, group, tokens, changes.get("rows", ROWS))
    types = _pointers(dtype, x=dtype)
    parts = tile.parts(architecture, -(-changes.get("rows", ROWS) // tile.rows), CHANNELS)
    types |= {} if parts == 1 else {"y": "*fp32"}
    constants = {
        "CHANNELS": CHANNELS, "WIDTH": CHANNELS, "GROUP": group or 0, "BITS": bits, "PARTS": parts,
        "HAS_ZERO": changes.get("zero_point", False), "HAS_BIAS": True, "ASM": True,
        "FULL": tokens % tile.tokens == 0,
        "BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "SLICES": tile.slices, "STAGES": tile.stages,
    }  # fmt: skip
    zero = " zero point" if changes.get("zero_point") else ""
    return Case(
        name=f"decode w{bits} g{group or 'row'}{zero} {dtype} rows {tile.rows} tokens {tile.tokens} "
        f"warps {tile.warps} stages {tile.stages}{_shared(parts)}",
        architecture=architecture,
        kernel=decode_kernel,
        types=types,
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        matrix=("HMMA",),
        weights=tile.rows * tile.slices * 128,
        load_bits=64 if group == 16 else 128,
        limit=tile.limit(zero_points=changes.get("zero_point", False)),
    )


def digits_case(architecture: int, tokens: int, rows: int, dtype: str = "bf16", channels: int = CHANNELS) -> Case:
    """`triton.digits`, whose loop exchanges nothing."""
    tile = tiles.digits_tile(architecture, tokens, rows)
    types = {
        "digits": "*i8", "x_scale": "*fp32", "codes": "*i8", "scale": f"*{dtype}", "bias": f"*{dtype}",
        "y": f"*{dtype}", "tokens": "i32", "rows": "i32",
    }  # fmt: skip
    constants = {
        "WIDTH": channels, "GROUP": 128, "RUN": RUN, "HAS_BIAS": True, "ASM": True, "PARTS": 1,
        "CHAINED": architecture >= tiles.CHAINS,
        "BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "SLICES": tile.slices, "STAGES": tile.stages,
    }  # fmt: skip
    return Case(
        name=f"digits w4 g128 {dtype} rows {tile.rows} tokens {tile.tokens} warps {tile.warps} stages {tile.stages} "
        f"of {channels}",
        architecture=architecture,
        kernel=digits_kernel,
        types=types,
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        matrix=("IMMA",),
        weights=tile.rows * tile.slices * tile.stages * 128,
        renames=True,
    )


def split_case(architecture: int, rotation: int | None, dtype: str = "bf16") -> Case:
    """`triton.quantize.split`."""
    constants = {
        "CHANNELS": CHANNELS, "WIDTH": CHANNELS, "ROTATION": rotation or 0, "EQUALIZED": True,
        "CHAINED": architecture >= tiles.CHAINS,
    }  # fmt: skip
    types = {"x": f"*{dtype}", "equalizer": "*fp32", "out": "*i8", "scales": "*fp32", "token_stride": "i32"}
    return Case(
        name=f"split {dtype} rotation {rotation}", architecture=architecture, kernel=split_kernel, types=types,
        constants=constants, warps=1, stages=3, matrix=(),
    )  # fmt: skip


def prefill_case(
    architecture: int,
    tokens: int,
    bits: int,
    group: int | None,
    operand: str = "i8",
    *,
    grouped: bool = False,
    rows: int = ROWS,
) -> Case:
    """`triton.prefill` with operands of one type."""
    kind = DTYPES[operand]
    tile = tiles.prefill_tile(architecture, kind.primitive_bitwidth, bits, group, tokens, rows)
    float_dtype = "fp16" if operand == "i8" else operand
    integer = operand == "i8"
    scales = (CHANNELS // (group or CHANNELS) if grouped else 1) if integer else -1
    parts = tile.parts(architecture, -(-rows // tile.rows) * -(-tokens // tile.tokens), CHANNELS)
    constants = {
        "CHANNELS": CHANNELS, "WIDTH": CHANNELS, "GROUP": group or 0, "BITS": bits, "X_GROUPS": scales, "DTYPE": kind,
        "HAS_ZERO": False, "HAS_BIAS": True, "ASM": True, "FLOAT_TRICK": integer and architecture < 90,
        "BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "STRIP": tile.strip, "STAGES": tile.stages,
        "PARTS": parts, "SETTLES": architecture == 90 and not integer,
    }  # fmt: skip
    return Case(
        name=f"prefill w{bits} g{group or 'row'} {operand}{' grouped' if grouped else ''} rows {tile.rows} "
        f"tokens {tile.tokens} warps {tile.warps} stages {tile.stages}{_shared(parts)}",
        architecture=architecture,
        kernel=prefill_kernel,
        types={**_pointers(float_dtype, x=operand), "x_scale": "*fp32", **({} if parts == 1 else {"y": "*fp32"})},
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        matrix=() if operand == "fp32" else _matrix(architecture, integer=integer),
        weights=tile.rows * 128,
        # What a thread reads of a row at once is eight bytes in groups of 16, and of six bits in small tiles of floats.
        load_bits=64 if group == 16 or (bits == 6 and not integer) else 128,
    )


def bytes_case(architecture: int, tokens: int, rows: int) -> Case:
    """`triton.bytes`, whose operands are copied by descriptors."""
    tile = tiles.bytes_tile(architecture, tokens, rows)
    types = {
        "x": f"tensordesc<i8[{tile.tokens}, 128]>", "codes": f"tensordesc<i8[{tile.rows}, 128]>", "x_scale": "*fp32",
        "scale": "*fp16", "bias": "*fp16", "y": "*fp16", "tokens": "i32", "rows": "i32",
    }  # fmt: skip
    constants = {
        "WIDTH": CHANNELS, "X_GROUPS": 1, "HAS_BIAS": True,
        "BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "STRIP": tile.strip, "STAGES": tile.stages,
    }  # fmt: skip
    return Case(
        name=f"bytes w8 grow i8 rows {tile.rows} tokens {tile.tokens} warps {tile.warps} stages {tile.stages}",
        architecture=architecture,
        kernel=bytes_kernel,
        types=types,
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        matrix=_matrix(architecture, integer=True),
    )


def levels_case(architecture: int, tokens: int, rows: int, group: int = 128) -> Case:
    """`triton.levels`, whose left operand is made in registers."""
    tile = tiles.levels_tile(architecture, tokens, rows)
    types = {
        "x": f"tensordesc<i8[{tile.tokens}, 64]>", "codes": f"tensordesc<i8[{tile.rows}, 64]>",
        "scales": f"tensordesc<fp16[1, {tile.rows}]>", "x_scale": "*fp32", "scale": "*fp16", "bias": "*fp16",
        "y": "*fp16", "tokens": "i32", "rows": "i32",
    }  # fmt: skip
    constants = {
        "WIDTH": CHANNELS, "GROUP": group, "X_GROUPS": 1, "HAS_BIAS": True, "ASM": True,
        "BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "STRIP": tile.strip, "STAGES": tile.stages,
    }  # fmt: skip
    return Case(
        name=f"levels w4 g{group} i8 rows {tile.rows} tokens {tile.tokens} warps {tile.warps} stages {tile.stages}",
        architecture=architecture,
        kernel=levels_kernel,
        types=types,
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        matrix=_matrix(architecture, integer=True),
    )


def floats_case(architecture: int, tokens: int, rows: int, group: int = 128, dtype: str = "bf16") -> Case:
    """`triton.floats`, whose left operand is made in registers."""
    tile = tiles.floats_tile(architecture, tokens, rows)
    parts = tile.parts(architecture, -(-rows // tile.rows) * -(-tokens // tile.tokens), CHANNELS)
    types = {
        "x": f"tensordesc<{dtype}[{tile.tokens}, 64]>", "codes": f"tensordesc<i8[{tile.rows}, 64]>",
        "scales": f"tensordesc<{dtype}[1, {tile.rows}]>", "bias": f"*{dtype}",
        "y": f"*{dtype}" if parts == 1 else "*fp32", "tokens": "i32", "rows": "i32",
    }  # fmt: skip
    constants = {
        "WIDTH": CHANNELS, "GROUP": group, "HAS_BIAS": parts == 1, "ASM": True, "PARTS": parts,
        "SETTLES": architecture == 90,
        "BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "STRIP": tile.strip, "STAGES": tile.stages,
    }  # fmt: skip
    return Case(
        name=f"floats w4 g{group} {dtype} rows {tile.rows} tokens {tile.tokens} warps {tile.warps} "
        f"stages {tile.stages}{_shared(parts)}",
        architecture=architecture,
        kernel=floats_kernel,
        types=types,
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        matrix=_matrix(architecture, integer=False),
    )


def sums_case(architecture: int, parts: int) -> Case:
    """`triton.sums`."""
    types = {"parts": "*fp32", "bias": "*fp16", "y": "*fp16", "rows": "i32"}
    constants = {"PARTS": parts, "HAS_BIAS": True, "BLOCK_ROWS": SUMMED_ROWS}
    return Case(
        name=f"sums of {parts}", architecture=architecture, kernel=sums_kernel, types=types, constants=constants,
        warps=2, stages=3, matrix=(),
    )  # fmt: skip


def written_case(architecture: int, group: int) -> Case:
    """What `triton.levels` writes a whole weight with."""
    types = {"codes": "*i8", "scale": "*fp16", "out": "*i8", "rows": "i32"}
    constants = {"WIDTH": CHANNELS, "GROUP": group, "ASM": True, "BLOCK_ROWS": 64}
    return Case(
        name=f"levels written w4 g{group}", architecture=architecture, kernel=write_bytes_kernel, types=types,
        constants=constants, warps=4, stages=3, matrix=(), weights=64 * 128, load_bits=128,
    )  # fmt: skip


def quantize_case(
    architecture: int,
    group: int | None,
    rotation: int | None,
    dtype: str,
    *,
    rounds: bool = True,
    bits: int = 8,
    fitted: bool = False,
) -> Case:
    """`triton.quantize`, equalised."""
    tile = tiles.quantize_tile(CHANNELS, group, rotation, whole=rounds and group is None)
    qmax = 2 ** (bits - 1) - 1
    constants = {
        "CHANNELS": CHANNELS, "WIDTH": CHANNELS, "GROUP": group or 0, "ROTATION": rotation or 0, "EQUALIZED": True,
        "STATIC": False, "ROUNDS": rounds, "QMAX": qmax, "FITTED": fitted_shift(qmax) if fitted else 0,
        "SPAN": tile.span, "CHUNK": tile.chunk,
    }  # fmt: skip
    return Case(
        name=f"{'quantize' if rounds else 'transform'}{' fitted' if fitted else ''} {dtype} "
        f"g{group or 'token'} rotation {rotation} "
        f"chunk {tile.chunk} warps {tile.warps}",
        architecture=architecture,
        kernel=quantize_kernel,
        types={
            "x": f"*{dtype}",
            "equalizer": "*fp32",
            "fixed": "*fp32",
            "out": "*i8" if rounds else f"*{dtype}",
            "scales": "*fp32",
            "clip": "fp32",
            "token_stride": "i32",
            "out_stride": "i32",
            "scale_stride": "i32",
        },
        constants=constants,
        warps=tile.warps,
        stages=3,
        matrix=(),
    )


def dequantize_case(architecture: int, bits: int) -> Case:
    """`triton.dequantize`."""
    constants = {
        "CHANNELS": CHANNELS, "WIDTH": CHANNELS, "GROUP": 0 if bits == 8 else 128, "BITS": bits,
        "HAS_ZERO": False, "ASM": True, "BLOCK_ROWS": 16,
    }  # fmt: skip
    types = {"codes": "*i8", "scale": "*fp16", "zero": "*i8", "out": "*fp16", "rows": "i32"}
    return Case(
        name=f"dequantize w{bits} fp16", architecture=architecture, kernel=dequantize_kernel, types=types,
        constants=constants, warps=4, stages=3, matrix=(),
    )  # fmt: skip


def checked_cases(architecture: int) -> list[Case]:
    """The few that every test run compiles: the tiles that most calls take, and those with the least room to spare."""
    return [
        digits_case(architecture, 1, ROWS),
        digits_case(architecture, 1, MANY_ROWS),
        decode_case(architecture, 1, 4, 128),
        decode_case(architecture, 1, 4, 128, zero_point=True, rows=1024),
        decode_case(architecture, 16, 4, 32, rows=1024),
        decode_case(architecture, 32, 4, 32, rows=MANY_ROWS),
        decode_case(architecture, 16, 4, 16),
        decode_case(architecture, 32, 6, 16, zero_point=True),
        prefill_case(architecture, 600, 4, 128),
        prefill_case(architecture, 600, 4, 128, grouped=True),
        prefill_case(architecture, 600, 6, 128, grouped=True),
        prefill_case(architecture, 600, 4, 16, "fp16"),
        prefill_case(architecture, 200, 8, None),
        *([bytes_case(architecture, 600, ROWS)] if architecture >= tiles.BULK_COPIES else []),
        *([levels_case(architecture, 600, ROWS)] if architecture >= tiles.BULK_COPIES else []),
        *([floats_case(architecture, 600, ROWS)] if architecture >= tiles.BULK_COPIES else []),
        written_case(architecture, 128),
    ]


def all_cases(architecture: int) -> list[Case]:
    """Every shipped tile, with the weights that use it."""
    actual = [
        *[digits_case(architecture, *size) for size in itertools.product((1, 4), (1024, MANY_ROWS))],
        digits_case(architecture, 1, ROWS, "fp16", 13824),
        split_case(architecture, 128),
        split_case(architecture, None, "fp16"),
        *_decode_cases(architecture),
        *_prefill_cases(architecture),
        *[quantize_case(architecture, group, rotation, "fp16") for group, rotation in QUANTIZED],
        *[quantize_case(architecture, group, 128, "bf16", bits=4, fitted=True) for group in (128, None)],
        quantize_case(architecture, None, 128, "bf16", rounds=False),
        *[dequantize_case(architecture, bits) for bits in (4, 6, 8)],
    ]
    actual += [written_case(architecture, 128), written_case(architecture, 32)]
    if architecture >= tiles.BULK_COPIES:
        actual += [bytes_case(architecture, 600, 1024), bytes_case(architecture, 2048, MANY_ROWS)]
        actual += [levels_case(architecture, *size) for size in ((300, 1024), (600, 5120), (1024, MANY_ROWS))]
        actual.append(levels_case(architecture, 600, ROWS, 64))
        sizes = ((64, 5120), (64, MANY_ROWS), (200, 5120), (600, 5120))
        actual += [floats_case(architecture, *size, dtype=dtype) for size in sizes for dtype in ("bf16", "fp16")]
        actual += [floats_case(architecture, *size, 64) for size in sizes]
    actual.append(sums_case(architecture, 3))
    return list({(case.name, *case.constants.items()): case for case in actual}.values())


def _decode_cases(architecture: int) -> Iterator[Case]:
    for tokens, rows in itertools.product((1, 8, 16, 32), (1024, MANY_ROWS)):
        for bits, group in ((4, 128), (4, 32), (6, 128), (8, None)):
            yield decode_case(architecture, tokens, bits, group, rows=rows)
        for bits in (4, 6):
            yield decode_case(architecture, tokens, bits, 128, zero_point=True, rows=rows)
            yield decode_case(architecture, tokens, bits, 16, rows=rows)
            yield decode_case(architecture, tokens, bits, 16, zero_point=True, rows=rows)
    for bits, group in ((4, 128), (6, 128), (8, None)):
        yield decode_case(architecture, 1, bits, group, "bf16")


def _prefill_cases(architecture: int) -> Iterator[Case]:
    for tokens, rows in itertools.product((16, 32, 64, 600), (1024, MANY_ROWS)):
        for bits, group in ((4, 128), (6, 128), (8, None)):
            yield prefill_case(architecture, tokens, bits, group, rows=rows)
            yield prefill_case(architecture, tokens, bits, group, "fp16", rows=rows)
    for tokens, bits in itertools.product((16, 32, 600), (4, 6)):
        yield prefill_case(architecture, tokens, bits, 128, grouped=True)
        yield prefill_case(architecture, tokens, bits, 32, grouped=True)
        yield prefill_case(architecture, tokens, bits, 16, "fp16")
    yield prefill_case(architecture, 600, 4, 128, "bf16")
    yield prefill_case(architecture, 600, 4, 16, "bf16")
    yield prefill_case(architecture, 600, 4, 128, "fp32")


def _pointers(dtype: str, *, x: str) -> dict[str, str]:
    return {
        "x": f"*{x}", "codes": "*i8", "scale": f"*{dtype}", "zero": "*i8", "bias": f"*{dtype}", "y": f"*{dtype}",
        "tokens": "i32", "rows": "i32", "token_stride": "i32",
    }  # fmt: skip


def _shared(parts: int) -> str:
    return "" if parts == 1 else f" shared by {parts}"


def _matrix(architecture: int, *, integer: bool) -> tuple[str, ...]:
    """Names that the instruction may start with: on 100 older compilers have no fifth-generation integer product."""
    if architecture == 100:
        return ("UTC", "IMMA", "HMMA")
    if architecture == 90:
        return ("IGMMA",) if integer else ("HGMMA",)
    return ("IMMA",) if integer else ("HMMA",)


def line(case: Case, found: Resources) -> str:
    """One row of the table."""
    matrix = next((name for name, _ in found.matrix.most_common() if len(name) > 4), "-")
    per_weight = ""
    if case.weights is not None and found.body:
        per_weight = f"{sum(found.body.values()) * case.warps * 32 / case.weights:.2f}"
    return (
        f"{case.architecture:4} {case.name:66} {found.registers:4} {found.stack_bytes:5} {found.shared_bytes:7} "
        f"{matrix:22} {max(found.load_bits, default=0) // 8:5} {per_weight:>7}"
    )


def row(place: tuple[int, int], *, quick: bool, match: str) -> tuple[str, bool]:
    """A row of the table by its architecture and number, with its faults, and whether it has any."""
    architecture, number = place
    case = cases(architecture, quick=quick, match=match)[number]
    actual = case.resources()
    faults = case.faults(actual)
    return line(case, actual) + ("  FAULT " + ", ".join(faults) if faults else ""), bool(faults)


def cases(architecture: int, *, quick: bool, match: str = "") -> list[Case]:
    """What the table has of one architecture, of the names that hold `match`."""
    actual = checked_cases(architecture) if quick else all_cases(architecture)
    return [case for case in actual if match in case.name]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--quick", action="store_true", help="only the tiles that the tests compile")
    parser.add_argument("--match", default="", help="only kernels whose name holds this text, as in 'decode w4 g16'")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}: registers of a thread, bytes of stack, bytes of shared memory, matrix")
    print("instruction, bytes of the widest load, instructions per weight in one step of the loop")
    places = [
        (architecture, number)
        for architecture in arguments.architectures
        for number in range(len(cases(architecture, quick=arguments.quick, match=arguments.match)))
    ]
    failures = 0
    with multiprocessing.get_context("spawn").Pool(arguments.workers, warnings.simplefilter, ("ignore",)) as pool:
        one = functools.partial(row, quick=arguments.quick, match=arguments.match)
        for text, faulty in pool.imap(one, places):
            failures += faulty
            print(text, flush=True)
    print(f"{failures} of the {len(places)} kernels have faults")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
