"""Photographs: taken from unpacked packages, cropped and scaled."""

from pathlib import Path
from typing import Any

from PIL import Image


def find_original(folder: Path, name: str) -> Path:
    """The file `name` in the folder that the packages were unpacked into.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {folder}; unpack there the packages that build.py --help names")
    return path


def prepare(spec: dict[str, Any], folder: Path) -> Image.Image:
    """The photograph of `spec`: `crop` in shares of the sides (left, top, right, bottom), `long_side` in pixels."""
    image = Image.open(find_original(folder, spec["file"]))
    left, top, right, bottom = spec.get("crop", (0, 0, 1, 1))
    box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    image = image.crop(tuple(round(edge) for edge in box))
    scale = spec["long_side"] / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
