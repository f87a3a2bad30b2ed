"""Types and ranges of records, before anything is built from them."""

import copy

import pytest

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.hf.format.entries import LARGEST, require_entries

MODULE = {
    "in_features": 64,
    "out_features": 32,
    "bias": False,
    "weight_bits": 4,
    "weight_group": None,
    "symmetric": True,
    "scale_dtype": "float32",
    "activation_bits": 8,
    "activation_group": None,
    "activation_clip": 1,
    "weight_clip": 0.9,
    "site": "x",
}
VALUES = {
    "modules": {"x": MODULE},
    "blocks": [{"part": "language", "first": 0, "last": 0}],
    "calibration": {},
    "manifest": {"x.weight": ["F32", [0]]},
    "digest": "d",
}


def test_what_saves_write_is_accepted():
    """A clip of 1 is an integer in JSON."""
    require_entries(VALUES)


def test_results_before_the_first_save_are_accepted():
    require_entries({"modules": {"x": MODULE}})


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("in_features", 0, "a positive integer"),
        ("in_features", -1, rf"int \(integers up to {LARGEST}"),
        ("in_features", 10**30, "int"),
        ("in_features", True, "int"),
        ("in_features", 64.0, "int"),
        ("out_features", None, "int"),
        ("bias", 1, "bool"),
        ("weight_group", "auto", "int or null"),
        ("scale_dtype", "load", "float32 or float16 or bfloat16"),
        ("scale_dtype", 5, "str"),
        ("activation_clip", float("nan"), "float"),
        ("activation_clip", float("inf"), "float"),
        ("activation_clip", 0, "a positive number"),
        ("weight_clip", "1.0", "float"),
        ("site", ["x"], "str"),
        ("rotation", 3, "null or a power of two up to 1024"),
        ("rotation", 2**20, "null or a power of two up to 1024"),
    ],
)
def test_fields_of_a_linear_have_their_type_and_range(field, value, expected):
    values = copy.deepcopy(VALUES)
    values["modules"]["x"][field] = value

    with pytest.raises(ConfigError, match=rf"modules\[x\]\.{field} of quantization_config is .*, expected {expected}"):
        require_entries(values)


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("blocks", {}, "a list of dicts"),
        ("blocks", [1], "a list of dicts"),
        ("calibration", [], "a dict"),
        ("manifest", [], "a dict of tensors"),
        ("manifest", {"x": ["F32"]}, r"\[dtype, \[sizes"),
        ("manifest", {"x": ["F32", [-1]]}, r"\[dtype, \[sizes"),
        ("manifest", {"x": ["F32", [2**40]]}, r"\[dtype, \[sizes"),
        ("manifest", {"x": ["F32", [1] * 100]}, r"\[dtype, \[sizes"),
        ("manifest", {"x": [{}, []]}, r"\[dtype, \[sizes"),
        ("digest", 5, "a text"),
    ],
)
def test_the_rest_of_the_record_too(field, value, expected):
    with pytest.raises(ConfigError, match=f"of quantization_config is .*, expected {expected}"):
        require_entries(VALUES | {field: value})


def test_long_values_are_cut_in_the_message():
    with pytest.raises(ConfigError) as error:
        require_entries(VALUES | {"digest": ["x" * 10**6]})

    assert len(str(error.value)) < 250
