"""What model inputs must be like for a model to take them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optimum_qvlm.errors import DataError

ID_TYPES = (torch.int64, torch.int32)


def require_ready(record: Any, where: str, first: str) -> None:
    """Refuse a record that is no dict of model inputs, as the one called `first` is.

    Raises:
        DataError: says what it is instead.
    """
    ids = record.get("input_ids") if isinstance(record, Mapping) else None
    if ids is None:
        raise DataError(f"{where} must be a dict of model inputs with input_ids [rows, tokens], as {first} is")
    if not isinstance(ids, Tensor):
        raise DataError(f"{where}: input_ids must be a tensor [rows, tokens], got {type(ids).__name__}")
    if ids.dim() != 2:
        raise DataError(
            f"{where}: input_ids has the shape {list(ids.shape)}; expected [rows, tokens]. Rows of a dataset in torch "
            "format lack the first dimension: add it to all their tensors with unsqueeze(0)"
        )


def require_inputs(
    batch: Mapping[str, Tensor], names: Sequence[str], vocabulary: int | None, image_tokens: Sequence[int] = ()
) -> None:
    """Refuse token ids that the model has no embedding for, and rows without a token to read.

    Args:
        batch: model inputs with input_ids [rows, tokens].
        names: of the rows, at least one, for errors.
        vocabulary: rows of the embedding; None if not known.
        image_tokens: ids that need none, since image features take their places.

    Raises:
        DataError: names sample, value and limit.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.dtype not in ID_TYPES:
        raise DataError(f"{names[0]}: input_ids must be integers (int64), got {ids.dtype}")
    if ids.numel() == 0:
        raise DataError(f"{names[0]} is empty: input_ids has the shape {list(ids.shape)}")
    if mask is not None and mask.dim() == 2:
        _require_mask(mask, ids, names)
    wrong = ids < 0
    if vocabulary is not None:
        wrong |= ids >= vocabulary
    wrong &= ~stands_for_image(ids, image_tokens)
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        limit = "negative" if vocabulary is None else f"outside 0..{vocabulary - 1}, which the model's embedding has"
        raise DataError(
            f"{names[row]}: token id {int(ids[row, place])} at place {place} is {limit}; use the tokenizer or "
            "processor of this model"
        )


def _require_mask(mask: Tensor, ids: Tensor, names: Sequence[str]) -> None:
    if mask.shape != ids.shape:
        raise DataError(
            f"{names[0]}: attention_mask has the shape {list(mask.shape)}, input_ids {list(ids.shape)}; make them equal"
        )
    masked = ~mask.bool().any(dim=1)
    if bool(masked.any()):
        raise DataError(f"{names[int(masked.nonzero()[0])]} is empty: its attention_mask is zero everywhere")


def stands_for_image(ids: Tensor, image_tokens: Sequence[int]) -> Tensor:
    """bool of the shape of `ids`: which token ids are among the image tokens."""
    return torch.isin(ids, torch.tensor(list(image_tokens), dtype=ids.dtype, device=ids.device))
