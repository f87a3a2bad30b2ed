"""Charts: drawn with matplotlib from data in JSON."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

Spec = dict[str, Any]
DPI = 80


def draw_bars(axes: Axes, spec: Spec) -> None:
    """One or more series of bars side by side, or stacked; `across` lays them down."""
    names, series = spec["names"], spec["series"]
    places = np.arange(len(names))
    base = np.zeros(len(names))
    thick = 0.8 if spec.get("stacked") else 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        shift = 0.0 if spec.get("stacked") else (number - (len(series) - 1) / 2) * thick
        draw, offset = (axes.barh, {"left": base}) if spec.get("across") else (axes.bar, {"bottom": base})
        colour = spec["colours"][number] if "colours" in spec else None
        bars = draw(places + shift, values, thick * 0.95, label=label, color=colour, **offset)
        if spec.get("numbers"):
            style = {"label_type": "center"} if spec.get("stacked") else {"padding": 2}
            axes.bar_label(bars, fontsize=9, **style)
        if spec.get("stacked"):
            base += values
    if spec.get("across"):
        axes.set_yticks(places, names)
        axes.invert_yaxis()
    else:
        axes.set_xticks(places, names)


def draw_lines(axes: Axes, spec: Spec) -> None:
    """One line per series; `step` makes steps, `area` fills below."""
    for label, values in spec["series"].items():
        style = "steps-post" if spec.get("step") else "default"
        (line,) = axes.plot(spec["names"], values, marker=spec.get("marker", "o"), drawstyle=style, label=label)
        if spec.get("area"):
            axes.fill_between(spec["names"], values, alpha=0.3, color=line.get_color())


def draw_points(axes: Axes, spec: Spec) -> None:
    """One cloud per series of (x, y), with names beside the points where `labels` has them."""
    for label, points in spec["series"].items():
        x, y = np.array(points).T
        axes.scatter(x, y, s=spec.get("point", 40), label=label, alpha=0.8)
    for text, x, y in spec.get("labels", []):
        axes.annotate(text, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9)


def draw_pie(axes: Axes, spec: Spec) -> None:
    """Slices with their share in per cent; `hole` makes a ring."""
    wedge = {"width": 0.45} if spec.get("hole") else {}
    distance = 0.78 if spec.get("hole") else 0.6
    axes.pie(
        list(spec["slices"].values()),
        labels=list(spec["slices"]),
        autopct="%.0f %%",
        pctdistance=distance,
        startangle=90,
        counterclock=False,
        wedgeprops=wedge,
    )


def draw_heat(axes: Axes, spec: Spec) -> None:
    """A matrix with a number in each cell."""
    values = np.array(spec["values"])
    axes.imshow(values, cmap=spec.get("map", "YlOrRd"), aspect="auto")
    axes.set_xticks(range(values.shape[1]), spec["names"])
    axes.set_yticks(range(values.shape[0]), spec["rows"])
    middle = (values.max() + values.min()) / 2
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, value, ha="center", va="center", color="white" if value > middle else "black")


def draw_boxes(axes: Axes, spec: Spec) -> None:
    """A box plot per series."""
    axes.boxplot(list(spec["series"].values()), tick_labels=list(spec["series"]))


def draw_spans(axes: Axes, spec: Spec) -> None:
    """Tasks as horizontal spans from start to end."""
    names = list(spec["spans"])
    for place, (start, end) in enumerate(spec["spans"].values()):
        axes.barh(place, end - start, left=start, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


DRAWERS: dict[str, Callable[[Axes, Spec], None]] = {
    "bars": draw_bars,
    "boxes": draw_boxes,
    "heat": draw_heat,
    "lines": draw_lines,
    "pie": draw_pie,
    "points": draw_points,
    "spans": draw_spans,
}


def draw_chart(spec: Spec) -> Image.Image:
    """The chart of `spec`, `size` in pixels, in one of matplotlib's styles."""
    width, height = spec["size"]
    with plt.style.context(["default", spec.get("style", "default")]):
        figure, axes = plt.subplots(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
        DRAWERS[spec["draw"]](axes, spec)
        axes.set(title=spec["title"], **spec.get("axes", {}))
        if "ticks" in spec:
            axes.set_xticks(spec["ticks"])
        if spec.get("grid"):
            axes.grid(True, axis=spec["grid"], alpha=0.4)
            axes.set_axisbelow(True)
        if spec.get("legend"):
            axes.legend()
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        plt.close(figure)
    return Image.open(stream).convert("RGB")
