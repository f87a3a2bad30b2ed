"""The commands `optimum-cli export qvlm` and `optimum-cli qvlm`: their texts and options, the work is done elsewhere.

optimum-cli imports this file on each of its runs, as `optimum.commands.register.register_qvlm`, a copy that
the build puts there with one of the options beside it. So at the top it imports of ours these alone, by where they lie:
even the package root would load transformers.
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from .qvlm_options import (
    add_model_options,
    add_setting_options,
    add_sharing_options,
    add_source_options,
    leave_out_defaults,
    positive_int,
)

EXIT_STATUS = """
exit status:
  0 done, 1 unexpected error, 2 usage or input that was refused, 3 the Hub refused or was not reached,
  130 interrupted (Ctrl-C), 143 terminated (SIGTERM)
"""

EXPORT_EPILOG = (
    """\
examples:
  Quantize with the packaged calibration samples:
    optimum-cli export qvlm --model llava-hf/llava-1.5-7b-hf --scheme w4a8 llava-w4a8/

  Calibrate on your own samples, 4-bit weights only, vision tower in full precision:
    optimum-cli export qvlm --model ./llava --scheme w4a16 --vision-scheme none \\
        --dataset samples.jsonl --num-samples 128 llava-w4a16/

  Keep the language model's first layer at 8 bits, and the projector in full precision:
    optimum-cli export qvlm --model ./llava --override '*language_model*.layers.0.*=w8a8' \\
        --modules-to-not-convert multi_modal_projector llava-mixed/

  Groups of 32 with zero points for one kind of linear:
    optimum-cli export qvlm --model ./llava \\
        --override '*.down_proj={"scheme":"w4a8","group_size":32,"symmetric":false}' llava-groups/

  The paper's mode, at 4 bits throughout:
    optimum-cli export qvlm --model ./llava --paper 4 llava-paper/

  Save, and upload to a private repository:
    optimum-cli export qvlm --model ./llava --push-to-hub me/llava-qvlm --private llava-w4a8/

  A folder for stock vLLM and SGLang:
    optimum-cli export qvlm --model ./llava --scheme w8a8 --servable --format compressed-tensors llava-ct/

  See in minutes whether that would work, how long it would take and how large the result would be:
    optimum-cli export qvlm --model ./llava --dry-run llava-w4a8/
"""
    + EXIT_STATUS
)

INFO_EPILOG = (
    """\
examples:
  optimum-cli qvlm info llava-w4a8/
  optimum-cli qvlm info me/llava-qvlm --revision main --json
"""
    + EXIT_STATUS
)

REPORT_EPILOG = (
    """\
examples:
  optimum-cli qvlm report llava-w4a8/
  optimum-cli qvlm report me/llava-qvlm --output llava.html
  optimum-cli qvlm report llava-w4a8/ --compare llava-w4a4/
"""
    + EXIT_STATUS
)

CHAT_EPILOG = (
    """\
examples:
  optimum-cli qvlm chat llava-w4a8/ --image street.jpg "How many bicycles are there?"
  optimum-cli qvlm chat ./llama-w4a16 "Name three rivers."
"""
    + EXIT_STATUS
)


def terminate(number: int, _: FrameType | None) -> NoReturn:
    """What SIGTERM does: unwind, so that temporary folders are removed. A second one is not heard meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)


class Command(BaseOptimumCLICommand):
    """What the commands share: signals and exit codes."""

    def work(self) -> int:
        """Do it; returns the exit code."""
        raise NotImplementedError

    def run(self) -> None:
        """Do it. optimum-cli drops what this returns, so other exit codes than 0 are raised."""
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            code = self.work()
        except KeyboardInterrupt:
            print(f"{self.parser.prog}: interrupted", file=sys.stderr)
            code = 130
        finally:
            signal.signal(signal.SIGTERM, before)
        if code != 0:
            raise SystemExit(code)


