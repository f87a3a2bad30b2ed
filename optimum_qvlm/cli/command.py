"""The command line of `optimum-cli export qvlm`: options only, the work is in `optimum_qvlm.cli.export`.

optimum-cli imports this file on each of its runs, as `optimum.commands.register.register_qvlm`, a copy that
the build puts there. So it imports nothing of ours at the top: even the package root would load transformers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

EPILOG = """\
examples:
  Quantize with the packaged calibration samples:
    optimum-cli export qvlm --model llava-hf/llava-1.5-7b-hf --scheme w4a8 llava-w4a8/

  Calibrate on your own samples, 4-bit weights only, vision tower in full precision:
    optimum-cli export qvlm --model ./llava --scheme w4a16 --vision-scheme none \\
        --dataset samples.jsonl --num-samples 128 llava-w4a16/

  Keep the language model's first layer at 8 bits, and the projector in full precision:
    optimum-cli export qvlm --model ./llava --override '*language_model*.layers.0.*=w8a8' \\
        --modules-to-not-convert multi_modal_projector llava-mixed/

  See in minutes whether that would work, how long it would take and how large the result would be:
    optimum-cli export qvlm --model ./llava --dry-run llava-w4a8/

exit status:
  0 saved, 1 unexpected error, 2 usage or input that was refused, 130 interrupted
"""


def positive_int(text: str) -> int:
    """An integer above zero."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return value


def group_size(text: str) -> int | str | None:
    """`auto`, `none` for the whole row, or the number of input channels that share a scale."""
    if text == "auto":
        return text
    if text == "none":
        return None
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError:
        message = f"must be auto, none or a whole number above 0, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def optional_scheme(text: str) -> str | None:
    """A scheme's name, or `none` for full precision. Whether the scheme exists is not checked here."""
    return None if text == "none" else text


def override(text: str) -> tuple[str, str | None]:
    """`PATTERN=SCHEME`, split at the last `=`."""
    pattern, _, scheme = text.rpartition("=")
    if pattern == "" or scheme == "":
        message = f"must read PATTERN=SCHEME, as in 'lm_head=w8a8' or 'multi_modal_projector=none', got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return pattern, optional_scheme(scheme)


class AddOverride(argparse.Action):
    """Collects overrides in a dict, in the order given; a pattern given twice is a usage error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(values, tuple), "the type of the option is `override`"
        pattern, scheme = values
        collected: dict[str, str | None] = dict(getattr(namespace, self.dest) or {})
        if pattern in collected:
            parser.error(f"argument {option_string}: pattern {pattern!r} is given twice; keep one of them")
        collected[pattern] = scheme
        setattr(namespace, self.dest, collected)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What is quantized, how it is loaded, where it goes."""
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the quantized model")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="try everything on one sample, print each module's precision and what the export would cost, save nothing",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="folder or Hub id of the full-precision model")
    group.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (%(default)s)")
    group.add_argument(
        "--task",
        choices=("auto", "image-text-to-text", "text-generation"),
        default="auto",
        help="what the model is loaded for; auto decides by its configuration (%(default)s)",
    )
    group.add_argument(
        "--device",
        help="device to calibrate on, like cuda:1, or auto to spread over all (default: cuda, else cpu)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="precision of what is not quantized; auto keeps the checkpoint's (%(default)s)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only for sources you have read",
    )


def add_scheme_options(parser: argparse.ArgumentParser) -> None:
    """How each part of the model is quantized."""
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--scheme",
        default="w4a8",
        help="weight and activation bits of the language model: w4a16, w4a8, w4a4, w6a6, w8a8 (%(default)s)",
    )
    group.add_argument(
        "--vision-scheme",
        type=optional_scheme,
        default="w8a8",
        metavar="SCHEME",
        help="the same for vision tower and projector; none keeps them in full precision (%(default)s)",
    )
    group.add_argument(
        "--group-size",
        type=group_size,
        default="auto",
        metavar="SIZE",
        help="input channels that share a scale: auto, a number, or none for whole rows (%(default)s)",
    )
    group.add_argument(
        "--method",
        choices=("qvlm", "rtn"),
        default="qvlm",
        help="qvlm calibrates; rtn rounds to nearest without data, in seconds (%(default)s)",
    )
    group.add_argument(
        "--modules-to-not-convert",
        action="append",
        metavar="NAME",
        help="module to keep in full precision; may be given more than once",
    )
    group.add_argument(
        "--override",
        dest="overrides",
        type=override,
        action=AddOverride,
        metavar="PATTERN=SCHEME",
        help="scheme of the modules whose names match, or none; of several given, the first match decides",
    )


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """What the model is calibrated on."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--dataset",
        metavar="FILE|NAME",
        help=(
            "a .jsonl file with image, question and answer in each line, image paths relative to it, "
            "or the name of a preset (default: the packaged samples)"
        ),
    )
    group.add_argument(
        "--num-samples",
        type=positive_int,
        default=64,
        metavar="N",
        help="samples to calibrate on (%(default)s)",
    )
    group.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="samples at a time (%(default)s)"
    )
    group.add_argument(
        "--max-length",
        type=positive_int,
        default=2048,
        metavar="N",
        help="tokens a sample at most (%(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")


class QVLMExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export qvlm`."""

    COMMAND = CommandInfo(name="qvlm", help="Quantize a vision-language model with Q-VLM.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the options to the subparser that optimum made."""
        parser.description = "Quantize a vision-language model with Q-VLM and save it."
        parser.epilog = EPILOG
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        add_model_options(parser)
        add_scheme_options(parser)
        add_calibration_options(parser)

    def run(self) -> None:
        """Quantize and save. optimum-cli drops what this returns, so other exit codes than 0 are raised."""
        try:
            from optimum_qvlm.cli.export import main

            code = main(self.args)
        except KeyboardInterrupt:
            print(f"{self.parser.prog}: interrupted", file=sys.stderr)
            code = 130
        if code != 0:
            raise SystemExit(code)


REGISTER_COMMANDS = [(QVLMExportCommand, ExportCommand)]
"""What optimum-cli looks for in this file: the command and its parent."""
