"""What a calibration produced."""

from dataclasses import dataclass, field
from typing import Any

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.search.plan import ModuleRecord, QuantPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteError:
    """Relative squared error of one site's outputs on the tokens of the search, for round-to-nearest and found."""

    site: str
    nearest: float
    found: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """Relative squared error of one layer's output against the full-precision chain, prefix error included."""

    part: str
    layer: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationResult:
    """Plan, records by disk name, errors and cost of one calibration.

    `recipe` is None where no data was used. `seconds` is wall-clock time of the search, data excluded.
    """

    plan: QuantPlan
    modules: dict[str, ModuleRecord]
    recipe: Recipe | None
    seconds: float
    sites: list[SiteError] = field(default_factory=list)
    layers: list[LayerError] = field(default_factory=list)

    def blocks(self) -> list[dict[str, Any]]:
        """The partition as plain JSON values."""
        return [{"part": block.part, "first": block.first, "last": block.last} for block in self.plan.blocks]
