"""Clocks, ratios of pairs and the rate of a copy, as every benchmark of speed takes them."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

Clock = Callable[[], float]

COLD_BYTES = 200 * 2**20
"""What the weight sets of a GPU's run hold together, so that its cache holds none: four times the largest cache."""

COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}
COPIES = 8
"""In a row, between two looks at the clock."""


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device: torch.device | str, *, cpu_time: bool = False) -> Clock:
    """Seconds, once the device has done what it was asked; with `cpu_time` those of the process where it is a CPU."""
    place = torch.device(device)

    def synchronized() -> float:
        wait(place)
        return time.perf_counter()

    return time.process_time if cpu_time and place.type == "cpu" else synchronized


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the ratios of pairs: whatever the machine did besides hit both of a pair."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def copy_bandwidth(device: torch.device, clock: Clock | None = None) -> float:
    """Bytes read and written per second by copies of a large tensor.

    Each is a call of its own: as a node of a CUDA graph a copy reaches four fifths of the rate.
    """
    clock = clock_of(device) if clock is None else clock
    source = torch.zeros(COPIED_BYTES.get(device.type, COPIED_BYTES["cpu"]), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        started = clock()
        for _ in range(COPIES):
            target.copy_(source)
        times.append((clock() - started) / COPIES)
    return 2 * source.nbytes / statistics.median(times[1:])


def machine(device: torch.device | str) -> str:
    """Device and versions."""
    place = torch.device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}, triton {import_module('triton').__version__}"


def microseconds(calls: Sequence[Callable[[], Tensor]], rounds: int, device: torch.device) -> float:
    """Median over rounds of the mean time of a call; on a GPU the calls of a round are one replayed CUDA graph."""
    clock = clock_of(device)
    with torch.inference_mode():
        for one in calls[:2]:
            one()
        run = captured(calls) if device.type == "cuda" else lambda: [one() for one in calls]
        times = []
        for _ in range(rounds + 1):
            started = clock()
            run()
            times.append((clock() - started) / len(calls) * 1e6)
    return statistics.median(times[1:])


def captured(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], object]:
    """What replays all calls as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for one in calls:
            one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in calls:
            one()
    return graph.replay
