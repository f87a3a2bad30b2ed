"""Tests, benchmarks and examples use public names of the package, so that what is private can change."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.contract import ROOT, sources


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if private(name)}


PRIVATE = {name for _path, tree in sources() for name in own_names(tree)}


def reaches(path: Path) -> Iterator[str]:
    """Where a file reaches into the package: attributes, imports, and names that are given as strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    theirs = PRIVATE - own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in theirs:
            yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimum_qvlm"):
            yield from (f"{path.name}:{node.lineno}: {each.name}" for each in node.names if private(each.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
            yield from (f"{path.name}:{node.lineno}: {text}" for text in texts if text in theirs)


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_only_public_names_are_used(folder):
    told = [reach for path in sorted((ROOT / folder).rglob("*.py")) for reach in reaches(path)]

    assert told == [], "make what must be reached into a function, or test through what users see"


@pytest.mark.parametrize(
    "source",
    [
        "linear._hold(stored)",
        "from optimum_qvlm.hf.saving.write import _seal",
        "monkeypatch.setattr(write, '_seal', slow)",
    ],
)
def test_each_kind_of_reach_is_seen(tmp_path, source):
    (tmp_path / "test_it.py").write_text(source)

    assert list(reaches(tmp_path / "test_it.py"))
