"""What all adapters share: numbered layers, and linears grouped by the input that they read."""

from types import SimpleNamespace

import pytest
from torch import nn

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.adapter import Adapter, holds_linear


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


def layers(count, entry=None):
    return nn.ModuleList((nn.Linear(2, 2) if entry is None else entry()) for _ in range(count))


@pytest.mark.parametrize(
    "tower, expected",
    [
        (Tree(layers=layers(2)), "tower.layers"),
        (Tree(encoder=Tree(layer=layers(3)), heads=layers(2)), "tower.encoder.layer"),
        (Tree(blocks=layers(2, lambda: Tree(inner=layers(5)))), "tower.blocks"),
        (Tree(norms=layers(4, lambda: nn.LayerNorm(2)), blocks=layers(2)), "tower.blocks"),
        (layers(2), "tower"),
    ],
    ids=["plain", "longest", "outermost", "with linears", "itself"],
)
def test_the_list_of_layers_is_the_longest_outermost_one_with_linears(tower, expected):
    assert Adapter(Tree(tower=tower)).layer_list("tower") == expected


@pytest.mark.parametrize(
    "tower, message",
    [
        (Tree(norm=nn.LayerNorm(2)), "tower of Tree holds no list of layers, where one was expected"),
        (Tree(a=layers(2), b=layers(2)), "tower of Tree holds the lists tower.a, tower.b, where one was expected"),
        (Tree(layers=layers(0)), "tower of Tree holds no list of layers"),
    ],
    ids=["none", "two", "empty"],
)
def test_no_or_two_such_lists_are_refused(tower, message):
    with pytest.raises(UnsupportedModelError, match=message):
        Adapter(Tree(tower=tower)).layer_list("tower")


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"image_token_id": 7}, (7,)),
        ({"image_token_index": 8}, (8,)),
        ({"image_token_id": 7, "image_token_index": 7, "video_token_id": 9}, (7, 9)),
        ({"image_token_id": None}, ()),
    ],
)
def test_image_tokens_are_those_that_the_configuration_names(fields, expected):
    """Under one of the names that families use, each once."""
    model = Tree()
    model.config = SimpleNamespace(**fields)

    assert Adapter(model).image_tokens() == expected


@pytest.mark.parametrize(
    "module, expected",
    [(nn.Linear(2, 2), True), (nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), True), (nn.LayerNorm(2), False)],
)
def test_whether_a_module_holds_a_linear(module, expected):
    assert holds_linear(module) is expected
