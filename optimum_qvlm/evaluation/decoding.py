"""What a model does in `generate`: one pass over the prompt, then one token at a time with a cache."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from optimum_qvlm.evaluation.continuation import Continuation

ANSWER_TOKENS = 16
"""Tokens of a greedy answer at most: in full precision each of them may move all weights to the device once."""


def decoded_logits(model: Any, continuation: Continuation, device: torch.device) -> Tensor:
    """Logits [counted tokens, vocabulary] in fp32 on the CPU, of `generate` that is made to say the continuation.

    The first of a row comes from the pass over its prompt, each other one from a step of its own.
    """
    tokens = continuation.tokens.to(device)
    forced = LogitsProcessorList([_Forced(tokens, continuation.prompt["input_ids"].shape[1])])
    output = _generate(model, continuation.prompt, device, tokens.shape[1], ends=None, processors=forced)
    logits = torch.stack([step.to(device) for step in output.logits], dim=1)
    return logits[continuation.counted.to(device)].float().cpu()


def greedy_answers(model: Any, continuation: Continuation, device: torch.device) -> list[list[int]]:
    """Tokens that greedy generation gives to each prompt with something to continue: up to and with an end token,
    `ANSWER_TOKENS` at most.

    Of the model's generation settings only the end tokens are used.
    """
    identifier = getattr(model.generation_config, "eos_token_id", None)
    ends = [identifier] if isinstance(identifier, int) else list(identifier or ())
    output = _generate(model, continuation.prompt, device, ANSWER_TOKENS, ends=ends or None)
    rows = output.sequences[:, continuation.prompt["input_ids"].shape[1] :].tolist()
    answered = continuation.counted.any(dim=1).tolist()
    return [_up_to_end(row, ends) for row, counts in zip(rows, answered, strict=True) if counts]


def pad_token_of(model: Any) -> int:
    """What prompts are padded with: masked out, so it matters only that it stands for no image."""
    for holder in (model.generation_config, model.config.get_text_config()):
        identifier = getattr(holder, "pad_token_id", None)
        if isinstance(identifier, int) and identifier >= 0:
            return identifier
    return 0


class _Forced(LogitsProcessor):  # type: ignore[misc]
    """Lets a known token through at each step, and nothing else."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        forced = self.tokens[:, step : step + 1].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, forced, 0.0)


def _generate(
    model: Any,
    prompt: Mapping[str, Tensor],
    device: torch.device,
    steps: int,
    *,
    ends: list[int] | None,
    processors: LogitsProcessorList | None = None,
) -> Any:
    """Greedy `generate` without any of the model's own settings. `forward` may swallow what `generate` refuses: that is
    left out."""
    known = {*inspect.signature(model.forward).parameters}
    known |= {*inspect.signature(model.prepare_inputs_for_generation).parameters}
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=steps,
        eos_token_id=ends,
        pad_token_id=pad_token_of(model),
        return_dict_in_generate=True,
        output_logits=processors is not None,
    )
    inputs = {name: tensor.to(device) for name, tensor in prompt.items() if name in known}
    with torch.no_grad(), _without_settings(model):
        return model.generate(**inputs, generation_config=config, logits_processor=processors)


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """Inside, the model has no generation settings, which would fill in what ours leave open."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _up_to_end(row: list[int], ends: list[int]) -> list[int]:
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: stop + 1]
