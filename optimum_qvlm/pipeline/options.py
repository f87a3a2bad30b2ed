"""What a calibration is asked to do, as validated values."""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.plan import Block
from optimum_qvlm.quant.entropy import Softness
from optimum_qvlm.search.error_feedback import FeedbackOptions
from optimum_qvlm.search.site import ClipGrids, SiteOptions
from optimum_qvlm.search.transforms import KINDS, Kind, TransformOptions
from optimum_qvlm.settings import EncoderOptions
from optimum_qvlm.spec import GroupSize, Scheme, WeightSpec

Method = Literal["qvlm", "layerwise", "rtn"]
Effort = Literal["fast", "balanced"]
Transforms = Literal["auto"] | Kind

FAST_CLIPS = ClipGrids(activation=(1.0,), weight=(1.0, 0.9, 0.8))
"""What `effort="fast"` tries without error feedback."""

FEEDBACK_CLIPS = tuple(1.0 - step / 40 for step in range(13))
"""Weight clips that are tried with error feedback, where each costs little; every second with `effort="fast"`."""

REFINING_SWEEPS = 2
"""Of scales and codes behind error feedback with `effort="balanced"`."""

FOLDED: tuple[Kind, ...] = ("off", "equalize")
"""Transforms among which a site chooses whose norm takes up the equalizer."""

_FAST_EXPONENTS = (0.5,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearChoice:
    """Grids asked for one linear or one part.

    Attributes:
        weight: the weight's grid, whose group `group_size` says for each linear; None keeps full precision. Scales on
            two levels are left out where no product gains by them, see `optimum_qvlm.pipeline.planner`.
        activation_bits: of activations; None leaves them.
        group_size: as in `WeightSpec.grouped`.
        static: whether calibration fixes the range of activations.
        fitted: whether dynamic activations of few bits choose sign and size of each scale, which other runtimes do not.
    """

    weight: WeightSpec | None
    activation_bits: int | None = None
    group_size: GroupSize = "auto"
    static: bool = False
    fitted: bool = True

    @property
    def scheme(self) -> Scheme | None:
        """The bits of both; None keeps full precision."""
        return None if self.weight is None else Scheme(self.weight.bits, self.activation_bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """Schemes per part and pattern, and how to search.

    Attributes:
        language: for the decoder's linears.
        vision: for the linears of the tower and the projector.
        keep: name patterns that stay in full precision.
        overrides: (pattern, choice), the first that matches a name decides.
        method: "qvlm" searches blocks, "layerwise" each site alone, "rtn" rounds to nearest without data.
        search_tokens: tokens per site that the search looks at, drawn with the seed; a joint search runs blocks on
            as many, in whole batches.
        max_block_depth: layers of a block at most.
        threshold: h0 of the partition, None for the median dependency of the model.
        softness: of the assignment that dependency is measured with.
        joint: search the sites of each block together, on blocks formed by dependency.
        search: what the search of a site may do.
        blocks: to search in place of those that the measured dependency gives; every layer once, in order.
        encoder: how tower and projector are optimised after their search.
        fold: let norms take up the equalizers; sites behind none get no transform.
        weighs_tokens: let errors of tokens count by what they do to the model's predictions, see
            `optimum_qvlm.pipeline.token_weights`.
    """

    language: LinearChoice
    vision: LinearChoice
    keep: tuple[str, ...] = ()
    overrides: tuple[tuple[str, LinearChoice], ...] = ()
    method: Method = "qvlm"
    seed: int = 0
    search_tokens: int = 2048
    joint: bool = True
    max_block_depth: int = 3
    threshold: float | None = None
    softness: Softness = "step_squared"
    search: SiteOptions = field(default_factory=SiteOptions)
    blocks: tuple[Block, ...] | None = None
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    fold: bool = False
    weighs_tokens: bool = False


def site_options(
    clips: ClipGrids, effort: Effort, transforms: Transforms, *, error_feedback: bool, fold: bool = False
) -> SiteOptions:
    """What the search of a site may do with these clips.

    `"fast"` tries a single balance of equalisation, and refines nothing behind error feedback. With `fold` there is no
    rotation, which no norm can take up.
    """
    kinds: tuple[Kind, ...] = (transforms,) if transforms != "auto" else FOLDED if fold else KINDS
    exponents = _FAST_EXPONENTS if effort == "fast" else TransformOptions().exponents
    return SiteOptions(
        clips=clips,
        transforms=None if kinds == ("off",) else TransformOptions(kinds=kinds, exponents=exponents),
        feedback=FeedbackOptions(sweeps=0 if effort == "fast" else REFINING_SWEEPS) if error_feedback else None,
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a module: shell-style (`*.mlp.*`), or a run of whole dotted components."""
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def keeps(pattern: str, name: str) -> bool:
    """Whether a pattern keeps a module in full precision: as `matches`, or by the rule of transformers.

    That rule, as of its 5.24: the pattern is a regular expression for the start of the name up to the end of a
    component, or the end of the name as it is. What is no regular expression, as `*.mlp.*`, is shell-style only.
    """
    if matches(pattern, name):
        return True
    try:
        starts = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None
    except re.error:
        return False
    return starts or name.endswith(pattern)


def require_matches(
    patterns: Iterable[str], names: Iterable[str], field_name: str, rule: Callable[[str, str], bool] = matches
) -> None:
    """Refuse a pattern that matches nothing by its `rule`, since it is a typing error or a wrong idea of the model.

    Raises:
        ConfigError: with the closest names.
    """
    known = list(names)
    for pattern in patterns:
        if not any(rule(pattern, name) for name in known):
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
            raise ConfigError(f"{field_name}: {pattern!r} matches no linear of the model; close: {', '.join(close)}")
