"""From a user's dataset and a processor to batches of model inputs."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from optimum_qvlm.data import packaged
from optimum_qvlm.data.inputs import require_inputs, require_ready
from optimum_qvlm.data.recipe import find_preset
from optimum_qvlm.data.rendering import Batch, cut, group, render, tokenizer_of
from optimum_qvlm.data.rows import Rows, download, draw, draw_others
from optimum_qvlm.data.sample import Sample, read_sample
from optimum_qvlm.errors import DataError

__all__ = [
    "Batch",
    "LoaderOptions",
    "fingerprint",
    "make_batches",
    "make_labelled_batches",
    "make_prompts",
    "read_dataset",
    "read_held_out",
    "tokenizer_of",
]

logger = logging.get_logger("transformers.optimum_qvlm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """How many samples, in what batches, up to what length in tokens, of how many token ids (None: not known)."""

    num_samples: int
    batch_size: int
    max_length: int
    seed: int
    vocabulary: int | None = None


def read_dataset(
    dataset: Any, options: LoaderOptions, *, wants_images: bool, image_tokens: Sequence[int] = ()
) -> tuple[str, list[Sample | Batch]]:
    """A description of `dataset` and at most `num_samples` of its samples.

    A dataset larger than that is sampled with the seed, in order. None is the packaged set, a string a preset.
    Dicts of ready model inputs come back as they are; their rows count as samples.

    Raises:
        DataError: empty, of no accepted form, with ids that are not the model's, or without a single image where
            `wants_images`.
    """
    source, records = _records(dataset, wants_images=wants_images)
    if len(records) == 0:
        raise DataError("the calibration dataset is empty; pass at least one sample, or None for the packaged set")
    places = draw(len(records), options.num_samples, options.seed)
    read = _read(records, places, options, options.num_samples, image_tokens)
    samples = [sample for sample in read if isinstance(sample, Sample)]
    _tell_of_answers(samples)
    if samples and wants_images and not any(sample.has_image for sample in samples):
        raise DataError(
            f"none of the {len(samples)} calibration samples has an image, but the model has a vision tower; "
            'give the records an "image", or pass dataset=None for the packaged set'
        )
    return source, read


def read_held_out(
    dataset: Any, options: LoaderOptions, *, wants_images: bool, count: int, image_tokens: Sequence[int] = ()
) -> list[Sample | Batch]:
    """At most `count` of the samples that `read_dataset` leaves out, drawn with the seed; none where it takes all."""
    _, records = _records(dataset, wants_images=wants_images)
    drawn = draw(len(records), options.num_samples, options.seed)
    places = draw_others(len(records), drawn, count, options.seed)
    return _read(records, places, options, count, image_tokens)


def make_batches(
    samples: Sequence[Sample], processor: Any, options: LoaderOptions, image_tokens: Sequence[int] = ()
) -> list[Batch]:
    """Render samples with the processor's chat template and stack them, padded on the right.

    Sequences longer than `max_length` lose their end, but never an image token: a cut that would fall before
    the last one moves behind it. Very large images make batches of fewer than `batch_size` rows.

    Raises:
        DataError: the processor refuses a batch, or the model would.
    """
    groups = group(samples, processor, options.batch_size)
    return [_make_batch(members, processor, options, image_tokens) for members in groups]


def make_labelled_batches(
    samples: Sequence[Sample], processor: Any, options: LoaderOptions, image_tokens: Sequence[int] = ()
) -> list[Batch]:
    """As `make_batches`, with `labels`: the token ids of the answers, -100 everywhere else.

    Every sample needs an answer.
    """
    batches = []
    for members in group(samples, processor, options.batch_size):
        batch = _make_batch(members, processor, options, image_tokens)
        prompts = make_prompts(members, processor, options, image_tokens)
        prompt_lengths = prompts["attention_mask"].sum(dim=1, keepdim=True)
        places = torch.arange(batch["input_ids"].shape[1], device=prompt_lengths.device)
        in_answer = (places >= prompt_lengths) & batch["attention_mask"].bool()
        batches.append({**batch, "labels": torch.where(in_answer, batch["input_ids"], -100)})
    return batches


def make_prompts(
    samples: Sequence[Sample],
    processor: Any,
    options: LoaderOptions | None = None,
    image_tokens: Sequence[int] = (),
) -> Batch:
    """Prompts without answers, padded on the left, ready for `generate`.

    With `options`, texts are shortened and ids checked as `make_batches` does; the prompts are not cut.
    """
    max_length = None if options is None else options.max_length
    batch = render(samples, processor, answered=False, side="left", max_length=max_length)
    vocabulary = None if options is None else options.vocabulary
    require_inputs(batch, [sample.where for sample in samples], vocabulary, image_tokens)
    return batch


def fingerprint(batches: Sequence[Batch]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the model inputs, in order."""
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        digest.update(b"next batch" if number > 0 else b"")
        for name in sorted(batch):
            tensor = batch[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _records(dataset: Any, *, wants_images: bool) -> tuple[str, Sequence[Any]]:
    if dataset is None:
        return "packaged", packaged.image_samples() if wants_images else packaged.text_samples()
    if isinstance(dataset, str):
        return f"preset:{dataset}", download(find_preset(dataset))
    if hasattr(dataset, "column_names") and hasattr(dataset, "__len__") and not isinstance(dataset, Mapping):
        return "datasets.Dataset", Rows(dataset) if hasattr(dataset, "with_format") else dataset
    if not isinstance(dataset, Sequence):
        raise DataError(
            "dataset must be None, a preset's name, a list or a datasets.Dataset, "
            f"got {type(dataset).__name__}; choose one split of a DatasetDict, and make a stream a list"
        )
    return "user", dataset


def _read(
    records: Sequence[Any], places: Sequence[int], options: LoaderOptions, limit: int, image_tokens: Sequence[int]
) -> list[Sample | Batch]:
    """The records at `places`, each read once; of ready model inputs as many as have `limit` rows."""
    chosen = ((f"dataset[{place}]", records[place]) for place in places)
    first = next(chosen, None)
    if first is None:
        return []
    rest = chain([first], chosen)
    if isinstance(first[1], Mapping) and first[1].get("input_ids") is not None:
        return list(_ready(rest, options, limit, image_tokens))
    return [record if isinstance(record, Sample) else read_sample(record, where) for where, record in rest]


def _ready(
    records: Iterable[tuple[str, Any]], options: LoaderOptions, limit: int, image_tokens: Sequence[int]
) -> Iterator[Batch]:
    rows, first = 0, None
    for where, record in records:
        first = where if first is None else first
        require_ready(record, where, first)
        number = record["input_ids"].shape[0]
        names = [where] if number < 2 else [f"{where}, row {row}" for row in range(number)]
        batch = {name: value for name, value in record.items() if isinstance(value, Tensor) and name != "labels"}
        require_inputs(batch, names, options.vocabulary, image_tokens)
        if rows < limit:
            rows += number
            yield batch


def _make_batch(
    samples: Sequence[Sample], processor: Any, options: LoaderOptions, image_tokens: Sequence[int]
) -> Batch:
    batch = render(samples, processor, answered=True, side="right", max_length=options.max_length)
    batch = cut(batch, options.max_length, image_tokens)
    require_inputs(batch, [sample.where for sample in samples], options.vocabulary, image_tokens)
    return batch


def _tell_of_answers(samples: Sequence[Sample]) -> None:
    several = [sample for sample in samples if sample.more_answers > 0]
    if several:
        logger.warning(
            f"{len(several)} of {len(samples)} samples list several answers, {several[0].where} the first of them; the "
            "first answer of each is used"
        )
