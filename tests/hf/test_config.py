"""`QVLMConfig`: what it refuses, and that it survives JSON and copying."""

import copy
import json
import re
from dataclasses import fields
from inspect import signature

import pytest

from optimum_qvlm import EncoderOptions, QVLMConfig, QVLMError, SearchOptions
from optimum_qvlm.errors import ConfigError, SpecError
from optimum_qvlm.hf.config import FORMAT_VERSION
from optimum_qvlm.hf.format.record import CalibrationRecord, config_digest, config_identity
from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.settings import NESTED, Settings, declaration, nested_names
from optimum_qvlm.spec import Scheme

OVERRIDES = {"lm_head": "w8a8", "layers.0": None, "*.down_proj": {"scheme": "w4a16", "group_size": 32}}


def make_record(**changes) -> CalibrationRecord:
    """One module, one block, sealed."""
    module = ModuleRecord(
        in_features=64,
        out_features=32,
        bias=False,
        weight_bits=4,
        weight_group=32,
        symmetric=True,
        scale_dtype="bfloat16",
        activation_bits=8,
        activation_group=None,
        activation_clip=0.95,
        weight_clip=0.8125,
        site="layers.0.q_proj",
    )
    values = {
        "modules": {"layers.0.q_proj": module},
        "blocks": [{"part": "language", "first": 0, "last": 0}],
        "calibration": {"method": "qvlm", "samples": 4},
        "manifest": {"layers.0.q_proj.weight_scale": ["BF16", [32, 2]]},
        "digest": "0" * 64,
    }
    return CalibrationRecord(**(values | changes))


def dotted(settings: dict) -> dict:
    """Arguments, of which `search.tokens` goes into the dict `search`."""
    arguments: dict = {}
    for name, value in settings.items():
        argument, _, own = name.partition(".")
        arguments[argument] = {**arguments.get(argument, {}), own: value} if own else value
    return arguments


def through_json(config: QVLMConfig) -> QVLMConfig:
    return QVLMConfig.from_dict(json.loads(json.dumps(config.to_dict())))


@pytest.mark.parametrize("field", ["scheme", "vision_scheme"])
@pytest.mark.parametrize("value", ["w9a1", "w4", "w1a8", "w4a9", "W4A8", "w4a8 ", "", 4, ["w4a8"]])
def test_unknown_schemes_are_refused_with_the_known_ones(field, value):
    with pytest.raises(SpecError, match=r"unknown scheme .*; use one of w4a16, w4a8, w4a4, w6a6, w8a8, or w<bits>"):
        QVLMConfig(**{field: value})


def test_the_language_model_needs_a_scheme():
    """None would mean: quantize nothing, which is what leaving the configuration out does."""
    with pytest.raises(SpecError, match="unknown scheme None"):
        QVLMConfig(None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decode_tokens": -1}, "decode_tokens must be an integer of at least 0, got -1"),
        ({"decode_tokens": True}, "decode_tokens must be an integer of at least 0, got True"),
        ({"decode_tokens": "16"}, "decode_tokens must be an integer of at least 0, got '16'"),
    ],
)
def test_token_thresholds_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        QVLMConfig(**settings)


def test_the_token_threshold_is_recorded():
    """It decides what a saved model computes. `exact_decode` of checkpoints of before is a threshold of none."""
    assert through_json(QVLMConfig(decode_tokens=5)).weight_only_tokens() == 5
    saved = QVLMConfig(decode_tokens=5).to_dict()
    assert QVLMConfig.from_dict(saved | {"exact_decode": True}).weight_only_tokens() == 0
    assert QVLMConfig.from_dict(saved | {"exact_decode": False}).weight_only_tokens() == 5


@pytest.mark.parametrize(
    "field", ["num_samples", "batch_size", "max_length", "search.tokens", "search.max_block_depth"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "64", None, True])
def test_counts_must_be_positive_integers(field, value):
    with pytest.raises(ConfigError, match=f"{field} must be a positive integer, got {value!r}"):
        QVLMConfig(**dotted({field: value}))


@pytest.mark.parametrize("value", [-1, 0.5, "0", None, True])
def test_seeds_must_be_integers_from_zero(value):
    with pytest.raises(ConfigError, match=f"seed must be an integer of at least 0, got {value!r}"):
        QVLMConfig(seed=value)