class QVLMExportCommand(Command):
    """`optimum-cli export qvlm`."""

    COMMAND = CommandInfo(name="qvlm", help="Quantize a vision-language model with Q-VLM.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the options to the subparser that optimum made."""
        describe(
            parser,
            "[OPTIONS] --model MODEL OUTPUT",
            "Quantize a vision-language model with Q-VLM and save it.",
            EXPORT_EPILOG,
        )
        add_model_options(parser)
        add_sharing_options(parser)
        kept = {"paper", *(action.dest for action in parser._actions)}
        add_setting_options(parser)
        leave_out_defaults(parser, kept)

    def work(self) -> int:
        """Quantize, save, and if asked upload."""
        from optimum_qvlm.cli.export import main

        return main(self.args)


class QVLMInfoCommand(Command):
    """`optimum-cli qvlm info`."""

    COMMAND = CommandInfo(name="info", help="Show what a quantized model consists of, without loading weights.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        describe(
            parser,
            "[OPTIONS] PATH_OR_REPO",
            "Check a quantized model, and show its precision, sizes and calibration.",
            INFO_EPILOG,
        )
        parser.add_argument("model", metavar="PATH_OR_REPO", help="folder or Hub id of a quantized model")
        parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
        parser.add_argument("--variant", help="of the weight files, as in model.VARIANT.safetensors")
        parser.add_argument("--json", action="store_true", help="print one JSON object, with every module")

    def work(self) -> int:
        """Read and print."""
        from optimum_qvlm.cli.info import main

        return main(self.args)


class QVLMReportCommand(Command):
    """`optimum-cli qvlm report`."""

    COMMAND = CommandInfo(name="report", help="Write the report of a quantized model as a page to look at.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        describe(
            parser,
            "[OPTIONS] PATH_OR_REPO",
            "Write the report of a quantized model, or of two side by side, as one HTML file.",
            REPORT_EPILOG,
        )
        parser.add_argument("model", metavar="PATH_OR_REPO", help="folder or Hub id of a quantized model")
        parser.add_argument("--compare", metavar="PATH_OR_REPO", help="a second model, shown beside the first")
        parser.add_argument(
            "-o",
            "--output",
            type=Path,
            default=Path("qvlm_report.html"),
            metavar="FILE",
            help="where to write the page (%(default)s)",
        )
        parser.add_argument("--revision", help="branch, tag or commit of the first on the Hub (default: main)")
        parser.add_argument("--variant", help="of the weight files, as in model.VARIANT.safetensors")

    def work(self) -> int:
        """Read, draw, write."""
        from optimum_qvlm.cli.report import main

        return main(self.args)


class QVLMChatCommand(Command):
    """`optimum-cli qvlm chat`."""

    COMMAND = CommandInfo(name="chat", help="Ask a model one question, about an image or not.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        describe(
            parser,
            "[OPTIONS] PATH QUESTION",
            "Ask a model one question; the answer is printed while it is written.",
            CHAT_EPILOG,
        )
        parser.add_argument("model", metavar="PATH", help="folder or Hub id of the model")
        parser.add_argument("question", metavar="QUESTION", help="what to ask")
        parser.add_argument("--image", action="append", type=Path, metavar="FILE", help="may be given more than once")
        parser.add_argument(
            "--max-new-tokens",
            type=positive_int,
            default=256,
            metavar="N",
            help="longest answer in tokens (%(default)s)",
        )
        add_source_options(parser)

    def work(self) -> int:
        """Load, ask, print."""
        from optimum_qvlm.cli.chat import main

        return main(self.args)


class QVLMCommand(BaseOptimumCLICommand):
    """`optimum-cli qvlm`, which shows the help of its subcommands."""

    COMMAND = CommandInfo(name="qvlm", help="Look at and try models quantized with Q-VLM.")
    SUBCOMMANDS = (
        CommandInfo(name="info", help=QVLMInfoCommand.COMMAND.help, subcommand_class=QVLMInfoCommand),
        CommandInfo(name="report", help=QVLMReportCommand.COMMAND.help, subcommand_class=QVLMReportCommand),
        CommandInfo(name="chat", help=QVLMChatCommand.COMMAND.help, subcommand_class=QVLMChatCommand),
    )


def describe(parser: argparse.ArgumentParser, usage: str, description: str, epilog: str) -> None:
    """Texts around the options, with their line breaks; `usage` in place of a list of all options, which every
    mistake would print before it says what is wrong."""
    parser.usage, parser.description, parser.epilog = f"{parser.prog} {usage}", description, epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


REGISTER_COMMANDS = [(QVLMExportCommand, ExportCommand), QVLMCommand]
"""What optimum-cli looks for in this file: a command and its parent, or one at the root."""
