"""What the fields of `QVLMConfig` may be."""

from collections.abc import Mapping
from typing import Any, get_args

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.pipeline.options import Effort, Method
from optimum_qvlm.quant.entropy import SOFTNESS
from optimum_qvlm.search.transforms import KINDS
from optimum_qvlm.spec import TWO_LEVEL_BITS, GroupSize, Scheme

LISTS = ("modules_to_not_convert", "activation_clips", "weight_clips")
"""Fields that are None or a list; other sequences are accepted and become lists."""

LARGEST = 1e300
"""No number of a setting is above. Comparing with it, unlike `math.isfinite`, also takes integers of any length."""

LARGEST_COUNT = 2**31 - 1
"""Of samples, tokens, layers and epochs: larger ones do not fit where they are used."""

LARGEST_SEED = 2**63 - 1
"""The largest that torch's generators take of either sign."""

LARGEST_RATE, LARGEST_FACTOR = 100.0, 1e6
"""Of the encoder's optimisation: a larger step leaves every bound at once, a larger factor overflows the loss."""

_POSITIVE = ("num_samples", "batch_size", "max_length", "search_tokens", "max_block_depth")
_COUNTS = ("seed", "decode_tokens", "encoder_epochs")
_SWITCHES = ("symmetric", "error_feedback", "servable", "two_level_scales", "exact_decode", "dequantize")
_FACTORS = ("encoder_lr", "encoder_eta", "encoder_l1", "encoder_l2")
_CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "effort": get_args(Effort),
    "transforms": ("auto", *KINDS),
    "activation_range": ("dynamic", "static"),
    "soft_assignment": SOFTNESS,
}


def require_valid(values: Mapping[str, Any]) -> None:
    """Refuse fields of the wrong type or range, and those that contradict each other.

    Schemes and overrides are read elsewhere.

    Raises:
        ConfigError: names the field, its value and what it may be.
    """
    for name in _POSITIVE:
        if not (_is_int(values[name]) and values[name] >= 1):
            raise ConfigError(f"{name} must be a positive integer, got {values[name]!r}")
    for name in _COUNTS:
        if not (_is_int(values[name]) and values[name] >= 0):
            raise ConfigError(f"{name} must be an integer of at least 0, got {values[name]!r}")
    for name in (*_POSITIVE, *_COUNTS):
        _require_most(values[name], LARGEST_SEED if name == "seed" else LARGEST_COUNT, name)
    for name in _SWITCHES:
        if not isinstance(values[name], bool):
            raise ConfigError(f"{name} must be True or False, got {values[name]!r}")
    for name in _FACTORS:
        if not (_is_number(values[name]) and values[name] >= 0):
            raise ConfigError(f"{name} must be a number of at least 0, got {values[name]!r}")
        _require_most(values[name], LARGEST_RATE if name == "encoder_lr" else LARGEST_FACTOR, name)
    for name, allowed in _CHOICES.items():
        if values[name] not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {values[name]!r}")
    if values["threshold"] is not None and not (_is_number(values["threshold"]) and values["threshold"] >= 0):
        raise ConfigError(f"threshold must be None or a number of at least 0, got {str(values['threshold'])[:60]}")
    require_group(values["group_size"], "group_size")
    _require_names(values["modules_to_not_convert"], values["overrides"])
    for name in ("activation_clips", "weight_clips"):
        _require_clips(values[name], name)
    _require_agreement(values)


