"""Nothing outside `compat/` touches what torch, triton, transformers and accelerate keep to themselves."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tests.compat.contract import LIBRARIES, PACKAGE, ROOT, sources

PUBLIC = {
    "accelerate",
    "torch",
    "torch.nn",
    "torch.nn.functional",
    "torch.utils.checkpoint",
    "transformers",
    "transformers.utils",
    "transformers.utils.quantization_config",
    "triton",
    "triton.language",
}
"""Modules whose names the libraries' own pages import."""

UNDOCUMENTED = {"adjust_generation_fn", "all_tied_weights_keys", "arg_names", "get_balanced_memory"}
"""Names without an underscore that no page promises."""

SET_ON_INSTANCES = {"_hf_hook", "_is_hf_initialized", *vars(nn.Module())}
"""Private names that their classes lack."""

OF_PYTHON = {"os._exit", "parser._actions"}
"""Python's own library has underscores too."""

BASES = (nn.Module, torch.Tensor, HfQuantizer, PreTrainedModel, QuantizationConfigMixin)
"""Classes that ours derive from."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_foreign(name: str) -> bool:
    """Whether a private name is one of the libraries' classes, or one that they set on instances."""
    return is_private(name) and (name in SET_ON_INSTANCES or any(hasattr(base, name) for base in BASES))


def members(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    """Line and name of what the body of a class defines."""
    for entry in node.body:
        if isinstance(entry, ast.FunctionDef):
            yield entry.lineno, entry.name
        elif isinstance(entry, ast.Assign | ast.AnnAssign):
            targets = entry.targets if isinstance(entry, ast.Assign) else [entry.target]
            yield from ((entry.lineno, target.id) for target in targets if isinstance(target, ast.Name))


@cache
def our_names() -> set[str]:
    """Private names that the package itself defines, as a function, class, variable or attribute."""
    names: set[str] = set()
    for _path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                own = not isinstance(node, ast.Attribute) or ast.unparse(node.value) in ("self", "cls", "weight")
                names |= {node.id if isinstance(node, ast.Name) else node.attr} if own else set()
    return {name for name in names if is_private(name) and not is_foreign(name)}


def uses(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each private use in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            private = is_private(node.attr) and node.attr not in ours and text not in OF_PYTHON
            if private or node.attr in UNDOCUMENTED:
                yield node.lineno, text
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            if node.value in UNDOCUMENTED or is_foreign(node.value):
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.ClassDef):
            yield from ((line, f"{node.name}.{name}") for line, name in members(node) if is_foreign(name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in LIBRARIES and alias.name not in PUBLIC:
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            names = [alias.name for alias in node.names]
            if node.module not in PUBLIC or any(map(is_private, names)) or UNDOCUMENTED.intersection(names):
                yield node.lineno, f"from {node.module} import {', '.join(names)}"


def test_nothing_private_is_used_outside_compat():
    ours = our_names()
    told = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path, tree in sources()
        if PACKAGE / "compat" not in path.parents
        for line, text in uses(tree, ours)
    ]

    assert told == [], "move each into a function of optimum_qvlm/compat/, with its reason and a contract test"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._is_tracing()",
        "import torch\ntorch._int_mm(a, b)",
        "from torch.utils._pytree import tree_leaves",
        "from torch.utils import _pytree",
        "from triton.compiler import CompiledKernel",
        "import triton.runtime.jit",
        "from accelerate.hooks import add_hook_to_module",
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING",
        "kept = model._keep_in_fp32_modules",
        "module._parameters['weight']",
        "getattr(module, '_hf_hook', None)",
        "tied = model.all_tied_weights_keys",
        "class A(nn.Module):\n    def _apply(self, fn):\n        pass",
        "class A(nn.Module):\n    _is_hf_initialized = True",
    ],
)
def test_each_kind_of_private_use_is_seen(source):
    assert list(uses(ast.parse(source), our_names()))


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_touch_has_a_contract_and_a_reason(library):
    """A touch without a test is met first by a user of the next release."""
    touches = importlib.import_module(f"optimum_qvlm.compat.{library}")
    tests = importlib.import_module(f"tests.compat.test_{library}")
    public = {
        value
        for name, value in vars(touches).items()
        if not name.startswith("_") and inspect.isroutine(value) | inspect.isclass(value)
        if value.__module__ == touches.__name__
    }

    kept = {test.touch for test in vars(tests).values() if hasattr(test, "touch")}

    assert {value.__name__ for value in public - kept} == set()
    assert [value.__name__ for value in public if not inspect.getdoc(value)] == []
    assert touches.SEEN.count(" to ") == 1
