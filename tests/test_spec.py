"""Specifications: what is refused, and how schemes become grids."""

import dataclasses

import pytest

from optimum_qvlm.errors import QVLMError, SpecError
from optimum_qvlm.spec import NAMED_SCHEMES, ActivationSpec, Scheme, WeightSpec


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 16])
@pytest.mark.parametrize("spec, kind", [(WeightSpec, "weight"), (ActivationSpec, "activation")])
def test_bits_outside_two_to_eight_are_refused(bits, spec, kind):
    with pytest.raises(SpecError, match=rf"{kind} bits must lie in 2\.\.8.*got {bits}"):
        spec(bits=bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 1, 48, 128])
@pytest.mark.parametrize("spec", [WeightSpec, ActivationSpec])
def test_bits_and_groups_inside_the_limits_are_kept(bits, group, spec):
    made = spec(bits=bits, group=group)

    assert (made.bits, made.group) == (bits, group)


@pytest.mark.parametrize("group", [0, -1, -128])
@pytest.mark.parametrize("spec", [WeightSpec, ActivationSpec])
def test_groups_below_one_are_refused(group, spec):
    """Zero must not be taken for None."""
    with pytest.raises(SpecError, match=f"group must be positive or None, got {group}"):
        spec(bits=4, group=group)


@pytest.mark.parametrize(
    "changes, shown", [({"bits": 5}, "5 bits"), ({"symmetric": False}, "4 bits and zero points")], ids=str
)
def test_two_levels_are_for_symmetric_grids_of_four_bits(changes, shown):
    """Other codes times fifteen do not fit a byte."""
    with pytest.raises(SpecError, match=f"two-level scales are for symmetric grids of at most 4 bits, got {shown}"):
        WeightSpec(**{"bits": 4, "group": 32, "two_level": True, **changes})


def test_spec_errors_are_value_errors():
    """Users who never heard of our tree catch ValueError."""
    with pytest.raises(ValueError, match="bits") as caught:
        WeightSpec(bits=1)

    assert isinstance(caught.value, QVLMError)


def test_specs_are_frozen_and_compare_by_value():
    """They are keys of dicts when sites are split."""
    spec = ActivationSpec(bits=4, group=32)

    assert {spec: 1}[ActivationSpec(bits=4, group=32)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError, match="bits"):
        spec.bits = 8


@pytest.mark.parametrize("group, in_features, groups", [(None, 96, 1), (32, 96, 3), (96, 96, 1), (1, 7, 7)])
def test_groups_counts_the_scales_of_a_row(group, in_features, groups):
    assert WeightSpec(bits=4, group=group).groups(in_features) == groups


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("activation_bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_every_scheme_in_the_limits_is_read_and_printed_back(weight_bits, activation_bits):
    scheme = Scheme.parse(f"w{weight_bits}a{activation_bits}")

    assert scheme == Scheme(weight_bits, None if activation_bits == 16 else activation_bits)
    assert str(scheme) == f"w{weight_bits}a{activation_bits}"


@pytest.mark.parametrize(
    "text",
    ["", "w4", "a8", "W4A8", "w4a9", "w1a8", "w9a8", "w4a1", "w4a32", "w16a16", " w4a8", "w4a8\n", "w4a8x", 4, None],
    ids=repr,
)
def test_anything_else_is_no_scheme(text):
    """The message names what was given and what can be given."""
    with pytest.raises(SpecError, match=r"unknown scheme .*; use one of w4a16, w4a8, w4a4, w6a6, w8a8") as caught:
        Scheme.parse(text)

    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", NAMED_SCHEMES)
def test_named_schemes_are_read(text):
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
    "in_features, group",
    [(4096, 128), (128, 128), (64, 64), (192, 64), (96, 32), (48, 16), (144, 16), (100, None), (1, None), (15, None)],
)
@pytest.mark.parametrize("bits", [2, 4, 6, 7])
def test_auto_takes_the_largest_group_that_divides(in_features, group, bits):
    spec = Scheme(bits, 8).weight_spec(in_features, "auto", symmetric=True)

    assert spec == WeightSpec(bits=bits, group=group)


