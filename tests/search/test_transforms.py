"""Which transform a site gets: what is possible, what undoes outliers, what is not worth its time."""

import pytest
import torch
from torch import Tensor

from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.site import FeedbackOptions, SiteOptions, search_site
from optimum_qvlm.search.site_problem import SiteProblem
from optimum_qvlm.search.transforms import (
    KINDS,
    TransformOptions,
    candidates,
    choose_transform,
    equalizer,
    rotation_size,
)
from optimum_qvlm.spec import ActivationSpec, WeightSpec

EXPONENTS = [0.0, 0.3, 0.5, 1.0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_problem(
    *,
    channels: int = 64,
    group: int | None = 32,
    activation_bits: int | None = 4,
    bits: int = 4,
    factors: Tensor | None = None,
    seed: int = 0,
) -> SiteProblem:
    """Two linears that read 80 tokens. `factors` [channels] are moved from the weights into the activations."""
    factors = torch.ones(channels) if factors is None else factors
    weights = {"q": normal(24, channels, seed=seed + 1) / factors, "k": normal(8, channels, seed=seed + 2) / factors}
    activation = None
    if activation_bits is not None:
        activation = ActivationSpec(bits=activation_bits, group=group if activation_bits < 8 else None)
    return SiteProblem(
        inputs=normal(80, channels, seed=seed) * factors,
        weights=weights,
        specs=dict.fromkeys(weights, WeightSpec(bits=bits, group=group)),
        activation=activation,
        scale_dtype=torch.float32,
    )


def outliers(channels: int = 64) -> Tensor:
    """Powers of two, so that moving them changes no product by a bit."""
    factors = torch.ones(channels)
    factors[[3, 40]] = torch.tensor([64.0, 16.0])
    return factors


def kind(transform: SiteTransform) -> str:
    names = {(False, False): "off", (True, False): "equalize", (False, True): "rotate", (True, True): "both"}
    return names[transform.equalizer is not None, transform.rotation is not None]


@pytest.mark.parametrize(
    "channels, group, expected",
    [
        (64, 32, 32),
        (576, None, 64),
        (1536, None, 128),
        (4304, None, 16),
        (256, 256, 128),
        (96, 48, 16),
        (24, None, None),
        (64, 8, None),
        (1, None, None),
    ],
)
def test_rotations_are_the_largest_that_fit_a_group(channels, group, expected):
    """A block that crosses groups would mix scales; one below 16 is not worth it."""
    assert rotation_size(make_problem(channels=channels, group=group)) == expected


def test_a_rotation_fits_every_linear_of_its_site():
    problem = make_problem(channels=64, group=64, activation_bits=8)
    specs = {"q": WeightSpec(bits=4, group=64), "k": WeightSpec(bits=4, group=16)}

    mixed = SiteProblem(
        inputs=problem.inputs, weights=problem.weights, specs=specs, activation=None, scale_dtype=torch.float32
    )

    assert rotation_size(mixed) == 16


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_factors_that_were_moved_cancel(exponent):
    """Whatever the balance, the equalized problem is the same as without the outliers."""
    clean, moved = equalizer(make_problem(), exponent), equalizer(make_problem(factors=outliers()), exponent)

    shared = (clean / (moved * outliers())).log()
    assert torch.allclose(shared, shared.mean().expand(64), atol=1e-5)


def test_the_ends_of_the_balance_even_out_one_side():
    problem = make_problem(factors=outliers())

    even_inputs = (problem.inputs * equalizer(problem, 1.0)).square().mean(0)
    even_weights = (torch.cat(list(problem.weights.values())) / equalizer(problem, 0.0)).square().mean(0)

    assert torch.allclose(even_inputs, even_inputs.mean().expand(64), rtol=1e-4)
    assert torch.allclose(even_weights, even_weights.mean().expand(64), rtol=1e-4)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("dead", ["activations", "weights", "all"])
def test_dead_channels_get_factor_one(exponent, dead):
    """Nothing there can be balanced, and nothing may become infinite."""
    problem = make_problem()
    if dead != "weights":
        problem.inputs[:, 5] = 0
    if dead != "activations":
        for weight in problem.weights.values():
            weight[:, 5] = 0
    if dead == "all":
        problem.inputs.zero_()

    actual = equalizer(problem, exponent)

    assert float(actual[5]) == 1.0
    assert bool(torch.isfinite(actual).all()) and bool((actual > 0).all())


@pytest.mark.parametrize("allowed", KINDS)
def test_a_single_kind_is_what_a_site_gets(allowed):
    options = TransformOptions(kinds=(allowed,), exponents=(0.5,))

    assert [kind(t) for t in candidates(make_problem(), options)] == [allowed]
    assert kind(choose_transform(make_problem(), options, damping=None)) == allowed


@pytest.mark.parametrize("allowed, expected", [("rotate", "off"), ("both", "equalize")])
def test_where_no_rotation_fits_the_rest_remains(allowed, expected):
    options = TransformOptions(kinds=(allowed,), exponents=(0.5,))

    assert [kind(t) for t in candidates(make_problem(channels=24, group=None), options)] == [expected]


@pytest.mark.parametrize("damping", [None, 0.01])
@pytest.mark.parametrize("activation_bits", [4, 8])
def test_outliers_are_equalized(damping, activation_bits):
    problem = make_problem(factors=outliers(), activation_bits=activation_bits)

    chosen = choose_transform(problem, TransformOptions(kinds=("off", "equalize")), damping=damping)

    assert kind(chosen) == "equalize"


@pytest.mark.parametrize("damping", [None, 0.01])
def test_a_token_that_peaks_in_one_channel_is_rotated(damping):
    """Equalisation cannot help where the peak is in another channel of each token."""
    problem = make_problem(channels=64, group=64)
    problem.inputs[torch.arange(80), torch.arange(80) % 64] = 12.0

    chosen = choose_transform(problem, TransformOptions(), damping=damping)

    assert chosen.rotation == 64


@pytest.mark.parametrize("damping", [None, 0.01])
def test_what_gains_nothing_is_left_out(damping):
    """A transform costs time in every forward."""
    problem = make_problem(activation_bits=None, bits=8, group=None)

    chosen = choose_transform(problem, TransformOptions(margin=0.9), damping=damping)

    assert chosen.is_identity


@pytest.mark.parametrize("damping, expected", [(None, True), (0.01, False)])
def test_weights_alone_are_not_equalized_behind_feedback(damping, expected):
    """It gained on sites and lost at the output. Where there is no feedback, or no rotation, it is all there is."""
    problem = make_problem(factors=outliers(), activation_bits=None)
    fixed = make_problem(factors=outliers()[:24], activation_bits=None, channels=24, group=None)

    chosen = choose_transform(problem, TransformOptions(), damping=damping)

    assert (chosen.equalizer is not None) == expected
    assert choose_transform(fixed, TransformOptions(), damping=damping).equalizer is not None
    assert kind(choose_transform(problem, TransformOptions(kinds=("both",)), damping=damping)) == "both"


@pytest.mark.parametrize("feedback", [None, FeedbackOptions()], ids=["plain", "feedback"])
@pytest.mark.parametrize("bits", [4, 8])
def test_equalization_alone_undoes_outliers(feedback, bits):
    """The site's error with outliers is that without them."""
    options = SiteOptions(transforms=TransformOptions(kinds=("equalize",)), feedback=feedback)

    clean = search_site(make_problem(activation_bits=bits), options)
    moved = search_site(make_problem(activation_bits=bits, factors=outliers()), options)

    assert moved.error == pytest.approx(clean.error, rel=0.02)
    assert moved.error < 0.2 * moved.nearest_error
