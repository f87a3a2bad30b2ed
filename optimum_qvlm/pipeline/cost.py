"""What the steps of a calibration take, noted where they are done, and what a larger one would take."""

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from optimum_qvlm.compat.torch import dispatch_mode_class, flatten, memory_of

Step = Literal["capture", "check", "dependency", "enter", "forward", "search", "joint", "encoder", "epoch", "weigh"]
"""Steps of a calibration. `forward` runs a layer on the hidden states of all runs, `enter` the model up to a part,
`encoder` what is done once to optimise it, `epoch` what each epoch of that costs, and
`weigh` the backward pass that says what each token counts."""

PER_TOKEN: frozenset[Step] = frozenset({"capture", "enter", "forward", "encoder", "epoch", "weigh"})
"""Steps that take as long as there are tokens. The others look at a bounded number of them."""

PER_WEIGHT: frozenset[Step] = frozenset({"forward", "search", "joint"})
"""Steps that are done block by block, and take as long as a part holds weights. The others take the whole model."""


@dataclass(slots=True)
class Meter:
    """Notes what is spent.

    Attributes:
        device: whose memory is counted.
        weighing: do again what looks largest, to count the memory that it takes, with so many tokens where they are
            drawn; 0 leaves that out.
        seconds: wall clock by step and part; a step of the whole model has the part None. Of a step in a step, the
            outer one counts.
        workspace: most bytes on the device at a time that `weigh` has counted, by step.
        block_bytes: most bytes of a block's layers on the device, with the candidates that they try.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    weighing: int = 0
    seconds: dict[tuple[Step, str | None], float] = field(default_factory=lambda: defaultdict(float))
    workspace: dict[Step, int] = field(default_factory=dict)
    block_bytes: int = 0
    _largest: dict[Step, int] = field(default_factory=dict)
    _inside: bool = False

    @contextmanager
    def timed(self, step: Step, part: str | None = None) -> Iterator[None]:
        """Add the time inside to what the step has taken."""
        if self._inside:
            yield
            return
        started, self._inside = time.perf_counter(), True
        try:
            yield
        finally:
            self._inside = False
            self.seconds[step, part] += time.perf_counter() - started

    def weigh(self, step: Step, size: int, work: Callable[[], object]) -> None:
        """Do the work once more and count its memory, if asked for and `size` makes it the largest of its step."""
        if self.weighing > 0 and size > self._largest.get(step, -1):
            self._largest[step] = size
            live = LiveBytes(self.device)
            with live:
                work()
            self.workspace[step] = live.peak

    def note_block(self, held: int) -> None:
        """Keep the most bytes of a block."""
        self.block_bytes = max(self.block_bytes, held)

    def expected(self, *, tokens: float, weights: Mapping[str, float], epochs: float) -> float:
        """Seconds of a calibration with `tokens` times the tokens, `weights` times those of each part, and `epochs`
        times the epochs of the encoder."""
        total = 0.0
        for (step, part), seconds in self.seconds.items():
            growth = tokens if step in PER_TOKEN else 1.0
            if step in PER_WEIGHT:
                assert part is not None
                growth *= weights[part]
            total += seconds * growth * (epochs if step == "epoch" else 1.0)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a calibration is expected to take.

    Attributes:
        seconds: wall clock, without loading the model, rendering data and comparing held-out samples.
        answer_seconds: the part of it that goes into writing missing answers.
        host_bytes: the model, the hidden states of both chains and the arguments of all calls, on the CPU.
        device_bytes: the largest block with the candidates that its linears try, and the most that searching a site or
            running a batch through a layer takes beside it. On a CPU it comes on top of `host_bytes`.
    """

    seconds: float
    answer_seconds: float
    host_bytes: int
    device_bytes: int


class LiveBytes(dispatch_mode_class()):  # type: ignore[misc]
    """Bytes of all storages on a device that operations inside created and that are still alive, and the most there
    were at a time. Memory that an operation takes and gives back by itself is not seen."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made; a view takes nothing."""
        output = func(*args, **(kwargs or {}))
        given = {memory_of(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            if storage.device.type == self.device.type and memory_of(storage) not in given:
                self._note(storage)
        return output

    def _note(self, storage: Any) -> None:
        key, size = memory_of(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(values: Any) -> list[Any]:
    return [tensor.untyped_storage() for tensor in flatten(values)[0] if isinstance(tensor, torch.Tensor)]
