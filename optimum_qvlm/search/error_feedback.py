"""Rounding of weights with error feedback: what rounding one channel does wrong, the channels after it make good.

The recursion is GPTQ's (Frantar et al., arXiv 2210.17323) on the second moment of the transformed, rounded inputs.
The target is the least-squares answer to full-precision outputs, as in GPTAQ (Li et al., arXiv 2504.02692).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.kernels.recursion import feed_back
from optimum_qvlm.quant.affine import QuantizedWeight, dequantize_weight, quantize_weight, split_groups
from optimum_qvlm.quant.levels import fit_steps
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.refinement import BLOCK, refined
from optimum_qvlm.search.site_problem import SiteProblem, SiteRounding
from optimum_qvlm.spec import WeightSpec

ROWS_AT_ONCE = 1024

DAMPING_STEPS = 12
"""Times that damping grows tenfold at most, until it outweighs every second moment by far."""

NEXT_MULTIPLE = 1.1
"""A ratio that is tried beside the clips where scales are multiples of a step: that which is closest to the full range
may lie below it, and the next one be better."""

SHARE_ROWS = 256
"""Rows of a weight, evenly spread, on which the share is measured that a correction of its target holds elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackOptions:
    """How errors are fed back.

    Attributes:
        damping: added to the diagonal of the Hessian, as a share of its mean, where weights are rounded, since
            correlations of few tokens hold less on others.
        ridge: the same where the target is fitted.
        asymmetry: share of the difference between full-precision and quantized inputs that the target makes good,
            0..1. The difference that rounding this site's own inputs makes is always made good.
        activation_margin: takes the place of that of the clips, since the target makes good what clipping shrinks.
        ordered: channels with the largest second moment first: whole groups, and the channels in each.
        signed: symmetric scales of fewer than 8 bits are negative where the largest magnitude of a group is positive,
            so that it lies where the grid has one step more. With 8 bits that gains nothing.
        sweeps: times that all scales and codes of fewer than 8 bits are decided again afterwards, each with all others
            known.
    """

    damping: float = 0.05
    ridge: float = 0.01
    asymmetry: float = 1.0
    activation_margin: float = 0.02
    ordered: bool = True
    signed: bool = True
    sweeps: int = 0

    def turns(self, spec: WeightSpec) -> bool:
        """Whether scales of that grid may be negative."""
        return self.signed and spec.symmetric and spec.bits < 8


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over tokens: `hessian` of rounded times rounded, `cross` of wanted times rounded, fp32 [in, in].

    The wanted inputs are in the site's own channels, the rounded ones in the transformed.
    """

    hessian: Tensor
    cross: Tensor


def site_moments(problem: SiteProblem, rounding: SiteRounding, asymmetry: float) -> tuple[Moments, Moments]:
    """Second moments over all calibration tokens of the problem, each times its weight: of the first half of each
    piece, and of the second."""
    channels, device = problem.inputs.shape[1], problem.inputs.device
    halves = tuple(
        Moments(*(torch.zeros(channels, channels, dtype=torch.float32, device=device) for _ in range(2)))
        for _ in range(2)
    )
    for tokens, reference, weight in problem.pieces():
        middle = -(-len(tokens) // 2)
        for half, part in zip(halves, (slice(middle), slice(middle, None)), strict=True):
            rounded = rounding(tokens[part])
            target = torch.lerp(tokens[part].float(), reference[part].float(), asymmetry)
            weighed = rounded if weight is None else rounded * weight[part]
            half.hessian.addmm_(weighed.T, rounded)
            half.cross.addmm_(target.T, weighed)
    return halves[0], halves[1]


def corrected_target(
    weight: Tensor, halves: tuple[Moments, Moments], transform: SiteTransform, damping: float
) -> Tensor:
    """The weight [out, in] for transformed, rounded inputs whose products come closest to the wanted outputs.

    Ridge regression around the folded weight, which it is where rounded and wanted inputs agree. Most of what rounding
    does is noise, which a regression on few tokens would learn by heart: so the correction is scaled by the share
    that holds on tokens it was not fitted to, each half of the tokens judging the other.
    """
    folded = transform.fold(weight)
    missing = [weight.float() @ half.cross - folded @ half.hessian for half in halves]
    gain = size = 0.0
    some = slice(None, None, -(-len(weight) // SHARE_ROWS))
    for fit, test in ((0, 1), (1, 0)):
        change = _solved(halves[fit].hessian, missing[fit][some], damping)
        gain += float((change * missing[test][some]).sum())
        size += float(((change @ halves[test].hessian) * change).sum())
    kept = min(max(gain / max(size, 1e-30), 0.0), 1.0)
    share = 2 * kept / (1 + kept)  # both halves together hold half the noise of one
    return folded + share * _solved(halves[0].hessian + halves[1].hessian, missing[0] + missing[1], damping)


def round_with_feedback(
    target: Tensor,
    hessian: Tensor,
    spec: WeightSpec,
    *,
    scale_dtype: torch.dtype,
    clips: tuple[float, ...],
    options: FeedbackOptions,
) -> tuple[QuantizedWeight, Tensor]:
    """Codes for `target` [out, in], and the clip ratio [out, groups] of each scale.

    Args:
        target: what would be best without rounding.
        hessian: second moment [in, in] of what the weight multiplies.
        spec: the grid. Groups of at most `BLOCK` channels get their scale when their turn comes, by the error that
            is left after feedback inside the group; larger ones before, by what plain rounding leaves to be made good.
        scale_dtype: dtype in which scales are stored.
        clips: ratios to choose scales from.
        options: everything else. Sweeps move scales away from the clips, and the ratios that are returned with them.
    """
    width = target.shape[1] if spec.group is None else spec.group
    order = _order(hessian.diagonal(), width, ordered=options.ordered)
    factor = _inverse_factor(hessian[order][:, order], options.damping)
    back, cost = torch.argsort(order), factor.diagonal().square().reciprocal()
    moment = _damped(hessian, options.damping) if options.sweeps > 0 and spec.bits < 8 else None
    group_order, signed = order[::width] // width, options.turns(spec)
    free, step = replace(spec, two_level=False), None
    pieces = []
    for rows in target.float().split(ROWS_AT_ONCE):
        if spec.two_level:
            step = _steps(rows, free, cost[back], scale_dtype, clips, signed=signed)
        if width <= BLOCK:
            codes, scale, zero, ratio = _round_groups(
                rows[:, order], factor, free, width, clips, scale_dtype, signed=signed, step=step
            )
            place = torch.argsort(group_order)
            scale, ratio = scale[:, place], ratio[:, place]
            zero = None if zero is None else zero[:, place]
        else:
            ratio = _clip_by_cost(rows, free, cost[back], scale_dtype, clips, signed=signed, step=step)
            nearest = quantize_weight(rows, free, clip=ratio, scale_dtype=scale_dtype, signed=signed, step=step)
            scale, zero = nearest.scale, nearest.zero_point
            codes = _round_fixed(rows[:, order], factor, spec, scale[:, order // width], _pick(zero, order // width))
        rounded = QuantizedWeight(codes[:, back], scale, zero)
        if moment is not None:
            rounded = refined(rows, moment, rounded, spec, sweeps=options.sweeps, step=step)
            ratio = ratio * (rounded.scale.float() / scale.float()).abs()
        pieces.append((rounded.codes, rounded.scale, zero, ratio))
    codes, scale, ratio = (torch.cat([piece[i] for piece in pieces]) for i in (0, 1, 3))  # type: ignore[misc]
    zeros = [piece[2] for piece in pieces if piece[2] is not None]
    return QuantizedWeight(codes, scale, torch.cat(zeros) if zeros else None), ratio


def clip_by_moment(
    rows: Tensor, spec: WeightSpec, second_moment: Tensor, scale_dtype: torch.dtype, grid: tuple[float, ...]
) -> Tensor:
    """Ratio [rows, groups] of least error `d G d^T` of plain rounding, with `second_moment` G [groups, n, n]."""

    def error(clip: float) -> Tensor:
        rounded = dequantize_weight(quantize_weight(rows, spec, clip=clip, scale_dtype=scale_dtype))
        change = split_groups(rows.float() - rounded, spec).transpose(0, 1)
        return ((change @ second_moment) * change).sum(-1).T

    return _best_of(grid, error)


def conditional_moments(hessian: Tensor, damping: float) -> Tensor:
    """What a unit error of each channel [in] costs once the channels after it have made good what they can.

    These are the squared pivots of the damped Hessian when its channels are eliminated from the last to the first.
    """
    return _cholesky(hessian.flip(0, 1), damping).diagonal().flip(0).square()


def _clip_by_cost(
    rows: Tensor,
    spec: WeightSpec,
    cost: Tensor,
    scale_dtype: torch.dtype,
    grid: tuple[float, ...],
    *,
    signed: bool,
    step: Tensor | None = None,
) -> Tensor:
    """Ratio [rows, groups] of least error of plain rounding, a channel's square error weighed with its `cost` [in]."""

    def error(clip: float) -> Tensor:
        nearest = quantize_weight(rows, spec, clip=clip, scale_dtype=scale_dtype, signed=signed, step=step)
        change = rows.float() - dequantize_weight(nearest)
        return split_groups(change.square_().mul_(cost), spec).sum(-1)

    return _best_of(grid, error)


