"""What the optimisation of a visual encoder minimises, and the rounding that it can differentiate.

Equations 8 to 10 of the paper. Knows tensors only: the pipeline says where they come from. Rounding passes gradients
straight through, values beyond the grid pass none, so a scale learns from what it rounds and from what it cuts off.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.kernels import dequantize_tokens, fake_quantize_static, hadamard, quantize_tokens
from optimum_qvlm.quant.affine import QuantizedWeight, split_groups
from optimum_qvlm.quant.entropy import Positions, Softness, soft_assignment
from optimum_qvlm.settings import EncoderOptions
from optimum_qvlm.spec import ActivationSpec, WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The four terms, fp32 scalars.

    Attributes:
        answer: cross entropy of the answer tokens, in nats.
        entropy: sum over layers of dependency times weight, in nats.
        vision: error of the encoder's output, see `relative_error`.
        final: error of the language model's last layer, likewise.
    """

    answer: Tensor
    entropy: Tensor
    vision: Tensor
    final: Tensor

    def total(self, options: EncoderOptions) -> Tensor:
        """The composite loss: `answer + l1 entropy + l2 (vision + eta final)`."""
        errors = self.vision + options.final_share * self.final
        return self.answer + options.entropy_weight * self.entropy + options.error_weight * errors


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats of logits [tokens, vocabulary] on labels [tokens]; 0 where there is no token."""
    if labels.numel() == 0:
        return logits.float().sum()
    return F.cross_entropy(logits.float(), labels)


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Sum of absolute differences over the sum of absolute values of `wanted`, so that units cancel."""
    difference: Tensor = torch.linalg.vector_norm(found - wanted, ord=1, dtype=torch.float32)
    size: Tensor = torch.linalg.vector_norm(wanted, ord=1, dtype=torch.float32)
    return difference / size.clamp(min=1e-30)


def soft_dependency(first: Positions | None, second: Positions, softness: Softness = "step_squared") -> Tensor:
    """`optimum_qvlm.quant.entropy.conditional_entropy` of the joint table as a differentiable fp32 scalar.

    Without `first`, the entropy of `second` alone.
    """
    later = soft_assignment(second, softness)
    if first is None:
        return -_self_information(later.mean(dim=0))
    table = soft_assignment(first, softness).T @ later / later.shape[0]
    return _self_information(table.sum(dim=1)) - _self_information(table)


def _self_information(shares: Tensor) -> Tensor:
    """Sum of p log p; shares that are nearly zero count as zero, and have no gradient."""
    return torch.where(shares > 1e-12, shares * shares.clamp(min=1e-12).log(), 0.0).sum()


def weighted_entropy(dependencies: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of dependencies, each times its layer's weight. Both have one entry per layer that depends on another."""
    assert len(dependencies) == len(weights)
    terms = [weight * dependency for dependency, weight in zip(dependencies, weights, strict=True)]
    return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float32, device="cpu")


def jacobian_weights(norms: Sequence[float]) -> list[float]:
    """Norms of the final error's gradient at each layer's output, scaled to sum to one; even where all are zero."""
    total = sum(norms)
    return [norm / total if total > 0 else 1 / len(norms) for norm in norms]


def round_through(x: Tensor) -> Tensor:
    """`x` rounded, halves to even, with the gradient of the identity."""
    return _with_gradient(torch.round(x.detach()), x)


def learned_tokens(x: Tensor, spec: ActivationSpec, log_clip: Tensor, clip: float) -> Tensor:
    """Dynamic activations rounded with the clip `clip * exp(log_clip)`; values are those of the real operation.

    `x` is [..., channels], `log_clip` a scalar. What the scale is a share of counts as constant.
    """
    codes, scale = quantize_tokens(x.detach(), spec.bits, spec.group, learned_clip(log_clip, clip), fitted=spec.fitted)
    exact = dequantize_tokens(codes, scale).to(x.dtype)
    grouped = x.float() if spec.group is None else x.float().unflatten(-1, (-1, spec.group))
    if spec.group is not None:
        scale = scale.unsqueeze(-1)
    change = log_clip.exp()
    scale = scale * (change / change.detach())  # the scale as it is, with the gradient of its clip
    high = 2 ** (spec.bits - 1) - 1
    low = -high - 1 if spec.fitted else -high
    surrogate = (round_through(grouped / scale).clamp(low, high) * scale).reshape(x.shape).to(x.dtype)
    return _with_gradient(exact, surrogate)