@pytest.mark.parametrize("value", [0, -32, 32.0, "32", "Auto", True, [32]])
def test_group_sizes_must_be_auto_none_or_positive(value):
    with pytest.raises(ConfigError, match='group_size must be "auto", None or a positive integer, got '):
        QVLMConfig(group_size=value)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_symmetric_must_be_a_boolean(value):
    with pytest.raises(ConfigError, match=f"symmetric must be True or False, got {value!r}"):
        QVLMConfig(symmetric=value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scheme": "w8a8"}, 'weights of 2 to 4 bits and rounded activations, got scheme="w8a8"; use "w4a8"'),
        ({"scheme": "w6a6"}, 'weights of 2 to 4 bits and rounded activations, got scheme="w6a6"; use "w4a8"'),
        ({"scheme": "w4a16"}, 'weights of 2 to 4 bits and rounded activations, got scheme="w4a16"; use "w4a8"'),
        ({"scheme": "w4a4"}, 'one scale per token, which scheme="w4a4" has with activation_range="static" only'),
        ({"symmetric": False}, "weights without zero points, got symmetric=False"),
        ({"group_size": None}, "several groups to a row, got group_size=None"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value.values())),
)
def test_two_level_scales_are_refused_where_nothing_gains_by_them(settings, message):
    """They cost a little accuracy, for products of bytes that these do not have."""
    with pytest.raises(ConfigError, match=re.escape(f"two_level_scales=True needs {message}")):
        QVLMConfig(two_level_scales=True, **settings)


@pytest.mark.parametrize(
    "settings", [{}, {"scheme": "w3a8"}, {"scheme": "w4a4", "search": {"activation_range": "static"}}], ids=str
)
def test_two_level_scales_reach_language_and_overrides_and_survive_json(settings):
    config = through_json(QVLMConfig(two_level_scales=True, overrides=OVERRIDES, **settings))

    options = config.options()
    assert config.two_level_scales is True
    assert options.language.two_level and not options.vision.two_level
    assert [pattern for pattern, choice in options.overrides if choice.two_level] == ["lm_head", "*.down_proj"]
    assert not QVLMConfig().options().language.two_level


@pytest.mark.parametrize("value", ["gptq", "QVLM", None])
def test_other_methods_are_refused(value):
    with pytest.raises(ConfigError, match=f"method must be one of qvlm, layerwise, rtn, got {value!r}"):
        QVLMConfig(method=value)


@pytest.mark.parametrize("value", ["slow", "", None, 1, "Fast"])
def test_efforts_are_fast_and_balanced(value):
    with pytest.raises(ConfigError, match=f"effort must be one of balanced, fast, got {value!r}"):
        QVLMConfig(effort=value)


@pytest.mark.parametrize("value", ["hadamard", "", None, True, "Off"])
def test_transforms_are_known_kinds(value):
    with pytest.raises(ConfigError, match=f"search.transforms must be one of auto, off, .*both, got {value!r}"):
        QVLMConfig(search={"transforms": value})


@pytest.mark.parametrize("field", ["search.error_feedback", "servable", "two_level_scales", "dequantize"])
@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_switches_are_true_or_false(field, value):
    with pytest.raises(ConfigError, match=f"{field} must be True or False, got {value!r}"):
        QVLMConfig(**dotted({field: value}))


@pytest.mark.parametrize("transforms", ["equalize", "rotate", "both"])
def test_a_servable_model_with_transforms_is_refused(transforms):
    """Otherwise one of the two wishes would be dropped in silence."""
    with pytest.raises(ConfigError, match=f"servable=True leaves the choice .*transforms='{transforms}' asks"):
        QVLMConfig(servable=True, search={"transforms": transforms})


def test_servable_takes_the_peak_of_each_token():
    """As other runtimes do: a clip that was searched could not be written for them."""
    assert QVLMConfig(servable=True).options().search.clips.activation == (1.0,)
    assert len(QVLMConfig(servable=True, search={"activation_range": "static"}).options().search.clips.activation) > 1
    assert QVLMConfig(servable=True, search={"activation_clips": [1.0, 0.9]}).options().search.clips.activation == (
        1.0,
        0.9,
    )


