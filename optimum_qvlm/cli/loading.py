"""How commands load models."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_qvlm.errors import ConfigError, HubError, QVLMError

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Devices that transformers chooses."""

WITH_PAST = "-with-past"
"""What other exporters of optimum append to a task whose model keeps keys and values, as all do here."""


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
    from optimum_qvlm.hf.model_class import choose_auto_class, read_model_config, require_class

    source = source_of(args)
    device = choose_device(args.device)
    config = read_model_config(args.model, source)
    if to_quantize:
        require_full_precision(args.model, config)
    auto_class = choose_auto_class(getattr(args, "task", "auto").removesuffix(WITH_PAST), config)
    require_class(args.model, config, auto_class)
    if args.variant is None:
        require_index(args.model, **source)
    else:
        source["variant"] = args.variant
    return auto_class, {"dtype": args.dtype, "device_map": device, **source}


def source_of(args: Namespace) -> dict[str, Any]:
    """Where the files of a model and of its processor are, as options of any `from_pretrained`."""
    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    given = {"subfolder": args.subfolder, "cache_dir": args.cache_dir}
    return source | {name: value for name, value in given.items() if value is not None}


def require_full_precision(model: str, config: Any) -> None:
    """Refuse to quantize twice: transformers would keep the old settings, with a warning.

    Raises:
        QVLMError: the model is quantized.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise QVLMError(f"model {model} is quantized already, with {str(method)!r}; name the full-precision model")


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
