"""Everything that is measured on a GPU, as short stages, each a process of its own, with their tables last.

`--device cpu` runs the same stages on small shapes, to see that they work before a GPU is paid for.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE_LINES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command, and the longest that it may take."""

    name: str
    command: tuple[str, ...]
    limit_seconds: int


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
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
            print(f"{stage.name:12} {' '.join(stage.command)}")
        return
    results = [run(stage) for stage in stages]
    for stage, (status, seconds, output) in zip(stages, results, strict=True):
        print(f"\n=== {stage.name}: {status} in {seconds:.0f} s\n{output}")
    sys.exit(any(status != "done" for status, _, _ in results))


def make_stages(device: str) -> list[Stage]:
    """In the order in which a lack of time hurts least."""
    python, small = sys.executable, device == "cpu"
    kernels = ["benchmarks/gpu_linears.py", "--device", device]
    if small:
        kernels += ["--shapes", "256x256", "--tokens", "1", "17", "--rounds", "2", "--sets", "2"]
    stages = [
        Stage(
            name="suite",
            command=(python, "-m", "pytest", "-q", "-m", "gpu", *(["--collect-only"] if small else [])),
            limit_seconds=580,
        ),
        Stage(name="kernels", command=(python, *kernels), limit_seconds=400),
    ]
    shapes = ["smollm2-135m"] if small else ["llava-1.5-7b", "llava-1.5-13b"]
    for shape in shapes:
        command = [python, "benchmarks/generate.py", "--random-init", shape, "--device", device, "--baselines", "bf16"]
        command += ["--dtype", "bf16", "--static-cache"]
        command += ["--prompt", "8", "--tokens", "2", "--rounds", "1"] if small else ["--image", "--compile"]
        schemes = ["w4a8"] if small else ["w4a16", "w4a8", "w8a8"]
        stages.append(Stage(name=shape, command=(*command, "--schemes", *schemes), limit_seconds=580))
    calibration = (python, "benchmarks/quality.py", "--device", device, "--schemes", "w4a8")
    few = ("--seeds", "1", "--questions", "40") if small else ("--seeds", "1", "--questions", "400")
    stages.append(Stage(name="calibration", command=(*calibration, *few), limit_seconds=580))
    return stages


def run(stage: Stage) -> tuple[str, float, str]:
    """How it ended, seconds, and the last lines that it printed."""
    print(f"... {stage.name}", flush=True)
    started = time.perf_counter()
    try:
        ran = subprocess.run(
            stage.command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=stage.limit_seconds,
            check=False,
        )
        status, output = ("done" if ran.returncode == 0 else f"failed with status {ran.returncode}"), ran.stdout
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        status = f"stopped after {stage.limit_seconds} s"
        output = partial if isinstance(partial, str) else partial.decode(errors="replace")
    return status, time.perf_counter() - started, "\n".join(output.splitlines()[-TABLE_LINES:])


if __name__ == "__main__":
    main()
