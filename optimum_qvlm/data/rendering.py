"""How samples become model inputs: templates, prompts without one, padding, cutting."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from optimum_qvlm.data.inputs import stands_for_image
from optimum_qvlm.data.picture import Picture
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.errors import DataError

Batch = dict[str, Tensor]

PIXELS_AT_ONCE = 100_000_000
"""Pixels of all images that are decoded together; eight photographs of 12 megapixels are fewer."""

LETTERS_PER_TOKEN = 16
"""More than texts have, so that the beginning of a text is tokenized once to see that it is long enough."""

SPARE_TOKENS = 64
"""Tokens beyond the cut that stay in a shortened text, since a text that ends elsewhere may end in other tokens."""


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def group(samples: Sequence[Sample], processor: Any, size: int) -> list[Sequence[Sample]]:
    """The samples that are rendered together: at most `size`, and no more images than fit into memory at once.

    Without a chat template, samples with and without images are not mixed: processors take images for all or for none.
    """
    apart = _template(processor) is None
    groups: list[list[Sample]] = []
    pixels = 0
    for sample in samples:
        last = groups[-1] if groups else []
        pixels += sample.pixels
        fits = 0 < len(last) < size and pixels <= PIXELS_AT_ONCE
        if fits and not (apart and last[-1].has_image != sample.has_image):
            last.append(sample)
        else:
            groups.append([sample])
            pixels = sample.pixels
    return list(groups)


def render(
    samples: Sequence[Sample], processor: Any, *, answered: bool, side: str, max_length: int | None = None
) -> Batch:
    """Model inputs of samples, padded on one side; what a processor takes to be labels is left out.

    Texts are shortened to where they surely have more than `max_length` tokens; the caller cuts the rest.

    Raises:
        DataError: the processor refuses the samples.
    """
    tokenizer = tokenizer_of(processor)
    if max_length is not None:
        samples = [shorten(sample, tokenizer, max_length) for sample in samples]
    try:
        with _padding_side(tokenizer, side):
            encoded = _encoder(samples, processor)(samples, processor, answered)
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
        raise DataError(
            f"{type(processor).__name__} cannot process the calibration samples: {error}. Pass samples that it "
            "accepts, or ready model inputs (a list of dicts of tensors) as dataset"
        ) from error
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor) and name != "labels"}


def cut(batch: Batch, max_length: int, image_tokens: Sequence[int]) -> Batch:
    """A batch of at most `max_length` tokens, but never without its last image token."""
    ids = batch["input_ids"]
    is_image = stands_for_image(ids, image_tokens)
    last_image = int(is_image.any(dim=0).nonzero().max()) + 1 if bool(is_image.any()) else 0
    keep = max(max_length, last_image)
    if ids.shape[1] <= keep:
        return batch
    return {name: t[:, :keep] if t.dim() == 2 and t.shape == ids.shape else t for name, t in batch.items()}


def shorten(sample: Sample, tokenizer: Any, max_length: int) -> Sample:
    """The sample with each text ended somewhere behind its first `max_length` tokens, where it is much longer."""

    def short(text: str | None) -> str | None:
        length = LETTERS_PER_TOKEN * (max_length + SPARE_TOKENS)
        while text is not None and len(text) > length:
            ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= max_length + SPARE_TOKENS:
                return text[:length]
            length *= 2
        return text

    def short_part(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"text": short(part["text"])} if "text" in part else part

    messages = tuple({**turn, "content": [short_part(part) for part in turn["content"]]} for turn in sample.messages)
    return replace(sample, messages=messages, answer=short(sample.answer), text=short(sample.text))


def _template(processor: Any) -> Any:
    return getattr(processor, "chat_template", None)


def _encoder(samples: Sequence[Sample], processor: Any) -> Callable[[Sequence[Sample], Any, bool], Mapping[str, Any]]:
    """How these samples are rendered: as plain texts, by the chat template, or in the form of a family without one."""
    if all(sample.text is not None for sample in samples):
        return _encode_texts
    if _template(processor) is not None:
        return _encode_conversations
    return _encode_prompts if any(sample.has_image for sample in samples) else _encode_texts


def _encode_texts(samples: Sequence[Sample], processor: Any, answered: bool) -> Mapping[str, Any]:
    texts = []
    for sample in samples:
        question = sample.question() if sample.text is None else sample.text
        texts.append(f"{question}\n{sample.answer}" if answered and sample.answer is not None else question)
    return tokenizer_of(processor)(texts, return_tensors="pt", padding=len(texts) > 1)  # type: ignore[no-any-return]


def _encode_conversations(samples: Sequence[Sample], processor: Any, answered: bool) -> Mapping[str, Any]:
    flat = processor is tokenizer_of(processor)
    padding = len(samples) > 1
    options: dict[str, Any] = {"padding": padding} if flat else {"processor_kwargs": {"padding": padding}}
    return processor.apply_chat_template(  # type: ignore[no-any-return]
        [_conversation(sample, answered=answered, flat=flat) for sample in samples],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not answered,
        **options,
    )


def _encode_prompts(samples: Sequence[Sample], processor: Any, answered: bool) -> Mapping[str, Any]:
    """As processors of families without chat template take them, PaliGemma's among them: a text that begins with a
    token for each image, and the answer apart, as `suffix`, where the processor has such an argument."""
    if not hasattr(processor, "image_processor"):
        raise DataError(
            "the processor has no chat template, which image samples need; pass processor= with one, "
            "or ready model inputs (a list of dicts of tensors) as dataset"
        )
    token = getattr(processor, "image_token", None)
    prompts = [(token * len(sample.images) if isinstance(token, str) else "") + sample.question() for sample in samples]
    answers = [sample.answer or "" for sample in samples]
    options: dict[str, Any] = {}
    if answered and any(sample.answer is not None for sample in samples):
        if _takes_suffix(processor):
            options["suffix"] = answers
        else:
            prompts = [f"{prompt}\n{answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    images = [[_opened(image) for image in sample.images] for sample in samples]
    return processor(text=prompts, images=images, return_tensors="pt", padding=len(samples) > 1, **options)  # type: ignore[no-any-return]


def _takes_suffix(processor: Any) -> bool:
    """Whether the processor has an argument for the answer."""
    return "suffix" in signature(type(processor).__call__).parameters


def _conversation(sample: Sample, *, answered: bool, flat: bool) -> list[dict[str, Any]]:
    turns = [{**turn, "content": [_shown(part) for part in turn["content"]]} for turn in sample.messages]
    if sample.text is not None:
        turns.append({"role": "user", "content": [{"type": "text", "text": sample.text}]})
    if answered and sample.answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": sample.answer}]})
    if flat:
        for turn in turns:
            turn["content"] = "\n".join(part.get("text", "") for part in turn["content"])
    return turns


def _shown(part: Mapping[str, Any]) -> dict[str, Any]:
    return {**part, "image": _opened(part["image"])} if part.get("type") == "image" else dict(part)


def _opened(image: Picture | Image.Image) -> Image.Image:
    return image.open() if isinstance(image, Picture) else image


@contextmanager
def _padding_side(tokenizer: Any, side: str) -> Iterator[None]:
    """Pad on one side, with the end token where there is no pad token; the user's tokenizer is left as it was."""
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
