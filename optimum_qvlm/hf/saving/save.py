"""`save_pretrained` for quantized models: whole or not at all."""

import os
from pathlib import Path
from types import MethodType
from typing import Any

from safetensors import SafetensorError

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.files.atomic import publish, work_folder
from optimum_qvlm.hf.saving.push import Upload, push_to_hub
from optimum_qvlm.hf.saving.write import is_users_card, stale_weights, write_model
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


def save_pretrained(
    self: Any, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Save weights, configuration, processor files, report and model card into a folder.

    Everything is written to a temporary folder beside the target first and moved when it is whole, so a save that
    fails leaves what was there before. Takes the arguments of transformers' method. With `push_to_hub` the files
    that were written are uploaded, to `repo_id` or else a repository with the folder's name.

    Raises:
        CheckpointError: the target cannot be written (disk full, no permission); nothing was changed.
        HubError: the upload failed; the folder is whole.
    """
    if not push_to_hub:
        save(self, save_directory, *args, **kwargs)
        return
    options = {name: kwargs.pop(name) for name in COMMIT_OPTIONS if name in kwargs}
    repo_id, shared = kwargs.pop("repo_id", Path(save_directory).resolve().name), ("token", "variant")
    upload = Upload(repo_id=repo_id, **options, **{name: kwargs[name] for name in shared if name in kwargs})
    names = save(self, save_directory, *args, repo_id=repo_id, **kwargs)
    upload.send(Path(save_directory).resolve(), names)


def save(
    model: Any, save_directory: str | os.PathLike[str], *args: Any, repo_id: str | None = None, **kwargs: Any
) -> list[str]:
    """Save, as `save_pretrained` does; returns the names of the model's files in the folder.

    `repo_id` is what the card says, where one is written.

    Raises:
        CheckpointError: the target cannot be written.
    """
    target = Path(save_directory).resolve()
    if target.is_file():
        raise CheckpointError(f"{target} is a file; give a folder to save into")
    try:
        with work_folder(target) as work:
            write_model(model, work, *args, repo_id=repo_id, **kwargs)
            if is_users_card(target / CARD_FILE):
                (work / CARD_FILE).unlink(missing_ok=True)
            names = publish(work, target, stale_weights(kwargs.get("variant")))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"saving to {target} failed ({error}); nothing there was changed. Free space or choose another folder"
        ) from error
    users_card = (target / CARD_FILE).exists() and CARD_FILE not in names
    return [*names, CARD_FILE] if users_card else names
