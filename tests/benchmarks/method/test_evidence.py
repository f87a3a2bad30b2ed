"""The benchmark of the method: its partitions, its proxies, and that every table is filled."""

import json

import pytest
import torch

from benchmarks.measures import divergence
from benchmarks.method import evidence
from benchmarks.method.proxies import all_proxies
from benchmarks.method.tables import by_error, pairs_from, shuffled, tiles
from optimum_qvlm.pipeline.dependency import EntropyOptions
from optimum_qvlm.plan import Block, PlannedLayer, PlannedPart, QuantPlan

OPTIONS = EntropyOptions(bits=4, static=False, softness="step_squared", tokens=64, seed=0)


def part_of(name, count):
    layers = tuple(PlannedLayer(path=f"{name}.{n}", name=f"{name}.{n}", sites=()) for n in range(count))
    return PlannedPart(name=name, layers=layers)


def plan_of(*counts):
    parts = tuple(part_of(f"part{number}", count) for number, count in enumerate(counts))
    return QuantPlan(parts=parts, blocks=(), kept=())


def spans(blocks, name):
    return [(block.first, block.last) for block in blocks if block.part == name]


@pytest.mark.parametrize(
    "count, shift, wanted",
    [
        (4, 0, [(0, 1), (2, 3)]),
        (4, 1, [(0, 0), (1, 2), (3, 3)]),
        (5, 1, [(0, 0), (1, 2), (3, 4)]),
        (1, 0, [(0, 0)]),
        (1, 1, [(0, 0)]),
    ],
)
def test_both_shifts_together_search_every_pair(count, shift, wanted):
    assert spans(pairs_from(plan_of(count), shift), "part0") == wanted


def test_tiles_cover_a_part():
    assert [(b.first, b.last) for b in tiles(part_of("p", 7), 3)] == [(0, 2), (3, 5), (6, 6)]


@pytest.mark.parametrize("seed", range(5))
def test_random_partitions_have_the_same_sizes(seed):
    """Else they would differ in cost, and the comparison would say nothing about where borders lie."""
    blocks = [Block(part="part0", first=a, last=b) for a, b in [(0, 0), (1, 3), (4, 5), (6, 6)]]
    plan = plan_of(7)

    found = spans(shuffled(plan.parts, QuantPlan(parts=plan.parts, blocks=tuple(blocks), kept=()), seed), "part0")

    assert sorted(last - first for first, last in found) == [0, 0, 1, 2]
    assert [n for first, last in found for n in range(first, last + 1)] == list(range(7))


def test_blocks_by_error_join_layers_that_add_much():
    plan = plan_of(4)

    found = by_error(plan.parts, {"part0": [0.0, 0.1, 0.1, 0.5]})

    assert spans(found, "part0") == [(0, 0), (1, 1), (2, 3)] or spans(found, "part0") == [(0, 0), (1, 3)]


def test_every_proxy_is_a_finite_number():
    first, second = (torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    for name, proxy in all_proxies(OPTIONS).items():
        assert proxy(first, second) == proxy(first, second), name
        assert abs(proxy(first, second)) < 10, name


def test_a_copy_leaves_less_open_than_an_unrelated_layer():
    """That is what the first proxy measures, and what shuffling pairs destroys."""
    first, other = (torch.randn(200, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    proxies = all_proxies(OPTIONS)

    assert proxies["H(next | layer)"](first, first) < 0.9 * proxies["H(next | layer)"](first, other)
    shuffled_copy = proxies["pairs shuffled"](first, first)
    assert shuffled_copy == pytest.approx(proxies["H(next)"](first, first), rel=0.02)


def test_divergence_is_taken_per_token():
    wanted = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    found = torch.tensor([[0.0, 0.0], [3.0, 0.0]])

    assert divergence(wanted, found)[0] == 0
    assert divergence(wanted, found)[1] > 0.5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_table_is_filled(tmp_path, capsys):
    evidence.main(
        ["proxy", "partitions", "ablation", "--models", "plain", "--quick", "--workers", "2", "--output", str(tmp_path)]
    )

    printed = capsys.readouterr().out
    for name in ("H(next | layer)", "entropy 4", "random", "fixed", "+ dependency", "both"):
        assert any(line.startswith(name) for line in printed.splitlines())
    assert (tmp_path / "proxy-plain-w4a4.svg").exists()
    saved = json.loads((tmp_path / "ablation-plain-w4a4.json").read_text())
    assert list(saved) == ["baseline", "+ dependency", "+ encoder", "both"]
    assert len(saved["both"]["mean_depths"]) == 3


def test_a_text_model_has_no_ablation():
    class Text:
        name = "smollm2"

    with pytest.raises(SystemExit, match="needs a model with a vision tower"):
        evidence.lines_of("ablation", Text(), "w4a4", None, {})
