"""Load damaged checkpoints, and say how each load ended.

    python -m tests.fuzz.checkpoints --mutants 3000 --seed 1

Each mutant is loaded in a process of limited memory, which is killed when it takes too long. A load must be refused by
this package, or by a clear error of transformers or safetensors before this package is asked, or give the same logits.
Forged records, whose digest and identity fit, are other checkpoints: they may compute something else, nothing more.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from optimum_qvlm.cli.info import main as info
from optimum_qvlm.errors import QVLMError
from optimum_qvlm.files import strict_json
from tests.fuzz.mutations import SHARD_DAMAGE, TEXT_DAMAGE, Damage
from tests.jobs import logits, make_batch, quantize
from tests.tiny_families import FAMILIES
from tests.tiny_models import tiny_llama, tiny_llava

SECONDS = 20
MEMORY = 2 * 2**30
"""More than the process has before the first load."""

REFUSED, THEIRS, SAME, HARMLESS, OTHER = "refused", "theirs", "same", "harmless", "other checkpoint"
FAULTS = ("OTHER LOGITS", "BARE ERROR", "CANNOT RUN", "HANG", "CRASH", "INFO FAILS")
OUTCOMES = (REFUSED, THEIRS, SAME, HARMLESS, OTHER, *FAULTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One damaged checkpoint: all that is needed to make it again."""

    number: int
    seed: int
    base: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the load of a mutant ended. `detail` says what was changed, and which error came of it."""

    mutant: Mutant
    result: str
    detail: str
    seconds: float


def make_bases(folder: Path) -> dict[str, Path]:
    """Saved tiny checkpoints by name: text, images, and images in shards."""
    tiny_llama().save_pretrained(folder / "text-source")
    tiny_llava().save_pretrained(folder / "images-source")
    quantize(folder / "text-source", method="rtn").save_pretrained(folder / "text")
    model = quantize(folder / "images-source", method="rtn")
    model.save_pretrained(folder / "images")
    model.save_pretrained(folder / "shards", max_shard_size="100KB")
    return {name: folder / name for name in ("text", "images", "shards")}


def make_mutants(count: int, seed: int) -> list[Mutant]:
    """Kinds of damage in turn, on each base that can suffer it: the text model twice as often, as it loads faster."""
    turns = [(base, kind) for base in ("text", "images", "text", "shards") for kind in TEXT_DAMAGE]
    turns += [("shards", kind) for kind in SHARD_DAMAGE] * 2
    Random(seed).shuffle(turns)
    chosen = (turns[number % len(turns)] for number in range(count))
    return [Mutant(number=n, seed=seed, base=base, kind=kind) for n, (base, kind) in enumerate(chosen)]


def run(mutants: Sequence[Mutant], bases: dict[str, Path], *, workers: int = 1) -> Iterator[Outcome]:
    """The outcome of every mutant, in the order in which they end."""
    with tempfile.TemporaryDirectory() as scratch:
        pool = [_Worker(bases, Path(scratch) / str(number)) for number in range(workers)]
        waiting = list(reversed(mutants))
        try:
            while waiting or any(worker.mutant for worker in pool):
                for worker in pool:
                    if worker.mutant is None and waiting:
                        worker.give(waiting.pop())
                    elif worker.mutant is not None and (outcome := worker.outcome()) is not None:
                        yield outcome
        finally:
            for worker in pool:
                worker.stop()


def table(outcomes: Sequence[Outcome]) -> str:
    """How many mutants of each kind ended how."""
    counts = Counter((outcome.mutant.kind, outcome.result) for outcome in outcomes)
    results = [r for r in OUTCOMES if r not in FAULTS or any(outcome.result == r for outcome in outcomes)]
    rows = [["kind of damage", "mutants", *results]]
    for kind in (*TEXT_DAMAGE, *SHARD_DAMAGE):
        numbers = [counts[kind, result] for result in results]
        rows.append([kind, str(sum(numbers)), *(str(number or "") for number in numbers)])
    totals = [sum(counts[kind, result] for kind in (*TEXT_DAMAGE, *SHARD_DAMAGE)) for result in results]
    rows.append(["all", str(len(outcomes)), *map(str, totals)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


class _Worker:
    """A process forked from this one, which has all libraries loaded."""

    def __init__(self, bases: dict[str, Path], folder: Path) -> None:
        self.bases, self.folder = bases, folder
        self.mutant: Mutant | None = None
        self.process: Any = None
        self.pipe: Any = None
        self.started = 0.0

    def give(self, mutant: Mutant) -> None:
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other, self.bases, self.folder), daemon=True)
            self.process.start()
            other.close()
        self.mutant, self.started = mutant, time.perf_counter()
        self.pipe.send(mutant)

    def outcome(self) -> Outcome | None:
        """What the mutant came to; None after a short wait for it."""
        assert self.mutant is not None
        try:
            if self.pipe.poll(0.01):
                actual: Outcome = self.pipe.recv()
                self.mutant = None
                return actual
        except EOFError:
            return self._lost("CRASH")
        return self._lost("HANG") if time.perf_counter() - self.started > SECONDS else None

    def _lost(self, result: str) -> Outcome:
        assert self.mutant is not None
        outcome = Outcome(mutant=self.mutant, result=result, detail="", seconds=time.perf_counter() - self.started)
        self.stop()
        self.mutant = None
        return outcome

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(pipe: Connection, bases: dict[str, Path], folder: Path) -> None:
    """The life of a worker: damage, load, tell."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * os.sysconf("SC_PAGESIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    whole = {name: _Loaded.of(base, base) for name, base in bases.items()}
    while True:
        try:
            mutant = pipe.recv()
        except EOFError:
            return
        started = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bases[mutant.base], folder)
        damage: Damage = (TEXT_DAMAGE | SHARD_DAMAGE)[mutant.kind]
        said = damage(folder, Random(f"{mutant.seed}/{mutant.number}"))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result, detail = _judge(folder, bases[mutant.base], whole[mutant.base], forged="forged" in mutant.kind)
            complaint = _info_complaint(folder)
        if complaint is not None:
            result, detail = "INFO FAILS", complaint
        detail = f"{said} -> {detail}".encode("ascii", "backslashreplace").decode()
        pipe.send(Outcome(mutant=mutant, result=result, detail=detail, seconds=time.perf_counter() - started))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a load gave."""

    logits: torch.Tensor
    config: str

    @classmethod
    def of(cls, folder: Path, base: Path) -> "_Loaded":
        values = json.loads((base / "config.json").read_text())
        auto_class = FAMILIES[values["model_type"]].auto_class
        model = auto_class.from_pretrained(folder)
        return cls(logits(model, make_batch(base)), json.dumps(model.config.to_dict(), sort_keys=True, default=str))


def _judge(folder: Path, base: Path, whole: _Loaded, *, forged: bool) -> tuple[str, str]:
    try:
        actual = _Loaded.of(folder, base)
    except QVLMError as error:
        return REFUSED, f"{type(error).__name__}: {error}"
    except BaseException as error:
        return _judge_error(error)
    if torch.equal(actual.logits, whole.logits):
        return SAME if actual.config.replace(str(folder), str(base)) == whole.config else HARMLESS, ""
    return (OTHER if forged else "OTHER LOGITS"), ""


def _judge_error(error: BaseException) -> tuple[str, str]:
    """An error that is not of this package: bare, if this package is to be found on the way to it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/optimum_qvlm/" in frame.filename]
    where = (ours or frames)[-1]
    detail = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}, {where.name})"
    if any(frame.name == "logits" for frame in frames):
        return "CANNOT RUN", detail
    return ("BARE ERROR" if ours or isinstance(error, MemoryError) else THEIRS), detail


