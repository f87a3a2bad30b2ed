"""Several processes that each hold the subject of a benchmark and take turns at its items."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils import logging

from benchmarks.method.subjects import Sizes, Subject

Item = TypeVar("Item")
Found = TypeVar("Found")

_held: list[Subject] = []


def in_turn(
    work: Callable[..., Found], subject: Subject, items: Sequence[Item], workers: int, *arguments: Any
) -> Iterator[Found]:
    """`work(subject, item, *arguments)` of every item in their order, by so many processes of one thread each.

    With one worker this process does all, with its own threads.
    """
    if workers == 1:
        for item in items:
            yield work(subject, item, *arguments)
        return
    context = multiprocessing.get_context("spawn")
    made = (subject.name, subject.scratch, subject.sizes, subject.device)
    with ProcessPoolExecutor(min(workers, len(items)), context, _hold, made) as pool:
        yield from [task.result() for task in [pool.submit(_do, work, item, *arguments) for item in items]]


def _hold(name: str, scratch: Path, sizes: Sizes, device: str) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    _held.append(Subject(name, scratch, sizes, device))


def _do(work: Callable[..., Found], item: Any, *arguments: Any) -> Found:
    return work(_held[0], item, *arguments)
