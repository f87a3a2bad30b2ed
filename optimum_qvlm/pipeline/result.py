"""What a calibration produced."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.pipeline.encoder.step import EncoderResult
from optimum_qvlm.plan import Block, ModuleRecord, QuantPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteError:
    """Relative squared error of one site's outputs on the tokens of the search.

    Attributes:
        site: its name.
        nearest: of round-to-nearest.
        found: of the layer-wise optimum, never above `nearest`.
        chosen: of what the site got in the end, which a joint search may have moved away from its own optimum.
    """

    site: str
    nearest: float
    found: float
    chosen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """Relative squared error of one layer's output against the full-precision chain, prefix error included."""

    part: str
    layer: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockError:
    """The joint search of one block, on the runs that it looks at.

    Attributes:
        block: part and layers.
        before: relative squared error of the block's output with every site at its layer-wise optimum.
        after: the same with what the joint search chose, never above `before`.
        forwards: how often the block was run for it.
        share: of all tokens of the part that one of these forwards ran, in 0..1.
        seconds: wall-clock time of the joint search alone.
    """

    block: Block
    before: float
    after: float
    forwards: int
    share: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationResult:
    """Plan with the blocks that were formed, records by disk name, errors and cost of one calibration.

    `recipe` is None where no data was used. `seconds` is wall-clock time of the search, data excluded. `folded` names
    the norms that have taken up an equalizer, by the site behind them. `differences` are those of the layers, run alone
    on one sample, to the model's own forward, relative and by part; `captured_bytes` what hidden states and arguments
    of all samples take on the CPU.
    """

    plan: QuantPlan
    modules: dict[str, ModuleRecord]
    recipe: Recipe | None
    seconds: float
    sites: list[SiteError] = field(default_factory=list)
    layers: list[LayerError] = field(default_factory=list)
    joint: list[BlockError] = field(default_factory=list)
    encoder: EncoderResult | None = None
    folded: dict[str, str] = field(default_factory=dict)
    differences: Mapping[str, float] = field(default_factory=dict)
    captured_bytes: int = 0

    def blocks(self) -> list[dict[str, Any]]:
        """The partition as plain JSON values."""
        return [{"part": block.part, "first": block.first, "last": block.last} for block in self.plan.blocks]
