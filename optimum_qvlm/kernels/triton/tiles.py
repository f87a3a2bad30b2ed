"""Launch shapes of the Triton kernels, from the table `tiles.json`; nothing is tuned at run time.

`python -m benchmarks.speed.launch_table` measures candidates on the device that is there and writes its lines anew. A
device whose architecture has no lines takes those of the newest older one.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

OLDEST = 80
"""The oldest architecture, compute capability times ten, that the kernels are compiled for."""

DIGITS_TOKENS = 4
"""Up to how many tokens an unrounded activation goes through `triton.digits` where that takes the weight."""

DECODE_TOKENS = 32
"""Up to how many tokens an unrounded activation goes through `triton.decode`."""

FLOAT_TOKENS = 512
"""From how many tokens an unrounded activation meets a dequantized weight where `triton.floats` does not take it."""

DENSE_TOKENS = 1024
"""From how many tokens the dequantized weight is multiplied by the vendor's library in any case."""

BULK_COPIES = 90
"""The oldest architecture that copies whole tiles."""

CHAINS = 90
"""The oldest architecture that starts kernels ahead of the end of those before them."""

LEVELS_TOKENS = 257
"""From how many tokens integer activations go through `triton.levels`, where the weight has scales on two levels."""

WRITTEN_TOKENS = 512
"""From how many tokens a weight whose groups are too small for that is written in eight bits and then multiplied."""

MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}
"""Of the largest device of an architecture."""

MANY = {"digits": 64, "decode": 64, "prefill": 12288, "bytes": 98304, "levels": 98304, "floats": 2}
"""Per multiprocessor, the size from which a product is large: weight rows in decoding, by digits or not, programs of 64
rows in `triton.floats`, else elements of the result."""

MOST_REGISTERS = 255
"""That a thread of NVIDIA's devices can have."""

TABLE = "tiles.json"

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What all launches have that may share the channels of a tile.

    `busy` is how many programs keep a multiprocessor busy: where there are fewer tiles than that, several programs
    share the channels of each, `share` or more for each of them. None leaves a tile to one program.
    """

    busy: int | None = None
    share: int | None = None

    def parts(self, architecture: int, programs: int, width: int) -> int:
        """How many programs share the channels of each of `programs` tiles, of a weight with `width` channels."""
        if self.busy is None or self.share is None:
            return 1
        wanted = self.busy * MULTIPROCESSORS.get(architecture, 108) // programs
        blocks = width // 128
        parts = max(1, min(wanted, width // self.share))
        return -(-blocks // -(-blocks // parts))  # none is left without a block


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTile(Tile):
    """Tokens and weight rows of a program, blocks of 128 channels per step (shared by its warps), loads in flight.

    `registers` is how many a thread may have on NVIDIA's devices. Without it their assembler would rather put a word
    of a thread in memory than have fewer programs side by side.
    """

    tokens: int
    rows: int
    slices: int
    warps: int
    stages: int
    registers: int | None = None

    def limit(self, *, zero_points: bool) -> int | None:
        """Registers of a thread for weights with or without zero points, which need more; None for no limit."""
        return MOST_REGISTERS if zero_points else self.registers


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTile(Tile):
    """Tokens and weight rows of a program, blocks of rows side by side, loads in flight."""

    tokens: int
    rows: int
    warps: int
    stages: int
    strip: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeTile:
    """Channels of a program's step, and the power of two at or above it that it holds."""

    span: int
    chunk: int
    warps: int


def architecture(device: torch.device) -> int:
    """Compute capability times ten; 80 for what is not a CUDA device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def speaks_ptx(device: torch.device) -> bool:
    """Whether inline PTX may be used: on NVIDIA's devices."""
    return device.type == "cuda" and torch.version.hip is None


def chains(device: torch.device) -> bool:
    """Whether a kernel may start before the one that it reads from has ended, and wait for it where it has to."""
    return speaks_ptx(device) and architecture(device) >= CHAINS


def leaves_products_open(device: torch.device) -> bool:
    """Whether matrix units read operands from registers while a program goes on, see `triton.prefill.settled`."""
    return speaks_ptx(device) and 90 <= architecture(device) < 100


def size_class(kernel: str, architecture: int, size: int) -> str:
    """ "few" or "many": whether `size`, see `MANY`, keeps all multiprocessors of a device busy with large tiles."""
    return "many" if size >= MANY[kernel] * MULTIPROCESSORS.get(architecture, 108) else "few"


@functools.lru_cache(maxsize=1024)
def digits_tile(architecture: int, tokens: int, rows: int) -> DecodeTile:
    """The tile of `triton.digits`."""
    wanted = {"size": size_class("digits", architecture, rows)}
    return DecodeTile(**_shape(_entry("digits", architecture, tokens, wanted)))


