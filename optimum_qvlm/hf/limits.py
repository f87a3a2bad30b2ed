"""What a configuration may claim before a model is built from it."""

from typing import Any

from optimum_qvlm.errors import UnsupportedModelError

MOST_LAYERS = 10_000
"""Many times more than any published model has; building more, even without weights, would not end."""

COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")


def require_buildable(config: Any) -> None:
    """Refuse a configuration that claims more layers than any model has.

    Raises:
        UnsupportedModelError: names the field, its value and the limit.
    """
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    for part in (config, *filter(None, inner)):
        for name in COUNTS:
            count = getattr(part, name, None)
            if isinstance(count, int) and count > MOST_LAYERS:
                raise UnsupportedModelError(
                    f"the configuration claims {name}={count} for {part.model_type!r}; at most {MOST_LAYERS} layers "
                    "are built. Fetch config.json again, or correct it"
                )