def _steps(
    rows: Tensor,
    spec: WeightSpec,
    cost: Tensor,
    scale_dtype: torch.dtype,
    grid: tuple[float, ...],
    *,
    signed: bool,
) -> Tensor:
    """Steps [rows, 1] fitted to the scales that would be best without, see `fit_steps`."""
    ratio = _clip_by_cost(rows, spec, cost, torch.float32, grid, signed=signed)
    free_scale = quantize_weight(rows, spec, clip=ratio, scale_dtype=torch.float32, signed=signed).scale
    return fit_steps(free_scale, scale_dtype, split_groups(cost.unsqueeze(0), spec).mean(-1))


def _best_of(grid: tuple[float, ...], error: Callable[[float], Tensor]) -> Tensor:
    """For every entry of the errors the ratio of the grid that makes it least, the first of equals."""
    least = error(grid[0])
    best = torch.full_like(least, grid[0])
    for ratio in grid[1:]:
        other = error(ratio)
        best = torch.where(other < least, ratio, best)
        least = torch.minimum(other, least)
    return best


def _round_groups(
    rows: Tensor,
    factor: Tensor,
    spec: WeightSpec,
    width: int,
    clips: tuple[float, ...],
    scale_dtype: torch.dtype,
    *,
    signed: bool,
    step: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Group after group, trying every clip: codes [rows, in], scales, zero points and clips [rows, groups]."""
    work, count = rows.T.contiguous(), rows.shape[0]
    clips = clips if step is None else (*clips, NEXT_MULTIPLE)
    whole = replace(spec, group=None)
    codes, grid = torch.empty_like(work, dtype=torch.int8), torch.tensor(clips, dtype=torch.float32, device=work.device)
    scales, zeros, ratios = [], [], []
    for start in range(0, work.shape[0], width):
        stop = start + width
        part = work[start:stop]
        tried = [
            quantize_weight(part.T, whole, clip=clip, scale_dtype=scale_dtype, signed=signed, step=step)
            for clip in clips
        ]
        scale = torch.cat([t.scale.squeeze(1) for t in tried])
        zero = None if spec.symmetric else torch.cat([t.zero_point.squeeze(1) for t in tried])  # type: ignore[union-attr]
        every, errors = feed_back(part.repeat(1, len(clips)), factor[start:stop, start:stop], spec.bits, scale, zero)
        best = errors.square().sum(0).view(len(clips), count).argmin(0)
        chosen = best * count + torch.arange(count, device=best.device)
        codes[start:stop] = every[:, chosen].to(torch.int8)
        work[stop:] -= factor[start:stop, stop:].T @ errors[:, chosen]
        scales.append(scale[chosen])
        ratios.append(grid[best])
        if zero is not None:
            zeros.append(zero[chosen])
    return codes.T, torch.stack(scales, 1), torch.stack(zeros, 1) if zeros else None, torch.stack(ratios, 1)


def _round_fixed(rows: Tensor, factor: Tensor, spec: WeightSpec, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Codes [rows, in] on scales and zero points [rows, in] that are known, block after block of channels."""
    work = rows.T.contiguous()
    codes = torch.empty_like(work, dtype=torch.int8)
    for start in range(0, work.shape[0], BLOCK):
        stop = min(start + BLOCK, work.shape[0])
        fixed = None if zero is None else zero.T[start:stop]
        block = factor[start:stop, start:stop]
        block_codes, errors = feed_back(work[start:stop].clone(), block, spec.bits, scale.T[start:stop], fixed)
        codes[start:stop] = block_codes.to(torch.int8)
        work[stop:] -= factor[start:stop, stop:].T @ errors
    return codes.T


def _order(diagonal: Tensor, width: int, *, ordered: bool) -> Tensor:
    """Channels by falling second moment: groups stay together, with the heaviest group first."""
    grouped = diagonal.reshape(-1, width)
    if not ordered:
        return torch.arange(diagonal.numel(), device=diagonal.device)
    groups = torch.argsort(grouped.sum(1), descending=True, stable=True)
    inside = torch.argsort(grouped, dim=1, descending=True, stable=True)[groups]
    return (groups.unsqueeze(1) * width + inside).reshape(-1)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian with `damping` of its mean on the diagonal; the identity where it is zero."""
    damped = hessian.clone()
    mean = hessian.diagonal().mean()
    damped.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
    return damped


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with `U^T U` the inverse of the damped Hessian."""
    inverse = torch.cholesky_inverse(_cholesky(hessian, damping))
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if bool(failed):
        raise CalibrationError("the inverse of the second moment of its inputs leaves the range of fp32")
    factor: Tensor = upper
    return factor


def _cholesky(hessian: Tensor, damping: float) -> Tensor:
    """Lower factor of the Hessian with `damping` of its mean on the diagonal, more where fp32 needs it.

    Raises:
        CalibrationError: the Hessian is not finite, so no damping helps.
    """
    mean = float(hessian.diagonal().mean())
    eye = torch.eye(hessian.shape[0], dtype=torch.float32, device=hessian.device)
    if mean <= 0:
        return eye
    for _ in range(DAMPING_STEPS):
        lower, failed = torch.linalg.cholesky_ex(hessian / mean + damping * eye)
        if not bool(failed):
            scaled: Tensor = lower * mean**0.5
            return scaled
        damping *= 10
    raise CalibrationError(f"the second moment of its inputs (mean {mean:.2g}) overflows fp32")


def _solved(hessian: Tensor, right: Tensor, damping: float) -> Tensor:
    """`right H^-1` [out, in] with the damped Hessian."""
    return torch.cholesky_solve(right.T, _cholesky(hessian, damping)).T


def _pick(zero: Tensor | None, columns: Tensor) -> Tensor | None:
    return None if zero is None else zero[:, columns]
