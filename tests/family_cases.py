"""One family under one configuration, from a full-precision folder to a reloaded model, and what was seen."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_qvlm.pipeline import checks
from optimum_qvlm.pipeline.capture import Tracer, first_tensor
from tests.configs import make_config
from tests.plans import CPU, plan_for
from tests.tiny_families import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What happened to a family.

    Attributes:
        model, reloaded: as calibrated, and loaded from where it was saved.
        reload_exact: whether all tensors and the logits on another batch are bit for bit the same.
        chain: relative difference of the layers, run alone, to the real forward; the largest of all parts.
        reported: error of the last decoder layer as calibration reports it, None where nothing was searched.
        real: the same error, computed from full forwards of the quantized and the full-precision model.
        report: the whole report.
        full, batches: the model in full precision, and what `real` was computed on.
    """

    model: Any
    reloaded: Any
    reload_exact: bool
    chain: float
    reported: float | None
    real: float
    report: dict[str, Any]
    full: Any
    batches: list[dict[str, Tensor]]

    def unsteady(self) -> float:
        """Relative change of `real` when parameters move in their last bit, the largest of four draws.

        Codes that lie between two values flip then, so no two orders of summation agree better than this.
        """
        moved = (_error(_moved(self.model, seed), self.full, self.batches) for seed in range(4))
        return max(abs(error - self.real) for error in moved) / self.real

    def agreed(self) -> bool:
        """Whether the reported error is the real one, to a thousandth or as far as the last bit decides it."""
        assert self.reported is not None
        off = abs(self.reported / self.real - 1)
        return off <= 1e-3 or off <= self.unsteady()


def examine(family: Family, folder: Path, scheme: str = "w4a8", **settings: Any) -> Seen:
    """Quantize the family's tiny model, save it below `folder`, reload it, and compare.

    Parts of these models see fewer tokens than `decode_tokens`, so arithmetic is that of the scheme at every size.
    """
    full = family.build()
    full.save_pretrained(folder / "full")
    batches = [family.batch(seed=0, padding=2), family.batch(rows=3, seed=1)]
    config = make_config(scheme, **({"dataset": batches, "decode_tokens": 0} | settings))

    model = family.auto_class.from_pretrained(folder / "full", quantization_config=config)
    model.save_pretrained(folder / "quantized")
    reloaded = family.auto_class.from_pretrained(folder / "quantized")

    report = model.hf_quantizer.report
    errors = {entry["part"]: entry["error"] for entry in report["layers"]}
    return Seen(
        model=model,
        reloaded=reloaded,
        reload_exact=_same(model, reloaded, family.batch(seed=9, padding=3)),
        chain=_chain(full, batches[0]),
        reported=errors.get("language"),
        real=_error(model, full, batches),
        report=report,
        full=full,
        batches=batches,
    )


def _same(first: Any, second: Any, batch: dict[str, Tensor]) -> bool:
    tensors, others = first.state_dict(), second.state_dict()
    same = tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    with torch.no_grad():
        return same and torch.equal(first(**batch).logits, second(**batch).logits)


def _chain(model: Any, batch: dict[str, Tensor]) -> float:
    plan = plan_for(model)
    tracer = Tracer.of(model, plan, CPU)
    captured = tracer.capture([batch])
    return max(checks.require_chain(model, part, captured[part.name][0], CPU) for part in plan.parts)


def _error(model: Any, full: Any, batches: list[dict[str, Tensor]]) -> float:
    """Squared difference of what the last decoder layer returns, padding left out, over the squared norm."""
    squared = norm = 0.0
    for batch in batches:
        real = batch["attention_mask"].bool()
        found, wanted = (_last_hidden(m, batch)[real] for m in (model, full))
        squared += float((found - wanted).square().sum())
        norm += float(wanted.square().sum())
    return squared / norm


def _moved(model: Any, seed: int) -> Any:
    """A copy whose floating-point parameters are off by about one unit in the last place of float32."""
    torch.manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + 2**-23 * torch.randn_like(parameter))
    return moved


def _last_hidden(model: Any, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    last = model.get_decoder().layers[-1]
    handle = last.register_forward_hook(lambda _m, _a, out: seen.append(first_tensor(out)))
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    return seen[0]
