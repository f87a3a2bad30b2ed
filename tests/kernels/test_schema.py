"""The operation's schema, and arguments that take the way through a line of text."""

import pytest
import torch

from optimum_qvlm.kernels import schema
from optimum_qvlm.spec import ACTIVATION_NAMES, WEIGHT_NAMES, ActivationSpec, LinearFormat, WeightSpec

FORMATS = {
    "least": LinearFormat(weight=WeightSpec(bits=8)),
    "most": LinearFormat(
        weight=WeightSpec(bits=3, group=16, symmetric=False),
        activation=ActivationSpec(bits=4, group=16),
        activation_clip=0.1,
        equalized=True,
        rotation=64,
    ),
    "static on two levels": LinearFormat(
        weight=WeightSpec(bits=4, group=32, two_level=True), activation=ActivationSpec(bits=8, static=True)
    ),
}


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_the_line_of_a_format_gives_its_arguments_back(format):
    static = format.activation is not None and format.activation.static

    zero, equalized, fixed, values = schema.parsed(schema.written("table", 128, 96, 16, format))

    assert (zero, equalized, fixed) == (not format.weight.symmetric, format.equalized, static)
    given = torch.ones(1)
    tensors = (given, given, given if zero else None, given if equalized else None, given if fixed else None)
    stored, rounding, grid = schema.read(*tensors, *values)
    assert (stored.layout, grid.in_features, grid.out_features, grid.decode_tokens) == ("table", 128, 96, 16)
    assert (grid.weight, grid.activation) == (format.weight, format.activation)
    assert rounding.rotation == format.rotation
    assert rounding.clip == (1.0 if format.activation is None else format.activation_clip)


def test_the_operation_has_an_argument_for_each_field_of_both_grids():
    """But for what the tensors say: whether there are zero points, and a fixed scale of activations."""
    arguments = [argument.name for argument in torch.ops.optimum_qvlm.linear.default._schema.arguments]

    assert arguments[:7] == ["x", "weight", "scale", "zero_point", "bias", "equalizer", "input_scale"]
    grids = {*WEIGHT_NAMES, *ACTIVATION_NAMES} - {"symmetric", "activation_static"}
    rest = {"layout", "in_features", "out_features", "clip", "rotation", "decode_tokens"}
    assert sorted(arguments[7:]) == sorted(grids | rest)
