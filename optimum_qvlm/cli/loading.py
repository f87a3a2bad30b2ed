"""How commands load models."""

from argparse import Namespace
from typing import Any

from optimum_qvlm.errors import QVLMError


def load_model(args: Namespace, **options: Any) -> Any:
    """The model that `args` names, with its task, device, dtype and revision; `options` are for `from_pretrained`.

    Raises:
        QVLMError: files of it are missing or cannot be read.
    """
    auto_class, given = how_to_load(args)
    try:
        return auto_class.from_pretrained(args.model, **options, **given)
    except OSError as error:
        raise QVLMError(f"model {args.model} cannot be loaded: {error}") from error


def how_to_load(args: Namespace) -> tuple[Any, dict[str, Any]]:
    """The class to load the model with, and the options of its `from_pretrained`.

    Raises:
        QVLMError: configuration or index of the model cannot be read.
    """
    from optimum_qvlm.hf.index import require_index

    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    auto_class = choose_auto_class(getattr(args, "task", "auto"), read_model_config(args.model, source))
    require_index(args.model, args.revision)
    return auto_class, {"dtype": args.dtype, "device_map": choose_device(args.device), **source}


def read_model_config(model: str, source: dict[str, Any]) -> Any:
    """The configuration of a model.

    Raises:
        QVLMError: there is none that transformers can read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, **source)
    except (OSError, ValueError) as error:
        raise QVLMError(
            f"model {model} cannot be read; name a folder with a config.json, or a model on the Hub. {error}"
        ) from error


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


def choose_device(device: str | None) -> str:
    """`device`, or where it is None the first CUDA device, or the CPU."""
    if device is not None:
        return device

    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
