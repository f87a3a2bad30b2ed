"""How the user's `from_pretrained` reaches the Hub and what it trusts, for what the quantizer loads itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

METHOD = "adjust_generation_fn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Options of `from_pretrained` that hold for a processor too.

    Attributes:
        token: in place of the one that is stored or in HF_TOKEN. It is neither printed nor pickled.
        cache_dir: in place of the client's cache.
        local_files_only: whether the cache has to do.
        trust_remote_code: whether Python code that comes with the model may run. It is not pickled either.
    """

    token: str | bool | None = field(default=None, repr=False)
    cache_dir: Any = None
    local_files_only: bool = False
    trust_remote_code: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return self.options() | {"token": None, "trust_remote_code": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a model stays in the process, and with the user."""
        return self

    def options(self) -> dict[str, Any]:
        """The same as keyword arguments."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def watch_access(model: Any, note: Callable[[Access], None]) -> None:
    """Have `note` called once `from_pretrained` says how it reaches the Hub, which is before it has us calibrate.

    No hook of quantizers is told; the model's own method for its generation files is. Our stand-in on the instance
    notes what it is given, removes itself and calls that method. Of models that cannot generate nothing is heard.
    """
    method = getattr(model, METHOD, None)
    if method is None:
        return

    def adjust(*args: Any, **kwargs: Any) -> Any:
        unwatch_access(model)
        note(
            Access(
                token=kwargs.get("token"),
                cache_dir=kwargs.get("cache_dir"),
                local_files_only=bool(kwargs.get("local_files_only")),
                trust_remote_code=bool(kwargs.get("trust_remote_code")),
            )
        )
        return method(*args, **kwargs)

    setattr(model, METHOD, adjust)


def unwatch_access(model: Any) -> None:
    """Undo `watch_access`."""
    vars(model).pop(METHOD, None)
