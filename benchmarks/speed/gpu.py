"""Everything that is measured on a GPU, as short stages, each a process of its own, with its table last.

    python -m benchmarks.speed.gpu --list
    python -m benchmarks.speed.gpu --stages suite sanitizer kernels

`--device cpu` runs the same stages on small shapes, to see that they work before a GPU is paid for.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE_LINES = 40
WORKERS = 12
GPU_TESTS = (
    "tests/kernels",
    "tests/modules/test_bound_gpu.py",
    "tests/modules/test_fused_gpu.py",
    "tests/integration/test_cuda.py",
)
"""Where tests for a GPU are: collecting the others would need packages that a machine with one may lack."""

SANITIZER = "compute-sanitizer"
SANITIZED = " or ".join(
    (
        "test_every_scheme_at_every_bucket_of_tokens",
        "test_a_product_of_digits_is_the_definition",
        "test_digits_are_the_transformed_activations",
        "test_programs_that_share_digits_give_the_same_product",
        "test_columns_past_the_channels_are_zeros",
        "test_the_weight_is_rounded_once_and_summed_in_fp32",
        "test_programs_that_share_channels_give_the_same_product",
        "test_other_products_are_shared_alike",
        "test_parts_are_added_in_their_order",
    )
)
"""Every kernel, at the tiles of every bucket, on sizes that are ragged against them."""

BATCHES = (1, 4, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command, and the longest that it may take.

    Attributes:
        needs: a program without which there is nothing to run.
    """

    name: str
    command: tuple[str, ...]
    limit_seconds: int
    needs: str | None = None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--stages", nargs="+", help="only these")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_args()
    stages = make_stages(arguments.device)
    if arguments.stages:
        unknown = set(arguments.stages) - {stage.name for stage in stages}
        if unknown:
            parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in stages)}")
        stages = [stage for stage in stages if stage.name in arguments.stages]
    if arguments.list:
        for stage in stages:
            print(f"{stage.name:22} {stage.limit_seconds:4} s  {' '.join(stage.command)}")
        return
    ended = []
    for stage in stages:
        print(f"... {stage.name}", flush=True)
        status, seconds, output = run(stage)
        ended.append((stage.name, status, seconds))
        print(f"=== {stage.name}: {status} in {seconds:.0f} s\n{output}\n", flush=True)
    print(f"{'stage':22} {'seconds':>7}  status")
    for name, status, seconds in ended:
        print(f"{name:22} {seconds:7.0f}  {status}")
    sys.exit(any(status != "done" for _, status, _ in ended))


def make_stages(device: str) -> list[Stage]:
    """In the order in which a lack of time hurts least."""
    small = device == "cpu"
    stages = [*test_stages(small), *linear_stages(device, small)]
    shapes = ["smollm2-135m"] if small else ["llava-1.5-13b", "llava-1.5-7b"]
    for batch in BATCHES[:2] if small else BATCHES:
        stages += [generate_stage(shape, batch, device, small) for shape in shapes]
    stages += [user_stage(shape, device, small) for shape in shapes]
    stages += [calibration_stage(shape, device, small) for shape in shapes]
    return stages


def test_stages(small: bool) -> list[Stage]:
    """The GPU suite, and a part of it under a memory checker. On a CPU tests are collected and not run."""
    pytest = (sys.executable, *"-m pytest -q -m gpu -p no:benchmark".split())
    pytest += ("-q", "--collect-only") if small else ()
    workers = ("-n", str(WORKERS)) if find_spec("xdist") is not None and not small else ()
    checked = (*pytest, "tests/kernels/triton/launched", "-k", SANITIZED)
    if not small:  # the allocator of torch would hide what lies past the end of a tensor
        checker = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", SANITIZER, "--tool", "memcheck", "--error-exitcode", "9")
        checked = (*checker, *checked)
    return [
        Stage(name="suite", command=(*pytest, *GPU_TESTS, *workers), limit_seconds=400),
        Stage(name="sanitizer", command=checked, limit_seconds=90, needs=None if small else SANITIZER),
    ]


def linear_stages(device: str, small: bool) -> list[Stage]:
    """Single linears: every scheme, and other libraries."""
    linears = [sys.executable, "-m", "benchmarks.speed.gpu_linears", "--device", device]
    peers = [sys.executable, "-m", "benchmarks.speed.gpu_peers", "--device", device]
    if small:
        few = ["--shapes", "256x256", "--rounds", "2", "--sets", "2", "--tokens", "1", "17"]
        linears, peers = linears + few, peers + few
    return [
        Stage(name="kernels", command=tuple(linears), limit_seconds=200),
        Stage(name="peers", command=tuple(peers), limit_seconds=120),
    ]


def generate_stage(shape: str, batch: int, device: str, small: bool) -> Stage:
    """A whole model: prefill of an image and some text, 600 tokens together, and decoding.

    Large batches leave no room for all schemes beside their caches; those of four bits decode alike.
    """
    command = [sys.executable, "-m", "benchmarks.speed.generate", "--random-init", shape, "--device", device]
    command += ["--dtype", "bf16", "--baselines", "bf16", "--static-cache", "--batch", str(batch)]
    if small:
        command += ["--schemes", "w4a8", "--prompt", "8", "--tokens", "2", "--rounds", "1"]
    else:
        schemes = ["w4a8", "w8a8"] if batch > 4 else ["w4a16", "w4a8", "w4a4", "w8a8"]
        command += ["--schemes", *schemes, "--compile"]
        command += ["--image", "--prompt", "24", "--tokens", "128", "--rounds", "3"]
    return Stage(name=f"{shape}-batch{batch}", command=tuple(command), limit_seconds=580)


def user_stage(shape: str, device: str, small: bool) -> Stage:
    """What `model.generate` itself takes, plain and compiled, with other libraries where they are installed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.gpu_generate",
        "--shapes",
        shape,
        "--device",
        device,
        "--variants",
        "bf16",
    ]
    if small:
        command += ["w4a8-rotated-fused", "--text", "4", "--tokens", "2", "--rounds", "1"]
    else:
        peers = [
            name for name, module in (("bnb-nf4", "bitsandbytes"), ("torchao-int4", "torchao")) if find_spec(module)
        ]
        command += ["w4a16-rotated-fused", "w4a8-rotated", "w4a8-rotated-fused", "w8a8-rotated-fused", *peers]
    return Stage(name=f"{shape}-generate", command=tuple(command), limit_seconds=580)


def calibration_stage(shape: str, device: str, small: bool) -> Stage:
    """Four layers of each part."""
    command = [sys.executable, "-m", "benchmarks.speed.calibration", "--random-init", shape, "--device", device]
    if small:
        command += ["--layers", "1", "--samples", "2", "--efforts", "fast"]
    return Stage(name=f"{shape}-calibration", command=tuple(command), limit_seconds=300)


def run(stage: Stage) -> tuple[str, float, str]:
    """How it ended, seconds, and the last lines that it printed."""
    if stage.needs is not None and shutil.which(stage.needs) is None:
        return f"not run: there is no {stage.needs} on the PATH", 0.0, ""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    started = time.perf_counter()
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=stage.limit_seconds)
        status = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it started would hold the pipe open
        output, _ = process.communicate()
        status = f"stopped after {stage.limit_seconds} s"
    return status, time.perf_counter() - started, "\n".join(output.splitlines()[-TABLE_LINES:])


if __name__ == "__main__":
    main()