def test_servable_searches_only_what_norms_can_take_up():
    """No rotation, which no weight before a site can hold."""
    options = QVLMConfig(servable=True).options()

    assert options.fold
    assert options.search.transforms.kinds == ("off", "equalize")
    assert QVLMConfig(servable=True, search=SearchOptions(transforms="off")).options().search.transforms is None
    assert through_json(QVLMConfig(servable=True)).servable is True


def test_effort_and_feedback_reach_the_search():
    """Fast tries fewer candidates and refines nothing; without feedback each weight is rounded on its own."""
    balanced, fast = QVLMConfig().options().search, QVLMConfig(effort="fast").options().search
    plain = QVLMConfig(search={"error_feedback": False})

    assert set(fast.clips.activation) < set(balanced.clips.activation)
    assert set(fast.clips.weight) < set(balanced.clips.weight)
    assert set(QVLMConfig(search={"error_feedback": False}, effort="fast").options().search.clips.weight) < set(
        plain.options().search.clips.weight
    )
    assert fast.feedback.sweeps == 0 < balanced.feedback.sweeps
    assert len(fast.transforms.exponents) < len(balanced.transforms.exponents)
    assert plain.options().search.feedback is None


@pytest.mark.parametrize("value", ["lm_head", [1], ["lm_head", None], 5], ids=["text", "number", "none", "no list"])
def test_modules_to_not_convert_must_be_a_list_of_names(value):
    """A bare string would be taken letter by letter."""
    with pytest.raises(ConfigError, match="modules_to_not_convert must be a list of name patterns, got "):
        QVLMConfig(modules_to_not_convert=value)


@pytest.mark.parametrize(
    "value",
    [5, ["w4a8"], {"bits": 4}, {"scheme": "w4a8", "groups": 32}],
    ids=["number", "list", "other keys", "key too many"],
)
def test_overrides_must_be_schemes_or_known_settings(value):
    with pytest.raises(ConfigError, match=r"overrides\['lm_head'\] must be a scheme, None, or a dict with scheme"):
        QVLMConfig(overrides={"lm_head": value})


def test_schemes_of_overrides_are_checked_at_once():
    """Not hours later, when their module is reached."""
    with pytest.raises(SpecError, match="unknown scheme 'w4'"):
        QVLMConfig(overrides={"lm_head": {"scheme": "w4"}})


def test_group_sizes_of_overrides_are_checked_at_once():
    with pytest.raises(ConfigError, match=r"overrides\['lm_head'\]: group_size must be .*, got 0"):
        QVLMConfig(overrides={"lm_head": {"group_size": 0}})


def test_symmetric_of_overrides_is_checked_at_once():
    with pytest.raises(ConfigError, match="symmetric must be True or False, got 'no'"):
        QVLMConfig(overrides={"lm_head": {"symmetric": "no"}})


@pytest.mark.parametrize("value", [["lm_head"], "lm_head", 5], ids=["list", "text", "number"])
def test_overrides_must_be_a_mapping(value):
    with pytest.raises(ConfigError, match="overrides must be"):
        QVLMConfig(overrides=value)


def test_patterns_of_overrides_must_be_text():
    with pytest.raises(ConfigError, match="overrides"):
        QVLMConfig(overrides={5: "w8a8"})


def test_errors_are_value_errors():
    """So that users need not know our classes."""
    assert issubclass(ConfigError, QVLMError) and issubclass(QVLMError, ValueError)


def test_options_carry_every_setting():
    config = QVLMConfig(
        "w4a4",
        group_size=16,
        vision_scheme="w6a6",
        symmetric=False,
        modules_to_not_convert=["lm_head"],
        overrides=OVERRIDES,
        seed=3,
        method="rtn",
        search=SearchOptions(tokens=7),
    )

    options = config.options()

    assert (options.language.scheme, options.language.group_size) == (Scheme(4, 4), 16)
    assert (options.vision.scheme, options.vision.group_size) == (Scheme(6, 6), "auto")
    assert not options.language.symmetric and not options.vision.symmetric
    assert (options.keep, options.seed, options.method, options.search_tokens) == (("lm_head",), 3, "rtn", 7)
    assert [pattern for pattern, _ in options.overrides] == list(OVERRIDES)
    head, first, down = (choice for _, choice in options.overrides)
    assert (head.scheme, head.group_size, head.symmetric) == (Scheme(8, 8), "auto", False)
    assert first.scheme is None
    assert (down.scheme, down.group_size, down.symmetric) == (Scheme(4, None), 32, False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"vision_scheme": None, "group_size": None, "symmetric": False},
        {"overrides": OVERRIDES, "modules_to_not_convert": ["a", "b"]},
        {"num_samples": 3, "batch_size": 1, "max_length": 9, "seed": 2**40, "method": "rtn", "search": {"tokens": 1}},
        {"dataset": "scienceqa"},
    ],
    ids=["defaults", "nones", "patterns", "numbers", "preset"],
)
def test_settings_survive_json(settings):
    config = QVLMConfig("w6a6", **settings)

    again = through_json(config)

    assert again == config
    assert again.to_dict() == config.to_dict()
    assert list(again.overrides or {}) == list(config.overrides or {})


