"""The step that makes the files of a save those of the folder, so that at every instant one whole model loads."""

import errno
import filecmp
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.files import strict_json
from optimum_qvlm.files.atomic import files_below, publish, publishing, replace_file, sync_tree
from optimum_qvlm.hf.format.index import EXPLICIT
from optimum_qvlm.hf.saving.weight_files import GENERATION, WeightFiles, stale_files, weight_files_of

CONFIG = "config.json"


def publish_model(work: Path, target: Path, *, variant: str | None = None) -> list[str]:
    """Move the files of a save into the target, and remove weights and reports that they take the place of.

    Returns the names of the files.

    Raises:
        CheckpointError: a file there cannot be replaced (nothing was changed), or the new model is in place and
            loads, but not everything about it could be finished.
        OSError: nothing was changed.
    """
    names = files_below(work)
    stale = stale_files(names, variant)
    sync_tree(work)
    with publishing(target):
        require_replaceable(target, [*names, *matching(target, stale)])
        settle(target, work.parent)
        if not publish(work, target, dropped=stale):
            _publish_files(work, target, names, WeightFiles(variant), matching(target, stale))
    return names


def require_replaceable(target: Path, names: Iterable[str]) -> None:
    """Refuse, before anything is changed, a target where a file of these names could not be replaced or removed.

    Raises:
        CheckpointError: names the file.
    """
    for name in names:
        path = target / name
        above = next((target / parent for parent in Path(name).parents if (target / parent).is_file()), None)
        if above is not None:
            raise CheckpointError(f"{above} is a file where the save needs a folder; {_unchanged(target)}")
        reason = _hindrance(path)
        if reason is not None:
            raise CheckpointError(f"{path} cannot be replaced ({reason}); {_unchanged(target)}")


def settle(target: Path, work: Path) -> None:
    """Give the weights that config.json names by their generation their usual names, at last in config.json too.

    Does nothing where config.json names none. At every instant it names weights that are whole, so this can be
    stopped anywhere and done again. `work` is a folder of the same mount.

    Raises:
        OSError: the disk is full or broken; the model loads.
    """
    config = read_json(target / CONFIG)
    entry = config.get(EXPLICIT)
    kind = weight_files_of(entry)
    if kind is None or not isinstance(entry, str):
        return
    index = read_json(target / entry) if entry.endswith(".json") else None
    weights = [entry] if index is None else sorted(set(index.get("weight_map", {}).values()))
    if not all(GENERATION.fullmatch(name) and (target / name).is_file() for name in [entry, *weights]):
        return
    for name in weights:
        _second_name(target / name, target / kind.usual(name), work)
    if index is not None:
        index["weight_map"] = {key: kind.usual(name) for key, name in index["weight_map"].items()}
        replace_file(target / kind.index, strict_json.as_file(index), work=work)
    usual = {kind.usual(name) for name in [entry, *weights]}
    there = matching(target, kind.pattern)
    for name in there:
        if GENERATION.fullmatch(name) is None and name not in usual:
            (target / name).unlink()
    del config[EXPLICIT]
    replace_file(target / CONFIG, strict_json.as_file(config), work=work)
    for name in there:
        if GENERATION.fullmatch(name) is not None:
            (target / name).unlink()


def _publish_files(work: Path, target: Path, names: list[str], kind: WeightFiles, stale: Collection[str]) -> None:
    """File by file: where there are weights already, the new ones come under names of their own first.

    config.json, renamed last, decides which are loaded.
    """
    last = [name for name in names if name == CONFIG]
    rest = [name for name in names if name != CONFIG]
    replaced = [name for name in stale if kind.pattern.fullmatch(name)]
    left_over = [name for name in stale if name not in names and name not in replaced]
    if len(replaced) == 0:
        for name in [*rest, *last]:
            _move(work, target, name)
        _remove(target, left_over)
        return
    weights = [name for name in rest if kind.pattern.fullmatch(name)]
    _publish_generation(work, target, weights, kind)
    try:
        for name in rest:
            if name not in weights:
                _move(work, target, name)
        settle(target, work.parent)
        _remove(target, left_over)
    except OSError as error:
        raise CheckpointError(
            f"the new model is in {target} and loads, but not everything beside its weights is new, or has its usual "
            f"name ({error}); free space there and save again"
        ) from error


def _publish_generation(work: Path, target: Path, weights: list[str], kind: WeightFiles) -> None:
    """Add the weights under names of a new generation, and have config.json name them: the step that counts."""
    mark = secrets.token_hex(4)
    fresh = {name: kind.in_generation(name, mark) for name in weights}
    entry = fresh.get(kind.index, fresh[weights[0]])
    try:
        if kind.index in fresh:
            index = read_json(work / kind.index)
            index["weight_map"] = {key: fresh[name] for key, name in index["weight_map"].items()}
            replace_file(work / kind.index, strict_json.as_file(index), work=work.parent)
        for name, other in fresh.items():
            os.rename(work / name, target / other)
        config = read_json(work / CONFIG) | {EXPLICIT: entry}
        replace_file(target / CONFIG, strict_json.as_file(config), work=work.parent)
    except BaseException:
        for other in fresh.values():
            with suppress(OSError):
                (target / other).unlink()
        raise


def _move(work: Path, target: Path, name: str) -> None:
    """Replace a file, unless it is the same already."""
    destination = target / name
    destination.parent.mkdir(exist_ok=True)
    if not destination.is_file() or not filecmp.cmp(work / name, destination, shallow=False):
        os.replace(work / name, destination)


def _remove(target: Path, names: Iterable[str]) -> None:
    for name in names:
        (target / name).unlink(missing_ok=True)


def _second_name(source: Path, destination: Path, work: Path) -> None:
    """Give a file a second name, in place of whatever has it; a copy where the file system has no hard links."""
    between = work / f"{destination.name}.{secrets.token_hex(4)}"
    try:
        os.link(source, between)
    except OSError:
        shutil.copyfile(source, between)
        with open(between, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(between, destination)


def _hindrance(path: Path) -> str | None:
    """Why a file cannot be replaced; None where nothing speaks against it."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISDIR(status.st_mode):
        return "it is a folder"
    if not stat.S_ISREG(status.st_mode):
        return None
    above = path.parent.stat()
    if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, status.st_uid, above.st_uid):
        return "it is another user's, and the folder lets only owners replace files"
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        return "it is marked as immutable" if error.errno == errno.EPERM else None
    return None


def _unchanged(target: Path) -> str:
    return f"nothing in {target} was changed. Move it away or choose another folder"


def matching(target: Path, pattern: re.Pattern[str]) -> list[str]:
    """Names at the top of a folder that match, sorted; none where it is not there."""
    return sorted(path.name for path in target.iterdir() if pattern.fullmatch(path.name)) if target.is_dir() else []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is something else, or not there."""
    try:
        status = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}
