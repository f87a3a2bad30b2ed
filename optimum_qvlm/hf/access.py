"""How the user's `from_pretrained` reaches the Hub and what it trusts, for what the quantizer loads itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from transformers.utils import logging

from optimum_qvlm.compat.transformers import unwatch_options, watch_options

logger = logging.get_logger("transformers.optimum_qvlm")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Options of `from_pretrained` that hold for a processor too.

    Attributes:
        token: in place of the one that is stored or in HF_TOKEN. It is neither printed nor pickled.
        cache_dir: in place of the client's cache.
        local_files_only: whether the cache has to do.
        trust_remote_code: whether Python code that comes with the model may run. It is not pickled either.
        told: whether transformers told the others; if not, they are what is safe.
    """

    token: str | bool | None = field(default=None, repr=False)
    cache_dir: Any = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    told: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return self.options() | {"told": self.told, "token": None, "trust_remote_code": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a model stays in the process, and with the user."""
        return self

    def options(self) -> dict[str, Any]:
        """The same as keyword arguments."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "told"}

    def say_what_is_unknown(self) -> None:
        """Log, before something is fetched, that the options which the user gave are not known here."""
        if not self.told:
            logger.warning(
                "transformers did not tell token, cache_dir, local_files_only and trust_remote_code of "
                "from_pretrained, as the model cannot generate: processor and tokenizer are fetched without them. For "
                "private ones log in with `hf auth login` or set HF_TOKEN; HF_HUB_OFFLINE=1 keeps to the cache"
            )


def watch_access(model: Any, note: Callable[[Access], None]) -> None:
    """Have `note` called once `from_pretrained` says how it reaches the Hub, which is before it has us calibrate.

    Of models that cannot generate it is never called.
    """
    watch_options(model, lambda options: note(_access_of(options)))


def unwatch_access(model: Any) -> None:
    """Undo `watch_access`."""
    unwatch_options(model)


def _access_of(options: Mapping[str, Any]) -> Access:
    return Access(
        token=options.get("token"),
        cache_dir=options.get("cache_dir"),
        local_files_only=bool(options.get("local_files_only")),
        trust_remote_code=bool(options.get("trust_remote_code")),
        told=True,
    )
