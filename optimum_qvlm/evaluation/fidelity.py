"""How close a quantized model stays to full precision, token by token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.errors import DataError

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Mean over answer tokens.

    Attributes:
        tokens: how many were compared.
        mean_kl: Kullback-Leibler divergence of the model from the reference, in nats.
        top1_agreement: share of tokens whose most likely token is the same, in 0..1.
    """

    tokens: int
    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Greedy answers beside those of the reference to the same prompts.

    Attributes:
        answers: how many were compared.
        tokens: of the reference's answers on average, ends included.
        agreed_tokens: of these, how many come before the first difference, on average.
        exact_match: share of answers that are the same throughout, in 0..1.
    """

    answers: int
    tokens: float
    agreed_tokens: float
    exact_match: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFidelity:
    """How close last hidden states stay, for models that predict no tokens.

    Attributes:
        tokens: how many were compared.
        relative_error: sum of squared differences over that of squares of the reference.
    """

    tokens: int
    relative_error: float


def predicts_tokens(model: Any) -> bool:
    """Whether a model has logits over its vocabulary: the bare ones of `AutoModel` and classifiers have none."""
    return model.get_output_embeddings() is not None


def device_of(model: Any) -> torch.device:
    """Where inputs of a model go: the first of its devices that is not the CPU, if there is one."""
    placed = [parameter.device for parameter in model.parameters() if parameter.device.type != "meta"]
    return next((device for device in placed if device.type != "cpu"), torch.device("cpu"))


def answer_logits(
    model: Any, batches: Sequence[Mapping[str, Tensor]], device: torch.device | None = None
) -> list[Tensor]:
    """Logits [answer tokens, vocabulary] in fp32 at the positions that predict labelled tokens, per batch.

    `device` is where inputs go, by default where the model is.

    Raises:
        DataError: a batch has no labels, or none that marks an answer.
    """
    return _at_answers(lambda inputs: model(**inputs).logits, batches, device_of(model) if device is None else device)


def answer_states(
    model: Any, batches: Sequence[Mapping[str, Tensor]], device: torch.device | None = None
) -> list[Tensor]:
    """Last hidden states [answer tokens, channels] at the same positions, in the same way."""
    base = model.base_model
    device = device_of(model) if device is None else device
    return _at_answers(lambda inputs: base(**inputs).last_hidden_state, batches, device)


def _at_answers(
    forward: Callable[[dict[str, Any]], Tensor], batches: Sequence[Mapping[str, Tensor]], device: torch.device
) -> list[Tensor]:
    outputs = []
    for number, batch in enumerate(batches):
        if "labels" not in batch or not bool((batch["labels"][:, 1:] != IGNORED).any()):
            raise DataError(f"batch {number} has no labelled answer tokens to compare on")
        inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        with torch.inference_mode():
            output = forward({**inputs, "use_cache": False})
        predicting = (batch["labels"][:, 1:] != IGNORED).to(output.device)
        outputs.append(output[:, :-1][predicting].float().cpu())
    return outputs


def right_answers(logits: Sequence[Tensor], batches: Sequence[Mapping[str, Tensor]]) -> list[bool]:
    """Whether each sample's whole answer, its end included, is the model's first choice token by token.

    That is the case exactly where greedy generation gives the answer. `logits` are those of `answer_logits`.
    """
    right: list[bool] = []
    for measured, batch in zip(logits, batches, strict=True):
        labels = batch["labels"][:, 1:].cpu()
        expected = labels != IGNORED
        agrees = torch.ones_like(expected)
        agrees[expected] = measured.argmax(-1) == labels[expected]
        right += agrees.all(dim=1).tolist()
    return right


def compare(reference: Sequence[Tensor], measured: Sequence[Tensor]) -> Fidelity:
    """Fidelity of `measured` to `reference`, both as `answer_logits` returns them."""
    kl = agreed = tokens = 0.0
    for expected, got in zip(reference, measured, strict=True):
        log_wanted, log_got = F.log_softmax(expected.double(), dim=-1), F.log_softmax(got.double(), dim=-1)
        kl += float(F.kl_div(log_got, log_wanted, reduction="sum", log_target=True))
        agreed += float((expected.argmax(-1) == got.argmax(-1)).sum())
        tokens += expected.shape[0]
    return Fidelity(tokens=int(tokens), mean_kl=kl / tokens, top1_agreement=agreed / tokens)


def compare_states(reference: Sequence[Tensor], measured: Sequence[Tensor]) -> StateFidelity:
    """Fidelity of `measured` to `reference`, both as `answer_states` returns them."""
    error = square = 0.0
    for target, got in zip(reference, measured, strict=True):
        error += float((got.double() - target.double()).square().sum())
        square += float(target.double().square().sum())
    tokens = sum(len(target) for target in reference)
    return StateFidelity(tokens=tokens, relative_error=error / square if square > 0 else error)


def compare_answers(reference: Sequence[Sequence[int]], measured: Sequence[Sequence[int]]) -> Agreement:
    """How far greedy answers, as token ids, follow those of the reference; there must be one at least."""
    pairs = list(zip(reference, measured, strict=True))
    agreed = [next((n for n, (a, b) in enumerate(zip(*p, strict=False)) if a != b), min(map(len, p))) for p in pairs]
    return Agreement(
        answers=len(pairs),
        tokens=sum(len(expected) for expected, _ in pairs) / len(pairs),
        agreed_tokens=sum(agreed) / len(pairs),
        exact_match=sum(list(expected) == list(got) for expected, got in pairs) / len(pairs),
    )
