"""What settings of `QVLMConfig` say together: which contradict each other, which have no effect, which are saved."""

from dataclasses import fields
from typing import Any

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.settings import NESTED, Settings, declaration
from optimum_qvlm.spec import TWO_LEVEL_BITS, GroupSize, Scheme

RUN_TIME = ("decode_tokens", "dequantize")
"""Settings that `from_pretrained` takes beside a quantized checkpoint."""

_CLASSES = (Settings, *NESTED.values())

_ENTRIES = [(entry, declaration(entry)) for options in _CLASSES for entry in fields(options)]

SAVED = tuple(declared.saved for _, declared in _ENTRIES if declared.saved is not None)
"""Flat names of settings in config.json."""

HELD = tuple(declared.saved for _, declared in _ENTRIES if declared.saved is not None and declared.held)
"""Those that say what a checkpoint holds: another value asked for when it is loaded is an error."""

DEFAULTS: dict[str, Any] = {declared.saved or entry.name: entry.default for entry, declared in _ENTRIES}
"""Default of each setting by its flat name."""


def saved_values(options: Any) -> dict[str, Any]:
    """Settings that are saved, by flat name: of a configuration its own, of nested options theirs."""
    made = type(options) if type(options) in _CLASSES else Settings
    entries = [(entry, declaration(entry).saved) for entry in fields(made)]
    return {saved: getattr(options, entry.name) for entry, saved in entries if saved is not None}


def idle_settings(config: Any) -> list[str]:
    """One sentence for each reason why settings that differ from their defaults have no effect together."""
    blocks = ("search.max_block_depth", "search.threshold", "search.soft_assignment")
    encoder = tuple(f"encoder.{entry.name}" for entry in fields(NESTED["encoder"]))
    data = ("dataset", "num_samples", "batch_size", "max_length", "seed", "search.tokens")
    clips = ("search.activation_clips", "search.weight_clips")
    learns = config.encoder.epochs > 0
    reasons: dict[str, tuple[str, ...]] = {}
    if config.method == "rtn":
        forced = () if config.search.transforms == "off" else ("search.transforms",)
        reasons['method="rtn" rounds without data or search'] = ("resume", *data, *blocks, *clips, *forced, *encoder)
    else:
        alone = blocks[:2] if learns else blocks
        if config.method == "layerwise":
            reasons['method="layerwise" forms no blocks'] = alone
        elif config.effort == "fast":
            reasons['effort="fast" forms no blocks'] = alone
        if not learns:
            reasons["encoder.epochs=0 leaves the encoder as the search left it"] = encoder
    return [
        f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: {reason}"
        for reason, names in reasons.items()
        if (idle := [name for name in names if _is_changed(config, name)])
    ]


def _is_changed(config: Any, name: str) -> bool:
    """Datasets may compare element by element, so None is told apart by identity."""
    holder, _, own = name.rpartition(".")
    options = getattr(config, holder) if holder else config
    entries = fields(NESTED[holder] if holder else Settings)
    value, default = getattr(options, own), next(entry.default for entry in entries if entry.name == own)
    return value is not None if default is None else value != default


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


def require_agreement(config: Any) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: names both.
    """
    if config.method == "rtn" and config.search.activation_range == "static":
        raise ConfigError('search.activation_range="static" needs data, which method="rtn" does not use')
    if config.servable and config.search.transforms not in ("auto", "off"):
        raise ConfigError(
            "servable=True leaves the choice of transforms to the search, which uses only what norms can take up, but "
            f'search.transforms={config.search.transforms!r} asks for one; use "auto", or servable=False'
        )
