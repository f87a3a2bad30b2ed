"""Everything that a calibration could be refused for, found in minutes and without leaving anything behind."""

import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.calibration_data import try_data
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.format.modules import packed_bytes
from optimum_qvlm.hf.model_class import choose_auto_class, read_model_config
from optimum_qvlm.hf.saving.source import Source
from optimum_qvlm.pipeline.calibrate import calibrate
from optimum_qvlm.pipeline.cost import Cost
from optimum_qvlm.pipeline.rehearsal import rehearse
from optimum_qvlm.pipeline.result import CalibrationResult
from optimum_qvlm.plan import QuantPlan
from optimum_qvlm.report.dry_run import DryRun, module_rows

RELOAD_OPTIONS = ("attn_implementation", "device_map", "dtype", "max_memory", "torch_dtype", "trust_remote_code")
"""Options of `from_pretrained` that the rehearsal loads the saved folder with."""


def dry_run(
    model: str | Path, config: QVLMConfig, *, model_class: Any = None, folder: str | Path | None = None, **options: Any
) -> DryRun:
    """Try what `from_pretrained` and `save_pretrained` would do, with as little work as shows whether it would succeed.

    The model is loaded, every linear is planned, all samples are rendered; one sample runs through the model and the
    first block of each part is searched on it, the rest is rounded to nearest. The result is saved to a temporary
    folder, reloaded and compared bit for bit. Nothing stays on disk; `config` is not changed.

    Args:
        model: folder or Hub id of the full-precision model.
        config: the settings to try.
        model_class: whose `from_pretrained` to use; by default the auto class for images and text where the model
            has one, else that for text generation.
        folder: an existing folder to make the temporary one in, which shows that there is room; by default the
            system's.
        options: of `from_pretrained`, as `device_map`, `dtype`, `revision`.

    Raises:
        QVLMError: whatever the real run would refuse, with the same message.

    Example:
        >>> print(dry_run("llava-hf/llava-1.5-7b-hf", QVLMConfig("w4a8")))  # doctest: +SKIP
    """
    started = time.perf_counter()
    loader = model_class
    if loader is None:
        loader = choose_auto_class("auto", read_model_config(str(model), options))
    rehearsed = copy.deepcopy(config)
    rehearsed.rehearse = True
    quantized = loader.from_pretrained(model, quantization_config=rehearsed, **options)
    shown: DryRun = quantized.hf_quantizer.dry_run
    saved_bytes = _save_and_reload(quantized, loader, folder, options)
    return replace(shown, saved_bytes=saved_bytes, rehearsal_seconds=round(time.perf_counter() - started, 2))


def try_out(
    model: Any, plan: QuantPlan, config: QVLMConfig, source: Source, device: torch.device
) -> tuple[DryRun, CalibrationResult]:
    """What a loaded full-precision model would go through, tried; it is quantized in place, mostly by rounding.

    Bytes on disk and the time that it all took are left at zero.

    Raises:
        QVLMError: as the real calibration would.
    """
    options = config.options()
    bytes_before = packed_bytes(model)
    before = {linear.name: packed_bytes(model.get_submodule(linear.path)) for linear in plan.linears()}
    if options.method == "rtn":
        tried = None
        result = calibrate(model, plan, options, None, device)
        largest = max(before.values())
        cost = Cost(seconds=result.seconds, answer_seconds=0, host_bytes=bytes_before, device_bytes=4 * largest)
    else:
        tried = try_data(model, plan, config, source, device)
        rehearsal = rehearse(model, plan, options, tried.workload, device)
        result, cost = replace(rehearsal.result, recipe=tried.recipe), rehearsal.cost
        plan = result.plan
    after = {linear.name: packed_bytes(model.get_submodule(linear.path)) for linear in plan.linears()}
    shown = DryRun(
        modules=module_rows(plan, result.modules, before, after),
        kept=plan.kept,
        samples=0 if tried is None else tried.recipe.samples,
        missing_answers=0 if tried is None else tried.missing_answers,
        chain=dict(result.differences),
        cost=cost,
        bytes_before=bytes_before,
        bytes_after=packed_bytes(model),
        saved_bytes=0,
        rehearsal_seconds=0.0,
    )
    return shown, result


def _save_and_reload(model: Any, loader: Any, folder: str | Path | None, options: dict[str, Any]) -> int:
    """Bytes of the saved folder, which is removed again.

    Raises:
        CheckpointError: it could not be saved, or what is loaded differs.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix="qvlm-dry-run-", dir=folder)
    except OSError as error:
        raise CheckpointError(f"no folder can be made in {folder} ({error}); choose another place to save") from error
    with temporary as work:
        target = Path(work) / "model"
        model.save_pretrained(target)
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        kept = {name: options[name] for name in RELOAD_OPTIONS if name in options}
        reloaded = loader.from_pretrained(target, **kept)
        wanted, found = model.state_dict(), reloaded.state_dict()
        for name in sorted(wanted.keys() | found.keys()):
            if name not in wanted or name not in found or not torch.equal(wanted[name].cpu(), found[name].cpu()):
                raise CheckpointError(f"{name} is not the same after saving and reloading; please report this model")
    return size
