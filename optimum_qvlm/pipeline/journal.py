"""A folder that keeps what a calibration has finished, so that one that was killed can go on."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.utils import logging

from optimum_qvlm.errors import JournalError
from optimum_qvlm.files import strict_json
from optimum_qvlm.files.atomic import replace_file
from optimum_qvlm.files.held import locked
from optimum_qvlm.plan import QuantPlan

logger = logging.get_logger("transformers.optimum_qvlm")

HEAD = "journal.json"
LOCK = "lock"
SUFFIX = ".safetensors"
FORMAT = 1

SHOWN = 5
"""Differences that an error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something finished: JSON values and tensors, which lie in one safetensors file."""

    values: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def digest(self) -> str:
        """SHA-256 over values, names, dtypes, shapes and bytes."""
        digest = hashlib.sha256(strict_json.dumps(self.values, sort_keys=True).encode())
        update(digest, self.tensors)
        return digest.hexdigest()


class Journal:
    """The entries of one calibration in a folder of their own.

    A file appears as a whole or not at all. What was damaged since counts as not finished, with a warning. Where the
    disk is full, the calibration goes on without new entries, with a warning too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writable = True

    def read(self, name: str) -> Entry | None:
        """An entry, None where it is missing or damaged."""
        path = self.folder / f"{name}{SUFFIX}"
        if not path.exists():
            return None
        try:
            entry, digest = _read(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            self.refuse(name, str(error))
            return None
        if entry.digest() == digest:
            return entry
        self.refuse(name, "its digest is another one")
        return None

    def refuse(self, name: str, reason: str) -> None:
        """Say that an entry cannot be used."""
        logger.warning(f"{self.folder / name}{SUFFIX} is damaged ({reason}); what it held is done again")

    def write(self, name: str, values: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep an entry, in place of one of the same name."""
        if not self.writable:
            return
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in (tensors or {}).items()}
        entry = Entry(values=values, tensors=held)
        metadata = {"values": strict_json.dumps(values, sort_keys=True), "digest": entry.digest()}
        content = save({"": torch.empty(0), **held}, metadata)
        try:
            replace_file(self.folder / f"{name}{SUFFIX}", content, work=self.folder)
        except OSError as error:
            self.writable = False
            logger.warning(f"{self.folder} takes no more ({error}); the calibration goes on, and cannot be resumed")


@contextmanager
def opened(folder: Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal in a folder, which is made where there is none, held against other processes inside.

    `identity` says what calibration it is, as nested JSON values.

    Raises:
        JournalError: it is of another calibration (names what differs), in use, no journal, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, seconds=0):
            _enter(folder, identity)
            yield Journal(folder)
    except TimeoutError as error:
        raise JournalError(
            f"{folder} is in use by another process that calibrates; wait for it, or give another folder as resume"
        ) from error
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(folder)):
            raise
        raise JournalError(f"the journal {folder} cannot be used ({error}); give another folder as resume") from error


def discard(folder: Path) -> None:
    """Remove a journal, unless another process has it. What is not of a journal stays, and so does the folder then."""
    with suppress(OSError):
        with locked(folder / LOCK, seconds=0):
            for path in _ours(folder):
                path.unlink(missing_ok=True)
        folder.rmdir()


def source_digests(model: nn.Module, plan: QuantPlan) -> dict[str, str]:
    """SHA-256 of the tensors of each layer, by its disk name, and of all others together."""
    layers = [layer for part in plan.parts for layer in part.layers] + list(plan.unused)
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    digests: dict[str, str] = {}
    for layer in layers:
        own = {name: state.pop(name) for name in list(state) if name.startswith(f"{layer.path}.")}
        digests[layer.name] = tensor_digest(own)
    return digests | {"others": tensor_digest(state)}


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    update(digest, tensors)
    return digest.hexdigest()


def update(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add names, dtypes, shapes and bytes to a digest."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def _read(path: Path) -> tuple[Entry, str]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != ""}
    values = strict_json.loads(metadata["values"])
    if not isinstance(values, dict):
        raise ValueError("its values are no JSON object")
    return Entry(values=values, tensors=tensors), metadata["digest"]


def _enter(folder: Path, identity: Mapping[str, Any]) -> None:
    """Check that the folder is the journal of this calibration, or make it so."""
    head = {"format": FORMAT, "identity": dict(identity)}
    path = folder / HEAD
    for left in (*folder.glob(f"*{SUFFIX}.*"), *folder.glob(f"{HEAD}.*")):
        left.unlink()  # of a process that was killed while it wrote
    if not path.exists():
        strange = next((path for path in folder.iterdir() if path.name != LOCK), None)
        if strange is not None:
            raise JournalError(
                f"{folder} holds {strange.name} and is no journal; give an empty or new folder as resume"
            )
        replace_file(path, strict_json.dumps(head, indent=2, sort_keys=True).encode(), work=folder)
        return
    try:
        written = strict_json.loads(path.read_bytes())
    except ValueError as error:
        raise JournalError(f"{path} is damaged ({error}); remove {folder} to start anew") from error
    differences = list(_differences(written, head))
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise JournalError(
            f"{folder} is the journal of another calibration: {'; '.join(differences[:SHOWN])}{more}. Give another "
            "folder as resume, or remove that one to start anew"
        )


def _differences(written: Any, now: Any, path: str = "") -> Iterator[str]:
    """What differs, leaf by leaf."""
    if isinstance(written, dict) and isinstance(now, dict):
        for name in sorted(written.keys() | now.keys()):
            yield from _differences(written.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif written != now:
        name = path.removeprefix("identity.")
        hashed = all(value is None or (isinstance(value, str) and len(value) == 64) for value in (written, now))
        yield f"{name} has another content" if hashed else f"{name} is {written!r} there and {now!r} here"


def _ours(folder: Path) -> list[Path]:
    return [folder / HEAD, *folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{SUFFIX}.*"), *folder.glob(f"{HEAD}.*")]