def test_the_order_of_overrides_survives_json():
    """The first pattern that matches decides."""
    config = QVLMConfig(overrides={"*": "w8a8", "lm_head": None})

    assert list(through_json(config).overrides) == ["*", "lm_head"]


@pytest.mark.parametrize("changes", [{}, {"manifest": None, "digest": None}], ids=["sealed", "not saved yet"])
def test_a_record_survives_json(changes):
    config = QVLMConfig(overrides=OVERRIDES)
    config.record = make_record(**changes)

    again = through_json(config)

    assert again.to_dict() == config.to_dict()
    assert again.record.modules == config.record.modules
    assert again.record.blocks == config.record.blocks
    assert again.record.manifest == config.record.manifest


def test_reading_computes_the_digest_of_what_was_read():
    config = QVLMConfig()
    config.record = make_record()
    values = config.to_dict()

    record = QVLMConfig.from_dict(values).record

    assert record.digest == "0" * 64
    assert record.found_digest == config_digest(values)
    assert record.found_identity == config_identity(values)


def test_the_identity_is_known_before_the_weights_are_written():
    """It stands among them, so it cannot depend on their manifest."""
    values = QVLMConfig().to_dict()

    assert config_identity(values | {"manifest": {}, "digest": "x"}) == config_identity(values)
    assert config_identity(values | {"seed": 1}) != config_identity(values)


def test_the_digest_looks_at_everything_but_itself():
    values = QVLMConfig().to_dict()

    assert config_digest(values | {"digest": "x"}) == config_digest(values)
    assert config_digest(dict(reversed(values.items()))) == config_digest(values)
    assert config_digest(values | {"seed": 1}) != config_digest(values)


def test_datasets_and_processors_are_never_written():
    """They may be large, private, or both."""
    config = QVLMConfig(dataset=[{"question": "secret"}], processor=object())

    written = json.dumps(config.to_dict())

    assert "secret" not in written and "processor" not in written
    assert config.to_dict()["dataset"] is None


def test_the_name_of_a_preset_is_written():
    assert QVLMConfig(dataset="scienceqa").to_dict()["dataset"] == "scienceqa"


def test_data_can_be_dropped():
    config = QVLMConfig(dataset=[{"question": "q"}], processor=object())
    preset = QVLMConfig(dataset="scienceqa")

    config.drop_data()
    preset.drop_data()

    assert config.dataset is None and config.processor is None
    assert preset.dataset == "scienceqa"


def test_a_deep_copy_shares_data_and_nothing_else():
    """transformers copies configurations; a dataset in memory or a processor must not be copied with them."""
    config = QVLMConfig(
        dataset=[object()], processor=object(), overrides=dict(OVERRIDES), modules_to_not_convert=["lm_head"]
    )
    config.record = make_record()

    copied = copy.deepcopy(config)

    assert copied.dataset is config.dataset and copied.processor is config.processor
    assert copied == config
    copied.overrides["new"] = None
    copied.modules_to_not_convert.append("new")
    copied.record.modules.clear()
    assert list(config.overrides) == list(OVERRIDES)
    assert config.modules_to_not_convert == ["lm_head"]
    assert list(config.record.modules) == ["layers.0.q_proj"]


def test_the_users_containers_are_not_taken_over():
    """Changing the own list later must not change a configuration that was validated."""
    keep, overrides = ["lm_head"], dict(OVERRIDES)
    config = QVLMConfig(modules_to_not_convert=keep, overrides=overrides)

    keep.append("new")
    overrides["new"] = None

    assert config.modules_to_not_convert == ["lm_head"]
    assert list(config.overrides) == list(OVERRIDES)


