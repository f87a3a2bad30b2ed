"""A folder in the format of compressed-tensors, which stock vLLM, SGLang and transformers read."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.export.schemes import INTS, format_for, quantization_config, require_expressible
from optimum_qvlm.files import strict_json
from optimum_qvlm.files.atomic import work_folder
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.format.modules import GUARDS
from optimum_qvlm.hf.format.names import runtime_modules
from optimum_qvlm.hf.format.server_names import server_name
from optimum_qvlm.hf.saving.publish import CONFIG, publish_model
from optimum_qvlm.hf.saving.save import failing, target_folder
from optimum_qvlm.hf.saving.write import write_model
from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.quant.packing import unpack_codes
from optimum_qvlm.report.card import CARD_FILE

INDEX = "model.safetensors.index.json"


def export_compressed_tensors(model: Any, folder: str | os.PathLike[str], **options: Any) -> list[str]:
    """Write a quantized model, with processor and report, in the format of compressed-tensors.

    The folder takes the target's place in one step, as that of `save_pretrained`. Weights dequantize to the same
    values, bit for bit. Nothing of this package is needed to load it.

    Args:
        model: a model that was quantized, or loaded quantized, with `servable=True`.
        folder: where to write.
        options: of transformers' `save_pretrained`, as `max_shard_size`.

    Returns:
        The names of the files.

    Raises:
        ConfigError: a module does something that the format has no words for, or the model is not quantized.
        CheckpointError: the folder cannot be written; nothing there was changed.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if not isinstance(config, QVLMConfig) or config.record is None:
        raise ConfigError(f"{type(model).__name__} is not quantized with qvlm; there is nothing to export")
    require_expressible(config.record.modules, ())
    target = target_folder(folder)
    with failing(target), work_folder(target) as work:
        write_model(model, work, **options)
        (work / CARD_FILE).unlink(missing_ok=True)  # it says how to load our own format
        _convert(work, runtime_modules(model, config.record.modules, "weight_packed"))
        return publish_model(work, target)


def _convert(work: Path, runtime: Mapping[str, str]) -> None:
    """Turn a saved model into the other format, file by file. `runtime` are its modules' names in transformers."""
    model_config = json.loads((work / CONFIG).read_text(encoding="utf-8"))
    read = QVLMConfig.from_dict(model_config["quantization_config"])
    assert isinstance(read, QVLMConfig) and read.record is not None and read.record.manifest is not None
    modules = read.record.modules
    require_expressible(modules, read.record.manifest)
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(work.glob("*.safetensors")):
        tensors = {
            server_name(name, model_config): tensor for name, tensor in _converted(load_file(path), modules).items()
        }
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if (work / INDEX).exists():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (work / INDEX).write_bytes(strict_json.as_file(index))
    names = {name: (server_name(name, model_config), runtime[name]) for name in modules}
    converted = model_config | {"quantization_config": quantization_config(modules, names)}
    (work / CONFIG).write_bytes(strict_json.as_file(converted))


def _converted(tensors: Mapping[str, Tensor], modules: Mapping[str, ModuleRecord]) -> dict[str, Tensor]:
    """The tensors of a file as compressed-tensors names and stores them."""
    converted = {}
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        entry = modules.get(owner)
        if name in GUARDS or (entry is not None and kind == "weight"):
            continue
        if entry is None or format_for(entry) != INTS:
            converted[name] = tensor
        elif kind != "weight_shape":
            converted |= _as_ints(owner, kind, tensor, entry)
    return converted


def _as_ints(owner: str, kind: str, tensor: Tensor, entry: ModuleRecord) -> dict[str, Tensor]:
    if kind == "weight_packed":
        return {f"{owner}.weight": unpack_codes(tensor, entry.weight.bits, entry.in_features)}
    if kind == "weight_zero_point":
        codes = unpack_codes(tensor.T, entry.weight.bits, entry.out_features)
        return {f"{owner}.{kind}": codes.T.contiguous()}
    return {f"{owner}.{kind}": tensor}
