"""What all adapters share: numbered layers, and linears grouped by the input that they read."""

from types import SimpleNamespace

import pytest
from torch import nn

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.adapter import Adapter


class Tree(nn.Module):
    """A model made of named children, with a configuration."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="tree")
        for name, child in children.items():
            self.add_module(name, child)


def linears(*names: str) -> Tree:
    return Tree(**{name: nn.Linear(2, 2) for name in names})


@pytest.mark.parametrize("count", [0, 1, 12])
def test_layers_of_a_list_are_numbered_in_order(count):
    """Ten comes after nine, not after one."""
    model = Tree(layers=nn.ModuleList(nn.Linear(2, 2) for _ in range(count)))

    assert Adapter(model).numbered("layers") == tuple(f"layers.{number}" for number in range(count))


@pytest.mark.parametrize("path", ["blocks", "inner.layers"])
def test_a_missing_list_is_refused(path):
    with pytest.raises(UnsupportedModelError, match=f"Tree has no {path}, where its layers were expected"):
        Adapter(Tree(inner=nn.Linear(2, 2))).numbered(path)


def test_something_else_than_a_list_is_refused():
    with pytest.raises(UnsupportedModelError, match="layers of Tree is not a list of layers"):
        Adapter(Tree(layers=nn.Linear(2, 2))).numbered("layers")


@pytest.mark.parametrize(
    "names, expected",
    [
        (("q_proj", "k_proj", "v_proj", "o_proj"), [("q_proj", "k_proj", "v_proj"), ("o_proj",)]),
        (("k_proj", "out_proj", "q_proj"), [("k_proj", "q_proj"), ("out_proj",)]),
        (("gate_proj", "up_proj", "down_proj"), [("gate_proj", "up_proj"), ("down_proj",)]),
        (("fc1", "fc2"), [("fc1",), ("fc2",)]),
        (("q_proj", "gate_proj"), [("q_proj",), ("gate_proj",)]),
        ((), []),
    ],
)
def test_known_siblings_share_a_site(names, expected):
    adapter = Adapter(Tree(layer=linears(*names)))

    assert adapter.sites("layer") == [tuple(f"layer.{name}" for name in site) for site in expected]


def test_cousins_do_not_share_a_site():
    """Self attention and cross attention have linears of equal names and other inputs."""
    adapter = Adapter(Tree(layer=Tree(self_attn=linears("q_proj", "k_proj"), cross_attn=linears("q_proj", "k_proj"))))

    assert adapter.sites("layer") == [
        ("layer.self_attn.q_proj", "layer.self_attn.k_proj"),
        ("layer.cross_attn.q_proj", "layer.cross_attn.k_proj"),
    ]


def test_a_linear_is_a_layer_of_its_own():
    """The output embedding, for one."""
    assert Adapter(linears("lm_head")).sites("lm_head") == [("lm_head",)]


def test_other_modules_are_not_quantized():
    layer = Tree(norm=nn.LayerNorm(2), conv=nn.Conv2d(1, 1, 1), embedding=nn.Embedding(2, 2))

    assert Adapter(Tree(layer=layer)).sites("layer") == []


def test_by_default_no_token_stands_for_an_image():
    assert Adapter(Tree()).image_tokens() == ()


def test_a_family_must_say_where_its_parts_sit():
    with pytest.raises(NotImplementedError, match=r"^$"):
        Adapter(Tree()).parts()
