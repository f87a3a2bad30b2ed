"""What a model says of held-out samples, read at once and through `generate`, and how two models compare."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from optimum_qvlm.evaluation.continuation import continuation_of
from optimum_qvlm.evaluation.decoding import decoded_logits, greedy_answers, pad_token_of
from optimum_qvlm.evaluation.fidelity import (
    answer_logits,
    answer_states,
    compare,
    compare_answers,
    compare_states,
    device_of,
    predicts_tokens,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Of one model on some batches.

    Attributes:
        prefill: logits of `answer_logits`, per batch; empty where the model predicts no tokens.
        states: last hidden states of `answer_states` in their place, per batch; empty where it does.
        decode: those of `decoded_logits`, per batch that can be continued; empty where the model cannot generate.
        answers: tokens of greedy answers, per row that can be continued.
        rows: batch and row in it of each of these.
    """

    prefill: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    decode: list[Tensor] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    rows: list[tuple[int, int]] = field(default_factory=list)


def observe(
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    image_tokens: Sequence[int],
    *,
    quantized: bool,
    device: torch.device | None = None,
) -> Observation:
    """Read the labelled answers at once, then token by token, then generate.

    What full precision computes does not depend on how many tokens come at once, so one pass is enough for it: except
    where token types let prompts see what comes after them, as in PaliGemma. `device` is where inputs go, by default
    where the model is.

    Raises:
        DataError: a batch has no labels, or none that marks an answer.
    """
    device = device_of(model) if device is None else device
    if not predicts_tokens(model):
        return Observation(states=answer_states(model, batches, device))
    seen = Observation(prefill=answer_logits(model, batches, device))
    if not model.can_generate():
        return seen
    pad = pad_token_of(model)
    for number, (batch, logits) in enumerate(zip(batches, seen.prefill, strict=True)):
        continuation = continuation_of(batch, image_tokens, pad)
        if continuation is None:
            continue
        by_steps = quantized or "token_type_ids" in batch
        seen.decode.append(
            decoded_logits(model, continuation, device) if by_steps else logits[continuation.labelled.cpu()]
        )
        seen.answers.extend(greedy_answers(model, continuation, device))
        seen.rows.extend((number, row) for row in continuation.counted.any(dim=1).nonzero().flatten().tolist())
    return seen


def fidelity_report(reference: Observation, observed: Observation) -> dict[str, Any]:
    """`fidelity` of the report: figures of `prefill`, and of `decode` and `generate`, None where a model cannot; of
    `states` in their place where it predicts no tokens."""
    if reference.states:
        states = asdict(compare_states(reference.states, observed.states))
        return {"prefill": None, "decode": None, "generate": None, "states": states}
    decodes = bool(reference.decode)
    return {
        "prefill": asdict(compare(reference.prefill, observed.prefill)),
        "decode": asdict(compare(reference.decode, observed.decode)) if decodes else None,
        "generate": asdict(compare_answers(reference.answers, observed.answers)) if decodes else None,
    }
