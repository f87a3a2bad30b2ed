"""An image of a sample: where it comes from, and how it is decoded."""

import io
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile

from optimum_qvlm.compat.transformers import upright_image
from optimum_qvlm.errors import DataError

DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
)
"""What Pillow raises on damaged files, depending on the format and on where the damage is."""

SHOWN = 200
"""Characters of an image's name in an error: it may be the image itself, in base64."""

Source = Image.Image | str | Path | bytes | Mapping[str, object]
"""A PIL image, a path, a `data:image/` address, the bytes of a file, or `{"bytes", "path"}` of the datasets library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image that is decoded whenever it is opened, so that many large ones take no memory between.

    Attributes:
        source: a PIL image, which stays the user's; a path, address or bytes otherwise.
        pixels: width times height.
        where: names it in errors.
    """

    source: Source
    pixels: int
    where: str = field(compare=False)

    def open(self) -> Image.Image:
        """The image in RGB, upright.

        Raises:
            DataError: it can no longer be read.
        """
        return open_image(self.source, self.where)


def read_picture(source: object, where: str) -> Picture:
    """A picture that was decoded once, so that a damaged file is found at once.

    Raises:
        DataError: as `open_image`.
    """
    width, height = open_image(source, where).size
    if isinstance(source, Path):
        source = str(source)
    if isinstance(source, Mapping):
        source = {"bytes": source.get("bytes"), "path": source.get("path")}
    return Picture(source=source, pixels=width * height, where=where)  # type: ignore[arg-type]


def open_image(source: object, where: str) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says, as transformers' own loader gives it to processors.

    Raises:
        DataError: not an image, missing, damaged, or with more pixels than Pillow decodes. `where` names it.
    """
    try:
        return _decode(source)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{where}: the image {_name(source)} is too large ({error}); shrink it, or set PIL.Image.MAX_IMAGE_PIXELS "
            "if you trust it"
        ) from error
    except DAMAGE as error:
        reason = str(error)[:SHOWN]
        raise DataError(
            f"{where}: the image {_name(source)} cannot be read ({reason}); replace or remove it"
        ) from error


def _decode(source: object) -> Image.Image:
    if isinstance(source, Image.Image):
        name = _undecoded_file(source)
        return _upright(source) if name is None else _decode_file(name, source.tell())
    if isinstance(source, str) and source.startswith("data:image/"):
        return _upright(source)
    if isinstance(source, str | Path):
        return _decode_file(os.fspath(source))
    if isinstance(source, bytes | bytearray):
        return _upright(Image.open(io.BytesIO(source)))
    if isinstance(source, Mapping) and (source.get("bytes") is not None or source.get("path") is not None):
        return _decode_stored(source)
    raise DataError(f"an image must be a PIL image or a file path, got {type(source).__name__}")


def _upright(image: str | Image.Image) -> Image.Image:
    return upright_image(image)  # type: ignore[no-any-return]


def _undecoded_file(image: Image.Image) -> str | None:
    """The file of an image that was opened but not decoded yet, since it would stay decoded in the user's hands."""
    name = getattr(image, "filename", None)
    if not (isinstance(image, ImageFile.ImageFile) and image.tile and isinstance(name, str) and os.path.isfile(name)):
        return None
    with Image.open(name) as again:
        again.seek(image.tell())
        return name if (again.size, again.mode) == (image.size, image.mode) else None


def _decode_file(name: str, frame: int = 0) -> Image.Image:
    """A frame of a regular file; opening a pipe would wait for ever."""
    if name.startswith(("http://", "https://")):
        raise DataError(f"the image {name[:SHOWN]} is an address; download it, and name the file")
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise OSError("it is no regular file")
    with open(name, "rb") as file:
        return _upright(_opened(file, frame))


def _opened(file: BinaryIO, frame: int) -> Image.Image:
    image = Image.open(file)
    image.seek(frame)
    return image


def _decode_stored(source: Mapping[str, object]) -> Image.Image:
    """A value of an image column: the file's bytes, or its path; addresses are for the library that wrote them."""
    content, path = source.get("bytes"), source.get("path")
    if content is not None:
        return _decode(content)
    if isinstance(path, str) and "://" in path:
        from datasets import Image as Column

        return _upright(Column().decode_example({"bytes": None, "path": path}))
    return _decode(path)


def _name(source: object) -> str:
    if isinstance(source, Mapping):
        source = source.get("bytes") if source.get("path") is None else source.get("path")
    if isinstance(source, bytes | bytearray):
        return f"of {len(source)} bytes"
    return str(source)[:SHOWN]
