"""Fixtures that several folders share."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import AutoProcessor

from tests.tiny_models import tiny_llama, tiny_llava

collect_ignore = [] if find_spec("playwright") else ["browser"]
"""`make test-browser` has an environment of its own, with a browser."""

ROOT = Path(__file__).parent.parent

# The same examples in every run, and no time limit for one of them: machines that run tests are busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


# Tensors here are tiny: threads that wait for each other on a busy machine cost twenty times the work. Processes that
# tests start read the variable when they import torch.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA as `save_pretrained` leaves it, without a processor. Read only."""
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as `save_pretrained` leaves it, without a tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bundled_folder() -> Path:
    """The trained model with processor and chat template that comes with the repository."""
    return ROOT / "examples" / "tiny_vlm"


@pytest.fixture
def processor(bundled_folder: Path) -> Any:
    """The processor of the bundled model, fresh for every test, since tests change it."""
    return AutoProcessor.from_pretrained(bundled_folder)