def _info_complaint(folder: Path) -> str | None:
    """What is wrong with `optimum-cli qvlm info`: a traceback, or JSON that is none. None where it is in order."""
    for as_json in (False, True):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                info(Namespace(model=str(folder), revision=None, variant=None, json=as_json))
            if as_json:
                strict_json.loads(said.getvalue())
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"info, json={as_json}: {type(error).__name__}: {error} ({frame.name})"
    return None


def main() -> int:
    """Print the table, the errors of others, and what went wrong; 1 if anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="print how every mutant ended")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bases = make_bases(Path(folder))
        outcomes = list(run(make_mutants(args.mutants, args.seed), bases, workers=args.workers))
    print(f"seed {args.seed}, {time.perf_counter() - started:.0f} s, slowest {max(o.seconds for o in outcomes):.1f} s")
    print(table(outcomes))
    theirs = Counter(_kind_of_error(outcome.detail) for outcome in outcomes if outcome.result == THEIRS)
    print("\nerrors of transformers and safetensors:")
    print("\n".join(f"{count:5d}  {error}" for error, count in theirs.most_common()))
    for outcome in outcomes:
        if args.all or outcome.result in FAULTS:
            mutant = outcome.mutant
            print(f"{outcome.result}: {mutant.number} {mutant.base}, {mutant.kind}: {outcome.detail}")
    return 1 if any(outcome.result in FAULTS for outcome in outcomes) else 0


def _kind_of_error(detail: str) -> str:
    """Its type, and the function that raised it."""
    error = detail.rpartition(" -> ")[2] if " -> " in detail else detail
    return f"{error.partition(':')[0]} {error.rpartition(' (')[2].rstrip(')')}"


if __name__ == "__main__":
    sys.exit(main())
