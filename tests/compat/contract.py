"""Contracts with other libraries: each says in one sentence what a new release moved, and where we use it."""

import ast
from collections.abc import Callable, Iterator
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "optimum_qvlm"
LIBRARIES = ("torch", "triton", "transformers", "accelerate")


def contract(touch: Callable[..., Any], *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test that `touch`, a function or class of `optimum_qvlm.compat`, still does what it says.

    `names` are what it touches, as "torch._int_mm".
    """

    def holds(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def checked(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                raise pytest.fail.Exception(sentence(touch, names, error)) from error

        checked.touch = touch  # type: ignore[attr-defined]
        return checked

    return holds


def sentence(touch: Callable[..., Any], names: tuple[str, ...], error: Exception) -> str:
    """What moved, what of ours touches it, and who uses that."""
    library = names[0].partition(".")[0]
    moved = f"{library} {version(library)} moved or changed {' or '.join(names)}"
    ours = f"{touch.__module__}.{touch.__name__}"
    users = ", ".join(sorted(users_of(touch))) or "nobody"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{moved}: mend {ours}, which {users} use{'' if ',' in users else 's'}, or bound {library} ({reason})"


def users_of(touch: Callable[..., Any]) -> Iterator[str]:
    """Files of the package that import it."""
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == touch.__module__:
                if any(alias.name == touch.__name__ for alias in node.names):
                    yield str(path.relative_to(ROOT))


@cache
def sources() -> tuple[tuple[Path, ast.Module], ...]:
    """Every file of the package, parsed."""
    return tuple((path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(PACKAGE.rglob("*.py")))
