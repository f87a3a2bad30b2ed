"""Rounding functions of one site: the layer-wise search of its clips (equation 2 of the paper), and its candidates."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optimum_qvlm.kernels import fake_quantize_static, fake_quantize_tokens
from optimum_qvlm.quant.affine import QuantizedWeight, dequantize_weight, quantize_weight, split_groups
from optimum_qvlm.quant.observers import static_scale
from optimum_qvlm.quant.spec import ActivationSpec, WeightSpec
from optimum_qvlm.quant.transform import SiteTransform

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipGrids:
    """Candidate ratios. Each grid holds 1.0, which is round-to-nearest.

    `activation_margin` is the share by which a clip must lower the error of a site to be preferred to 1.0. What
    rounding does to activations averages out over tokens and layers, what clipping does is systematic, so clips that
    gain little on their site lose at the model's output.
    """

    activation: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
    weight: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
    activation_margin: float = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteProblem:
    """Everything that the search of a site looks at.

    Attributes:
        inputs: activations [tokens, in_features] that reach the site through the quantized prefix.
        weights: full-precision weight [out_features, in_features] per linear.
        specs: grid per linear.
        activation: grid of the shared activation, None to leave it.
        scale_dtype: dtype in which scales are stored.
    """

    inputs: Tensor
    weights: Mapping[str, Tensor]
    specs: Mapping[str, WeightSpec]
    activation: ActivationSpec | None
    scale_dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteChoice:
    """The rounding function that was found.

    `weights` hold the inverse of `transform` folded in. `input_scale` is the fp32 [1] scale of a static activation.
    `error` and `nearest_error` are relative: squared error of the site's outputs over their squared norm,
    for this choice and for round-to-nearest (NaN where there was nothing to measure on).
    """

    activation_clip: float
    weights: dict[str, QuantizedWeight]
    weight_clips: dict[str, float] = field(default_factory=dict)
    error: float = float("nan")
    nearest_error: float = float("nan")
    transform: SiteTransform = field(default_factory=SiteTransform)
    input_scale: Tensor | None = None


def round_to_nearest(
    weights: Mapping[str, Tensor], specs: Mapping[str, WeightSpec], scale_dtype: torch.dtype
) -> SiteChoice:
    """The baseline: full range everywhere, no data."""
    rounded = {name: quantize_weight(w, specs[name], scale_dtype=scale_dtype) for name, w in weights.items()}
    return SiteChoice(activation_clip=1.0, weights=rounded, weight_clips=dict.fromkeys(weights, 1.0))


def search_site(problem: SiteProblem, grids: ClipGrids) -> SiteChoice:
    """Choose the activation clip, then a weight clip per row and group, to minimise the site's output error.

    The activation clip is chosen with full-precision weights; each weight clip by the exact error that its
    group contributes to the output, given the rounded activations. Neither can do worse than
    round-to-nearest on `problem.inputs`: where the pair would, round-to-nearest is returned.
    """
    nearest = round_to_nearest(problem.weights, problem.specs, problem.scale_dtype)
    nearest = replace(nearest, input_scale=_input_scale(problem, problem.inputs, 1.0))
    nearest_error = _site_error(problem, nearest)
    found = round_site(problem, activation_clip=_search_activation_clip(problem, grids), grids=grids)
    best = found if found.error <= nearest_error else replace(nearest, error=nearest_error)
    return replace(best, nearest_error=nearest_error)


def round_site(
    problem: SiteProblem,
    *,
    activation_clip: float,
    transform: SiteTransform | None = None,
    grids: ClipGrids | None = None,
) -> SiteChoice:
    """Round the weights of a site for a given rounding of its activations.

    Each weight clip is the one of `grids` with the least error that its group contributes to the output, given the
    rounded activations. `transform` applies to activations, its inverse to weights. `error` is that of the result;
    `nearest_error` stays NaN.
    """
    grids = ClipGrids() if grids is None else grids
    transform = SiteTransform() if transform is None else transform
    inputs = transform.tokens(problem.inputs)
    scale = _input_scale(problem, inputs, activation_clip)
    rounded_inputs = _rounded(problem, inputs, activation_clip, scale).float()
    weights, clips = {}, {}
    for name, plain in problem.weights.items():
        weight = plain if transform.is_identity else transform.fold(plain)
        ratio = _search_weight_clip(weight, problem.specs[name], rounded_inputs, problem.scale_dtype, grids.weight)
        clips[name] = float(ratio.mean())
        weights[name] = quantize_weight(weight, problem.specs[name], clip=ratio, scale_dtype=problem.scale_dtype)
    found = SiteChoice(
        activation_clip=activation_clip, weights=weights, weight_clips=clips, transform=transform, input_scale=scale
    )
    return replace(found, error=_site_error(problem, found))


def _input_scale(problem: SiteProblem, inputs: Tensor, clip: float) -> Tensor | None:
    """The scale of a static activation, of which `clip` is a quantile of the magnitudes; None on dynamic grids."""
    spec = problem.activation
    return static_scale(inputs, spec.bits, clip) if spec is not None and spec.static else None


def _rounded(problem: SiteProblem, inputs: Tensor, clip: float, scale: Tensor | None) -> Tensor:
    spec = problem.activation
    if spec is None:
        return inputs
    if scale is not None:
        return fake_quantize_static(inputs, spec.bits, scale)
    return fake_quantize_tokens(inputs, spec.bits, spec.group, clip)


def _search_activation_clip(problem: SiteProblem, grids: ClipGrids) -> float:
    if problem.activation is None:
        return 1.0

    def error(clip: float) -> float:
        scale = _input_scale(problem, problem.inputs, clip)
        change = problem.inputs.float() - _rounded(problem, problem.inputs, clip, scale).float()
        return sum(_energy(change, weight) for weight in problem.weights.values())

    errors = {clip: error(clip) for clip in grids.activation}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= (1 - grids.activation_margin) * errors.get(1.0, float("inf")) else 1.0


def _search_weight_clip(
    weight: Tensor, spec: WeightSpec, inputs: Tensor, scale_dtype: torch.dtype, grid: tuple[float, ...]
) -> Tensor:
    """Best ratio [out_features, groups] from the grid; rows are taken in slices to bound memory."""
    groups = spec.groups(weight.shape[1])
    grouped = inputs.reshape(inputs.shape[0], groups, -1).transpose(0, 1)
    second_moment = grouped.transpose(1, 2) @ grouped
    return torch.cat(
        [_clip_of_rows(rows, spec, second_moment, scale_dtype, grid) for rows in weight.split(ROWS_AT_ONCE)]
    )


def _clip_of_rows(
    rows: Tensor, spec: WeightSpec, second_moment: Tensor, scale_dtype: torch.dtype, grid: tuple[float, ...]
) -> Tensor:
    best_error = torch.full((rows.shape[0], second_moment.shape[0]), float("inf"), device=rows.device)
    best = torch.ones_like(best_error)
    for ratio in grid:
        rounded = dequantize_weight(quantize_weight(rows, spec, clip=ratio, scale_dtype=scale_dtype))
        change = split_groups(rows.float() - rounded, spec).transpose(0, 1)
        error = ((change @ second_moment) * change).sum(-1).T
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, torch.full_like(best, ratio), best)
    return best


def _site_error(problem: SiteProblem, choice: SiteChoice) -> float:
    """Squared error of all outputs of the site over their squared norm."""
    inputs = choice.transform.tokens(problem.inputs)
    rounded = _rounded(problem, inputs, choice.activation_clip, choice.input_scale).float()
    error = norm = 0.0
    for name, weight in problem.weights.items():
        wanted = problem.inputs.float() @ weight.float().T
        error += float((wanted - rounded @ dequantize_weight(choice.weights[name]).T).square().sum())
        norm += float(wanted.square().sum())
    return error / max(norm, 1e-30)


def _energy(inputs: Tensor, weight: Tensor) -> float:
    return float((inputs.float() @ weight.float().T).square().sum())
