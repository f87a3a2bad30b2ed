"""Answers for samples that have none: the full-precision model's own, greedily."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging

from optimum_qvlm.data.loader import make_prompts, tokenizer_of
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.pipeline.layer_streaming import streamed

ANSWER_TOKENS = 32
"""Longest answer that is generated: enough to calibrate on, and cheap."""


def fill_answers(
    model: Any,
    samples: Sequence[Sample],
    processor: Any,
    *,
    layers: Iterable[str],
    device: torch.device,
    batch: int,
) -> list[Sample]:
    """Samples in their order, with the model's greedy answer where one is missing. Plain texts need none."""
    filled = list(samples)
    open_ones = [i for i, sample in enumerate(filled) if sample.answer is None and sample.text is None]
    groups = [open_ones[start : start + batch] for start in range(0, len(open_ones), batch)]
    tokenizer = tokenizer_of(processor)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad(), streamed(model, layers, device):
        for group in logging.tqdm(groups, desc="answering", unit="batch", disable=not groups):
            prompt = {n: t.to(device) for n, t in make_prompts([filled[i] for i in group], processor).items()}
            output = model.generate(**prompt, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=pad)
            texts = tokenizer.batch_decode(output[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(group, texts, strict=True):
                filled[index] = replace(filled[index], answer=text.strip())
    return filled
