"""The options of the commands, and how their words are read.

The file lies beside the commands where they are registered, and imports nothing of ours for the same reason.
"""

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

COMPRESSED_TENSORS = "compressed-tensors"
FORMATS = ("qvlm", COMPRESSED_TENSORS)
"""Of the folder that an export writes."""


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


def clips(text: str) -> list[float]:
    """Numbers with commas between them. Whether they are clips is not checked here."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        message = f"must be numbers with commas between them, as in 1,0.95,0.9, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def task(text: str) -> str:
    """What a model is loaded for, with or without `-with-past`."""
    if text.removesuffix("-with-past") not in ("auto", "image-text-to-text", "text-generation"):
        message = f"must be auto, image-text-to-text or text-generation, with or without -with-past, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return text


def leave_out_defaults(parser: argparse.ArgumentParser, kept: Collection[str]) -> None:
    """From here on the namespace holds only options that were given, and those in `kept`.

    Whoever reads it can then tell an option that equals the default from one that was left out; the help shows
    defaults as before.
    """
    for action in parser._actions:
        if action.dest not in kept and action.default is not argparse.SUPPRESS:
            action.help = None if action.help is None else action.help.replace("%(default)s", str(action.default))
            action.default = argparse.SUPPRESS


def optional_scheme(text: str) -> str | None:
    """A scheme's name, or `none` for full precision. Whether the scheme exists is not checked here."""
    return None if text == "none" else text


