"""Replacing submodules by name."""

import pytest
from torch import nn

from optimum_qvlm.modules.swap import replace_module


def make_tree() -> nn.Module:
    """A linear at the top, one in a list, one inside a child."""
    root = nn.Module()
    root.head = nn.Linear(2, 2)
    root.layers = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())])
    return root


@pytest.mark.parametrize("path", ["head", "layers.0", "layers.1.0"])
def test_the_module_at_a_path_is_replaced(path):
    """Also at the top, where there is no dot, and in lists, whose names are numbers."""
    root, module = make_tree(), nn.Identity()
    others = {name for name, _ in root.named_modules()}

    replace_module(root, path, module)

    assert root.get_submodule(path) is module
    assert {name for name, _ in root.named_modules()} == others


@pytest.mark.parametrize("path", ["tail", "layers.7", "layers.0.weight", "head.proj"])
def test_a_path_that_leads_nowhere_is_refused(path):
    """A new attribute beside the old module would go unnoticed."""
    root = make_tree()

    with pytest.raises(AttributeError, match=path.rpartition(".")[2]):
        replace_module(root, path, nn.Identity())

    assert [name for name, _ in root.named_children()] == ["head", "layers"]


def test_order_of_children_stays():
    """Execution order of a Sequential depends on it."""
    root = make_tree()

    replace_module(root, "layers.0", nn.Identity())

    assert [type(child).__name__ for child in root.layers] == ["Identity", "Sequential"]
