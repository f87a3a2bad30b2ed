"""What `optimum-cli export qvlm` does: load with quantization, save, say what came out."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_qvlm.cli.records import read_dataset
from optimum_qvlm.errors import QVLMError

COPIED_OPTIONS = (
    "scheme",
    "vision_scheme",
    "group_size",
    "method",
    "modules_to_not_convert",
    "overrides",
    "num_samples",
    "batch_size",
    "max_length",
    "seed",
)
"""Options whose values are those of the `QVLMConfig` arguments of the same name."""

BYTE_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


def main(args: Namespace) -> int:
    """Run the command; returns the exit code.

    0 saved, 2 input that was refused, which is said on stderr. Other errors are raised: they are bugs, and
    their traceback is wanted.
    """
    try:
        export(args)
    except QVLMError as error:
        print(f"optimum-cli export qvlm: error: {error}", file=sys.stderr)
        return 2
    return 0


def export(args: Namespace) -> None:
    """Quantize `args.model` and save it in `args.output`."""
    check_output(args.output, args.model)
    arguments = config_arguments(args)

    from optimum_qvlm import QVLMConfig

    config = QVLMConfig(**arguments)
    if args.dry_run:
        print(try_out(args, config))
        return
    model = load_model(args, config)
    model.save_pretrained(args.output)
    print(summary(args.output, args.scheme))


def check_output(output: Path, model: str) -> None:
    """Refuse, before hours are spent, a folder that could not be written or holds the model itself."""
    if output.exists() and not output.is_dir():
        raise QVLMError(f"output {output} is a file; name a folder")
    if Path(model).is_dir() and output.resolve() == Path(model).resolve():
        raise QVLMError(f"output {output} is the folder of the full-precision model; name another one")


def config_arguments(args: Namespace) -> dict[str, Any]:
    """Keyword arguments for `QVLMConfig`.

    Raises:
        DataError: the file given as `--dataset` cannot be used.
    """
    return {name: getattr(args, name) for name in COPIED_OPTIONS} | {"dataset": read_dataset(args.dataset)}


def load_model(args: Namespace, config: object) -> Any:
    """The model, quantized by `config` while it loads."""
    auto_class, options = loading(args)
    return auto_class.from_pretrained(args.model, quantization_config=config, **options)


def loading(args: Namespace) -> tuple[Any, dict[str, Any]]:
    """The class to load the model with, and the options of its `from_pretrained`."""
    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    auto_class = choose_auto_class(args.task, read_model_config(args.model, source))
    return auto_class, {"dtype": args.dtype, "device_map": choose_device(args.device), **source}


def try_out(args: Namespace, config: Any) -> Any:
    """What an export would do, tried; the rehearsal saves on the disk that the output would be on."""
    from optimum_qvlm import dry_run

    output = args.output.absolute()
    folder = next(parent for parent in (output, *output.parents) if parent.is_dir())
    auto_class, options = loading(args)
    return dry_run(args.model, config, model_class=auto_class, folder=folder, **options)


def read_model_config(model: str, source: dict[str, Any]) -> Any:
    """The configuration of the full-precision model.

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


def summary(output: Path, scheme: str) -> str:
    """What lies in `output`, for the last line that the user sees."""
    sizes = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
    return f"Saved the {scheme} model in {output}: {len(sizes)} files, {readable_bytes(sum(sizes))}"


def readable_bytes(count: int) -> str:
    """`count` in the largest decimal unit that it reaches, as in `1.25 GB`."""
    for unit, factor in BYTE_UNITS.items():
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"
