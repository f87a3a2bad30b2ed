"""Upload of a quantized model to the Hub, in one commit."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HTTPError  # type: ignore[attr-defined]

from optimum_qvlm.errors import HubError
from optimum_qvlm.files.atomic import files_below, work_folder
from optimum_qvlm.hf.saving.weight_files import stale_files
from optimum_qvlm.hf.saving.write import is_users_card, write_model
from optimum_qvlm.report.card import CARD_FILE
from optimum_qvlm.version import __version__

UPLOAD_ERRORS = (OSError, HTTPError, ValueError, RuntimeError)
"""What huggingface_hub raises: OSError its own, HTTPError the transport, RuntimeError the upload of a single file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Where files go, and how the commit is described; the same arguments as transformers' `push_to_hub` has."""

    repo_id: str
    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False
    variant: str | None = None

    def send(self, folder: Path, names: list[str]) -> Any:
        """Upload the named files of a folder; returns the commit's `CommitInfo`.

        The repository is made if it is not there. Weight files and reports of an earlier save that are not among the
        new ones are deleted in the same commit. A README.md that somebody wrote or edited on the Hub stays.

        Raises:
            HubError: nothing was committed. Large files that arrived are not sent again the next time.
        """
        api = HfApi(token=self.token, library_name="optimum-qvlm", library_version=__version__)
        try:
            repo = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision is not None and not self.revision.startswith("refs/"):
                api.create_branch(repo, branch=self.revision, exist_ok=True)
            if self._has_users_card(api, repo):
                names = [name for name in names if name != CARD_FILE]
            stale = stale_files(names, self.variant)
            there = [name for name in api.list_repo_files(repo, revision=self.revision) if stale.fullmatch(name)]
            return api.create_commit(
                repo,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names),
                    *(CommitOperationDelete(path_in_repo=name) for name in there if name not in names),
                ],
                commit_message=self.commit_message or "Upload model quantized with optimum-qvlm",
                commit_description=self.commit_description,
                revision=self.revision,
                create_pr=self.create_pr,
            )
        except UPLOAD_ERRORS as error:
            raise HubError(
                f"uploading to {self.repo_id} failed and nothing was committed: {_reason(error)}. Log in with "
                "`hf auth login` or set HF_TOKEN to a token that may write there, then push again; large files that "
                "arrived are not sent again"
            ) from error

    def _has_users_card(self, api: HfApi, repo: str) -> bool:
        try:
            downloaded = api.hf_hub_download(repo, CARD_FILE, revision=self.revision)
        except EntryNotFoundError:
            return False
        return is_users_card(Path(downloaded))


def push_to_hub(
    self: Any,
    repo_id: str,
    *,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
    variant: str | None = None,
    **commit: Any,
) -> Any:
    """Upload weights, configuration, processor, report and card in one commit; returns its `CommitInfo`.

    `commit` takes `commit_message`, `commit_description`, `private`, `token`, `revision` and `create_pr`, as
    transformers' method does. `tags` go into the card.

    Raises:
        HubError: the upload failed; nothing was committed.
    """
    upload = Upload(repo_id=repo_id, variant=variant, **commit)
    more = (tags,) if isinstance(tags, str) else tuple(tags or ())
    with work_folder(Path(tempfile.gettempdir()) / "optimum_qvlm", mode=0o700) as work:
        write_model(self, work, repo_id=repo_id, tags=more, max_shard_size=max_shard_size, variant=variant)
        return upload.send(work, files_below(work))


def require_access(repo_id: str, token: str | bool | None = None) -> None:
    """Refuse, before hours are spent, an upload for which there is no usable token.

    Raises:
        HubError: no token, one that the Hub does not know, one that only reads, or another namespace.
    """
    try:
        me = HfApi(token=token).whoami()
    except UPLOAD_ERRORS as error:
        raise HubError(
            f"the Hub does not let you upload to {repo_id}: {_reason(error)}. Log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write there"
        ) from error
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(f"the token only reads, and {repo_id} is to be written; make one with write access")
    names = [me["name"], *(organisation["name"] for organisation in me.get("orgs", []))]
    if "/" in repo_id and repo_id.partition("/")[0] not in names:
        raise HubError(f"{repo_id} is not yours to write: your token is of {', '.join(names)}; use one of these names")


def _reason(error: BaseException) -> str:
    """One line of what went wrong; errors of single files have the reason in their cause."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return " ".join(lines[:3]).rstrip(".") or type(cause).__name__
