"""`save_pretrained` for quantized models: whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

from safetensors import SafetensorError

from optimum_qvlm.compat.transformers import has_adapters
from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.files.atomic import files_below, work_folder
from optimum_qvlm.hf.config import QUANT_METHOD
from optimum_qvlm.hf.saving.publish import CONFIG, matching, publish_model, read_json, require_replaceable
from optimum_qvlm.hf.saving.push import Upload, push_to_hub
from optimum_qvlm.hf.saving.weight_files import REPORT_FILES, WeightFiles
from optimum_qvlm.hf.saving.write import is_users_card, write_model
from optimum_qvlm.pipeline.journal import discard
from optimum_qvlm.report.card import CARD_FILE

COMMIT_OPTIONS = ("commit_message", "commit_description", "private", "revision", "create_pr")


def wrap_saving(model: Any) -> None:
    """Give the instance our methods; a deep copy of the model gets ones bound to the copy."""
    model.save_pretrained = MethodType(save_pretrained, model)
    model.push_to_hub = MethodType(push_to_hub, model)


def unwrap_saving(model: Any) -> None:
    """Undo `wrap_saving`."""
    for name in ("save_pretrained", "push_to_hub"):
        vars(model).pop(name, None)


def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """Save weights, configuration, processor files, report and model card into a folder.

    Everything is written to a temporary folder beside the target first, which then takes the target's place in one
    step, so that whoever loads from it, and whenever the process is killed, finds the whole old model or the whole
    new one. Other files in the target stay. Takes the arguments of transformers' method. With `push_to_hub` the files
    that were written are uploaded, to `repo_id` or else a repository with the folder's name. With
    `is_main_process=False` nothing is done.

    Raises:
        CheckpointError: the target cannot be written (disk full, no permission, a file that cannot be replaced) or is
            the full-precision model; nothing was changed, or the message says what was.
        HubError: the upload failed; the folder is whole.
    """
    options = _options(self, save_directory, args, kwargs)
    if not options.pop("push_to_hub", False):
        save(self, save_directory, **options)
        return
    commit = {name: options.pop(name) for name in COMMIT_OPTIONS if name in options}
    repo_id, shared = options.pop("repo_id", Path(save_directory).resolve().name), ("token", "variant")
    upload = Upload(repo_id=repo_id, **commit, **{name: options[name] for name in shared if name in options})
    target = Path(save_directory).resolve()
    with failing(target), work_folder(target) as copy:
        names = save(self, save_directory, repo_id=repo_id, copy=copy, **options)
        if len(names) > 0:
            upload.send(copy if files_below(copy) == sorted(names) else target, names)


def save(
    model: Any,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    repo_id: str | None = None,
    copy: Path | None = None,
    **options: Any,
) -> list[str]:
    """Save, as `save_pretrained` does; returns the names of the model's files in the folder.

    Args:
        is_main_process: False does nothing at all.
        repo_id: what the card says, where one is written.
        copy: an empty folder of the same file system where the files get second names, that no later save changes;
            it stays empty where the file system has no hard links.
        options: of transformers' method.

    Raises:
        CheckpointError: the target cannot be written, or is the full-precision model.
    """
    if not is_main_process:
        return []
    target = target_folder(save_directory)
    _require_not_the_source(model, target)
    with failing(target), work_folder(target) as work:
        write_model(model, work, repo_id=repo_id, **options)
        if len(files_below(work)) == 0:
            return []  # torch.distributed knows that this process is not the main one
        users_card = is_users_card(target / CARD_FILE)
        if users_card:
            (work / CARD_FILE).unlink(missing_ok=True)
        if copy is not None:
            _link_files(work, copy)
            if users_card:
                _link_files(target, copy, [CARD_FILE])
        names = publish_model(work, target, variant=options.get("variant"))
    if model.hf_quantizer.journal is not None:
        discard(model.hf_quantizer.journal)
        model.hf_quantizer.journal = None
    return [*names, CARD_FILE] if users_card else names


def require_writable(save_directory: str | os.PathLike[str]) -> None:
    """Try, before hours are spent, whether a save could write into a folder; leaves nothing behind.

    Raises:
        CheckpointError: names what is in the way.
    """
    target = target_folder(save_directory)
    kind = WeightFiles()
    usual = [CONFIG, "generation_config.json", "model.safetensors", kind.index, *REPORT_FILES, CARD_FILE]
    with failing(target), work_folder(target) as work:
        (work / CONFIG).write_text("{}")
        require_replaceable(target, [*usual, *matching(target, kind.pattern)])


@contextmanager
def failing(target: Path) -> Iterator[None]:
    """Says of an error of the file system that nothing was changed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"saving to {target} failed ({error}); nothing there was changed. Free space or choose another folder"
        ) from error


def _options(model: Any, folder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of transformers' method by their names."""
    method = type(model).save_pretrained
    bound = dict(signature(method).bind(model, folder, *args, **kwargs).arguments)
    more: dict[str, Any] = bound.pop("kwargs", {})
    return {name: value for name, value in list(bound.items())[2:]} | more


def target_folder(save_directory: str | os.PathLike[str]) -> Path:
    """The folder that is saved into.

    Raises:
        CheckpointError: it is a file.
    """
    target = Path(save_directory).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder to save into")
    return target


def _require_not_the_source(model: Any, target: Path) -> None:
    """Refuse to replace the full-precision model that this one was made from; an adapter may lie beside it."""
    quantizer = model.hf_quantizer
    adapter = has_adapters(model)
    source = quantizer.source.folder
    if quantizer.pre_quantized or adapter or not (source.is_dir() and target.is_dir() and source.samefile(target)):
        return
    values = read_json(target / CONFIG).get("quantization_config")
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{target} is the folder of the full-precision model, which this save would replace; choose another one, "
            f"as {target}-qvlm"
        )


def _link_files(folder: Path, other: Path, names: list[str] | None = None) -> None:
    """Second names in `other` for files of a folder, as far as the file system has hard links."""
    for name in files_below(folder) if names is None else names:
        (other / name).parent.mkdir(exist_ok=True)
        with suppress(OSError):
            os.link(folder / name, other / name)
