"""`save_pretrained` for quantized models: whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

from safetensors import SafetensorError

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.config import config_digest
from optimum_qvlm.hf.shards import read_headers
from optimum_qvlm.hf.source import REPORT_FILE

WORK_MARK = ".qvlm-saving-"


def wrap_saving(model: Any) -> None:
    """Give the instance our `save_pretrained`; a deep copy of the model gets one bound to the copy."""
    model.save_pretrained = MethodType(save_pretrained, model)


def unwrap_saving(model: Any) -> None:
    """Undo `wrap_saving`."""
    vars(model).pop("save_pretrained", None)


def save_pretrained(
    self: Any, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Save weights, configuration, processor files and report into a folder.

    Everything is written to a temporary folder beside the target first and moved file by file when it is
    whole, so a save that fails leaves what was there before. Takes the arguments of transformers' method.

    Raises:
        CheckpointError: the target cannot be written (disk full, no permission); nothing was changed.
    """
    target = Path(save_directory).resolve()
    if target.is_file():
        raise CheckpointError(f"{target} is a file; give a folder to save into")
    try:
        with _work_folder(target) as work:
            type(self).save_pretrained(self, work, *args, **kwargs)
            _add_sidecars(self, work)
            _seal(work)
            _publish(work, target, kwargs.get("variant"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"saving to {target} failed ({error}); nothing there was changed. Free space or choose another folder"
        ) from error
    if push_to_hub:
        names = ("commit_message", "private", "token", "create_pr", "revision", "max_shard_size")
        options = {name: kwargs[name] for name in names if name in kwargs}
        self.push_to_hub(kwargs.get("repo_id", target.name), **options)


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, removed at the end; left-overs of processes that died are removed too.

    Where the target is a mount point, or its parent cannot be written, the folder is made inside the target:
    renames work within one file system only.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    home = target.parent
    if target.is_dir() and (target.stat().st_dev != home.stat().st_dev or not os.access(home, os.W_OK)):
        home = target
    prefix = f".{target.name}{WORK_MARK}"
    for left in home.glob(f"{prefix}*"):
        if not _alive(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    work = home / f"{prefix}{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError, OverflowError):
        return True
    return True


def _add_sidecars(model: Any, work: Path) -> None:
    """Processor, tokenizer, templates, licence and report beside the weights, unless already written."""
    quantizer = model.hf_quantizer
    for path, name in quantizer.source.sidecars():
        destination = work / name
        if not destination.exists() and not (name == REPORT_FILE and quantizer.report is not None):
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, destination)
    for name, content in quantizer.processor_files.items():
        destination = work / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(content)
    if quantizer.report is not None:
        (work / REPORT_FILE).write_text(json.dumps(quantizer.report, indent=2) + "\n", encoding="utf-8")


def _seal(work: Path) -> None:
    """Write the manifest of the tensors as they are on disk, and the digest, into config.json."""
    path = work / "config.json"
    if not path.exists():  # adapters alone, or a process that writes nothing
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    values = config["quantization_config"]
    values["manifest"] = read_headers(sorted(work.glob("*.safetensors")))
    absent = [name for name in values["modules"] if f"{name}.weight_packed" not in values["manifest"]]
    if absent:
        raise CheckpointError(f"{absent[0]} was not written under the name that its record has")
    values["digest"] = config_digest(values)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _publish(work: Path, target: Path, variant: str | None) -> None:
    """Move all files into the target, configuration last, and remove weights of an earlier save."""
    target.mkdir(exist_ok=True)
    files = sorted((path for path in work.rglob("*") if path.is_file()), key=lambda path: path.name == "config.json")
    names = {path.relative_to(work) for path in files}
    stem = re.escape("model" if variant is None else f"model.{variant}")
    weights = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index({stem[5:]})?\.json")
    for path in files:
        destination = target / path.relative_to(work)
        destination.parent.mkdir(exist_ok=True)
        os.replace(path, destination)
    for path in target.iterdir():
        if weights.fullmatch(path.name) and Path(path.name) not in names:
            path.unlink()
