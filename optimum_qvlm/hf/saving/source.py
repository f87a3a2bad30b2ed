"""Where a model came from, and the files that lie beside its weights."""

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import filter_repo_objects, validate_repo_id  # type: ignore[attr-defined]
from transformers import AutoProcessor
from transformers.utils import logging

from optimum_qvlm.errors import CheckpointError, DataError
from optimum_qvlm.hf.access import Access
from optimum_qvlm.hf.saving.weight_files import REPORT_FILE
from optimum_qvlm.report.card import CARD_FILE, read_metadata

logger = logging.get_logger("transformers.optimum_qvlm")

SIDECARS = (
    "preprocessor_config.json",
    "image_processor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    REPORT_FILE,
)
"""What must travel with the weights so that the folder is whole: processor, tokenizer, templates, licence."""

CODE = "*.py"
"""What travels too where it is trusted: a processor of its own kind cannot be loaded without."""

LARGEST_HELD = 64 * 2**20
"""Bytes of the largest file beside the weights whose content is held in memory; tokenizers have up to 35 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """A file beside the weights as it was when the model was loaded.

    Attributes:
        path: where it lies, or lay.
        content: None of one that is too large to hold.
        stamp: size in bytes, and time of the last change in nanoseconds.
    """

    path: Path
    content: bytes | None = field(repr=False)
    stamp: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> "Sidecar":
        """Read a file.

        Raises:
            OSError: it cannot be read.
        """
        status = path.stat()
        content = path.read_bytes() if status.st_size <= LARGEST_HELD else None
        return cls(path=path, content=content, stamp=(status.st_size, status.st_mtime_ns))

    def write(self, destination: Path) -> None:
        """Write it elsewhere.

        Raises:
            CheckpointError: it was too large to hold, and is gone or another one by now.
        """
        if self.content is not None:
            destination.write_bytes(self.content)
            return
        status = self.path.stat() if self.path.is_file() else None
        if status is None or (status.st_size, status.st_mtime_ns) != self.stamp:
            raise CheckpointError(
                f"{self.path}, which belongs to the model, is gone or was changed after the model was loaded, and is "
                "too large to be held in memory; put it back and save again"
            )
        shutil.copyfile(self.path, destination)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A local folder, or a repository at a fixed commit with the cache that holds it, and how that is reached.

    Attributes:
        held: the files beside the weights by their names relative to the folder, as they were when `hold` was called.
    """

    folder: Path
    repo: str | None = None
    revision: str | None = None
    cache: Path | None = None
    access: Access = field(default_factory=Access)
    held: Mapping[str, Sidecar] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, checkpoint_files: list[str]) -> "Source":
        """Read off the resolved weight files; those of the Hub lie in `models--org--name/snapshots/COMMIT`."""
        folder = Path(checkpoint_files[0]).parent
        for parent in (folder, *folder.parents):
            home = parent.parent.parent
            if parent.parent.name == "snapshots" and home.name.startswith("models--"):
                repo = home.name.removeprefix("models--").replace("--", "/")
                return cls(folder=folder, repo=repo, revision=parent.name, cache=home.parent)
        return cls(folder=folder)

    @property
    def root(self) -> Path:
        """What no link may leave: the folder, or the cache's folder of the repository."""
        if self.repo is None or self.cache is None:
            return self.folder
        return self.cache / f"models--{self.repo.replace('/', '--')}"

    def origin(self) -> dict[str, str]:
        """Name and commit of the model, for the record; empty for a local folder, whose path is nobody's business."""
        if self.repo is None or self.revision is None:
            return {}
        return {"base_model": self.repo, "base_revision": self.revision}

    def hold(self) -> "Source":
        """The same with the files beside the weights read, so that a save needs the folder no more.

        Links that leave the folder are not followed, and what cannot be read is left: a save refuses both.
        """
        root = self.root.resolve()
        held = {}
        for path in self._paths((*SIDECARS, CODE, CARD_FILE)):
            if path.resolve().is_relative_to(root):
                with suppress(OSError):
                    held[str(path.relative_to(self.folder))] = Sidecar.of(path)
        return replace(self, held=held)

    def sidecars(self) -> dict[str, Sidecar]:
        """Files beside the weights by their names relative to the folder; those of the Hub are downloaded.

        Those that were held are as they were then, even if the folder has gone. Where the Hub cannot be
        reached, what its cache holds has to do, with a warning: a model that took hours must be saved.

        Raises:
            CheckpointError: a file is a link that leads elsewhere.
        """
        reason = self._fetch()
        if reason is not None:
            logger.warning_once(
                f"the processor files of {self.repo} could not be fetched ({reason}); those in the cache are used. "
                "Check that the saved folder has a processor, or save it yourself; for a private model log in with "
                "`hf auth login` or set HF_TOKEN"
            )
        paths = self._paths(self._patterns())
        self.require_inside(paths)
        there = {str(path.relative_to(self.folder)): path for path in paths}
        later = {name: Sidecar.of(path) for name, path in there.items() if name not in self.held}
        return dict(sorted((later | {name: file for name, file in self.held.items() if self._travels(name)}).items()))

    def require_inside(self, paths: Iterable[Path]) -> None:
        """Refuse links that lead out of the folder: with them a save or an upload would carry private files away.

        Raises:
            CheckpointError: names the file.
        """
        root = self.root.resolve()
        for path in paths:
            if not path.resolve().is_relative_to(root):
                raise CheckpointError(f"{path} is a link that leaves {self.root}; put a copy of the file in its place")

    def card_metadata(self) -> dict[str, Any]:
        """The YAML block of the model card that lies beside the weights; empty where there is none."""
        path = self.folder / CARD_FILE
        try:
            held = self.held.get(CARD_FILE)
            content = path.read_bytes() if held is None or held.content is None else held.content
            return read_metadata(content.decode())
        except (OSError, UnicodeDecodeError):
            return {}

    def load_processor(self) -> Any:
        """The processor, or for a text model the tokenizer.

        Raises:
            DataError: there is none.
        """
        reason = self._fetch()
        try:
            return AutoProcessor.from_pretrained(self.folder, trust_remote_code=self.access.trust_remote_code)
        except (OSError, ValueError, ImportError, KeyError) as error:
            private = "" if reason is None else "for a private model log in with `hf auth login` or set HF_TOKEN; else "
            raise DataError(
                f"no processor could be loaded from {self.folder} ({reason or error}); {private}pass processor= to "
                "QVLMConfig, or ready model inputs (a list of dicts of tensors) as dataset"
            ) from error

    def _paths(self, patterns: Iterable[str]) -> list[Path]:
        return sorted({path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()})

    def _travels(self, name: str) -> bool:
        return name != CARD_FILE and (self.access.trust_remote_code or not name.endswith(".py"))

    def _patterns(self) -> tuple[str, ...]:
        return (*SIDECARS, CODE) if self.access.trust_remote_code else SIDECARS

    def _fetch(self) -> str | None:
        """Download the files beside the weights; returns why that failed, None where they are there."""
        if self.repo is None or self.revision is None:
            return None
        self.access.say_what_is_unknown()
        if self.access.local_files_only:
            return "local_files_only=True"
        root = next(parent for parent in (self.folder, *self.folder.parents) if parent.name == self.revision)
        inside = self.folder.relative_to(root)
        patterns = [str(inside / pattern) for pattern in (*self._patterns(), CARD_FILE)]
        api = HfApi(token=self.access.token)
        try:
            # not snapshot_download: where it cannot list the repository, it takes a cache that lacks files for whole
            names = api.list_repo_files(self.repo, revision=self.revision)
            for name in filter_repo_objects(names, allow_patterns=patterns):
                api.hf_hub_download(self.repo, name, revision=self.revision, cache_dir=self.cache)
        except (OSError, HTTPError, ValueError) as error:
            return next(iter(str(error).strip().splitlines()), type(error).__name__)
        return None


def is_folder(name: str) -> bool:
    """Whether a model's name is that of a folder; else a repository on the Hub may have it.

    Raises:
        CheckpointError: it is neither.
    """
    try:
        folder, file = Path(name).is_dir(), Path(name).is_file()
    except OSError as error:
        raise CheckpointError(f"{name[:100]!r} is no usable path ({error}); name a folder or a model") from error
    if folder:
        return True
    if file:
        raise CheckpointError(f"{name} is a file; name the folder that it lies in")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(
            f"there is no folder {name}, and no model on the Hub can have this name; check the path, or name a model "
            "as in llava-hf/llava-1.5-7b-hf"
        ) from error
    return False


def require_weights_inside(name: str, checkpoint_files: list[str]) -> None:
    """Refuse weight files outside the folder that was named: an index may hold any path.

    Raises:
        CheckpointError: names the path.
    """
    folder = Path(name)
    if not folder.is_dir():
        return  # a repository, whose file names the Hub's client checks
    for file in map(Path, checkpoint_files):
        if not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts or "\0" in str(file):
            raise CheckpointError(f"the index names {file!r}, which is outside {folder}; fetch the checkpoint again")
