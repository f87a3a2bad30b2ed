"""A report that came from elsewhere: what is odd in it counts as absent, and nothing stumbles over it."""

import pytest

from optimum_qvlm.report import figures

GENERATED = {"answers": 8, "tokens": 16.0, "agreed_tokens": 9.5, "exact_match": 0.25}
ODD = [None, True, "x", [], {}, float("nan"), float("inf"), 10**400, -(10**400)]


@pytest.mark.parametrize(
    "data", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000], ids=["empty", "list", "cut", "bytes", "deep"]
)
def test_what_is_no_object_is_an_empty_report(data):
    assert figures.read_report(data) == {}


def test_an_object_is_read():
    assert figures.read_report(b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_values_are_no_figures(value):
    """The last two are ints that no float can hold; formatting them would raise."""
    assert not figures.is_figure(value)
    assert figures.measured_layers({"layers": [{"layer": "a", "error": value}, value]}) == []
    assert figures.memory_bytes({"bytes": {"before": 8, "after": value}}) is None
    assert figures.fidelity_figures({"fidelity": {"mean_kl": value}}) == {}
    assert figures.generation_figures({"fidelity": {"generate": GENERATED | {"tokens": value}}}) == {}


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_containers_are_absent(value):
    report = dict.fromkeys(("layers", "kept_in_full_precision", "folded_into_norms", "bytes", "fidelity"), value)

    assert figures.measured_layers(report) == figures.kept_names(report) == figures.folded_norms(report) == []
    assert figures.memory_bytes(report) is None
    assert figures.fidelity_figures(report) == figures.generation_figures(report) == {}
    assert figures.generation_figures({"fidelity": {"generate": value}}) == {}


def test_nothing_is_divided_by_no_bytes():
    assert figures.memory_bytes({"bytes": {"before": 8, "after": 0}}) is None
    assert figures.memory_bytes({"bytes": {"before": 8, "after": 2}}) == (8, 2)


def test_what_is_sound_beside_it_is_kept():
    report = {
        "layers": [{"layer": "a", "error": 0.5}, {"layer": 5, "error": 0.5}],
        "kept_in_full_precision": ["lm_head", None],
        "folded_into_norms": {"a": "norm", "b": 5},
        "fidelity": {"tokens": "many", "mean_kl": 0.5, "top1_agreement": 1.0, "more": 3},
    }

    assert [layer["layer"] for layer in figures.measured_layers(report)] == ["a"]
    assert figures.kept_names(report) == ["lm_head"]
    assert figures.folded_norms(report) == ["norm"]
    assert figures.fidelity_figures(report) == {figures.HELD_OUT: {"mean_kl": 0.5, "top1_agreement": 1.0}}


def test_figures_of_both_paths_and_of_generation_are_told_apart():
    """Greedy answers have no divergence, and one table cannot show both."""
    prefill = {"tokens": 9, "mean_kl": 0.5, "top1_agreement": 1.0}
    report = {"fidelity": {"prefill": prefill, "decode": None, "generate": GENERATED | {"more": 1}}}

    assert figures.fidelity_figures(report) == {"prefill": prefill}
    assert figures.generation_figures(report) == GENERATED
    assert figures.generation_figures({"fidelity": prefill}) == {}
