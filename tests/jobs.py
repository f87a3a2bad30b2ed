"""What users do with a model folder, in short: quantize, load, compare, run in a fresh process."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_qvlm.hf.format.record import config_digest
from tests.configs import make_config
from tests.tiny_families import FAMILIES

ROOT = Path(__file__).parent.parent


def model_type(folder: Path) -> str:
    """What config.json says."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def load(folder: Path, **options: Any) -> Any:
    """`from_pretrained` of the auto class that fits."""
    return FAMILIES[model_type(folder)].auto_class.from_pretrained(folder, **options)


def make_batch(folder: Path, seed: int = 9, **shape: int) -> dict[str, Tensor]:
    """Model inputs that fit the tiny model in `folder`, with images where its family takes them."""
    return FAMILIES[model_type(folder)].batch(seed=seed, **shape)


def quantize(folder: Path, scheme: str = "w4a8", *, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Quantize a tiny model on two ready batches; `settings` are those of `QVLMConfig`, `options` of loading."""
    settings = {"dataset": [make_batch(folder, seed=0, padding=2), make_batch(folder, seed=1)]} | settings
    return load(folder, quantization_config=make_config(scheme, **settings), **(options or {}))


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of one forward, floating inputs in the model's dtype."""
    inputs = {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    with torch.no_grad():
        return model(**inputs).logits


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of `quantization_config` in config.json; None removes a field."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    values = config["quantization_config"] | changes
    config["quantization_config"] = {name: value for name, value in values.items() if value is not None}
    path.write_text(json.dumps(config))


def forget_model_config(config: dict[str, Any]) -> None:
    """Take what the record says of the model out of the content of a config.json, as if it had never been there."""
    record = config["quantization_config"]
    del record["model_config"]
    record["digest"] = config_digest(record)


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process that can import the package and the tests, to its end."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    inherited = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    command: Sequence[str] = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=200)
