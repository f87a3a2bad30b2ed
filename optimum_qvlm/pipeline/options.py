"""What a calibration is asked to do, as validated values."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.quant.spec import GroupSize, Scheme
from optimum_qvlm.search.rounding import ClipGrids, SiteOptions
from optimum_qvlm.search.transforms import KINDS, Kind, TransformOptions
from optimum_qvlm.search.weights import FeedbackOptions

Method = Literal["qvlm", "rtn"]
Effort = Literal["fast", "balanced"]
Transforms = Literal["auto"] | Kind

_FAST_CLIPS = ClipGrids(activation=(1.0,), weight=(1.0, 0.9, 0.8))
_FAST_EXPONENTS = (0.5,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearChoice:
    """Scheme and weight grid asked for one linear or one part; `scheme` None keeps full precision."""

    scheme: Scheme | None
    group_size: GroupSize = "auto"
    symmetric: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """Schemes per part and pattern, and how to search.

    Attributes:
        language: for the decoder's linears.
        vision: for the linears of the tower and the projector.
        keep: name patterns that stay in full precision.
        overrides: (pattern, choice), the first that matches a name decides.
        method: "qvlm" searches, "rtn" rounds to nearest without data.
        search_tokens: tokens per site that candidates are compared on, drawn with the seed.
        search: what the search of a site may do.
    """

    language: LinearChoice
    vision: LinearChoice
    keep: tuple[str, ...] = ()
    overrides: tuple[tuple[str, LinearChoice], ...] = ()
    method: Method = "qvlm"
    seed: int = 0
    search_tokens: int = 2048
    search: SiteOptions = field(default_factory=SiteOptions)


def site_options(effort: Effort, transforms: Transforms, *, error_feedback: bool) -> SiteOptions:
    """What the search of a site may do. `"fast"` tries fewer clips and a single balance of equalisation."""
    clips = _FAST_CLIPS if effort == "fast" else ClipGrids()
    kinds = KINDS if transforms == "auto" else (transforms,)
    exponents = _FAST_EXPONENTS if effort == "fast" else TransformOptions().exponents
    return SiteOptions(
        clips=clips,
        transforms=None if kinds == ("off",) else TransformOptions(kinds=kinds, exponents=exponents),
        feedback=FeedbackOptions() if error_feedback else None,
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a module: shell-style (`*.mlp.*`), or a run of whole dotted components."""
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def require_matches(patterns: Iterable[str], names: Iterable[str], field_name: str) -> None:
    """Refuse a pattern that matches nothing, since it is a typing error or a wrong idea of the model.

    Raises:
        ConfigError: with the closest names.
    """
    known = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in known):
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
            raise ConfigError(f"{field_name}: {pattern!r} matches no linear of the model; close: {', '.join(close)}")
