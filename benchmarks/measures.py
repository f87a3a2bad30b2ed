"""What is read off logits, as `optimum_qvlm.evaluation.fidelity.answer_logits` returns them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.data.loader import Batch
from optimum_qvlm.evaluation.fidelity import IGNORED


def perplexity(logits: Sequence[Tensor], batches: Sequence[Batch]) -> float:
    """Over labelled tokens."""
    losses = [F.cross_entropy(one, ids, reduction="sum") for one, ids in zip(logits, targets(batches), strict=True)]
    return math.exp(float(torch.stack(losses).sum()) / sum(map(len, logits)))


def targets(batches: Sequence[Batch]) -> list[Tensor]:
    """Token ids [labelled tokens] of each batch that its logits predict."""
    shifted = [batch["labels"][:, 1:] for batch in batches]
    return [labels[labels != IGNORED] for labels in shifted]


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats of each token [tokens]."""
    log_reference, log_own = F.log_softmax(reference.double(), dim=-1), F.log_softmax(logits.double(), dim=-1)
    return F.kl_div(log_own, log_reference, reduction="none", log_target=True).sum(-1)
