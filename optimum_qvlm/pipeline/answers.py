"""Answers for samples that have none: the full-precision model's own, greedily."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging

from optimum_qvlm.data.loader import LoaderOptions, make_prompts
from optimum_qvlm.data.rendering import group, tokenizer_of
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.pipeline.layer_streaming import streamed

ANSWER_TOKENS = 32
"""Longest answer that is generated: enough to calibrate on, and cheap."""


def fill_answers(
    model: Any,
    samples: Sequence[Sample],
    processor: Any,
    options: LoaderOptions,
    *,
    layers: Iterable[str],
    device: torch.device,
    image_tokens: Sequence[int] = (),
) -> list[Sample]:
    """Samples in their order, with the model's greedy answer where one is missing. Plain texts need none.

    Of `options`, `batch_size`, `max_length` and `vocabulary` count.
    """
    filled = list(samples)
    open_ones = [i for i, sample in enumerate(filled) if sample.answer is None and sample.text is None]
    groups = group([filled[i] for i in open_ones], processor, options.batch_size)
    tokenizer = tokenizer_of(processor)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    indices = iter(open_ones)
    with torch.no_grad(), streamed(model, layers, device):
        for members in logging.tqdm(groups, desc="answering", unit="batch", disable=not groups):
            batch = make_prompts(members, processor, options, image_tokens)
            prompt = {name: tensor.to(device) for name, tensor in batch.items()}
            output = model.generate(**prompt, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=pad)
            texts = tokenizer.batch_decode(output[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            for sample, text in zip(members, texts, strict=True):
                filled[next(indices)] = replace(sample, answer=text.strip())
    return filled
