"""Which transform a site gets: the one of least expected error at its output."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optimum_qvlm.quant.affine import dequantize_weight, quantize_weight
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.error_feedback import conditional_moments
from optimum_qvlm.search.site_problem import SiteProblem

LARGEST_ROTATION = 128
SMALLEST_ROTATION = 16


Kind = Literal["off", "equalize", "rotate", "both"]
KINDS: tuple[Kind, ...] = ("off", "equalize", "rotate", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformOptions:
    """What a site may get.

    Attributes:
        kinds: the transforms among which the search chooses; a single one is what every site gets that can have it.
        exponents: balances between activations and weights that are tried: 1 makes activations even, 0 weights.
        margin: share by which a transform must lower the expected error, since it costs time in every forward.
    """

    kinds: tuple[Kind, ...] = KINDS
    exponents: tuple[float, ...] = (0.3, 0.5, 0.7)
    margin: float = 0.02


def rotation_size(problem: SiteProblem) -> int | None:
    """Size of the Hadamard blocks: the largest power of two, up to 128, that divides every group of the site.

    None where that is below 16: blocks so small hardly even anything out.
    """
    channels = problem.inputs.shape[1]
    widths = [spec.group or channels for spec in problem.specs.values()]
    if problem.activation is not None and problem.activation.group is not None:
        widths.append(problem.activation.group)
    size = math.gcd(LARGEST_ROTATION, *widths)
    return size if size >= SMALLEST_ROTATION else None


def equalizer(problem: SiteProblem, exponent: float) -> Tensor:
    """`w^(1 - exponent) / a^exponent` per channel, fp32, geometric mean 1.

    `a` is the root mean square of the channel's activations, `w` that of the weights which read it. A factor that
    was moved from weights to activations cancels for every exponent.
    """
    activations = problem.inputs.float().square().mean(0).sqrt()
    weights = torch.cat([w.float() for w in problem.weights.values()]).square().mean(0).sqrt()
    alive = (activations > 0) & (weights > 0)
    logs = torch.where(alive, (1 - exponent) * weights.log() - exponent * activations.log(), 0.0)
    logs = torch.where(alive, logs - logs.sum() / alive.sum().clamp(min=1), 0.0)
    factors = logs.clamp(-20, 20).exp()
    return factors if problem.snap is None else problem.snap(factors)


def candidates(problem: SiteProblem, options: TransformOptions) -> list[SiteTransform]:
    """Everything that the options allow, the identity first; the identity alone where nothing else is possible.

    Where a site cannot be rotated, "rotate" is the identity and "both" is "equalize".
    """
    rotation = rotation_size(problem)
    transforms = []
    if "off" in options.kinds or ("rotate" in options.kinds and rotation is None):
        transforms.append(SiteTransform())
    if "rotate" in options.kinds and rotation is not None:
        transforms.append(SiteTransform(None, rotation))
    wants_plain = "equalize" in options.kinds or ("both" in options.kinds and rotation is None)
    for exponent in options.exponents:
        scale = equalizer(problem, exponent)
        if wants_plain:
            transforms.append(SiteTransform(scale))
        if "both" in options.kinds and rotation is not None:
            transforms.append(SiteTransform(scale, rotation))
    return transforms


def choose_transform(problem: SiteProblem, options: TransformOptions, *, damping: float | None) -> SiteTransform:
    """The candidate of least expected error. Behind error feedback, weights alone get no equalizer beside a rotation.

    Args:
        problem: the site.
        options: what is allowed.
        damping: of the error feedback that weights will be rounded with, None for plain rounding.
    """
    allowed = candidates(problem, options)
    if problem.activation is None and damping is not None:
        # Rotation and feedback leave an equalizer little to do for weights alone: what it gains on the calibration
        # tokens, it loses at the model's output.
        bare = [transform for transform in allowed if transform.equalizer is None]
        allowed = bare if any(transform.rotation is not None for transform in bare) else allowed
    if len(allowed) == 1:
        return allowed[0]
    judge = _Judge(problem, damping)
    handicap = [1 - options.margin if transform.is_identity else 1.0 for transform in allowed]
    errors = [judge.error(transform) * share for transform, share in zip(allowed, handicap, strict=True)]
    return allowed[errors.index(min(errors))]


class _Judge:
    """Expected squared error of a site's output under a transform, with both roundings taken as independent."""

    def __init__(self, problem: SiteProblem, damping: float | None) -> None:
        self.problem, self.damping = problem, damping
        inputs = problem.inputs.float()
        self.tokens = problem.few()
        self.hessian = inputs.T @ inputs / len(inputs)
        weights = torch.cat([weight.float() for weight in problem.weights.values()])
        self.gram = weights.T @ weights

    def error(self, transform: SiteTransform) -> float:
        """Per token."""
        return self._of_activations(transform) + self._of_weights(transform)

    def _of_activations(self, transform: SiteTransform) -> float:
        if self.problem.activation is None:
            return 0.0
        exact = transform.tokens(self.tokens).float()
        change = self.problem.rounding(1.0, transform)(self.tokens) - exact
        gram = transform.fold(transform.fold(self.gram).T)
        return float(((change @ gram) * change).sum()) / len(self.tokens)

    def _of_weights(self, transform: SiteTransform) -> float:
        hessian = transform.tokens(transform.tokens(self.hessian).T)
        cost = None if self.damping is None else conditional_moments(hessian, self.damping)
        total = 0.0
        for name, weight in self.problem.weights.items():
            folded = transform.fold(weight)
            near = quantize_weight(folded, self.problem.specs[name], scale_dtype=self.problem.scale_dtype)
            change = folded - dequantize_weight(near)
            if cost is None:
                total += float(((change @ hessian) * change).sum())
            else:
                total += float((change.square() @ cost).sum())
        return total
