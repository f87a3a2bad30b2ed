"""Every setting of `QVLMConfig`, declared once: its default, what it may be, its line of help.

The checks of the configuration, the options of the command and the table of the documentation come from here. The file
imports nothing of ours at its top, since the command reads it by its path, without loading the package.
"""

from dataclasses import Field, dataclass, field, fields, replace
from os import PathLike
from typing import Any, Protocol

LARGEST = 1e300
"""No number of a setting is above. Comparing with it, unlike `math.isfinite`, also takes integers of any length."""

LARGEST_COUNT = 2**31 - 1
"""Of samples, tokens, layers and epochs: larger ones do not fit where they are used."""

LARGEST_SEED = 2**63 - 1
"""The largest that torch's generators take of either sign."""

DECLARED = "setting"
"""Key of a setting's `Declaration` in the metadata of its field."""


class Kind(Protocol):
    """What a setting may be."""

    @property
    def shown(self) -> str:
        """Its type, as the documentation writes it."""

    def problem(self, value: Any) -> str | None:
        """What a value must be, behind "must be"; None where it is that."""


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer of at least `least` and at most `most`."""

    least: int = 0
    most: int = LARGEST_COUNT
    shown: str = "int"

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= self.least):
            return "a positive integer" if self.least == 1 else f"an integer of at least {self.least}"
        return None if value <= self.most else f"at most {self.most}"


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number of at least 0, above it if `positive`, and at most `most`; None too if `optional`."""

    most: float = LARGEST
    positive: bool = False
    optional: bool = False

    @property
    def shown(self) -> str:
        """See `Kind`."""
        return "float, None" if self.optional else "float"

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        if value is None and self.optional:
            return None
        if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST):
            return f"{'None or ' if self.optional else ''}a number of at least 0"
        if self.positive and value == 0:
            return "above 0"
        return None if value <= self.most else f"at most {self.most}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    @property
    def shown(self) -> str:
        """See `Kind`."""
        return ", ".join(f'`"{word}"`' for word in self.words)

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        return None if isinstance(value, str) and value in self.words else f"one of {', '.join(self.words)}"


