"""Names that other libraries do not promise to keep, looked up when they are first used."""

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from optimum_qvlm.errors import DependencyError


@cache
def private(name: str, seen: str) -> Any:
    """What `name` stands for, as "torch._int_mm"; `seen` are the releases that had it, as "2.11 to 2.14".

    Raises:
        DependencyError: the installed release has no such name.
    """
    library, *parts = name.split(".")
    value: Any = import_module(library)
    path = library
    for part in parts:
        path = f"{path}.{part}"
        try:
            value = getattr(value, part) if hasattr(value, part) else import_module(path)
        except ImportError as error:
            raise DependencyError(
                f"{library} {release(library)} has no {name}, which optimum-qvlm uses and {library} {seen} had; "
                f"install one of those, or a newer optimum-qvlm"
            ) from error
    return value


def release(library: str) -> str:
    """The installed release of a library."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "of an unknown release"
