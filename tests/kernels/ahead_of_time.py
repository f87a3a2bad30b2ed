"""Compile kernels for architectures that are not here and read from the binary what they use."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optimum_qvlm.compat.triton import arithmetic_options

TOOLS = Path(nvidia.__file__).parent / "bin"

MATRIX = re.compile(r"\b([A-Z0-9]*(?:MMA)\S*)")
INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_.]+)?)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one program of a compiled kernel takes.

    `matrix` counts matrix instructions by name; `body` is every instruction of the longest loop by name. Compute
    capability 10.0 keeps sums in columns of tensor memory; others have none. `open_products` counts products with an
    operand in registers that nothing waits for before a step of a loop ends: the next one may overwrite them.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    matrix: Counter[str]
    body: Counter[str]
    load_bits: tuple[int, ...]
    open_products: int = 0


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, **options: Any):
    """The kernel compiled for `architecture`; pointers and strides count as aligned to 16."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in types and name not in ("tokens", "clip")
    }
    constants = {name: constants[name] for name in names if name not in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = arithmetic_options() | options
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def read_resources(compiled: Any) -> Resources:
    """Registers, stack and shared memory of a compiled kernel, and its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    found = usage.stdout + usage.stderr
    body = _longest_loop(listing)
    return Resources(
        registers=int(re.search(r"REG:(\d+)", found)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", found)[1]),
        shared_bytes=compiled.metadata.shared,
        tensor_columns=compiled.metadata.tmem_size or 0,
        matrix=Counter(MATRIX.findall(listing)),
        body=Counter(body),
        load_bits=tuple(sorted({int(bits) for bits in re.findall(r"LDG\S*?\.(\d+)", listing)})),
        open_products=_open_products(compiled.asm["ttgir"]),
    )


def _open_products(code: str) -> int:
    """Of all loops of a kernel in Triton's representation for GPUs."""
    found = started = 0
    for line in code.splitlines():
        if "warp_group_dot " in line and "dot_op<{opIdx = 0" in line:
            started += 1
        elif (wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line)) is not None:
            started = min(started, int(wait[1]))
        elif "scf.yield" in line:
            found, started = found + started, 0
    return found


def _longest_loop(listing: str) -> list[str]:
    """Instructions between a label and the last jump back to it, of the loop that has most of them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    best: list[str] = []
    for line in listing.splitlines():
        label = re.match(r"^\s*(\.L_x?_?\w+):", line)
        if label is not None:
            labels[label[1]] = len(instructions)
            continue
        found = INSTRUCTION.match(line)
        if found is None:
            continue
        instructions.append(found[1])
        target = re.search(r"\bBRA\b.*?(\.L_x?_?\w+)", line)
        if target is not None and target[1] in labels and len(instructions) - labels[target[1]] > len(best):
            if labels[target[1]] < len(instructions) - 1:
                best = instructions[labels[target[1]] :]
    return best