@dataclass(frozen=True, slots=True)
class Switch:
    """True or False."""

    shown: str = "bool"

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        return None if isinstance(value, bool) else "True or False"


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that share a scale."""

    shown: str = '`"auto"`, int, None'

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        if value is None or (isinstance(value, str) and value == "auto") or Whole(1).problem(value) is None:
            return None
        return '"auto", None or a positive integer'


@dataclass(frozen=True, slots=True)
class Patterns:
    """A list of name patterns, or None."""

    shown: str = "list of str, None"

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        listed = isinstance(value, list | tuple | set | frozenset) and all(isinstance(entry, str) for entry in value)
        return None if value is None or listed else "a list of name patterns"


@dataclass(frozen=True, slots=True)
class Clips:
    """A list of ratios with 1.0 among them, or None."""

    shown: str = "list of float, None"

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        if value is None:
            return None
        listed = list(value) if isinstance(value, list | tuple | set | frozenset) else []
        if 1.0 in listed and all(Number(1.0, positive=True).problem(clip) is None for clip in listed):
            return None
        return "a list of numbers above 0 and up to 1, with 1.0 among them"


@dataclass(frozen=True, slots=True)
class Schemes:
    """Schemes of modules by name pattern, or None."""

    shown: str = "dict, None"

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        named = isinstance(value, dict) and all(isinstance(pattern, str) for pattern in value)
        return None if value is None or named else "a dict from name patterns to schemes"


@dataclass(frozen=True, slots=True)
class Other:
    """What is read elsewhere: schemes, samples, processors."""

    shown: str = "str"

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        return None


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, True for one of our choice, or None."""

    shown: str = "str, Path, True, None"

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        named = isinstance(value, str | PathLike) and str(value) != ""
        return None if value is None or value is True or named else "a folder, True or None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a setting says of itself.

    Attributes:
        kind: what it may be.
        help: one line for command and documentation.
        saved: its flat name in config.json, None where it is not saved.
        held: whether a checkpoint holds it for good, so that asking for another value at load is an error.
        former: whether it was a flat argument once, which is still taken.
    """

    kind: Kind
    help: str
    saved: str | None
    held: bool = False
    former: bool = True


def setting(
    default: Any, kind: Kind, help: str, *, saved: str | None = "", held: bool = False, former: bool = True
) -> Any:
    """A field with its `Declaration`. It is saved under its own name if `saved` is the empty string."""
    declared = Declaration(kind=kind, help=help, saved=saved, held=held, former=former)
    return field(default=default, metadata={DECLARED: declared})


def declaration(entry: "Field[Any]") -> Declaration:
    """What the field of a setting declares, with the name it is saved under."""
    declared: Declaration = entry.metadata[DECLARED]
    if declared.saved != "":
        return declared
    return replace(declared, saved=entry.name)


def require_valid(options: Any, where: str = "") -> None:
    """Check each field of an instance of the classes below.

    Raises:
        ConfigError: names the setting, behind `where`, its value and what it may be.
    """
    for entry in fields(options):
        require(declaration(entry).kind, getattr(options, entry.name), f"{where}{entry.name}")


def require(kind: Kind, value: Any, name: str) -> None:
    """Check one value.

    Raises:
        ConfigError: names it and what it may be.
    """
    problem = kind.problem(value)
    if problem is not None:
        from optimum_qvlm.errors import ConfigError

        long = isinstance(value, int) and value.bit_length() > 128
        raise ConfigError(f"{name} must be {problem}, got {'a longer integer' if long else repr(value)[:200]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How roundings are searched: settings for experiments, `QVLMConfig(search=SearchOptions(...))`.

    Raises:
        ConfigError: a field is not valid.
    """

    transforms: str = setting(
        "auto",
        Choice(("auto", "off", "equalize", "rotate", "both")),
        "what is done to activations before they are rounded; auto chooses per input",
        held=True,
    )
    error_feedback: bool = setting(True, Switch(), "let channels of a weight make good what rounding others did")
    token_weights: bool = setting(
        False, Switch(), "let errors of tokens count by what they do to the model's predictions", former=False
    )
    fitted_activations: bool = setting(
        False,
        Switch(),
        "scales of activations of at most 5 bits take a sign and the best of three sizes",
        former=False,
        held=True,
    )
    tokens: int = setting(2048, Whole(1), "tokens per site on which candidates are compared", saved="search_tokens")
    max_block_depth: int = setting(3, Whole(1), "layers searched together at most")
    threshold: float | None = setting(
        None, Number(optional=True), "dependency in nats above which layers share a block; None is the model's median"
    )
    soft_assignment: str = setting(
        "step_squared",
        Choice(("step_squared", "step")),
        "what squared distances are divided by where dependency is measured",
    )
    activation_range: str = setting(
        "dynamic",
        Choice(("dynamic", "static")),
        "take ranges of activations from each input, or fix them in calibration",
        held=True,
    )
    activation_clips: list[float] | None = setting(
        None,
        Clips(),
        "candidates for clips of activations, with 1.0: ratios of the peak, or quantiles where ranges are static",
    )
    weight_clips: list[float] | None = setting(
        None, Clips(), "candidates for clips of weights, with 1.0: ratios of the peak"
    )

    def __post_init__(self) -> None:
        require_valid(self, "search.")
        for name in ("activation_clips", "weight_clips"):
            clips = getattr(self, name)
            object.__setattr__(self, name, None if clips is None else list(clips))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderOptions:
    """How tower and projector are optimised, `QVLMConfig(encoder=EncoderOptions(...))`.

    Gradients through the language model (equations 8 to 10 of the paper) move clips, scales and equalizers after the
    search.

    Raises:
        ConfigError: a field is not valid.
    """

    epochs: int = setting(
        0,
        Whole(),
        "passes over the samples that optimise the encoder's rounding; 0 leaves that out",
        saved="encoder_epochs",
    )
    learning_rate: float = setting(
        1e-2, Number(100.0, positive=True), "of Adam, on logarithms of clips, scales and equalizers", saved="encoder_lr"
    )
    final_share: float = setting(
        1.0, Number(1e6), "eta: of the language model's final error beside the encoder's", saved="encoder_eta"
    )
    entropy_weight: float = setting(
        1.0, Number(1e6), "lambda 1: of the weighted dependencies of layers, in nats", saved="encoder_l1"
    )
    error_weight: float = setting(10.0, Number(1e6), "lambda 2: of the two relative errors", saved="encoder_l2")

    def __post_init__(self) -> None:
        require_valid(self, "encoder.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The flat arguments of `QVLMConfig`, in the order in which they are shown."""

    scheme: str = setting(
        "w4a8",
        Other(),
        "weight and activation bits of the language model: w4a16, w4a8, w4a4, w6a6, w8a8, or w<2..8>a<2..8 or 16>",
        held=True,
    )
    vision_scheme: str | None = setting(
        "w8a8", Other("str, None"), "the same for vision tower and projector; None keeps full precision", held=True
    )
    group_size: Any = setting(
        "auto", Group(), "input channels that share a scale below 8 bits: auto, a number, or None for rows", held=True
    )
    symmetric: bool = setting(
        True, Switch(), "weight grids centred on zero; False adds a zero point per group", held=True
    )
    two_level_scales: bool = setting(
        False, Switch(), "weight scales of a row are multiples of one step: a GPU reads long prompts faster", held=True
    )
    modules_to_not_convert: list[str] | None = setting(
        None, Patterns(), "patterns of modules that stay in full precision", held=True
    )
    overrides: dict[str, Any] | None = setting(
        None,
        Schemes(),
        "pattern -> scheme, None (full precision), or a dict with any of scheme, group_size, symmetric; "
        "the first match decides",
        held=True,
    )
    method: str = setting(
        "qvlm",
        Choice(("qvlm", "layerwise", "rtn")),
        "qvlm searches blocks, layerwise each site alone; rtn rounds to nearest without data",
    )
    effort: str = setting(
        "balanced", Choice(("balanced", "fast")), "fast tries fewer candidates and searches no blocks jointly"
    )
    servable: bool = setting(
        False, Switch(), "use only transforms that norms can take up, as other runtimes need", held=True
    )
    dataset: Any = setting(
        None, Other("list, Dataset, str, None"), "samples; None is the packaged set, a name a preset", saved=None
    )
    processor: Any = setting(
        None, Other("object, str, None"), "renders the samples; None is the model's own", saved=None
    )
    resume: Any = setting(
        None,
        Place(),
        "folder that keeps finished blocks, so that a calibration that was killed goes on; True is one in the cache",
        saved=None,
    )
    report_samples: str = setting(
        "auto",
        Choice(("auto", "none", "answers", "images")),
        "held-out samples in the report: questions and answers, or images too; auto keeps answers of public data",
        saved=None,
        former=False,
    )
    num_samples: int = setting(64, Whole(1), "samples to calibrate on")
    batch_size: int = setting(8, Whole(1), "samples at a time")
    max_length: int = setting(2048, Whole(1), "tokens of a sample at most; image tokens are never cut")
    seed: int = setting(0, Whole(0, LARGEST_SEED), "of everything random")
    decode_tokens: int = setting(16, Whole(), "up to this many tokens in one call activations are not rounded")
    dequantize: bool = setting(
        False, Switch(), "beside a quantized checkpoint: load plain linears with the rounded weights", saved=None
    )


NESTED = {"search": SearchOptions, "encoder": EncoderOptions}
"""Arguments of `QVLMConfig` that hold settings of their own."""


def nested_names(*, former: bool = False) -> dict[str, tuple[str, str]]:
    """By name in config.json, the argument of `QVLMConfig` that holds a setting, and the setting's name in it.

    Of `former` ones alone, those that were flat arguments too.
    """
    return {
        declaration(entry).saved or entry.name: (argument, entry.name)
        for argument, options in NESTED.items()
        for entry in fields(options)
        if declaration(entry).former or not former
    }
