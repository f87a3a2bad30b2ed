"""Where a model came from, and the files that lie beside its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoProcessor

from optimum_qvlm.errors import DataError

REPORT_FILE = "qvlm_report.json"

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A local folder, or a repository at a fixed commit with the cache that holds it."""

    folder: Path
    repo: str | None = None
    revision: str | None = None
    cache: Path | None = None

    @classmethod
    def of(cls, name: str, checkpoint_files: list[str]) -> "Source":
        """Read off the resolved weight files; those of the Hub lie in `models--org--name/snapshots/COMMIT`."""
        folder = Path(checkpoint_files[0]).parent
        for parent in (folder, *folder.parents):
            if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
                cache = parent.parent.parent.parent
                return cls(folder=folder, repo=name, revision=parent.name, cache=cache)
        return cls(folder=folder)

    def sidecars(self) -> list[tuple[Path, str]]:
        """Files beside the weights with their names relative to the folder; those of the Hub are downloaded."""
        if self.repo is not None:
            self._download()
        paths = sorted({path for pattern in SIDECARS for path in self.folder.glob(pattern) if path.is_file()})
        return [(path, str(path.relative_to(self.folder))) for path in paths]

    def load_processor(self) -> Any:
        """The processor, or for a text model the tokenizer.

        Raises:
            DataError: there is none.
        """
        if self.repo is not None:
            self._download()
        try:
            return AutoProcessor.from_pretrained(self.folder)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise DataError(
                f"no processor could be loaded from {self.folder} ({error}); pass processor= to QVLMConfig, or "
                "ready model inputs (a list of dicts of tensors) as dataset"
            ) from error

    def _download(self) -> None:
        assert self.repo is not None and self.revision is not None
        root = next(p for p in (self.folder, *self.folder.parents) if p.name == self.revision)
        inside = self.folder.relative_to(root)
        patterns = [str(inside / pattern) for pattern in SIDECARS]
        snapshot_download(self.repo, revision=self.revision, cache_dir=self.cache, allow_patterns=patterns)
