"""The checkpoint format: extra tensors at save, assertions and module swapping at load.

A linear X is stored as in the pack-quantized format of compressed-tensors: `X.weight_packed`, `X.weight_scale`,
`X.weight_shape` and, with zero points, `X.weight_zero_point`. Beside them lies an empty `X.weight`: transformers
without this plugin would otherwise leave X at random values with no more than a warning; the empty tensor makes it
fail, and the tensor `GUARD` shows in its report what to import. Its 32 bytes are the identity of the configuration
that the weights were saved with.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qvlm.compat.accelerate import hook_of, offloads
from optimum_qvlm.compat.transformers import expect_more
from optimum_qvlm.errors import CheckpointError, SpecError
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.format.index import require_places
from optimum_qvlm.hf.format.names import runtime_modules
from optimum_qvlm.hf.format.record import CalibrationRecord, require_sealed
from optimum_qvlm.hf.format.safetensors_files import (
    Manifest,
    read_headers,
    read_tensor,
    require_manifest,
    require_written_order,
)
from optimum_qvlm.hf.memory import return_freed_memory
from optimum_qvlm.kernels import CHECKPOINT_LAYOUTS
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.modules.recorded import empty_linear, recorded_linear
from optimum_qvlm.modules.swap import replace_module
from optimum_qvlm.plan import ModuleRecord, QuantPlan
from optimum_qvlm.report.precision import readable_bytes, tensor_bytes

GUARD = (
    "READ THIS: quantized with optimum-qvlm. `import optimum_qvlm` before loading, or `python -m optimum_qvlm PROGRAM`"
)
"""A tensor's name: a report of tensor names is all that transformers shows of a checkpoint that it cannot read."""

GUARDS = (GUARD, "optimum_qvlm.import_optimum_qvlm_before_loading")
"""With the name that it had before, which is read for ever."""

