"""One calibration sample, from any of the forms that users have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from optimum_qvlm.errors import DataError

FORMS = (
    'a dict with "image" (or "images"), "question" and optionally "answer"; a list of chat messages, or a dict '
    'with "messages"; a text, or a dict with "text"; or a dict of ready model-input tensors with "input_ids"'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A conversation up to the answer, and the answer; or a plain text.

    Attributes:
        messages: chat messages whose content is a list of {"type": "image", "image": PIL image} and
            {"type": "text", "text": str} entries, without the answer's turn. Empty for a plain text.
        answer: the assistant's answer, None where there is none.
        text: a plain text to read, for text models.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    answer: str | None = None
    text: str | None = None

    @property
    def has_image(self) -> bool:
        """Whether any message shows an image."""
        return any(part.get("type") == "image" for m in self.messages for part in m["content"])


def read_sample(record: object, where: str) -> Sample:
    """Turn one record of a user's dataset into a sample. `where` names it in errors.

    Raises:
        DataError: the record has none of the accepted forms, or an image cannot be read.
    """
    if isinstance(record, str):
        return Sample(text=record)
    if isinstance(record, Mapping):
        if "messages" in record:
            return _from_messages(record["messages"], where)
        if "question" in record:
            return _from_question(record, where)
        if isinstance(record.get("text"), str):
            return Sample(text=record["text"])
        raise DataError(f"{where} has the keys {sorted(map(str, record))}; expected {FORMS}")
    if isinstance(record, Sequence) and record and all(isinstance(m, Mapping) and "role" in m for m in record):
        return _from_messages(record, where)
    raise DataError(f"{where} is a {type(record).__name__}; expected {FORMS}")


def _from_question(record: Mapping[str, Any], where: str) -> Sample:
    if not isinstance(record["question"], str):
        raise DataError(f"{where}: question must be a text, got {type(record['question']).__name__}")
    images = record.get("image") if record.get("images") is None else record["images"]
    if images is None:
        images = []
    elif not isinstance(images, Sequence) or isinstance(images, str):
        images = [images]
    content: list[dict[str, Any]] = [{"type": "image", "image": open_image(image, where)} for image in images]
    content.append({"type": "text", "text": record["question"]})
    answer = record.get("answer")
    return Sample(messages=({"role": "user", "content": content},), answer=None if answer is None else str(answer))


def _from_messages(messages: Any, where: str) -> Sample:
    turns: list[dict[str, Any]] = []
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"{where}: messages must be a list of chat messages, got {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise DataError(f'{where}: a chat message needs "role" and "content", got {_shown(message)}')
        turns.append({"role": message["role"], "content": _parts(message["content"], where)})
    if turns and turns[-1]["role"] == "assistant":
        answer = "".join(part.get("text", "") for part in turns.pop()["content"])
    else:
        answer = None
    if not turns:
        raise DataError(f"{where} holds no message before the answer")
    return Sample(messages=tuple(turns), answer=answer)


def _shown(message: object) -> str:
    return str(sorted(map(str, message))) if isinstance(message, Mapping) else type(message).__name__


def _parts(content: object, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise DataError(f"{where}: message content must be a text or a list of parts, got {type(content).__name__}")
    parts = []
    for part in content:
        if part.get("type") == "image":
            source = part.get("image", part.get("path", part.get("url")))
            parts.append({"type": "image", "image": open_image(source, where)})
        else:
            parts.append(dict(part))
    return parts


def open_image(source: object, where: str) -> Image.Image:
    """An RGB image from a PIL image or a file path, decoded now so that a corrupt file is found at once.

    Raises:
        DataError: not an image, missing, or corrupt.
    """
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        if isinstance(source, str | Path):
            with Image.open(source) as opened:
                return opened.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: the image {source!s} cannot be read ({error}); replace or remove it") from error
    raise DataError(f"{where}: an image must be a PIL image or a file path, got {type(source).__name__}")