def test_unknown_fields_are_refused():
    """A setting of a later release would otherwise be dropped without a word."""
    with pytest.raises(ConfigError, match="unknown fields in quantization_config: bits, desc_act"):
        QVLMConfig.from_dict({"quant_method": "qvlm", "scheme": "w4a8", "desc_act": True, "bits": 4})


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, "2", None])
def test_newer_formats_are_refused_with_the_way_out(version):
    with pytest.raises(ConfigError, match=r"format version .*reads up to 1; upgrade it: pip install -U optimum-qvlm"):
        QVLMConfig.from_dict({"quant_method": "qvlm", "format_version": version})


@pytest.mark.parametrize("modules", [None, [], {"a": {}}, {"a": None}, {"a": {"bits": 4}}])
def test_records_that_are_not_whole_are_refused(modules):
    values = QVLMConfig().to_dict() | {"digest": "0"}
    if modules is not None:
        values["modules"] = modules

    with pytest.raises(ConfigError, match=r"modules.* of quantization_config .*; fetch the checkpoint"):
        QVLMConfig.from_dict(values)


def test_unused_arguments_are_returned_when_asked_for():
    """transformers passes what it was given and takes back what is not ours."""
    config, rest = QVLMConfig.from_dict({"scheme": "w4a4"}, return_unused_kwargs=True, revision="main")

    assert config.scheme == "w4a4"
    assert rest == {"revision": "main"}


def test_a_configuration_can_be_printed():
    """`print(model.config)` shows it, also while a dataset is in it."""
    assert '"scheme": "w4a8"' in repr(QVLMConfig(dataset=[object()]))


def test_equality_is_of_settings():
    assert QVLMConfig("w4a8") == QVLMConfig("w4a8")
    assert QVLMConfig("w4a8") != QVLMConfig("w4a4")
    assert QVLMConfig("w4a8") != "w4a8"


@pytest.mark.parametrize("value", [-0.1, "1", True, float("nan"), float("inf")])
def test_thresholds_must_be_numbers_from_zero(value):
    with pytest.raises(ConfigError, match=r"search\.threshold must be None or a number of at least 0, got "):
        QVLMConfig(search={"threshold": value})


@pytest.mark.parametrize("field", ["activation_clips", "weight_clips"])
@pytest.mark.parametrize("value", [[], [0.9], [1.0, 0.0], [1.0, 1.1], [1.0, "0.9"], "1.0", 1.0, [1.0, None]])
def test_grids_must_hold_clips_and_the_full_range(field, value):
    """Without 1.0 there is no rounding to nearest to fall back to."""
    with pytest.raises(ConfigError, match=f"search.{field} must be a list of numbers above 0 and up to 1, with 1.0"):
        QVLMConfig(search={field: value})


@pytest.mark.parametrize("field, allowed", [("activation_range", "dynamic, static"), ("soft_assignment", "step_squa")])
@pytest.mark.parametrize("value", ["other", None, 1])
def test_other_ranges_and_assignments_are_refused(field, allowed, value):
    with pytest.raises(ConfigError, match=f"search.{field} must be one of {allowed}.*, got {value!r}"):
        QVLMConfig(search={field: value})


def test_static_ranges_without_data_are_refused():
    with pytest.raises(ConfigError, match='activation_range="static" needs data, which method="rtn" does not use'):
        QVLMConfig(search={"activation_range": "static"}, method="rtn")


def test_settings_of_the_search_reach_the_options():
    search = SearchOptions(
        max_block_depth=5, threshold=1.25, activation_clips=(1.0, 0.7), weight_clips=[1], soft_assignment="step"
    )
    config = QVLMConfig("w4a4", search=search)

    options = QVLMConfig.from_dict(config.to_dict()).options()

    assert (options.max_block_depth, options.threshold, options.softness) == (5, 1.25, "step")
    assert options.search.clips.activation == (1.0, 0.7) and options.search.clips.weight == (1.0,)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_papers_mode(bits):
    """Quantiles 1.0 to 0.98 in steps of 0.005 as static bounds, three layers, 64 pairs, the tower at the same bits."""
    config = QVLMConfig.paper(bits)

    options = config.options()
    assert config.num_samples == 64
    assert options.max_block_depth == 3 and options.softness == "step"
    for choice in (options.language, options.vision):
        assert str(choice.scheme) == f"w{bits}a{bits}" and choice.static
    assert options.search.clips.activation == (1.0, 0.995, 0.99, 0.985, 0.98)
    assert options.search.clips.activation_margin == 0.0


