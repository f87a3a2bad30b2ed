"""What can be known to fail before hours are spent."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optimum_qvlm.errors import CalibrationError, UnsupportedModelError
from optimum_qvlm.pipeline.capture import Run, Tracer, first_tensor, linear_inputs, require_finite
from optimum_qvlm.pipeline.layer_streaming import resident
from optimum_qvlm.plan import PlannedLayer, PlannedPart, QuantPlan

CHAIN_TOLERANCE = 1e-3
"""Largest relative difference between the chain of layers and the real forward, or two units in the last place of
the dtype where that is more; kernels may choose other orders of summation, a wrong argument shows as far more."""


LARGEST_VALUE = 1e15
"""Magnitude of weights and activations up to which sums of their squares over all tokens are finite in fp32."""


def require_sound_parameters(model: nn.Module, plan: QuantPlan) -> None:
    """Refuse NaN in parameters of any kind, and infinite values and those whose squares overflow in weights to round.

    What stays as it is may hold infinite values on purpose, as masks do.

    Raises:
        CalibrationError: names the first parameter.
    """
    names = {f"{linear.path}.weight": f"{linear.name}.weight" for linear in plan.linears()}
    for path, parameter in model.named_parameters():
        if parameter.numel() == 0 or not parameter.is_floating_point():
            continue
        values = parameter.detach()
        if values.element_size() == 1:
            values = values.float()  # torch finds no extremes of eight-bit floats
        least, most = (float(bound) for bound in torch.aminmax(values))
        unsound = math.isnan(least) or (path in names and not math.isfinite(least + most))
        if unsound:
            bad = int((~torch.isfinite(parameter)).sum())
            raise CalibrationError(
                f"{names.get(path, path)} holds {bad} NaN or infinite values; the checkpoint is damaged, or its "
                "values overflow the dtype: load it in a wider one, or fetch it again"
            )
        if path in names:
            require_magnitude(max(-least, most), names[path], "the checkpoint is damaged: fetch it again")


def require_moderate(tensors: Sequence[Tensor], name: str) -> None:
    """Refuse activations whose squares overflow where they are summed; of finite ones, see `require_finite`.

    Raises:
        CalibrationError: with the `name` of the site that they reach.
    """
    for tensor in tensors:
        if tensor.numel() > 0:
            least, most = (float(bound) for bound in torch.aminmax(tensor))
            way_out = "a norm or weight before it is damaged: fetch the checkpoint again, or keep the module"
            require_magnitude(max(-least, most), f"the input of {name}", way_out)


def require_magnitude(peak: float, name: str, way_out: str) -> None:
    """Refuse what holds values beyond `LARGEST_VALUE`.

    Raises:
        CalibrationError: with the name, the value and the limit.
    """
    if not peak <= LARGEST_VALUE:
        raise CalibrationError(
            f"{name} holds values up to {peak:.3g}, above {LARGEST_VALUE:.0e}, so sums of their squares overflow; "
            f"{way_out}"
        )


def require_finite_error(value: float, name: str) -> float:
    """An error that was measured, if it is a number.

    Raises:
        CalibrationError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise CalibrationError(
            f"the error of {name} is {value}: its values overflow fp32, so nothing can be compared; the checkpoint is "
            "damaged, or a sample is: fetch it again, or keep the module with modules_to_not_convert"
        )
    return value


def require_chain(model: nn.Module, part: PlannedPart, run: Run, device: torch.device) -> float:
    """Check on one run that the layers, called alone one after the other, give what the real forward gave.

    Returns their relative difference.

    Raises:
        UnsupportedModelError: they do not, so the adapter misses something that happens between them.
        CalibrationError: a layer returns NaN or infinite values.
    """
    assert run.output is not None
    hidden = run.hidden.to(device)
    with torch.no_grad():
        for layer, call in zip(part.layers, run.calls, strict=True):
            with resident(model, layer.path, device):
                hidden = call(model.get_submodule(layer.path), hidden, device)
            require_finite(hidden, layer.name, run.batch)
    difference = _relative_difference(hidden, run.output.to(device))
    limit = _limit(hidden.dtype)
    if not difference <= limit:
        raise UnsupportedModelError(
            f"the {part.name} layers, run one after the other, differ from the model's own forward by "
            f"{difference:.2g} (limit {limit:.2g}); the model does more between its layers than the adapter says"
        )
    return difference


def require_unused(
    tracer: Tracer,
    unused: Sequence[PlannedLayer],
    captured: Mapping[str, Sequence[Run]],
    batches: Sequence[Mapping[str, Tensor]],
) -> None:
    """Check that the model's output does not depend on what the `unused` layers return.

    It is computed twice on the first batch that reaches as many parts as any: as it is, and with theirs at zero.

    Raises:
        UnsupportedModelError: the outputs differ.
    """
    if not unused:
        return
    reached = Counter(run.batch for runs in captured.values() for run in runs)
    batch = batches[max(reached, key=lambda number: (reached[number], -number))]
    target = tracer.output(batch)
    for layer in unused:
        handle = tracer.model.get_submodule(layer.path).register_forward_hook(_zeroed)
        try:
            repeated = tracer.output(batch)
        finally:
            handle.remove()
        difference = _relative_difference(repeated, target)
        if not difference <= _limit(target.dtype):
            raise UnsupportedModelError(
                f"the model's output depends on {layer.name} (it changes by {difference:.2g} without), which the "
                "adapter calls unused"
            )


def _zeroed(_module: nn.Module, _args: object, output: object) -> object:
    if isinstance(output, tuple | list):
        return type(output)([torch.zeros_like(first_tensor(output)), *output[1:]])
    return torch.zeros_like(first_tensor(output))


def _relative_difference(repeated: Tensor, target: Tensor) -> float:
    target = target.float()
    return float((repeated.float() - target).norm() / target.norm().clamp(min=1e-30))


def _limit(dtype: torch.dtype) -> float:
    return max(CHAIN_TOLERANCE, 2 * torch.finfo(dtype).eps)


def require_shared_inputs(model: nn.Module, layer: PlannedLayer, run: Run, number: int, device: torch.device) -> None:
    """Check that the linears of each site receive the same tensor.

    Raises:
        UnsupportedModelError: they do not, or one of them never runs.
    """
    paths = [linear.path for site in layer.sites for linear in site.linears]
    local = [_within(path, layer.path) for path in paths]
    module = model.get_submodule(layer.path)
    with torch.no_grad(), resident(model, layer.path, device):
        seen = linear_inputs(module, local, lambda: run.calls[number](module, run.hidden.to(device), device))
    _require_seen(layer, paths, {f"{layer.path}.{name}" if name else layer.path for name in seen})
    for site in layer.sites:
        first = seen[_within(site.linears[0].path, layer.path)]
        for linear in site.linears[1:]:
            if not torch.equal(first, seen[_within(linear.path, layer.path)]):
                raise UnsupportedModelError(
                    f"{site.linears[0].name} and {linear.name} were taken to read the same input, but do not"
                )


def _require_seen(layer: PlannedLayer, paths: Sequence[str], seen: set[str]) -> None:
    for path in paths:
        if path not in seen:
            raise UnsupportedModelError(f"{path} of {layer.name} never ran in a calibration sample")


def _within(path: str, layer: str) -> str:
    """The path of a module relative to its layer, empty for the layer itself."""
    return path.removeprefix(layer).removeprefix(".")