def idle_settings(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """One sentence for each reason why settings that differ from their defaults have no effect together."""
    blocks = ("max_block_depth", "threshold", "soft_assignment")
    encoder = ("encoder_lr", "encoder_eta", "encoder_l1", "encoder_l2")
    data = ("dataset", "num_samples", "batch_size", "max_length", "seed", "search_tokens")
    clips = ("activation_clips", "weight_clips")
    learns = values["encoder_epochs"] > 0
    reasons: dict[str, tuple[str, ...]] = {}
    if values["method"] == "rtn":
        forced = () if values["transforms"] == "off" else ("transforms",)
        reasons['method="rtn" rounds without data or search'] = (
            *(*data, *blocks, *clips, *forced, "encoder_epochs", *encoder),
        )
    else:
        alone = blocks[:2] if learns else blocks
        if values["method"] == "layerwise":
            reasons['method="layerwise" forms no blocks'] = alone
        elif values["effort"] == "fast":
            reasons['effort="fast" forms no blocks'] = alone
        if not learns:
            reasons["encoder_epochs=0 leaves the encoder as the search left it"] = encoder
    if values["exact_decode"]:
        reasons["exact_decode=True rounds activations at every number of tokens"] = ("decode_tokens",)
    return [
        f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: {reason}"
        for reason, names in reasons.items()
        if (idle := [name for name in names if not _same(values[name], defaults[name])])
    ]


def _same(value: object, default: object) -> bool:
    """Datasets may compare element by element, so None is told apart by identity."""
    return value is None if default is None else value == default


def require_group(value: object, where: str) -> None:
    """Refuse what is no group size.

    Raises:
        ConfigError: with `where` it stands.
    """
    if value is None or value == "auto" or (_is_int(value) and value > 0):  # type: ignore[operator]
        return
    raise ConfigError(f'{where} must be "auto", None or a positive integer, got {value!r}')


def require_levels(scheme: Scheme, group_size: GroupSize, *, symmetric: bool, static: bool) -> None:
    """Refuse two-level scales where no product gains by them.

    Raises:
        ConfigError: says why.
    """
    if scheme.weight_bits > TWO_LEVEL_BITS or scheme.activation_bits is None:
        why = f'weights of 2 to {TWO_LEVEL_BITS} bits and rounded activations, got scheme="{scheme}"; use "w4a8"'
    elif scheme.activation_bits < 8 and not static:
        why = f'one scale per token, which scheme="{scheme}" has with activation_range="static" only; use "w4a8"'
    elif not symmetric:
        why = "weights without zero points, got symmetric=False"
    elif group_size is None:
        why = "several groups to a row, got group_size=None"
    else:
        return
    raise ConfigError(f"two_level_scales=True needs {why}, or leave two_level_scales False")


def _require_names(keep: Any, overrides: Any) -> None:
    if keep is not None and not (_is_list(keep) and all(isinstance(pattern, str) for pattern in keep)):
        raise ConfigError(f"modules_to_not_convert must be a list of name patterns, got {keep!r}")
    if overrides is not None and not (isinstance(overrides, dict) and all(isinstance(p, str) for p in overrides)):
        raise ConfigError(f"overrides must be a dict from name patterns to schemes, got {overrides!r}")


def _require_clips(value: Any, name: str) -> None:
    if value is None:
        return
    clips = list(value) if _is_list(value) else []
    if 1.0 not in clips or not all(_is_number(clip) and 0 < clip <= 1 for clip in clips):
        raise ConfigError(f"{name} must be a list of numbers above 0 and up to 1, with 1.0 among them, got {value!r}")


def _require_agreement(values: Mapping[str, Any]) -> None:
    if values["method"] == "rtn" and values["activation_range"] == "static":
        raise ConfigError('activation_range="static" needs data, which method="rtn" does not use')
    if values["servable"] and values["transforms"] not in ("auto", "off"):
        raise ConfigError(
            "servable=True leaves the choice of transforms to the search, which uses only what norms can take up, but "
            f'transforms={values["transforms"]!r} asks for one; use transforms="auto", or servable=False'
        )
    if values["encoder_lr"] == 0:
        raise ConfigError("encoder_lr must be above 0, got 0; encoder_epochs=0 turns the optimisation off")


def _require_most(value: int | float, most: int | float, name: str) -> None:
    if value > most:
        long = isinstance(value, int) and value.bit_length() > 128
        raise ConfigError(f"{name} must be at most {most}, got {'a longer integer' if long else repr(value)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset)
