"""The parser that optimum-cli builds."""

from argparse import ArgumentParser

import pytest
from optimum.commands.base import RootOptimumCLICommand
from optimum.commands.export.base import ExportCommand
from optimum.commands.optimum_cli import register_optimum_cli_subcommand

from optimum_qvlm.cli.command import QVLMCommand, QVLMExportCommand


@pytest.fixture
def parser() -> ArgumentParser:
    """The whole parser, with `export qvlm` and `qvlm` registered as optimum-cli does it."""
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(ExportCommand, parent_command=root)
    register_optimum_cli_subcommand(QVLMExportCommand, parent_command=root.registered_subcommands[0])
    register_optimum_cli_subcommand(QVLMCommand, parent_command=root)
    return root.parser