def test_the_papers_mode_takes_further_settings():
    config = QVLMConfig.paper(overrides={"lm_head": "w8a8"}, vision_scheme=None, seed=3)

    assert (config.scheme, config.vision_scheme, config.seed) == ("w4a4", None, 3)
    assert config.options().overrides[0][1].static


def test_encoder_settings_become_options():
    encoder = EncoderOptions(epochs=3, learning_rate=0.5, final_share=0.25, entropy_weight=2, error_weight=0)
    config = QVLMConfig(encoder=encoder)

    assert config.options().encoder == encoder
    assert QVLMConfig.from_dict(config.to_dict()) == config


def test_the_papers_mode_optimises_the_encoder():
    assert QVLMConfig.paper().options().encoder.epochs == 10
    assert QVLMConfig.paper(encoder={"epochs": 0}).options().encoder.epochs == 0
    adjusted = QVLMConfig.paper(encoder=EncoderOptions(learning_rate=0.5), search=SearchOptions(tokens=99))
    assert (adjusted.encoder.epochs, adjusted.encoder.learning_rate) == (10, 0.5)
    assert (adjusted.search.tokens, adjusted.search.transforms) == (99, "off")


@pytest.mark.parametrize("value", [-1, 1.5, True, "10", None])
def test_epochs_that_are_no_number_of_passes_are_refused(value):
    with pytest.raises(ConfigError, match=r"encoder\.epochs must be an integer of at least 0, got"):
        QVLMConfig(encoder={"epochs": value})


@pytest.mark.parametrize("field", ["learning_rate", "final_share", "entropy_weight", "error_weight"])
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), "1", None, True])
def test_factors_that_are_no_number_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"encoder.{field} must be a number of at least 0, got"):
        EncoderOptions(**{field: value})


def test_a_learning_rate_of_zero_is_refused():
    """It would cost the time of the step and change nothing."""
    with pytest.raises(ConfigError, match=r"encoder\.learning_rate must be above 0, got 0"):
        EncoderOptions(learning_rate=0)


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", 2**70),
        ("num_samples", 2**70),
        ("decode_tokens", 2**40),
        ("encoder.learning_rate", 1e300),
        ("encoder.error_weight", 1e300),
        ("search.threshold", 10**400),
    ],
)
def test_numbers_beyond_reason_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        QVLMConfig(**dotted({name: value}))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            {"effort": "fast", "search.threshold": 0.5, "search.max_block_depth": 2},
            'search.max_block_depth, search.threshold have no effect: effort="fast" forms',
        ),
        ({"method": "layerwise", "search.threshold": 0.5}, 'search.threshold has no effect: method="layerwise"'),
        ({"method": "rtn", "encoder.epochs": 2, "num_samples": 3}, "num_samples, encoder.epochs have no effect"),
        ({"encoder.learning_rate": 0.1}, "encoder.learning_rate has no effect: encoder.epochs=0"),
    ],
)
def test_settings_without_effect_are_named(settings, sentence):
    assert any(found.startswith(sentence) for found in QVLMConfig(**dotted(settings)).idle_settings())


@pytest.mark.parametrize(
    "settings", [{}, {"method": "rtn"}, {"effort": "fast"}, {"method": "rtn", "search": {"transforms": "off"}}]
)
def test_settings_that_agree_are_not_warned_about(settings):
    assert QVLMConfig(**settings).idle_settings() == []
    assert QVLMConfig.paper().idle_settings() == []


FORMER = {
    "search_tokens": 99,
    "max_block_depth": 2,
    "threshold": 0.5,
    "soft_assignment": "step",
    "activation_range": "static",
    "activation_clips": [1.0, 0.9],
    "weight_clips": [1.0, 0.8],
    "transforms": "rotate",
    "error_feedback": False,
    "encoder_epochs": 3,
    "encoder_lr": 0.5,
    "encoder_eta": 0.25,
    "encoder_l1": 2.0,
    "encoder_l2": 0.5,
}
"""Every flat argument of before that has moved, with a value that is not its default."""