def learned_static(x: Tensor, spec: ActivationSpec, log_scale: Tensor, scale: Tensor) -> Tensor:
    """Static activations rounded with the scale `scale * exp(log_scale)`, all [1]."""
    found = scale * log_scale.exp()
    exact = fake_quantize_static(x.detach(), spec.bits, found.detach())
    qmax = 2 ** (spec.bits - 1) - 1
    surrogate = (round_through(x.float() / found).clamp(-qmax, qmax) * found).to(x.dtype)
    return _with_gradient(exact, surrogate)


def learned_clip(log_clip: Tensor, clip: float) -> float:
    """The clip that a parameter stands for, as it is saved."""
    return min(1.0, clip * float(log_clip.detach().exp()))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStart:
    """Where the rounding of one weight starts: at what the search found, bit for bit.

    Attributes:
        spec: the grid.
        scale: [out_features, groups] in the stored dtype.
        zero_point: int8 [out_features, groups], None on a symmetric grid; it stays as it is.
        offset: int8 [out_features, in_features], what the search's codes are above round-to-nearest with its own
            scale, None for nothing. It keeps what error feedback or learned rounding decided.
    """

    spec: WeightSpec
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None

    @classmethod
    def of(cls, found: QuantizedWeight, weight: Tensor, spec: WeightSpec) -> "WeightStart":
        """From the search's result; `weight` is what it rounded, transform folded in."""
        plain = cls(spec=spec, scale=found.scale, zero_point=found.zero_point, offset=None)
        offset = found.codes - plain.rounded(weight, torch.zeros_like(found.scale, dtype=torch.float32)).codes
        return cls(
            spec=spec,
            scale=found.scale,
            zero_point=found.zero_point,
            offset=offset if bool(offset.any()) else None,
        )

    def value(self, weight: Tensor, log_scale: Tensor) -> Tensor:
        """The dequantized weight in fp32, with gradients to `weight` and `log_scale` [out_features, groups]."""
        codes, scale = self._codes(weight, log_scale)
        return (codes * scale).reshape(weight.shape)

    @torch.no_grad()
    def rounded(self, weight: Tensor, log_scale: Tensor) -> QuantizedWeight:
        """What is packed: `dequantize_weight` of it equals `value`."""
        codes, scale = self._codes(weight, log_scale)
        if self.zero_point is not None:
            codes = codes + self.zero_point.unsqueeze(-1)
        stored = scale.squeeze(-1).to(self.scale.dtype)
        return QuantizedWeight(codes.to(torch.int8).reshape(weight.shape), stored, self.zero_point)

    def _codes(self, weight: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes without zero point [rows, groups, channels], whole numbers, and scales [rows, groups, 1], in fp32."""
        low, high = -(2 ** (self.spec.bits - 1)), 2 ** (self.spec.bits - 1) - 1
        wanted = self.scale.float() * log_scale.exp()
        scale = _with_gradient(wanted.detach().to(self.scale.dtype).float(), wanted).unsqueeze(-1)
        zero = 0.0 if self.zero_point is None else self.zero_point.unsqueeze(-1).float()
        codes = (round_through(split_groups(weight, self.spec).float() / scale) + zero).clamp(low, high)
        if self.offset is not None:
            codes = (codes + split_groups(self.offset, self.spec)).clamp(low, high)
        return codes - zero, scale


def transformed(x: Tensor, equalizer: Tensor | None, rotation: int | None) -> Tensor:
    """`x diag(equalizer) (I x H)` in fp32 by differentiable operations; `x` itself where both are None."""
    if equalizer is None and rotation is None:
        return x
    x = x.float() if equalizer is None else x.float() * equalizer
    if rotation is None:
        return x
    blocks: Tensor = x.unflatten(-1, (-1, rotation))
    return (blocks @ hadamard(rotation, x.device)).reshape(x.shape)


def _with_gradient(exact: Tensor, surrogate: Tensor) -> Tensor:
    """The values of `exact`, bit for bit, with the gradient of `surrogate`."""
    return exact + (surrogate - surrogate.detach()) if surrogate.requires_grad else exact
