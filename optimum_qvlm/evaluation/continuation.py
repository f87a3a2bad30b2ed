"""A labelled batch cut in two: prompts, and the answers that decoding goes through token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qvlm.data.inputs import stands_for_image
from optimum_qvlm.evaluation.fidelity import IGNORED

LEFT_TO_GENERATE = ("labels", "attention_mask", "position_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What `generate` is given, and what follows.

    Attributes:
        prompt: model inputs up to the first answer token of each row, padded on the left; images are all in here.
        tokens: [rows, steps], what follows, with the pad token behind the end of a row.
        counted: [rows, steps], which of them have a label that was asked for.
        labelled: [labels of the batch], which of these are counted, in the order of `answer_logits`.
    """

    prompt: dict[str, Tensor]
    tokens: Tensor
    counted: Tensor
    labelled: Tensor


def continuation_of(batch: Mapping[str, Tensor], image_tokens: Sequence[int], pad: int) -> Continuation | None:
    """Cut a batch with labels before the first of each row that a decoding step can reach; None where there is none.

    A prompt has all images and ends in a token that is none: `generate` takes what it adds for more of the last kind.
    A row without such a label is all prompt. Tensors of the shape of `input_ids` are cut along, all others are the
    prompt's; positions are left to `generate`.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask.ne(0).to(ids.dtype)
    places = torch.arange(ids.shape[1], device=ids.device)
    images = stands_for_image(ids, image_tokens)
    first = real.argmax(1)
    earliest = torch.maximum(first, torch.where(images, places + 1, -1).amax(1))
    predicted = (labels != IGNORED) & (places > earliest[:, None])
    if not bool(predicted.any()):
        return None
    length = (real * (places + 1)).amax(1)
    start = torch.where(predicted.any(1), predicted.int().argmax(1), length)
    end = torch.where(predicted.any(1), (predicted * (places + 1)).amax(1), length)
    after = start[:, None] + torch.arange(int((end - start).max()), device=ids.device)
    inside = after < end[:, None]
    after = after.clamp(max=ids.shape[1] - 1)
    return Continuation(
        prompt=_prompt(batch, real, first, start, pad),
        tokens=ids.gather(1, after).masked_fill(~inside, pad),
        counted=predicted.gather(1, after) & inside,
        labelled=predicted[:, 1:][labels[:, 1:] != IGNORED],
    )


def _prompt(batch: Mapping[str, Tensor], real: Tensor, first: Tensor, start: Tensor, pad: int) -> dict[str, Tensor]:
    """Places `first` to `start` of each row, moved to the right end; zeros or the pad token come before."""
    ids = batch["input_ids"]
    width = int((start - first).max())
    source = start[:, None] - width + torch.arange(width, device=ids.device)
    inside = source >= first[:, None]
    source = source.clamp(min=0)
    prompt = {"attention_mask": real.gather(1, source) * inside}
    for name, tensor in batch.items():
        if name in LEFT_TO_GENERATE:
            continue
        if tensor.shape == ids.shape and tensor.dim() == 2:
            tensor = tensor.gather(1, source).masked_fill(~inside, pad if name == "input_ids" else 0)
        prompt[name] = tensor
    return prompt