@functools.lru_cache(maxsize=1024)
def decode_tile(architecture: int, bits: int, group: int | None, tokens: int, rows: int) -> DecodeTile:
    """The tile of `triton.decode`; more tokens than the largest takes are shared among programs."""
    wanted = {"bits": bits, "group": group or "row", "size": size_class("decode", architecture, rows)}
    return DecodeTile(**_shape(_entry("decode", architecture, min(tokens, DECODE_TOKENS), wanted)))


@functools.lru_cache(maxsize=1024)
def prefill_tile(
    architecture: int, operand_bits: int, weight_bits: int, group: int | None, tokens: int, rows: int
) -> PrefillTile:
    """The tile of `triton.prefill` for operands of 8, 16 or 32 bits; small groups need room for more sums."""
    wanted = {
        "operand": operand_bits,
        "bits": weight_bits,
        "sums": "one" if group is None or group >= 128 else "several",
        "size": size_class("prefill", architecture, rows * tokens),
    }
    return PrefillTile(**_shape(_entry("prefill", architecture, tokens, wanted)))


@functools.lru_cache(maxsize=1024)
def bytes_tile(architecture: int, tokens: int, rows: int) -> PrefillTile:
    """The tile of `triton.bytes`."""
    wanted = {"size": size_class("bytes", architecture, rows * tokens)}
    return PrefillTile(**_shape(_entry("bytes", architecture, tokens, wanted)))


@functools.lru_cache(maxsize=1024)
def levels_tile(architecture: int, tokens: int, rows: int) -> PrefillTile:
    """The tile of `triton.levels`."""
    wanted = {"size": size_class("levels", architecture, rows * tokens)}
    return PrefillTile(**_shape(_entry("levels", architecture, tokens, wanted)))


@functools.lru_cache(maxsize=1024)
def floats_tile(architecture: int, tokens: int, rows: int) -> PrefillTile:
    """The tile of `triton.floats`."""
    programs = -(-rows // 64) * -(-tokens // (64 if tokens <= 64 else 128))
    wanted = {"size": size_class("floats", architecture, programs)}
    return PrefillTile(**_shape(_entry("floats", architecture, tokens, wanted)))


@functools.lru_cache(maxsize=1024)
def quantize_tile(width: int, group: int | None, rotation: int | None, *, whole: bool) -> QuantizeTile:
    """The tile of `triton.quantize`: with one scale for the `whole` token a program does all of it, step by step."""
    least = max(128, rotation or 1)
    if group is not None and _power_of_two(group) != group:
        chunk = max(least, _power_of_two(group))
        return QuantizeTile(span=group, chunk=chunk, warps=8)
    most = max(least, group or 1, 2048 if whole else 512)
    chunk = min(most, max(least, group or 1, _power_of_two(width)))
    if whole:
        return QuantizeTile(span=chunk, chunk=chunk, warps=8 if chunk >= 2048 else 4)
    return QuantizeTile(span=chunk, chunk=chunk, warps=min(8, max(1, chunk // 512)))


@functools.cache
def table() -> tuple[Entry, ...]:
    """Lines of the table in its order.

    Each holds `kernel`, `architecture`, what it is for (`bits` and `group` of the weight, `operand` bits, `sums` per
    block of 128 channels, `size` of the product, tokens `up_to`; "any" fits all) and the shape of the launch.
    """
    return tuple(json.loads(resources.files(__package__).joinpath(TABLE).read_text()))


def _entry(kernel: str, architecture: int, tokens: int, wanted: Mapping[str, Any]) -> Entry:
    """The first line that fits, of the newest architecture that is not newer."""
    known = {line["architecture"] for line in table() if line["kernel"] == kernel}
    mine = max((number for number in known if number <= architecture), default=min(known))
    for line in table():
        if line["kernel"] != kernel or line["architecture"] != mine:
            continue
        fits = all(line.get(name, "any") in (value, "any") for name, value in wanted.items())
        if fits and (line.get("up_to", "any") == "any" or tokens <= line["up_to"]):
            return line
    raise LookupError(f"{TABLE} has no line for {kernel} on {architecture} with {dict(wanted)} and {tokens} tokens")


def _shape(line: Entry) -> dict[str, int]:
    """What a launch takes of a line."""
    names = ("tokens", "rows", "slices", "warps", "stages", "registers", "busy", "share")
    return {name: line[name] for name in names if name in line}


def _power_of_two(count: int) -> int:
    """The smallest power of two at or above `count`."""
    return 1 << (count - 1).bit_length()
