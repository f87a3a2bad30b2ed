"""Calibration records from a JSONL file."""

from json import JSONDecodeError
from pathlib import Path
from typing import Any

from optimum_qvlm.errors import DataError
from optimum_qvlm.files import strict_json

EXPECTED = "an object with image, question and answer, or with text"


def read_dataset(name: str | None) -> str | list[dict[str, Any]] | None:
    """Records of the file `name`, or `name` itself where it is no file: a preset's name, or None.

    Raises:
        DataError: `name` ends in `.jsonl` and there is no such file, or the file holds something else.
    """
    if name is None:
        return None
    path = Path(name)
    if is_file(path):
        return read_records(path)
    if path.suffix == ".jsonl":
        kind = "it is no regular file" if path.exists() else "there is no such file"
        raise DataError(f"dataset {name}: {kind}")
    if path.is_dir():
        raise DataError(f"dataset {name} is a folder; name the .jsonl file in it")
    return name


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON object a line; blank lines are skipped.

    Raises:
        DataError: naming file and line, where a line is not a record (see `parse_record`).
    """
    records = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() != "":
                    records.append(_parse_line(line, number, path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    if len(records) == 0:
        raise DataError(f"{path} holds no records; write {EXPECTED} in each line")
    return records


def _parse_line(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        return parse_record(line, path.parent)
    except DataError as error:
        raise DataError(f"{path}, line {number}: {error}") from error


def parse_record(line: str, folder: Path) -> dict[str, Any]:
    """One sample: `question` and optionally `answer`, `image` or `images`; or `text` alone.

    Image paths are relative to `folder` and returned absolute. Null counts as absent; other keys are dropped.

    Raises:
        DataError: the line is not such a record, or an image is missing.
    """
    try:
        record = strict_json.loads(line)
    except JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}; expected {EXPECTED}") from error
    except ValueError as error:
        raise DataError(f"not JSON: {error}; expected {EXPECTED}") from error
    if not isinstance(record, dict):
        raise DataError(f"{line.strip()[:40]!r} is not {EXPECTED}")
    texts = {key: record[key] for key in ("question", "answer", "text") if record.get(key) is not None}
    for key, value in texts.items():
        if not isinstance(value, str) or value.strip() == "":
            raise DataError(f"{key} must be text that is not blank, got {value!r}")
        require_unicode(key, value)
    if "question" not in texts:
        if "text" not in texts:
            raise DataError(f"neither question nor text among the keys {list(record)}; expected {EXPECTED}")
        return {"text": texts["text"]}
    texts.pop("text", None)
    return texts | parse_images(record, folder)


def parse_images(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`image` or `images` with absolute paths; nothing for a question about no image."""
    image, images = record.get("image"), record.get("images")
    if image is not None and images is not None:
        raise DataError("both image and images are given; keep one of them")
    if image is not None:
        return {"image": find_image(image, folder)}
    if images is None:
        return {}
    if not isinstance(images, list):
        raise DataError(f"images must be a list of paths, got {images!r}")
    return {"images": [find_image(name, folder) for name in images]}


def find_image(name: object, folder: Path) -> str:
    """Absolute path of an image file that exists."""
    if not isinstance(name, str):
        raise DataError(f"image must be a path, got {name!r}")
    require_unicode("image", name)
    path = folder.absolute() / name
    if not is_file(path):
        raise DataError(f"image {name!r} is no file; paths are relative to the folder of the .jsonl file")
    return str(path.resolve())


def is_file(path: Path) -> bool:
    """Whether it is a regular file; no for names that no file can have, and for links that lead nowhere."""
    try:
        return path.is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def require_unicode(key: str, value: str) -> None:
    """Refuse half a surrogate pair, which JSON can write and no tokenizer or file system takes.

    Raises:
        DataError: names the field.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{key} is not Unicode text ({error.reason} at character {error.start})") from error
