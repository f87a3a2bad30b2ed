"""How commands load models."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_qvlm.errors import ConfigError, HubError, QVLMError

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Devices that transformers chooses."""


def load_model(args: Namespace, **options: Any) -> Any:
    """The model that `args` names, with its task, device, dtype and revision; `options` are for `from_pretrained`.

    Raises:
        QVLMError: files of it are missing or cannot be read, or it is quantized and shall be.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    auto_class, given = how_to_load(args, to_quantize="quantization_config" in options)
    try:
        return auto_class.from_pretrained(args.model, **options, **given)
    except (OSError, HTTPError) as error:
        raise _failure(args.model)(f"model {args.model} cannot be loaded: {error}") from error


def how_to_load(args: Namespace, *, to_quantize: bool = False) -> tuple[Any, dict[str, Any]]:
    """The class to load the model with, and the options of its `from_pretrained`.

    Raises:
        QVLMError: configuration, index or device cannot be used, or the model shall be quantized and is already.
    """
    from optimum_qvlm.hf.format.index import require_index

    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    device = choose_device(args.device)
    config = read_model_config(args.model, source)
    if to_quantize:
        require_full_precision(args.model, config)
    auto_class = choose_auto_class(getattr(args, "task", "auto"), config)
    require_class(args.model, config, auto_class)
    require_index(args.model, args.revision)
    return auto_class, {"dtype": args.dtype, "device_map": device, **source}


def read_model_config(model: str, source: dict[str, Any]) -> Any:
    """The configuration of a model.

    Raises:
        QVLMError: there is none that transformers can read.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from transformers import AutoConfig

    from optimum_qvlm.hf.saving.source import is_folder

    is_folder(model)
    try:
        return AutoConfig.from_pretrained(model, **source)
    except (OSError, HTTPError, ValueError) as error:
        kind = _failure(model) if isinstance(error, (OSError, HTTPError)) else QVLMError
        raise kind(
            f"model {model} cannot be read; name a folder with a config.json, or a model on the Hub. {error}"
        ) from error


def require_full_precision(model: str, config: Any) -> None:
    """Refuse to quantize twice: transformers would keep the old settings, with a warning.

    Raises:
        QVLMError: the model is quantized.
    """
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise QVLMError(f"model {model} is quantized already, with {str(method)!r}; name the full-precision model")


def choose_auto_class(task: str, config: Any) -> Any:
    """The auto class for `task`; `auto` prefers image-text-to-text where `config` allows it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if task == "auto":
        remote_classes = getattr(config, "auto_map", None) or {}
        takes_images = (
            config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            or "AutoModelForImageTextToText" in remote_classes
        )
        task = "image-text-to-text" if takes_images else "text-generation"
    return AutoModelForImageTextToText if task == "image-text-to-text" else AutoModelForCausalLM


def require_class(model: str, config: Any, auto_class: Any) -> None:
    """Refuse a model that is of another kind.

    Raises:
        QVLMError: names its type.
    """
    from transformers.models.auto import modeling_auto

    kinds = {
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    name = auto_class.__name__
    if config.model_type not in kinds[name] and name not in (getattr(config, "auto_map", None) or {}):
        raise QVLMError(
            f"model {model} is of type {config.model_type!r}, which {name} does not load; name a model that answers "
            "in text, or another --task"
        )


def choose_device(device: str | None) -> str:
    """`device`, or where it is None the first CUDA device, or the CPU.

    Raises:
        ConfigError: it is no device, or is not there.
    """
    import torch

    from optimum_qvlm.hf.placement import require_device

    if device in AUTOMATIC:
        return device
    if device is not None:
        try:
            named = torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"{device!r} is no device; use cpu, cuda, cuda:1, mps or auto") from error
        require_device(named)
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _failure(model: str) -> type[QVLMError]:
    """What it is if a model cannot be read: a matter of the Hub, unless it is a folder."""
    return QVLMError if Path(model).is_dir() else HubError
