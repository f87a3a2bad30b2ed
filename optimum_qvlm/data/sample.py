"""One calibration sample, from any of the forms that users have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from optimum_qvlm.data.picture import Picture, read_picture
from optimum_qvlm.errors import DataError

FORMS = (
    'a dict with "image" (or "images"), "question" and optionally "answer"; a list of chat messages, or a dict '
    'with "messages" and optionally "images"; a text, or a dict with "text"; or a dict of ready model-input tensors '
    'with "input_ids"'
)

IMAGE_KEYS = ("image", "path", "url")
"""Where a part of a chat message holds its image, in the order in which they count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A conversation up to the answer, and the answer; or a plain text.

    Attributes:
        messages: chat messages whose content is a list of {"type": "image", "image": `Picture` or PIL image} and
            {"type": "text", "text": str} entries, without the answer's turn. Empty for a plain text.
        answer: the assistant's answer, None where there is none.
        text: a plain text to read, for text models.
        where: names the sample in errors.
        more_answers: how many answers the record lists beyond the one that is used.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    answer: str | None = None
    text: str | None = None
    where: str = field(default="a sample", compare=False)
    more_answers: int = field(default=0, compare=False)

    @property
    def images(self) -> list[Any]:
        """The images of all messages, in order."""
        return [part["image"] for part in self.parts() if part.get("type") == "image"]

    @property
    def has_image(self) -> bool:
        """Whether any message shows an image."""
        return bool(self.images)

    @property
    def pixels(self) -> int:
        """Of all its images together."""
        return sum(i.pixels if isinstance(i, Picture) else i.width * i.height for i in self.images)

    def parts(self) -> list[Mapping[str, Any]]:
        """The parts of all messages, in order."""
        return list(chain.from_iterable(message["content"] for message in self.messages))

    def question(self) -> str:
        """The texts of all messages, one a line."""
        return "\n".join(part.get("text", "") for part in self.parts() if part.get("type") != "image")


def read_sample(record: object, where: str) -> Sample:
    """Turn one record of a user's dataset into a sample. `where` names it in errors.

    Raises:
        DataError: the record has none of the accepted forms or is empty, or an image cannot be read.
    """
    sample = _read(record, where)
    if sample.text is None and sample.has_image:
        return sample
    if not (sample.text or sample.question() or sample.answer or "").strip():
        raise DataError(f"{where} holds neither text nor image; fill or remove it")
    return sample


def _read(record: object, where: str) -> Sample:
    if isinstance(record, str):
        return Sample(text=record, where=where)
    if isinstance(record, Mapping):
        given = {key for key in ("messages", "question", "text") if record.get(key) is not None}
        if "messages" in given:
            return _from_messages(record["messages"], _images(record), where)
        if "question" in given:
            return _from_question(record, where)
        if "text" in given and isinstance(record["text"], str):
            return Sample(text=record["text"], where=where)
        empty = next((key for key in ("messages", "question", "text") if key in record and key not in given), None)
        if empty is not None:
            raise DataError(f"{where}: {empty} is None; expected {FORMS}")
        raise DataError(f"{where} has the keys {sorted(map(str, record))}; expected {FORMS}")
    if isinstance(record, Sequence) and record and all(isinstance(m, Mapping) and "role" in m for m in record):
        return _from_messages(record, [], where)
    raise DataError(f"{where} is a {type(record).__name__}; expected {FORMS}")


def _images(record: Mapping[str, Any]) -> list[Any]:
    """What the record has under "images", or under "image" where that is None."""
    images = record.get("image") if record.get("images") is None else record["images"]
    if not isinstance(images, Sequence) or isinstance(images, str | bytes | bytearray):
        images = [images]
    return [image for image in images if image is not None]


def _from_question(record: Mapping[str, Any], where: str) -> Sample:
    if not isinstance(record["question"], str):
        raise DataError(f"{where}: question must be a text, got {type(record['question']).__name__}")
    content = [{"type": "image", "image": read_picture(image, where)} for image in _images(record)]
    content.append({"type": "text", "text": record["question"]})
    answer, more_answers = _first_answer(record.get("answer"), where)
    messages = ({"role": "user", "content": content},)
    return Sample(messages=messages, answer=answer, where=where, more_answers=more_answers)


def _first_answer(answer: Any, where: str) -> tuple[str | None, int]:
    """The answer as text, of several the first, and how many there are beyond it."""
    listed = [answer]
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        listed = list(answer)
    listed = [one for one in listed if one is not None]
    if not listed:
        return None, 0
    if isinstance(listed[0], Mapping | Sequence) and not isinstance(listed[0], str):
        raise DataError(f"{where}: answer must be a text or a list of texts, got a {type(listed[0]).__name__}")
    return str(listed[0]), len(listed) - 1


def _from_messages(messages: Any, images: list[Any], where: str) -> Sample:
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
    _place_images(turns, images, where)
    return Sample(messages=tuple(turns), answer=answer, where=where)


def _shown(message: object) -> str:
    return str(sorted(map(str, message))) if isinstance(message, Mapping) else type(message).__name__


def _parts(content: object, where: str) -> list[dict[str, Any]]:
    """The parts of a message, without what is None: rows of a table name every key that any row has. An image part
    has its picture under "image", or is without if its image is in a column of its own."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise DataError(f"{where}: message content must be a text or a list of parts, got {type(content).__name__}")
    return [_part({key: value for key, value in part.items() if value is not None}, where) for part in content]


def _part(part: dict[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "image_url":
        address = part.get("image_url")
        kind, part = "image", {"url": address.get("url") if isinstance(address, Mapping) else address}
    if kind == "image":
        source = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
        if source is None and "base64" in part:
            source = f"data:image/;base64,{part['base64']}"
        return {"type": "image"} if source is None else {"type": "image", "image": read_picture(source, where)}
    if kind is None:
        raise DataError(f'{where}: a part of a message needs a "type", got {_shown(part)}')
    if kind == "text" and not isinstance(part.get("text"), str):
        raise DataError(f'{where}: a part of type "text" needs a "text", got {_shown(part)}')
    return part


def _place_images(turns: list[dict[str, Any]], images: list[Any], where: str) -> None:
    """Give the parts that name no image those of the record, in order; without such parts and without any other
    image, they come before the user's first words."""
    shown = [part for turn in turns for part in turn["content"] if part.get("type") == "image"]
    empty = [part for part in shown if "image" not in part]
    if images and not shown:
        empty = [{"type": "image"} for _ in images]
        first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        first["content"][:0] = empty
    if empty and len(empty) != len(images):
        raise DataError(
            f'{where}: {len(empty)} parts of its messages are {{"type": "image"}} without an image, and "images" has '
            f"{len(images)}; give one for each"
        )
    for part, image in zip(empty, images, strict=False):
        part["image"] = read_picture(image, where)
