"""The journal of a calibration: where it lies, and what calibration it is of."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from torch import nn

from optimum_qvlm.files import strict_json
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.settings import RUN_TIME
from optimum_qvlm.pipeline.calibrate import CalibrationData
from optimum_qvlm.pipeline.journal import Journal, opened, source_digests, tensor_digest
from optimum_qvlm.plan import QuantPlan
from optimum_qvlm.version import __version__

CACHE = "optimum_qvlm/journals"
"""Folder of journals in that of the Hub's client."""


@contextmanager
def journal_of(
    model: nn.Module, plan: QuantPlan, config: QVLMConfig, data: CalibrationData | None, device: torch.device
) -> Iterator[Journal | None]:
    """The journal that the configuration asks for, held inside; None for none, and where nothing is searched.

    Raises:
        JournalError: it is of another calibration, in use, or cannot be written.
    """
    if config.resume is None or data is None:
        yield None
        return
    identity = {
        "source": source_digests(model, plan),
        "settings": _settings(config),
        "data": _data(data),
        "versions": {
            "optimum_qvlm": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "device": device.type,
    }
    with opened(_folder(config.resume, identity), identity) as journal:
        yield journal


def _folder(resume: Any, identity: dict[str, Any]) -> Path:
    if resume is not True:
        return Path(resume).expanduser().absolute()
    name = hashlib.sha256(strict_json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Path(HF_HOME, CACHE, name)


def _settings(config: QVLMConfig) -> dict[str, Any]:
    """Those that the result depends on."""
    values = {name: value for name, value in config.to_dict().items() if name not in (*RUN_TIME, "dataset")}
    return values


def _data(data: CalibrationData) -> dict[str, Any]:
    """What the samples are."""
    labels = {str(number): each for number, each in enumerate(data.labels)}
    return {"samples": data.recipe.samples, "inputs": data.recipe.fingerprint, "labels": tensor_digest(labels)}
