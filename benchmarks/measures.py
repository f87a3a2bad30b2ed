"""What is read off logits, as `optimum_qvlm.evaluation.fidelity.answer_logits` returns them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.data.loader import Batch
from optimum_qvlm.evaluation.fidelity import IGNORED, answer_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How a model answers beside the reference: for each row a sum over its labelled tokens, [rows] each.

    Attributes:
        number: of the row; one that comes again with another seed is no independent one.
        tokens: how many are labelled.
        kl: Kullback-Leibler divergence from the reference, in nats.
        loss: minus the logarithm of the probability of the labels, in nats.
        reference_loss: that of the reference.
        agreed: tokens whose most likely token is the same.
        right: 1 where every token is the most likely one, 0 elsewhere.
    """

    number: Tensor
    tokens: Tensor
    kl: Tensor
    loss: Tensor
    reference_loss: Tensor
    agreed: Tensor
    right: Tensor

    def share(self, name: str) -> float:
        """A sum for each token."""
        return float(getattr(self, name).sum() / self.tokens.sum())


def rows_of(model: Any, reference: Sequence[Tensor], batches: Sequence[Batch], numbers: Tensor) -> Rows:
    """A model on batches whose rows have these numbers, beside logits of the reference; one batch at a time."""
    parts: dict[str, list[Tensor]] = {field.name: [] for field in fields(Rows) if field.name != "number"}
    for wanted, batch in zip(reference, batches, strict=True):
        (logits,), (labels,) = answer_logits(model, [batch]), targets([batch])
        labelled = batch["labels"][:, 1:] != IGNORED
        values = {
            "tokens": torch.ones(len(labels)),
            "kl": divergence(wanted, logits),
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "reference_loss": F.cross_entropy(wanted, labels, reduction="none"),
            "agreed": logits.argmax(-1) == wanted.argmax(-1),
            "right": logits.argmax(-1) == labels,
        }
        for name, value in values.items():
            sums = torch.zeros(len(labelled)).double().index_add(0, labelled.nonzero()[:, 0], value.double())
            parts[name].append(sums)
        parts["right"][-1] = (parts["right"][-1] == parts["tokens"][-1]).double()
    return Rows(number=numbers, **{name: torch.cat(sums) for name, sums in parts.items()})


def joined(several: Sequence[Rows]) -> Rows:
    """The rows of several seeds."""
    return Rows(**{f.name: torch.cat([getattr(rows, f.name) for rows in several]) for f in fields(Rows)})


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
