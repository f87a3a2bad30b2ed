"""Maps of the model: a square for each linear, layer by layer, coloured by what it got."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from optimum_qvlm.report.page.charts import Cell, Drawing, grid, legend
from optimum_qvlm.report.page.markup import joined
from optimum_qvlm.report.page.numbers import readable
from optimum_qvlm.report.page.reading import ModuleRow, Reading
from optimum_qvlm.report.page.tables import Section, figure, panel, table
from optimum_qvlm.report.precision import readable_activation, readable_scales

COLOURS = 7
"""Colours that can be told apart; whatever comes later shares the last."""

WIDE = 460.0
"""Width beyond which a map takes a row of its own, and on a phone has to be moved sideways."""

MOST_COLUMNS = 200
"""Layers drawn in one map."""

KINDS = ("none", "equalized", "rotated", "equalized and rotated")
"""What may be done to the activations of a site."""

MOST_KINDS = 60
"""Rows drawn in one map."""


def precision(reading: Reading) -> Section | None:
    """Bits of every linear."""
    if not reading.modules:
        return None
    entries: list[tuple[int | None, str]] = [(colour, scheme) for scheme, colour in schemes(reading).items()]
    if any(row.record is None for row in reading.modules):
        entries.append((None, "full precision"))
    panels = panels_of(precision_maps(reading))
    return Section(
        anchor="precision",
        title="Precision of every linear",
        short="Precision",
        lead="One square is one linear; w4a8 reads: weights in 4 bits, activations in 8.",
        body=joined([legend(entries), figure("A map of the model", *panels, numbers=_precision_table(reading))]),
    )


def transforms(reading: Reading) -> Section | None:
    """What each site's activations are multiplied by, and where they are clipped."""
    rows = [row for row in reading.modules if row.record is not None]
    if not rows:
        return None
    kinds = {_transform(row) for row in rows}
    order = [kind for kind in KINDS if kind in kinds]
    colours = {kind: number + 1 for number, kind in enumerate(order)}
    maps = _maps(
        reading,
        lambda row: colours[_transform(row)] if row.record is not None else None,
        lambda row: f"{_transform(row)}, {_clips(row)}" if row.record is not None else "full precision",
        "transform",
    )
    counts = [[kind, str(sum(_transform(row) == kind for row in rows))] for kind in order]
    clips = [[row.name, _transform(row), *_clip_cells(row)] for row in rows]
    names = ["linear", "transform", "rotation", "activation clip", "weight clip"]
    return Section(
        anchor="transforms",
        title="Transforms and clips",
        short="Transforms",
        lead=(
            "Equalized: channels of the input are scaled against each other. Rotated: mixed by Hadamard blocks. A clip "
            "is the share of the peak that the largest code stands for."
        ),
        body=joined(
            [
                legend([(colour, kind) for kind, colour in colours.items()]),
                figure(
                    "What each linear reads through",
                    *panels_of(maps),
                    numbers=joined(
                        [table(["transform", "linears"], counts, numbers=(1,)), table(names, clips, numbers=(2, 3, 4))]
                    ),
                ),
            ]
        ),
    )


def schemes(reading: Reading) -> dict[str, int]:
    """The colour of each precision, in order."""
    names = dict.fromkeys(row.scheme for row in reading.modules if row.record is not None)
    return {name: min(number + 1, COLOURS) for number, name in enumerate(names)}


def precision_maps(reading: Reading) -> list[tuple[str, Drawing]]:
    """Maps of bits, by the name of the part."""
    colours = schemes(reading)
    return _maps(reading, lambda row: colours.get(row.scheme), _grid_of, "precision")


def panels_of(maps: Sequence[tuple[str, Drawing]]) -> list[Markup]:
    """Each with its name; wide ones on a row of their own."""
    return [panel(name, drawing.alone(), wide=drawing.width > WIDE) for name, drawing in maps]


def _maps(
    reading: Reading, colour: Callable[[ModuleRow], int | None], hint: Callable[[ModuleRow], str], what: str
) -> list[tuple[str, Drawing]]:
    """One for each run of layers, and one for what lies outside of layers."""
    groups: dict[str, list[ModuleRow]] = {}
    for row in reading.modules:
        groups.setdefault(row.part if row.layer is not None else "", []).append(row)
    alone = groups.pop("", [])
    drawn = [(part, _map(f"{what} of {part}", rows, colour, hint)) for part, rows in groups.items()]
    if alone:
        drawn.append(("outside of layers", _map(f"{what} of other linears", alone, colour, hint)))
    return drawn


def _map(
    title: str,
    rows: Sequence[ModuleRow],
    colour: Callable[[ModuleRow], int | None],
    hint: Callable[[ModuleRow], str],
) -> Drawing:
    kinds = list(dict.fromkeys(row.kind for row in rows))[:MOST_KINDS]
    layers = sorted({row.layer or 0 for row in rows})[:MOST_COLUMNS]
    places = {layer: number for number, layer in enumerate(layers)}
    cells: dict[tuple[int, int], list[ModuleRow]] = {}
    for row in rows:
        if row.kind in kinds and (row.layer or 0) in places:
            cells.setdefault((kinds.index(row.kind), places[row.layer or 0]), []).append(row)
    return grid(
        title,
        kinds,
        [str(layer) for layer in layers],
        [
            Cell(row=row, column=column, colour=colour(members[0]), hint=_hint(members, hint))
            for (row, column), members in cells.items()
        ],
    )


def _hint(members: Sequence[ModuleRow], hint: Callable[[ModuleRow], str]) -> str:
    """Experts of a layer share a square."""
    said = list(dict.fromkeys(hint(row) for row in members))
    more = "" if len(said) == 1 else f" and {len(said) - 1} others"
    name = members[0].name if len(members) == 1 else f"{members[0].name} and {len(members) - 1} like it"
    return f"{name}: {said[0]}{more}"


def _grid_of(row: ModuleRow) -> str:
    if row.record is None:
        return "full precision"
    weight, activation = row.record.weight, row.record.activation
    shared = f"{row.scheme}, weight scale per {readable_scales(weight)}"
    return shared if activation is None else f"{shared}, activation scale per {readable_activation(activation)}"


def _precision_table(reading: Reading) -> Markup:
    """Linears that differ in their layer's number alone share a row."""
    groups: dict[tuple[str, str, str], list[ModuleRow]] = {}
    for row in reading.modules:
        groups.setdefault((row.part, row.kind, _grid_of(row)), []).append(row)
    rows = [
        [part, kind, spans([row.layer for row in members if row.layer is not None]), str(len(members)), grid_of]
        for (part, kind, grid_of), members in groups.items()
    ]
    return table(["part", "linear", "layers", "count", "precision"], rows, numbers=(3,))


def spans(layers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _transform(row: ModuleRow) -> str:
    if row.record is None:
        return KINDS[0]
    return KINDS[(1 if row.record.format.equalized else 0) + (2 if row.record.format.rotation else 0)]


def _clips(row: ModuleRow) -> str:
    assert row.record is not None
    rounded = row.record.activation is not None
    clip = f"activation clip {readable(row.record.format.activation_clip)}, " if rounded else ""
    return f"{clip}weight clip {readable(row.record.weight_clip)}"


def _clip_cells(row: ModuleRow) -> list[str]:
    assert row.record is not None
    rounded = row.record.activation is not None
    rotation = "" if row.record.format.rotation is None else str(row.record.format.rotation)
    clip = readable(row.record.format.activation_clip) if rounded else ""
    return [rotation, clip, readable(row.record.weight_clip)]