@pytest.mark.parametrize("group_size", ["auto", None, 32, 48])
@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bit_weights_are_always_per_row(group_size, symmetric):
    """Even where the explicit group would not divide: it applies below 8 bits only."""
    spec = Scheme(8, 8).weight_spec(128, group_size, symmetric=symmetric)

    assert spec == WeightSpec(bits=8, group=None, symmetric=symmetric)


@pytest.mark.parametrize("group_size", [1, 24, 48, 96])
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_explicit_group_that_divides_is_taken(group_size, symmetric):
    spec = Scheme(4, 8).weight_spec(96, group_size, symmetric=symmetric)

    assert spec == WeightSpec(bits=4, group=group_size, symmetric=symmetric)


def test_no_group_is_the_whole_row():
    assert Scheme(4, 8).weight_spec(128, None, symmetric=True).group is None


@pytest.mark.parametrize(
    "in_features, group_size, way_out",
    [
        (128, 48, '128, 64, 32, 16, "auto" or None'),
        (96, 64, '32, 16, "auto" or None'),
        (100, 64, '"auto" or None'),
        (64, 128, '64, 32, 16, "auto" or None'),
    ],
)
def test_an_explicit_group_that_does_not_divide_is_refused_with_those_that_do(in_features, group_size, way_out):
    with pytest.raises(SpecError, match=f"group={group_size} does not divide in_features={in_features}; use {way_out}"):
        Scheme(4, 8).weight_spec(in_features, group_size, symmetric=True)


@pytest.mark.parametrize(
    "scheme, weight_group, expected",
    [
        ("w4a16", 64, None),
        ("w4a8", 64, ActivationSpec(bits=8)),
        ("w8a8", None, ActivationSpec(bits=8)),
        ("w4a4", 64, ActivationSpec(bits=4, group=64, fitted=True)),
        ("w6a6", 32, ActivationSpec(bits=6, group=32)),
        ("w4a7", 64, ActivationSpec(bits=7, group=64)),
        ("w4a4", None, ActivationSpec(bits=4, fitted=True)),
        ("w8a4", None, ActivationSpec(bits=4, fitted=True)),
        ("w4a5", 64, ActivationSpec(bits=5, group=64, fitted=True)),
    ],
)
def test_activations_below_eight_bits_share_the_groups_of_the_weight(scheme, weight_group, expected):
    """One product of scales per group in the kernel."""
    parsed = Scheme.parse(scheme)

    assert parsed.activation_spec(WeightSpec(bits=parsed.weight_bits, group=weight_group)) == expected


def test_grids_for_other_runtimes_are_not_fitted():
    """They know one way to take a scale from a token."""
    weight = WeightSpec(bits=4, group=64)

    assert Scheme.parse("w4a4").activation_spec(weight, fitted=False) == ActivationSpec(bits=4, group=64)


def test_a_static_scale_cannot_be_fitted_too():
    with pytest.raises(SpecError, match="the scale of a static activation is that of the calibration"):
        ActivationSpec(bits=4, static=True, fitted=True)


def test_a_static_activation_has_one_scale():
    """Groups and a fixed scale exclude each other; the message shows the group."""
    assert ActivationSpec(bits=4, static=True).static
    with pytest.raises(SpecError, match="a static activation has one scale, got group=32"):
        ActivationSpec(bits=4, group=32, static=True)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group", [None, 32])
def test_static_activations_share_one_scale_whatever_the_weight_groups(bits, group):
    scheme = Scheme(4, bits)

    assert scheme.activation_spec(WeightSpec(bits=4, group=group), static=True) == ActivationSpec(
        bits=bits, static=True
    )


def test_activations_in_floating_point_have_no_static_range_either():
    assert Scheme(4, None).activation_spec(WeightSpec(bits=4), static=True) is None
