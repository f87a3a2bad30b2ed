"""The options of the commands, and how their words are read.

The file lies beside the commands where they are registered, and imports nothing of ours for the same reason, but for
the declaration of settings, which is read by its path.
"""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__ == "optimum_qvlm.cli":
    from optimum_qvlm import settings as declared
else:

    def declaration_of_settings() -> Any:
        """The file of the package that declares settings, without the package, which would load transformers."""
        package = find_spec("optimum_qvlm")
        assert package is not None and package.origin is not None, "the distribution holds both"
        path = Path(package.origin).with_name("settings.py")
        spec = spec_from_file_location("optimum_qvlm_settings", path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    declared = declaration_of_settings()

GROUPS = {
    "quantization": (
        "scheme",
        "vision_scheme",
        "group_size",
        "symmetric",
        "two_level_scales",
        "modules_to_not_convert",
        "overrides",
    ),
    "search": ("method", "effort", "servable"),
    "at run time": ("decode_tokens",),
    "calibration": (
        "dataset",
        "processor",
        "resume",
        "report_samples",
        "num_samples",
        "batch_size",
        "max_length",
        "seed",
    ),
}
"""Settings that have an option of their own, by the title they stand under in the help."""

HELP = {
    "modules_to_not_convert": "module to keep in full precision; may be given more than once",
    "overrides": "scheme of the modules whose names match, or none, or a JSON object with any of scheme, group_size "
    "and symmetric; of several given, the first match decides",
    "dataset": "a .jsonl file with image, question and answer in each line, image paths relative to it, or the name of "
    "a preset (default: the packaged samples)",
    "processor": "folder or Hub id of the processor that renders the samples (default: the model's own)",
    "resume": "keep finished blocks in this folder, or in the cache if none is named, so that the same command goes on "
    "where it was killed; removed once the model is saved",
    "symmetric": "weight grids centred on zero; --no-symmetric adds a zero point per group",
}
"""Where a line of help says something else in a terminal than beside a Python argument."""

METAVARS = {
    "overrides": "PATTERN=SCHEME",
    "modules_to_not_convert": "NAME",
    "dataset": "FILE|NAME",
    "processor": "NAME",
}

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


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """One option for each setting, read as its declaration says, and `--search` and `--encoder` for those in them."""
    entries = {entry.name: entry for entry in fields(declared.Settings)}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            option = "--override" if name == "overrides" else f"--{name.replace('_', '-')}"
            group.add_argument(option, dest=name, **described(entries[name]))
        if title == "search":
            group.add_argument(
                "--paper",
                type=positive_int,
                nargs="?",
                const=4,
                metavar="BITS",
                help="the mode of the Q-VLM paper at so many bits (4 if none are given); other options adjust it",
            )
            for argument, options in declared.NESTED.items():
                group.add_argument(
                    f"--{argument}",
                    action=AddField,
                    metavar="NAME=VALUE",
                    help=f"for experiments, may be given more than once: {listed(options)}",
                )
    add_former_options(parser)


def add_former_options(parser: argparse.ArgumentParser) -> None:
    """Options of before, which the help does not show: `--search` and `--encoder` have taken their place."""
    for former, (argument, name) in declared.nested_names(former=True).items():
        entry = next(entry for entry in fields(declared.NESTED[argument]) if entry.name == name)
        shown = described(entry) | {"help": argparse.SUPPRESS}
        parser.add_argument(f"--{former.replace('_', '-')}", dest=former, **shown)
    parser.add_argument("--exact-decode", action="store_true", help=argparse.SUPPRESS)


def described(entry: Any) -> dict[str, Any]:
    """What argparse is told of a setting's option."""
    kind, default = declared.declaration(entry).kind, entry.default
    shown = HELP.get(entry.name, declared.declaration(entry).help.replace("None", "none"))
    values: dict[str, Any] = {"default": default, "help": shown}
    if isinstance(kind, declared.Switch):
        return values | {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if default is not None:
        values["help"] += " (%(default)s)"
    if isinstance(kind, declared.Choice):
        return values | {"choices": kind.words}
    if isinstance(kind, declared.Patterns):
        return values | {"action": "append", "metavar": METAVARS[entry.name]}
    if isinstance(kind, declared.Schemes):
        return values | {"action": AddOverride, "type": override, "metavar": METAVARS[entry.name]}
    if isinstance(kind, declared.Place):
        return values | {"nargs": "?", "const": True, "metavar": "FOLDER"}
    return values | {"type": reader(entry), "metavar": METAVARS.get(entry.name, _metavar(kind))}


def reader(entry: Any) -> Callable[[str], Any]:
    """How the word behind a setting's option is read."""
    kind = declared.declaration(entry).kind
    if isinstance(kind, declared.Whole):
        return positive_int if kind.least == 1 else int
    if isinstance(kind, declared.Other):
        return optional_scheme if entry.name == "vision_scheme" else str
    readers: dict[type, Callable[[str], Any]] = {
        declared.Number: float,
        declared.Group: group_size,
        declared.Clips: clips,
        declared.Switch: switch,
    }
    return readers.get(type(kind), str)


def _metavar(kind: Any) -> str:
    metavars = {declared.Whole: "N", declared.Number: "X", declared.Group: "SIZE", declared.Clips: "RATIO,..."}
    return metavars.get(type(kind), "SCHEME")


def listed(options: type) -> str:
    """The fields of nested settings with their defaults, for the help."""
    return ", ".join(f"{entry.name}={str(entry.default).lower()}" for entry in fields(options))


def switch(text: str) -> bool:
    """`true` or `false`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


class AddField(argparse.Action):
    """Collects `NAME=VALUE` in a dict; unknown names and values that cannot be read are usage errors."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        entries = {entry.name: entry for entry in fields(declared.NESTED[self.dest])}
        name, equals, text = str(values).partition("=")
        if not equals or name not in entries:
            parser.error(
                f"argument {option_string}: must read NAME=VALUE with one of {', '.join(entries)}, got {values!r}"
            )
        try:
            value = None if text == "none" and entries[name].default is None else reader(entries[name])(text)
        except (argparse.ArgumentTypeError, ValueError) as error:
            parser.error(f"argument {option_string}: {name}: {error}")
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest, None) or {}), name: value})


def add_sharing_options(parser: argparse.ArgumentParser) -> None:
    """Where the result goes besides the folder, and how it is reported."""
    group = parser.add_argument_group("sharing")
    group.add_argument("--push-to-hub", metavar="REPO", help="upload the folder's files to this repository too")
    group.add_argument("--private", action="store_true", help="make the repository private if it is new")
    group.add_argument("--json", action="store_true", help="print the outcome as one JSON object on stdout")
