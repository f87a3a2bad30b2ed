"""What a dry run shows: every module with its grid, site, block and bytes, and the expected cost."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from optimum_qvlm.pipeline.cost import Cost
from optimum_qvlm.plan import ModuleRecord, PlannedLayer, QuantPlan
from optimum_qvlm.report.precision import readable_bytes, readable_scales
from optimum_qvlm.spec import ActivationSpec, Scheme, WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """One linear that would be quantized.

    Attributes:
        name: its disk name.
        part: the chain that it belongs to; "unused" where nothing reads its layer.
        block: number of its block, from 1, formed on one sample: all of them may give other blocks; None in an unused
            layer.
        weight: the grid of its weight.
        activation: the grid of its activations; None where these are not rounded.
        site: disk name of the site's first linear.
        bytes_before, bytes_after: its tensors in memory, unquantized and quantized.
    """

    name: str
    part: str
    block: int | None
    weight: WeightSpec
    activation: ActivationSpec | None
    site: str
    bytes_before: int
    bytes_after: int

    @property
    def scheme(self) -> str:
        """Its effective bits, as in "w4a8"."""
        return str(Scheme.of(self.weight, self.activation))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values in one flat row: the weight's grid, with bits as the scheme."""
        grid = {"scheme": self.scheme} | {n: value for n, value in asdict(self.weight).items() if n != "bits"}
        names = ("name", "part", "block", "site", "bytes_before", "bytes_after")
        return {name: getattr(self, name) for name in names} | grid


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a calibration with the same settings would do, and what was tried for real.

    Attributes:
        modules: in execution order, those of unused layers last.
        kept: disk names of the linears that stay in full precision.
        samples: how many samples would be used, 0 without data.
        missing_answers: how many of them the model would have to answer first.
        chain: relative difference of the layers, run alone on one sample, to the model's forward, by part.
        cost: the estimate.
        bytes_before, bytes_after: the whole model in memory.
        saved_bytes: the folder that the rehearsal saved, reloaded and compared.
        rehearsal_seconds: what the dry run itself took.
    """

    modules: tuple[ModuleRow, ...]
    kept: tuple[str, ...]
    samples: int
    missing_answers: int
    chain: dict[str, float]
    cost: Cost
    bytes_before: int
    bytes_after: int
    saved_bytes: int
    rehearsal_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [row.to_dict() for row in self.modules]
        return {**asdict(replace(self, modules=())), "modules": rows}

    def __str__(self) -> str:
        """A table of the modules and the estimate below it, for people."""
        return "\n".join([*_table(self.modules), *(f"kept     {name}" for name in self.kept), "", *_totals(self)])


def module_rows(
    plan: QuantPlan, records: Mapping[str, ModuleRecord], before: Mapping[str, int], after: Mapping[str, int]
) -> tuple[ModuleRow, ...]:
    """Rows of a plan whose linears got `records`; bytes by disk name."""
    numbers = {(b.part, n): i for i, b in enumerate(plan.blocks, 1) for n in range(b.first, b.last + 1)}
    places: list[tuple[str, int | None, PlannedLayer]] = [
        (part.name, numbers[part.name, n], layer) for part in plan.parts for n, layer in enumerate(part.layers)
    ]
    places += [("unused", None, layer) for layer in plan.unused]
    return tuple(
        ModuleRow(
            name=linear.name,
            part=part,
            block=block,
            weight=records[linear.name].weight,
            activation=records[linear.name].activation,
            site=site.name,
            bytes_before=before[linear.name],
            bytes_after=after[linear.name],
        )
        for part, block, layer in places
        for site in layer.sites
        for linear in site.linears
    )


def _table(rows: tuple[ModuleRow, ...]) -> list[str]:
    head = ("block", "part", "module", "scheme", "group", "site", "before", "after")
    cells = [head, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cells(row: ModuleRow) -> tuple[str, ...]:
    return (
        "-" if row.block is None else str(row.block),
        row.part,
        row.name,
        row.scheme,
        readable_scales(row.weight),
        "own" if row.site == row.name else f"of {row.site.rpartition('.')[2]}",
        readable_bytes(row.bytes_before),
        readable_bytes(row.bytes_after),
    )


def _totals(run: DryRun) -> list[str]:
    blocks = {row.block for row in run.modules if row.block is not None}
    unused = sum(row.block is None for row in run.modules)
    lines = [
        f"{len(run.modules)} linears in {len(blocks)} blocks, {len(run.kept)} kept in full precision"
        + (f", {unused} in layers that nothing reads (rounded to nearest)" if unused else ""),
        f"model in memory: {readable_bytes(run.bytes_before)} -> {readable_bytes(run.bytes_after)}",
        f"saved, reloaded and compared bit for bit: {readable_bytes(run.saved_bytes)}",
    ]
    if run.samples > 0:
        lines += [
            f"{run.samples} samples" + (f", {run.missing_answers} without answer" if run.missing_answers else ""),
            f"layers run alone differ from the model's forward by at most {max(run.chain.values()):.1e}",
        ]
    return [
        *lines,
        f"estimate: {run.cost.seconds:.0f} s, {readable_bytes(run.cost.host_bytes)} of CPU memory, "
        f"{readable_bytes(run.cost.device_bytes)} more on the device that computes; "
        f"this dry run took {run.rehearsal_seconds:.0f} s",
    ]
