"""Quantized models that the tests of this folder share."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import quantize


@pytest.fixture(scope="session")
def quantized_llava(llava_folder: Path) -> Any:
    """A tiny LLaVA at w4a8 with its tower at w8a8. Read only."""
    return quantize(llava_folder)


@pytest.fixture(scope="session")
def quantized_folder(quantized_llava: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`quantized_llava` as saved. Read only."""
    folder = tmp_path_factory.mktemp("quantized")
    quantized_llava.save_pretrained(folder)
    return folder


@pytest.fixture
def folder_copy(quantized_folder: Path, tmp_path: Path) -> Path:
    """A copy of `quantized_folder` that a test may change."""
    return Path(shutil.copytree(quantized_folder, tmp_path / "copy"))
