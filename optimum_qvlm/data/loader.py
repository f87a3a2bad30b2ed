"""From a user's dataset and a processor to batches of model inputs."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from optimum_qvlm.data import packaged
from optimum_qvlm.data.recipe import Preset, find_preset
from optimum_qvlm.data.sample import Sample, read_sample
from optimum_qvlm.errors import DataError

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """How many samples, in what batches, up to what length in tokens."""

    num_samples: int
    batch_size: int
    max_length: int
    seed: int


def read_dataset(dataset: Any, options: LoaderOptions, *, wants_images: bool) -> tuple[str, list[Sample | Batch]]:
    """A description of `dataset` and at most `num_samples` of its samples.

    A dataset larger than that is sampled with the seed, in order. None is the packaged set, a string a preset.
    Dicts of ready model inputs come back as they are; their rows count as samples.

    Raises:
        DataError: empty, of no accepted form, or without a single image where `wants_images`.
    """
    source, records = _records(dataset, wants_images=wants_images)
    if len(records) == 0:
        raise DataError("the calibration dataset is empty; pass at least one sample, or None for the packaged set")
    chosen = [(place, records[place]) for place in _places(len(records), options)]
    if _is_model_input(chosen[0][1]):
        return source, list(_ready(chosen, options.num_samples))
    samples = [_sample(place, record) for place, record in chosen]
    if wants_images and not any(sample.has_image for sample in samples):
        raise DataError(
            f"none of the {len(samples)} calibration samples has an image, but the model has a vision tower; "
            'give the records an "image", or pass dataset=None for the packaged set'
        )
    return source, list(samples)


def read_held_out(dataset: Any, options: LoaderOptions, *, wants_images: bool, count: int) -> list[Sample | Batch]:
    """At most `count` of the samples that `read_dataset` leaves out, drawn with the seed; none where it takes all."""
    _, records = _records(dataset, wants_images=wants_images)
    taken = set(_places(len(records), options))
    left = [place for place in range(len(records)) if place not in taken]
    places = sorted(random.Random(options.seed).sample(left, min(count, len(left))))
    chosen = [(place, records[place]) for place in places]
    if chosen and _is_model_input(chosen[0][1]):
        return list(_ready(chosen, count))
    return [_sample(place, record) for place, record in chosen]


def make_batches(
    samples: Sequence[Sample], processor: Any, options: LoaderOptions, image_tokens: Sequence[int] = ()
) -> list[Batch]:
    """Render samples with the processor's chat template and stack them, padded on the right.

    Sequences longer than `max_length` lose their end, but never an image token: a cut that would fall before
    the last one moves behind it.

    Raises:
        DataError: the processor has no chat template, or refuses a batch.
    """
    batches = []
    iterator = iter(samples)
    while group := list(islice(iterator, options.batch_size)):
        with _padding_side(processor, "right"):
            batch = _render(group, processor, answered=True)
        batches.append(_cut(batch, options.max_length, image_tokens))
    return batches


def make_labelled_batches(
    samples: Sequence[Sample], processor: Any, options: LoaderOptions, image_tokens: Sequence[int] = ()
) -> list[Batch]:
    """As `make_batches`, with `labels`: the token ids of the answers, -100 everywhere else.

    Every sample needs an answer.
    """
    batches = make_batches(samples, processor, options, image_tokens)
    for number, batch in enumerate(batches):
        group = samples[number * options.batch_size : (number + 1) * options.batch_size]
        prompt_lengths = make_prompts(group, processor)["attention_mask"].sum(dim=1, keepdim=True)
        places = torch.arange(batch["input_ids"].shape[1], device=prompt_lengths.device)
        in_answer = (places >= prompt_lengths) & batch["attention_mask"].bool()
        batch["labels"] = torch.where(in_answer, batch["input_ids"], -100)
    return batches


def make_prompts(samples: Sequence[Sample], processor: Any) -> Batch:
    """Prompts without answers, padded on the left, ready for `generate`."""
    with _padding_side(processor, "left"):
        return _render(list(samples), processor, answered=False)


def stands_for_image(ids: Tensor, image_tokens: Sequence[int]) -> Tensor:
    """bool of the shape of `ids`: which token ids are among the image tokens."""
    return torch.isin(ids, torch.tensor(list(image_tokens), dtype=ids.dtype, device=ids.device))


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


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def _records(dataset: Any, *, wants_images: bool) -> tuple[str, Sequence[Any]]:
    if dataset is None:
        return "packaged", packaged.image_samples() if wants_images else packaged.text_samples()
    if isinstance(dataset, str):
        return f"preset:{dataset}", _download(find_preset(dataset))
    if hasattr(dataset, "column_names") and hasattr(dataset, "__len__") and not isinstance(dataset, Mapping):
        return "datasets.Dataset", dataset
    if not isinstance(dataset, Sequence):
        raise DataError(
            "dataset must be None, a preset's name, a list or a datasets.Dataset, "
            f"got {type(dataset).__name__}; choose one split of a DatasetDict, and make a stream a list"
        )
    return "user", dataset


def _places(count: int, options: LoaderOptions) -> list[int]:
    """Which of `count` records are calibrated on."""
    places = list(range(count))
    if count <= options.num_samples:
        return places
    return sorted(random.Random(options.seed).sample(places, options.num_samples))


def _sample(place: int, record: Any) -> Sample:
    return record if isinstance(record, Sample) else read_sample(record, f"dataset[{place}]")


def _download(preset: Preset) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("a preset needs the datasets library: pip install 'optimum-qvlm[datasets]'") from error
    try:
        rows = datasets.load_dataset(preset.path, preset.name, split=preset.split, revision=preset.revision)
        columns = {preset.question, preset.answer, preset.image, preset.choices} - {None}
        missing = columns - set(rows.column_names)
        if missing:
            raise ValueError(f"it has no column {', '.join(sorted(map(str, missing)))}")
    except (OSError, ValueError) as error:
        raise DataError(
            f"the preset's dataset {preset.path} could not be loaded ({error}); check the connection, or pass your own "
            "samples as dataset"
        ) from error
    records = []
    for row in rows:
        if preset.image is not None and row[preset.image] is None:
            continue
        answer = row[preset.answer]
        if preset.choices is not None:
            answer = row[preset.choices][answer]
        record = {
            "question": row[preset.question],
            "answer": answer[0] if isinstance(answer, list) else answer,
        }
        if preset.image is not None:
            record["image"] = row[preset.image]
        records.append(record)
    return records


def _is_model_input(record: Any) -> bool:
    return isinstance(record, Mapping) and isinstance(record.get("input_ids"), Tensor)


def _ready(records: Sequence[tuple[int, Any]], limit: int) -> Iterator[Batch]:
    rows = 0
    for number, record in records:
        if not _is_model_input(record) or record["input_ids"].dim() != 2:
            raise DataError(
                f"dataset[{number}] must be a dict of model inputs with input_ids [rows, tokens], as dataset[0] is"
            )
        if rows < limit:
            rows += record["input_ids"].shape[0]
            yield {name: value for name, value in record.items() if isinstance(value, Tensor) and name != "labels"}


def _render(samples: Sequence[Sample], processor: Any, *, answered: bool) -> Batch:
    tokenizer = tokenizer_of(processor)
    template = getattr(processor, "chat_template", None)
    try:
        if template is None or all(sample.text is not None for sample in samples):
            encoded = tokenizer(
                [_plain(sample, answered=answered) for sample in samples], return_tensors="pt", padding=True
            )
        else:
            flat = processor is tokenizer
            padding: dict[str, Any] = {"padding": True} if flat else {"processor_kwargs": {"padding": True}}
            encoded = processor.apply_chat_template(
                [_conversation(sample, answered=answered, flat=flat) for sample in samples],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=not answered,
                **padding,
            )
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
        raise DataError(
            f"{type(processor).__name__} cannot process the calibration samples: {error}. Pass samples that it "
            "accepts, or ready model inputs (a list of dicts of tensors) as dataset"
        ) from error
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor)}


def _conversation(sample: Sample, *, answered: bool, flat: bool) -> list[dict[str, Any]]:
    turns = [dict(message) for message in sample.messages]
    if sample.text is not None:
        turns.append({"role": "user", "content": [{"type": "text", "text": sample.text}]})
    if answered and sample.answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": sample.answer}]})
    if flat:
        for turn in turns:
            turn["content"] = "\n".join(part.get("text", "") for part in turn["content"])
    return turns


def _plain(sample: Sample, *, answered: bool) -> str:
    if sample.has_image:
        raise DataError(
            "the processor has no chat template, which image samples need; pass processor= with one, "
            "or ready model inputs (a list of dicts of tensors) as dataset"
        )
    if sample.text is not None:
        return sample.text
    question = "\n".join(part.get("text", "") for message in sample.messages for part in message["content"])
    return f"{question}\n{sample.answer}" if answered and sample.answer is not None else question


def _cut(batch: Batch, max_length: int, image_tokens: Sequence[int]) -> Batch:
    ids = batch["input_ids"]
    is_image = stands_for_image(ids, image_tokens)
    last_image = int(is_image.any(dim=0).nonzero().max()) + 1 if bool(is_image.any()) else 0
    keep = max(max_length, last_image)
    if ids.shape[1] <= keep:
        return batch
    return {name: t[:, :keep] if t.dim() == 2 and t.shape == ids.shape else t for name, t in batch.items()}


@contextmanager
def _padding_side(processor: Any, side: str) -> Iterator[None]:
    """Pad on one side, with the end token where there is no pad token; the user's tokenizer is left as it was."""
    tokenizer = tokenizer_of(processor)
    before, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = side
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = before
        if pad is None:
            tokenizer.pad_token = None
