"""Plans and records: order of execution, and a way to JSON and back."""

import json

import pytest

from optimum_qvlm.plan import (
    Block,
    Dependency,
    ModuleRecord,
    PlannedLayer,
    PlannedLinear,
    PlannedPart,
    QuantPlan,
    Site,
)
from optimum_qvlm.spec import ActivationSpec, WeightSpec


def linear(name: str) -> PlannedLinear:
    return PlannedLinear(
        path=f"model.{name}", name=name, in_features=8, out_features=4, bias=False, weight=WeightSpec(bits=4)
    )


def record(**changes: object) -> ModuleRecord:
    values = {
        "in_features": 64,
        "out_features": 32,
        "bias": True,
        "weight_bits": 4,
        "weight_group": 32,
        "symmetric": False,
        "scale_dtype": "bfloat16",
        "activation_bits": 6,
        "activation_group": 32,
        "activation_clip": 0.9,
        "weight_clip": 0.85,
        "site": "layers.0.q_proj",
    }
    return ModuleRecord.from_dict(values | changes)


def test_sites_and_linears_come_in_execution_order():
    """Each site must be searched on inputs that went through the sites before it."""
    tower = PlannedLayer(path="t", name="t", sites=(Site(linears=(linear("t.q"), linear("t.k")), activation=None),))
    first = PlannedLayer(path="a", name="a", sites=(Site(linears=(linear("a.q"),), activation=None),))
    second = PlannedLayer(
        path="b",
        name="b",
        sites=(Site(linears=(linear("b.q"),), activation=None), Site(linears=(linear("b.o"),), activation=None)),
    )
    plan = QuantPlan(
        parts=(PlannedPart(name="vision", layers=(tower,)), PlannedPart(name="language", layers=(first, second))),
        blocks=(Block(part="vision", first=0, last=0), Block(part="language", first=0, last=1)),
        kept=("lm_head",),
    )

    assert [site.name for site in plan.sites()] == ["t.q", "a.q", "b.q", "b.o"]
    assert [found.name for found in plan.linears()] == ["t.q", "t.k", "a.q", "b.q", "b.o"]


def test_a_layer_without_sites_is_passed_over():
    plan = QuantPlan(
        parts=(PlannedPart(name="language", layers=(PlannedLayer(path="a", name="a", sites=()),)),), blocks=(), kept=()
    )

    assert plan.sites() == [] and plan.linears() == []


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation_bits": None, "activation_group": None}, {"weight_group": None}, {"weight_clip": 1.0}],
    ids=["all", "weights only", "row", "nearest"],
)
def test_a_record_survives_json(changes):
    """It is saved in config.json."""
    before = record(**changes)

    after = ModuleRecord.from_dict(json.loads(json.dumps(before.to_dict())))

    assert after == before


@pytest.mark.parametrize("bits, group", [(4, 32), (8, None), (2, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_record_gives_the_weight_grid_back(bits, group, symmetric):
    found = record(weight_bits=bits, weight_group=group, symmetric=symmetric).weight

    assert found == WeightSpec(bits=bits, group=group, symmetric=symmetric)


@pytest.mark.parametrize("bits, group", [(4, 32), (8, None)])
def test_a_record_gives_the_activation_grid_back(bits, group):
    found = record(activation_bits=bits, activation_group=group).activation

    assert found == ActivationSpec(bits=bits, group=group)


def test_no_activation_bits_are_no_grid():
    assert record(activation_bits=None, activation_group=None).activation is None


@pytest.mark.parametrize("change, message", [({"extra": 1}, "extra"), ({"site": ...}, "site")])
def test_fields_too_many_or_too_few_are_refused(change, message):
    """A checkpoint of another format version must not load half."""
    values = {name: value for name, value in (record().to_dict() | change).items() if value is not ...}

    with pytest.raises(TypeError, match=message):
        ModuleRecord.from_dict(values)


def plan_in_blocks() -> QuantPlan:
    parts = tuple(
        PlannedPart(
            name=name, layers=tuple(PlannedLayer(path=f"{name}.{n}", name=f"{name}.{n}", sites=()) for n in "abc")
        )
        for name in ("vision", "language")
    )
    return QuantPlan(
        parts=parts,
        blocks=tuple(Block(part=name, first=n, last=n) for name in ("vision", "language") for n in range(3)),
        kept=(),
        dependencies=tuple(
            Dependency(part=name, layer=n, entropy=1.0) for name in ("vision", "language") for n in (0, 1)
        ),
        threshold=0.5,
    )


@pytest.mark.parametrize("part", ["vision", "language"])
def test_the_blocks_of_one_part_are_exchanged_and_the_order_kept(part: str) -> None:
    plan = plan_in_blocks()
    formed = (Block(part=part, first=0, last=1), Block(part=part, first=2, last=2))
    measured = tuple(Dependency(part=part, layer=n, entropy=2.0) for n in (0, 1))

    changed = plan.with_blocks(part, formed, measured)

    assert tuple(block for block in changed.blocks if block.part == part) == formed
    assert [block.part for block in changed.blocks] == sorted((b.part for b in changed.blocks), reverse=True)
    assert [d.entropy for d in changed.dependencies if d.part == part] == [2.0, 2.0]
    assert sum(d.entropy == 1.0 for d in changed.dependencies) == 2
    assert changed.threshold == plan.threshold


def test_mean_depth_is_layers_per_block() -> None:
    plan = plan_in_blocks()

    assert plan.mean_depth("language") == 1.0
    joined = plan.with_blocks("language", (Block(part="language", first=0, last=1), plan.blocks[-1]), ())
    assert joined.mean_depth("language") == 1.5 and joined.mean_depth("vision") == 1.0
