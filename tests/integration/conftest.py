"""Quantized folders that the integration tests share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.jobs import logits, make_batch, quantize

SCHEMES = ("w4a16", "w4a8", "w4a4", "w6a6", "w8a8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model that was quantized and saved, and its logits on a batch that it was not calibrated on."""

    model: Any
    source: Path
    folder: Path
    batch: dict[str, Tensor]
    logits: Tensor


@pytest.fixture(scope="session")
def job(llava_folder: Path, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Quantizes and saves each family and setting once. Read only."""
    sources = {"llava": llava_folder, "llama": llama_folder}
    done: dict[tuple[Any, ...], Job] = {}

    def quantized(family: str, scheme: str = "w4a8", *, dtype: torch.dtype = torch.float32, **settings: Any) -> Job:
        key = (family, scheme, dtype, *sorted(settings.items()))
        if key not in done:
            source, folder = sources[family], tmp_path_factory.mktemp("job")
            model = quantize(source, scheme, options={"dtype": dtype}, **settings)
            model.save_pretrained(folder)
            batch = make_batch(source, padding=3)
            done[key] = Job(model=model, source=source, folder=folder, batch=batch, logits=logits(model, batch))
        return done[key]

    return quantized
