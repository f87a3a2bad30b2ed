"""Which class a model is loaded with, by what its configuration says."""

from typing import Any

from huggingface_hub.errors import HTTPError, StrictDataclassError  # type: ignore[attr-defined]
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from optimum_qvlm.compat.transformers import model_types
from optimum_qvlm.errors import HubError, QVLMError
from optimum_qvlm.hf.format.model_sizes import require_buildable
from optimum_qvlm.hf.saving.source import is_folder

SOURCE_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code")
"""Options of `from_pretrained` that say where the configuration is."""


def read_model_config(model: str, options: dict[str, Any]) -> Any:
    """The configuration of a model; `options` are those of `from_pretrained`.

    Raises:
        QVLMError: there is none that transformers can read, or it claims sizes that no model has.
    """
    source = {name: options[name] for name in SOURCE_OPTIONS if name in options}
    folder = is_folder(model)
    try:
        values, _ = PreTrainedConfig.get_config_dict(model, **source)
        require_buildable(values, model)
        return AutoConfig.from_pretrained(model, **source)
    except QVLMError:
        raise
    except (OSError, HTTPError) as error:
        raise (QVLMError if folder else HubError)(_unreadable(model, error)) from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, StrictDataclassError) as error:
        raise QVLMError(_unreadable(model, error)) from error


def choose_auto_class(task: str, config: Any) -> Any:
    """The auto class for `task`; "auto" prefers image-text-to-text where `config` allows it."""
    if task == "auto":
        remote_classes = getattr(config, "auto_map", None) or {}
        takes_images = (
            config.model_type in model_types("AutoModelForImageTextToText")
            or "AutoModelForImageTextToText" in remote_classes
        )
        task = "image-text-to-text" if takes_images else "text-generation"
    return AutoModelForImageTextToText if task == "image-text-to-text" else AutoModelForCausalLM


def require_class(model: str, config: Any, auto_class: Any) -> None:
    """Refuse a model that is of another kind.

    Raises:
        QVLMError: names its type.
    """
    name = auto_class.__name__
    if config.model_type not in model_types(name) and name not in (getattr(config, "auto_map", None) or {}):
        raise QVLMError(
            f"model {model} is of type {config.model_type!r}, which {name} does not load; name a model that answers "
            "in text, or another --task"
        )


def _unreadable(model: str, error: Exception) -> str:
    reason = "it is nested too deep" if isinstance(error, RecursionError) else error
    return f"model {model} cannot be read; name a folder with a config.json, or a model on the Hub. {reason}"