LARGEST_GROWTH = 4  # from two bytes on disk to eight in memory, where dtype= asks for it
SMALL_BUFFERS = 64 * 2**20  # positions, masks and the like, which are not stored
SAFETENSORS_NAMES = {torch.int32: "I32", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def stored_state(model: nn.Module, identity: str, entries: Mapping[str, ModuleRecord]) -> dict[str, Tensor]:
    """The state dict as it goes to disk: with weight shapes and guards.

    `identity` is that of the configuration which is saved with it, see `config_identity`; `entries` are the records of
    the quantized linears by run-time path.

    Raises:
        CheckpointError: something changed the scales of a linear since they were recorded.
    """
    state = dict(model.state_dict())
    for path, module in quantized_modules(model).items():
        if module.layout not in CHECKPOINT_LAYOUTS:
            state |= {f"{path}.{name}": tensor for name, tensor in module.packed_state().items()}
        if path in entries:
            scale = f"{path}.weight_scale"
            state[scale] = _recorded_scale(path, state[scale], getattr(torch, entries[path].scale_dtype))
        state[f"{path}.weight_shape"] = torch.tensor([module.out_features, module.in_features], device="cpu")
        state[f"{path}.weight"] = torch.empty(0, dtype=torch.float32, device="cpu")
    state[GUARD] = torch.tensor(list(bytes.fromhex(identity)), dtype=torch.uint8, device="cpu")
    return state


def quantized_modules(model: nn.Module) -> dict[str, QuantLinear]:
    """Quantized linears by run-time path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def prepare_modules(model: nn.Module, decode_tokens: int) -> None:
    """Put every weight into the layout that is fastest on its device, one after the other.

    Weights that are offloaded stay packed until a hook brings them to the device for a call.

    Raises:
        CheckpointError: a weight is not what its record says.
    """
    for path, module in quantized_modules(model).items():
        module.decode_tokens, module.path = decode_tokens, path
        try:
            module.prepare(transient=_is_offloaded(module))
        except SpecError as error:
            raise CheckpointError(f"{path}: {error}") from error
    return_freed_memory()


def require_checkpoint(config: QVLMConfig, files: list[str]) -> CalibrationRecord:
    """Assert that configuration and files are what was saved, from headers alone.

    Raises:
        CheckpointError: an entry was changed, or a tensor is missing, truncated or does not fit.
    """
    stored = read_headers(files)
    record = require_record(config, stored)
    require_written_order(files)
    require_places(files)
    guard = next((name for name in GUARDS if name in stored), GUARD)
    if stored.get(guard) != ["U8", [32]]:
        raise CheckpointError(f"tensor {guard} is {stored.get(guard)}, not the 32 bytes that every save writes")
    identity = bytes(read_tensor(files, guard).tolist()).hex()
    if identity != record.found_identity:
        raise CheckpointError(
            f"the weights were not written together with config.json (identity {identity}, config "
            f"{record.found_identity}); the folder mixes two saves: save or fetch it again"
        )
    return record


def require_record(config: QVLMConfig, stored: Manifest) -> CalibrationRecord:
    """Assert that the configuration is what was saved, and that these tensors are there.

    Raises:
        CheckpointError: an entry was changed, or a tensor is missing, added or does not fit.
    """
    record = require_sealed(config.record)
    manifest = record.manifest
    assert manifest is not None, "a sealed record has one"
    require_manifest(manifest, stored)
    packed = (tensor.removesuffix(".weight_packed") for tensor in stored if tensor.endswith(".weight_packed"))
    unrecorded = next((name for name in packed if name not in record.modules), None)
    if unrecorded is not None:
        raise CheckpointError(f"{unrecorded} is quantized in the checkpoint's files, but not on record; fetch it again")
    for name, module in record.modules.items():
        _require_fit(name, module, manifest)
    return record


def swap_in_quantized(model: Any, record: CalibrationRecord) -> None:
    """Replace the recorded linears of a model on the meta device by empty quantized ones.

    Raises:
        CheckpointError: a recorded linear is not in this model, has other sizes, or another bias.
    """
    paths = runtime_modules(model, record.modules)
    for name, entry in record.modules.items():
        if name not in paths:
            raise CheckpointError(
                f"{name} is quantized in the checkpoint, but {type(model).__name__} has no such linear; load it with "
                "the class that config.json names under architectures"
            )
        linear = model.get_submodule(paths[name])
        if (linear.out_features, linear.in_features) != (entry.out_features, entry.in_features):
            raise CheckpointError(
                f"{name} has {entry.out_features}x{entry.in_features} weights in the checkpoint, "
                f"{linear.out_features}x{linear.in_features} in the model that config.json describes"
            )
        if entry.bias != (linear.bias is not None):
            raise CheckpointError(
                f"{name} has {_bias(entry.bias)} in the checkpoint, {_bias(not entry.bias)} in the model that "
                "config.json describes; restore config.json"
            )
        replace_module(model, paths[name], empty_linear(linear, entry))
    _require_memory(model, record.manifest or {})
    _ignore_extra_tensors(model)


def extra_tensors(modules: Iterable[str]) -> list[str]:
    """Names of what lies in the files beside the parameters."""
    return [*GUARDS, *(f"{name}.{tensor}" for name in modules for tensor in ("weight", "weight_shape"))]


def quantized_skeleton(model: Any, plan: QuantPlan) -> Any:
    """A copy of a model on the meta device as it will be once quantized: same sizes, no values."""
    skeleton = copy.deepcopy(model)
    for site in plan.sites():
        for planned in site.linears:
            linear = model.get_submodule(planned.path)
            empty = QuantLinear(
                planned.in_features,
                planned.out_features,
                LinearFormat(weight=planned.weight, activation=site.activation),
                bias=planned.bias,
                scale_dtype=linear.weight.dtype,
                bias_dtype=linear.weight.dtype,
                device="meta",
            )
            replace_module(skeleton, planned.path, empty)
    return skeleton


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they lie in memory, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _recorded_scale(path: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales of a linear in the dtype on record, which nothing is lost by.

    `prepare_model_for_kbit_training` of PEFT turns every 16-bit parameter into float32, for one.
    """
    narrow = scale.to(dtype)
    if not scale.is_meta and not torch.equal(narrow.to(scale.dtype), scale):
        raise CheckpointError(
            f"the scales of {path} were changed: they are no values of {dtype}, in which they were recorded; load the "
            "model again, or save what dequantize() returns"
        )
    return narrow


def _is_offloaded(module: nn.Module) -> bool:
    return offloads(hook_of(module))


def _require_fit(name: str, entry: ModuleRecord, manifest: Mapping[str, Any]) -> None:
    """The tensors of a module against its recorded precision."""
    channels, activation = entry.in_features, entry.activation
    sizes = {
        "weight_group": entry.weight.group,
        "activation_group": None if activation is None else activation.group,
        "rotation": entry.format.rotation,
    }
    for kind, size in sizes.items():
        if size is not None and (size < 1 or channels % size != 0):
            raise CheckpointError(f"{name}: {kind}={size} does not divide its {channels} channels")
    try:
        module = recorded_linear(entry)
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{name}: its entry in quantization_config is not valid: {error}") from error
    for tensor_name, tensor in module.state_dict().items():
        written = manifest.get(f"{name}.{tensor_name}")
        expected = [SAFETENSORS_NAMES.get(tensor.dtype), list(tensor.shape)]
        if written is None or list(written) != expected:
            raise CheckpointError(
                f"{name}.{tensor_name} is {written}, but {entry.weight.bits} bits in groups of "
                f"{entry.weight.group or 'a row'} need {expected}"
            )
    if entry.bias and f"{name}.bias" not in manifest:
        raise CheckpointError(f"{name}.bias is on record, but not in the checkpoint; fetch it again")
    stray = ("weight_zero_point", "input_equalizer", "input_scale", *(() if entry.bias else ("bias",)))
    for parameter in stray:
        if f"{name}.{parameter}" in manifest and parameter not in module.state_dict():
            raise CheckpointError(
                f"{name}.{parameter} is in the checkpoint, but its entry in quantization_config says nothing of it; "
                "the model would compute something else: fetch the checkpoint again"
            )


def _require_memory(model: Any, manifest: Mapping[str, Any]) -> None:
    """Refuse a config.json that describes a far larger model than the files hold, before memory is taken for it."""
    described, stored = packed_bytes(model), sum(map(tensor_bytes, manifest.values()))
    if described > LARGEST_GROWTH * stored + SMALL_BUFFERS:
        raise CheckpointError(
            f"config.json describes a model of {readable_bytes(described)}, but the files hold "
            f"{readable_bytes(stored)}; fetch the checkpoint again"
        )


def _bias(present: bool) -> str:
    return "a bias" if present else "no bias"


def _ignore_extra_tensors(model: Any) -> None:
    """Keep shapes and guards out of transformers' report of unexpected tensors."""
    paths = "|".join(re.escape(path) for path in quantized_modules(model))
    expect_more(model, [rf"^({paths})\.weight(_shape)?$", *map(re.escape, GUARDS)])


__all__ = [
    "GUARD",
    "Manifest",
    "extra_tensors",
    "packed_bytes",
    "prepare_modules",
    "quantized_modules",
    "quantized_skeleton",
    "require_checkpoint",
    "require_record",
    "stored_state",
    "swap_in_quantized",
]