def test_every_argument_that_moved_is_known_by_its_former_name():
    assert FORMER.keys() == nested_names(former=True).keys()


@pytest.mark.parametrize("name", FORMER)
def test_former_arguments_still_work_and_say_where_they_are_now(name):
    """With the line of the user, who is to change it."""
    argument, own = nested_names()[name]

    with pytest.warns(DeprecationWarning, match=rf"{name} is {argument}=\w+\({own}=\.\.\.\)") as caught:
        config = QVLMConfig(**{name: FORMER[name]})

    assert len(caught) == 1 and caught[0].filename == __file__
    assert config == QVLMConfig(**{argument: {own: FORMER[name]}})
    assert config.to_dict()[name] == FORMER[name]
    with pytest.warns(DeprecationWarning, match=f"{name} is read as {argument}.{own} now"):
        assert getattr(config, name) == FORMER[name]


def test_exact_decode_is_a_threshold_of_none():
    with pytest.warns(DeprecationWarning, match="exact_decode=True is decode_tokens=0"):
        assert QVLMConfig(decode_tokens=5, exact_decode=True).weight_only_tokens() == 0
    with pytest.raises(ConfigError, match="exact_decode must be True or False, got 1"):
        QVLMConfig(exact_decode=1)


def test_the_papers_mode_takes_former_arguments():
    with pytest.warns(DeprecationWarning) as caught:
        config = QVLMConfig.paper(encoder_epochs=2, transforms="auto")

    assert len(caught) == 1 and caught[0].filename == __file__
    assert (config.encoder.epochs, config.search.transforms, config.search.soft_assignment) == (2, "auto", "step")


def test_saved_configurations_are_read_without_warnings(recwarn):
    """Their flat names are those of the format, not arguments of before."""
    values = QVLMConfig("w4a4").to_dict() | FORMER | {"exact_decode": True}

    config = QVLMConfig.from_dict(values)

    assert not recwarn
    assert config.decode_tokens == 0
    assert {name: config.to_dict()[name] for name in FORMER} == FORMER


@pytest.mark.parametrize("argument, made", NESTED.items())
def test_nested_settings_are_options_or_dicts(argument, made):
    name = fields(made)[0].name
    with pytest.raises(ConfigError, match=rf"{made.__name__} has no field depth; it has {name}, "):
        QVLMConfig(**{argument: {"depth": 3}})
    with pytest.raises(ConfigError, match=rf"expected {made.__name__} or a dict with some of its fields, got 5"):
        QVLMConfig(**{argument: 5})


def test_unknown_arguments_are_refused_with_the_closest():
    with pytest.raises(TypeError, match="QVLMConfig has no setting num_sample; did you mean num_samples"):
        QVLMConfig(num_sample=3)


def test_the_signature_shows_every_setting_with_its_default():
    """Help and editors read it."""
    shown = {name: parameter.default for name, parameter in signature(QVLMConfig).parameters.items()}

    assert shown == {entry.name: entry.default for entry in fields(Settings)} | dict.fromkeys(NESTED)
    assert next(iter(shown)) == "scheme"


@pytest.mark.parametrize("made", [Settings, *NESTED.values()])
def test_every_setting_has_a_line_of_help_a_default_that_is_valid_and_a_name(made):
    names = [declaration(entry).saved for entry in fields(made)]
    for entry in fields(made):
        declared = declaration(entry)
        assert declared.kind.problem(entry.default) is None
        assert 10 < len(declared.help) < 140 and not declared.help.endswith(".")
    assert len({name for name in names if name is not None}) == len(names) - names.count(None)


@pytest.mark.parametrize(
    "options", [SearchOptions(transforms="rotate"), SearchOptions(activation_range="static")], ids=str
)
def test_what_a_checkpoint_holds_is_compared_inside_nested_settings_too(options):
    """`from_pretrained` carries over what was asked for beside the checkpoint."""
    asked = QVLMConfig(search=options).get_loading_attributes()["requests"]
    saved = QVLMConfig()
    saved.requests = asked

    with pytest.raises(ConfigError, match="but the checkpoint is quantized with"):
        saved.take_requests()
