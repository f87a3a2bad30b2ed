"""The search of one site: its transform, the clip of its activation, and how its weights are rounded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optimum_qvlm.quant.affine import QuantizedWeight, dequantize_weight, quantize_weight
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.error_feedback import (
    ROWS_AT_ONCE,
    FeedbackOptions,
    clip_by_moment,
    corrected_target,
    round_with_feedback,
    site_moments,
)
from optimum_qvlm.search.site_problem import SiteChoice, SiteProblem, SiteRounding
from optimum_qvlm.search.transforms import TransformOptions, choose_transform
from optimum_qvlm.spec import WeightSpec


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
class SiteOptions:
    """What the search of a site may do. `transforms` None leaves activations in their own channels, `feedback` None
    rounds each weight on its own."""

    clips: ClipGrids = field(default_factory=ClipGrids)
    transforms: TransformOptions | None = field(default_factory=TransformOptions)
    feedback: FeedbackOptions | None = field(default_factory=FeedbackOptions)

    @property
    def activation_margin(self) -> float:
        """The share by which a clip must lower the error, which depends on what can be made good."""
        return self.clips.activation_margin if self.feedback is None else self.feedback.activation_margin


def round_to_nearest(
    weights: Mapping[str, Tensor], specs: Mapping[str, WeightSpec], scale_dtype: torch.dtype
) -> SiteChoice:
    """The baseline: full range everywhere, no data."""
    rounded = {name: quantize_weight(w, specs[name], scale_dtype=scale_dtype) for name, w in weights.items()}
    return SiteChoice(activation_clip=1.0, weights=rounded, weight_clips=dict.fromkeys(weights, 1.0))


def search_site(problem: SiteProblem, options: SiteOptions) -> SiteChoice:
    """Choose transform, then activation clip, then round the weights, to minimise the site's output error.

    Transform and activation clip are chosen with full-precision weights and by expected errors; the weights are
    rounded given both. The whole is never worse than round-to-nearest on `problem.inputs`: where it would be,
    round-to-nearest is returned.
    """
    nearest = round_to_nearest(problem.weights, problem.specs, problem.scale_dtype)
    nearest = _measured(problem, nearest, problem.rounding(1.0, SiteTransform()))
    transform = SiteTransform()
    if options.transforms is not None:
        damping = None if options.feedback is None else options.feedback.damping
        transform = choose_transform(problem, options.transforms, damping=damping)
    clip = search_activation_clip(problem, options.clips, transform, margin=options.activation_margin)
    searched = round_site(problem, options, activation_clip=clip, transform=transform)
    best = searched if searched.error <= nearest.error else nearest
    return replace(best, nearest_error=nearest.error)


def round_site(
    problem: SiteProblem, options: SiteOptions, *, activation_clip: float, transform: SiteTransform
) -> SiteChoice:
    """Round the weights for a given rounding of the activations, and measure the error on `problem.inputs`.

    `nearest_error` is left open.
    """
    rounding = problem.rounding(activation_clip, transform)
    if options.feedback is None:
        weights, ratios = _round_alone(problem, options, rounding)
    else:
        weights, ratios = _round_together(problem, options, options.feedback, rounding)
    choice = SiteChoice(
        activation_clip=activation_clip,
        weights=weights,
        weight_clips={name: float(ratio.mean()) for name, ratio in ratios.items()},
        transform=transform,
    )
    return _measured(problem, choice, rounding)


def search_activation_clip(problem: SiteProblem, grids: ClipGrids, transform: SiteTransform, *, margin: float) -> float:
    """The ratio that minimises what rounding the activations alone does to the outputs, if it gains the margin."""
    if problem.activation is None:
        return 1.0
    stacked = torch.cat([weight.float() for weight in problem.weights.values()])
    gram = transform.fold(transform.fold(stacked.T @ stacked).T)
    tokens = problem.few()
    exact = transform.tokens(tokens).float()

    def error(clip: float) -> float:
        change = problem.rounding(clip, transform)(tokens) - exact
        return float(((change @ gram) * change).sum())

    errors = {clip: error(clip) for clip in grids.activation}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= (1 - margin) * errors.get(1.0, float("inf")) else 1.0


def _round_alone(
    problem: SiteProblem, options: SiteOptions, rounding: SiteRounding
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """Plain rounding, each row and group with the clip whose error at the output is least."""
    inputs = rounding(problem.inputs)
    weights, ratios = {}, {}
    for name, weight in problem.weights.items():
        spec, folded = problem.specs[name], rounding.transform.fold(weight)
        grouped = inputs.reshape(inputs.shape[0], spec.groups(inputs.shape[1]), -1).transpose(0, 1)
        moment = grouped.transpose(1, 2) @ grouped
        pieces = [
            clip_by_moment(rows, spec, moment, problem.scale_dtype, options.clips.weight)
            for rows in folded.split(ROWS_AT_ONCE)
        ]
        ratios[name] = torch.cat(pieces)
        weights[name] = quantize_weight(folded, spec, clip=ratios[name], scale_dtype=problem.scale_dtype)
    return weights, ratios


def _round_together(
    problem: SiteProblem, options: SiteOptions, feedback: FeedbackOptions, rounding: SiteRounding
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """Error feedback against full-precision outputs. Linears with one grid are rounded as one."""
    halves = site_moments(problem, rounding, feedback.asymmetry)
    weights, ratios = {}, {}
    for spec in dict.fromkeys(problem.specs.values()):
        names = [name for name, own in problem.specs.items() if own == spec]
        rows = [len(problem.weights[name]) for name in names]
        stacked = torch.cat([problem.weights[name] for name in names])
        rounded, ratio = round_with_feedback(
            corrected_target(stacked, halves, rounding.transform, feedback.ridge),
            halves[0].hessian + halves[1].hessian,
            spec,
            scale_dtype=problem.scale_dtype,
            clips=options.clips.weight,
            options=feedback,
        )
        codes, scales, clips = rounded.codes.split(rows), rounded.scale.split(rows), ratio.split(rows)
        zeros = [None] * len(rows) if rounded.zero_point is None else rounded.zero_point.split(rows)
        for name, *parts, own_clips in zip(names, codes, scales, zeros, clips, strict=True):
            weights[name], ratios[name] = QuantizedWeight(*parts), own_clips
    return weights, ratios


def _measured(problem: SiteProblem, choice: SiteChoice, rounding: SiteRounding) -> SiteChoice:
    """The choice with its static scale, and the relative error of the site's outputs."""
    rounded = rounding(problem.inputs)
    error = norm = 0.0
    for name in problem.weights:
        target = problem.target(name)
        error += float((target - rounded @ dequantize_weight(choice.weights[name]).T).square().sum())
        norm += float(target.square().sum())
    return replace(choice, error=error / max(norm, 1e-30), input_scale=rounding.grid.scale)
