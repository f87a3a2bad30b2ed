"""Patterns: what they match, and what a user reads who mistyped one."""

import pytest

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.pipeline.options import CalibrationOptions, LinearChoice, keeps, matches, require_matches
from optimum_qvlm.spec import Scheme, WeightSpec

NAMES = [
    "language_model.model.layers.1.mlp.up_proj",
    "language_model.model.layers.10.mlp.up_proj",
    "vision_tower.encoder.layers.1.mlp.fc1",
    "language_model.lm_head",
]


@pytest.mark.parametrize(
    "pattern, name",
    [
        ("lm_head", "lm_head"),
        ("lm_head", "language_model.lm_head"),
        ("layers.1", "model.layers.1.mlp.up_proj"),
        ("vision_tower", "vision_tower.encoder.layers.0.mlp.fc1"),
        ("*", "anything.at.all"),
        ("*.mlp.*", "model.layers.1.mlp.up_proj"),
        ("*up_proj", "model.layers.1.mlp.up_proj"),
        ("*.layers.[01].*", "model.layers.1.mlp.up_proj"),
        ("*.layers.?.*", "model.layers.1.mlp.up_proj"),
    ],
)
def test_a_pattern_matches_whole_components_or_like_a_shell(pattern, name):
    assert matches(pattern, name)


@pytest.mark.parametrize(
    "pattern, name",
    [
        ("layers.1", "model.layers.10.mlp.up_proj"),
        ("layers.1", "model.layers.11.mlp.up_proj"),
        ("head", "lm_head"),
        ("proj", "model.layers.1.mlp.up_proj"),
        ("*.layers.?.*", "model.layers.10.mlp.up_proj"),
        ("mlp.*", "model.layers.1.mlp.up_proj"),
        ("LM_HEAD", "lm_head"),
        ("lm.head", "lm_head"),
        ("", "lm_head"),
    ],
)
def test_parts_of_components_do_not_match(pattern, name):
    """`layers.1` must not mean layers 10 to 19 as well."""
    assert not matches(pattern, name)


@pytest.mark.parametrize("patterns", [[], ["layers.1"], ["*.fc1", "lm_head"]])
def test_patterns_that_match_something_are_accepted(patterns):
    require_matches(patterns, NAMES, "overrides")


@pytest.mark.parametrize(
    "pattern, close",
    [("lm_haed", "language_model.lm_head"), ("vision_tower.encoder.layers.1.mlp.fc9", NAMES[2]), ("layers.2", ".*")],
)
@pytest.mark.parametrize("field_name", ["modules_to_not_convert", "overrides"])
def test_a_pattern_that_matches_nothing_is_refused_with_close_names(pattern, close, field_name):
    """Otherwise a typing error would silently quantize what was to be kept."""
    with pytest.raises(
        ConfigError, match=f"{field_name}: '{pattern}' matches no linear of the model; close: .*{close}"
    ):
        require_matches(["lm_head", pattern], NAMES, field_name)


def test_names_may_be_a_generator():
    """They are looked at once per pattern."""
    require_matches(["lm_head", "*.fc1"], (name for name in NAMES), "overrides")


def test_defaults_search_with_both_grids():
    choice = LinearChoice(weight=WeightSpec(bits=4), activation_bits=8)

    options = CalibrationOptions(language=choice, vision=choice)

    assert (choice.group_size, choice.scheme) == ("auto", Scheme(4, 8))
    assert options.method == "qvlm"
    assert options.keep == () and options.overrides == ()
    assert options.search.clips.activation[0] == options.search.clips.weight[0] == 1.0


@pytest.mark.parametrize(
    "pattern, name, kept",
    [
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        (r"model.layers.\d+.mlp", "model.layers.11.mlp.up_proj", True),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("_proj", "model.layers.0.mlp.up_proj", True),
        ("*.mlp.*", "model.layers.0.mlp.up_proj", True),
        ("*up_proj", "model.layers.0.mlp.down_proj", False),
        ("a|model", "model.layers.0.mlp.up_proj", True),
    ],
)
def test_a_module_is_kept_by_our_rule_or_that_of_transformers(pattern, name, kept):
    """Lists of names are copied from other quantizers' configurations."""
    assert keeps(pattern, name) is kept