def override(text: str) -> tuple[str, Any]:
    """`PATTERN=SCHEME`, split at the last `=`, or `PATTERN={...}` with a JSON object."""
    if text.endswith("}"):
        pattern, _, value = text.partition("={")
        try:
            settings = json.loads("{" + value)
        except (ValueError, RecursionError) as error:
            raise argparse.ArgumentTypeError(f"what follows = is not JSON ({error}), got {text!r}") from None
        if pattern != "":
            return pattern, settings
    pattern, _, scheme = text.rpartition("=")
    if pattern == "" or scheme == "":
        message = (
            "must read PATTERN=SCHEME or PATTERN={JSON}, as in 'lm_head=w8a8', 'multi_modal_projector=none' or "
            f"'*.q_proj={{\"group_size\":32}}', got {text!r}"
        )
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
        collected: dict[str, Any] = dict(getattr(namespace, self.dest, None) or {})
        if pattern in collected:
            parser.error(f"argument {option_string}: pattern {pattern!r} is given twice; keep one of them")
        collected[pattern] = scheme
        setattr(namespace, self.dest, collected)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What is quantized, how it is loaded, where it goes."""
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the quantized model")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="of the folder: this package's own, or compressed-tensors, which stock vLLM and SGLang read too and which "
        "wants --servable (%(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="try everything on one sample, print each module's precision and what the export would cost, save nothing",
    )
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", required=True, help="folder or Hub id of the full-precision model")
    add_source_options(group)
    group.add_argument(
        "--task",
        type=task,
        default="auto",
        metavar="TASK",
        help="what the model is loaded for: auto, which decides by its configuration, image-text-to-text or "
        "text-generation; -with-past may follow, as other exporters have it (%(default)s)",
    )


def add_source_options(group: Any) -> None:
    """How any model is found and loaded."""
    group.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (%(default)s)")
    group.add_argument("--subfolder", metavar="NAME", help="folder inside the model's in which its files are")
    group.add_argument("--variant", metavar="NAME", help="of the weight files, as in model.VARIANT.safetensors")
    group.add_argument(
        "--cache-dir", "--cache_dir", metavar="FOLDER", help="where downloads are kept (default: the Hub client's)"
    )
    group.add_argument(
        "--device",
        help="device to run on, like cuda:1, or auto to spread over all (default: cuda, else cpu)",
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
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="weight grids centred on zero; --no-symmetric adds a zero point per group",
    )
    group.add_argument(
        "--two-level-scales",
        action="store_true",
        help="make weight scales of a row multiples of one step, so that a GPU reads long prompts faster",
    )
    group.add_argument(
        "--method",
        choices=("qvlm", "layerwise", "rtn"),
        default="qvlm",
        help="qvlm searches blocks, layerwise each layer alone; rtn rounds to nearest without data (%(default)s)",
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
        help=(
            "scheme of the modules whose names match, or none, or a JSON object with any of scheme, group_size and "
            "symmetric; of several given, the first match decides"
        ),
    )


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """How roundings are searched."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--effort",
        choices=("balanced", "fast"),
        default="balanced",
        help="fast tries fewer candidates and searches no blocks jointly (%(default)s)",
    )
    group.add_argument(
        "--paper",
        type=positive_int,
        nargs="?",
        const=4,
        metavar="BITS",
        help="the mode of the Q-VLM paper at so many bits (4 if none are given); other options adjust it",
    )
    group.add_argument(
        "--transforms",
        choices=("auto", "off", "equalize", "rotate", "both"),
        default="auto",
        help="what is done to activations before they are rounded; auto chooses per input (%(default)s)",
    )
    group.add_argument(
        "--error-feedback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let channels of a weight make good what rounding others did",
    )
    group.add_argument(
        "--servable", action="store_true", help="use only transforms that norms can take up, as other runtimes need"
    )
    group.add_argument(
        "--search-tokens",
        type=positive_int,
        default=2048,
        metavar="N",
        help="tokens on which candidates are compared (%(default)s)",
    )
    group.add_argument(
        "--max-block-depth",
        type=positive_int,
        default=3,
        metavar="N",
        help="layers searched together at most (%(default)s)",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="NATS",
        help="dependency of layers above which they share a block (default: the model's median)",
    )
    group.add_argument(
        "--soft-assignment",
        choices=("step_squared", "step"),
        default="step_squared",
        help="what squared distances are divided by where dependency is measured (%(default)s)",
    )
    group.add_argument(
        "--activation-range",
        choices=("dynamic", "static"),
        default="dynamic",
        help="take ranges of activations from each input, or fix them in calibration (%(default)s)",
    )
    for name in ("activation", "weight"):
        group.add_argument(
            f"--{name}-clips",
            type=clips,
            metavar="RATIO,...",
            help=f"candidates for clips of {name}s, 1 among them (default: a grid that suits the range)",
        )


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """How tower and projector are optimised."""
    group = parser.add_argument_group("visual encoder")
    group.add_argument(
        "--encoder-epochs",
        type=int,
        default=0,
        metavar="N",
        help="passes that optimise its rounding through the language model; 0 leaves that out (%(default)s)",
    )
    factors = {
        "lr": (1e-2, "learning rate of that"),
        "eta": (1.0, "share of the final error in its loss"),
        "l1": (1.0, "factor of the dependencies in its loss"),
        "l2": (10.0, "factor of the errors in its loss"),
    }
    for name, (default, shown) in factors.items():
        group.add_argument(f"--encoder-{name}", type=float, default=default, metavar="X", help=f"{shown} (%(default)s)")


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """What the saved model computes."""
    group = parser.add_argument_group("at run time")
    group.add_argument(
        "--decode-tokens",
        type=int,
        default=16,
        metavar="N",
        help="up to this many tokens in one call activations are not rounded (%(default)s)",
    )
    group.add_argument(
        "--exact-decode", action="store_true", help="round activations at every number of tokens, as the scheme says"
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
        "--processor",
        metavar="NAME",
        help="folder or Hub id of the processor that renders the samples (default: the model's own)",
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


def add_sharing_options(parser: argparse.ArgumentParser) -> None:
    """Where the result goes besides the folder, and how it is reported."""
    group = parser.add_argument_group("sharing")
    group.add_argument("--push-to-hub", metavar="REPO", help="upload the folder's files to this repository too")
    group.add_argument("--private", action="store_true", help="make the repository private if it is new")
    group.add_argument("--json", action="store_true", help="print the outcome as one JSON object on stdout")
