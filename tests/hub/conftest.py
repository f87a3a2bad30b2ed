"""The loopback Hub, and this process's huggingface_hub pointed at it."""

import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from optimum.commands.base import RootOptimumCLICommand
from optimum.commands.export.base import ExportCommand
from optimum.commands.optimum_cli import register_optimum_cli_subcommand

from optimum_qvlm.cli.command import QVLMCommand, QVLMExportCommand
from tests.hub.server import Hub, serve

TOKEN = "hf_owner"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A fresh server, an empty cache, and the owner's token in the environment.

    huggingface_hub reads HF_ENDPOINT and its like once, on import; a fresh process for every test would cost a
    minute each, so its constants are set here. test_fresh_processes.py goes the way over the environment.
    """
    with serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        yield running
        huggingface_hub.utils.close_session()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between the client's attempts take no time; returns what they would have taken."""
    pauses: list[float] = []
    real = time.sleep

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        real(min(seconds, 0.01))

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", sleep)
    return pauses


@pytest.fixture
def cli_parser() -> ArgumentParser:
    """The commands' parser, as optimum-cli builds it."""
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(ExportCommand, parent_command=root)
    register_optimum_cli_subcommand(QVLMExportCommand, parent_command=root.registered_subcommands[0])
    register_optimum_cli_subcommand(QVLMCommand, parent_command=root)
    return root.parser


@pytest.fixture(scope="session")
def model(llava_folder: Path) -> Any:
    """A tiny LLaVA at w4a8, quantized from a local folder. Read only."""
    from tests.jobs import quantize

    return quantize(llava_folder)
