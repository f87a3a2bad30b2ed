"""Rendered text and documents: pages drawn with Pillow from a description in JSON.

A page has `shapes` at fixed places, a `flow` of paragraphs, tables, rules and gaps that runs down between the
margins, and `labels` at fixed places. What does not fit is an error, so that no question asks for text that
the picture cuts off.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont
Spec = dict[str, Any]

FONTS = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-italic": "DejaVuSans-Oblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "serif-italic": "DejaVuSerif-Italic.ttf",
    "mono": "DejaVuSansMono.ttf",
    "mono-bold": "DejaVuSansMono-Bold.ttf",
}
IDEOGRAPHS = "\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"
PIECES = re.compile(rf"[{IDEOGRAPHS}]|[^\s{IDEOGRAPHS}]+|\s+")
LEADING = 1.35
CELL_PADDING = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Fonts:
    """The fonts that matplotlib brings along, and one for Chinese and Japanese called "cjk"."""

    cjk: Path

    def load(self, name: str, size: int) -> Font:
        """The font `name` at `size` pixels."""
        if name == "cjk":
            path = self.cjk
        else:
            path = Path(matplotlib.get_data_path(), "fonts", "ttf", FONTS[name])
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


class Page:
    """A page being drawn; `top` is where the flow goes on."""

    def __init__(self, spec: Spec, fonts: Fonts) -> None:
        self.spec = spec
        self.fonts = fonts
        self.image = Image.new("RGB", tuple(spec["size"]), spec.get("paper", "white"))
        self.draw = ImageDraw.Draw(self.image)
        self.margin: int = spec.get("margin", 32)
        self.top: float = spec.get("top", self.margin)

    @property
    def width(self) -> int:
        """Pixels between the margins."""
        return self.image.width - 2 * self.margin

    def style(self, item: Spec) -> tuple[Font, int, str]:
        """Font, size and ink of an item, from the page where it has none of its own."""
        size = item.get("size", self.spec.get("font_size", 18))
        name = item.get("font", self.spec.get("font", "sans"))
        return self.fonts.load(name, size), size, item.get("ink", self.spec.get("ink", "#222222"))

    def shape(self, item: Spec) -> None:
        """A box, an ellipse, a polygon or a line at a fixed place."""
        colours = {"fill": item.get("fill"), "outline": item.get("outline"), "width": item.get("width", 1)}
        if "box" in item:
            self.draw.rounded_rectangle(item["box"], item.get("radius", 0), **colours)
        elif "ellipse" in item:
            self.draw.ellipse(item["ellipse"], **colours)
        elif "polygon" in item:
            self.draw.polygon([tuple(point) for point in item["polygon"]], **colours)
        else:
            self.draw.line(item["line"], fill=item["fill"], width=item.get("width", 1))

    def label(self, item: Spec) -> None:
        """Text at a fixed place; `anchor` is Pillow's, and its lines are centred unless it starts with l."""
        font, _, ink = self.style(item)
        anchor = item.get("anchor", "mm")
        kind = "multiline_text" if "\n" in item["text"] else "text"
        left, top, right, bottom = getattr(self.draw, f"{kind}bbox")(item["at"], item["text"], font, anchor=anchor)
        if left < 0 or top < 0 or right > self.image.width or bottom > self.image.height:
            raise ValueError(f"{self.spec['name']}: the label {item['text']!r} leaves the page; move or shrink it")
        getattr(self.draw, kind)(
            item["at"], item["text"], ink, font, anchor=anchor, align="left" if anchor[0] == "l" else "center"
        )

    def flow(self, item: str | Spec) -> None:
        """The next paragraph, table, rule or gap."""
        entry: Spec = {"text": item} if isinstance(item, str) else item
        if "gap" in entry:
            self.top += entry["gap"]
        elif "rule" in entry:
            ends = (self.margin, self.top, self.image.width - self.margin, self.top)
            self.draw.line(ends, fill=self.style(entry)[2], width=entry["rule"])
            self.top += 8
        elif "table" in entry:
            self.table(entry)
        else:
            self.paragraph(entry)
        if self.top > self.image.height:
            raise ValueError(f"{self.spec['name']}: the flow ends at {self.top:.0f}; make the page taller")

    def paragraph(self, item: Spec) -> None:
        """Wrapped text, `align` l, c or r, with an `indent` in pixels and `after` pixels below."""
        font, size, ink = self.style(item)
        indent = item.get("indent", 0)
        for line in wrap(item["text"], font, self.width - indent):
            left, anchor = place(item.get("align", "l"), self.margin + indent, self.width - indent)
            self.draw.text((left, self.top), line, ink, font, anchor=anchor + "a")
            self.top += size * item.get("leading", LEADING)
        self.top += item.get("after", size * 0.4)

    def table(self, item: Spec) -> None:
        """Rows of cells in `columns`, shares of the width; `head` shades the first row, `grid` draws lines."""
        font, size, ink = self.style(item)
        edges = self.margin + self.width * np.cumsum([0.0, *item["columns"]]) / sum(item["columns"])
        height = size * item.get("leading", 1.7)
        for number, row in enumerate(item["table"]):
            head = number == 0 and item.get("head", False)
            if head:
                self.draw.rectangle(
                    (edges[0], self.top, edges[-1], self.top + height), fill=item.get("shade", "#dddddd")
                )
            for cell, align, left, right in zip(row, item["align"], edges[:-1], edges[1:], strict=True):
                if font.getlength(cell) > right - left - CELL_PADDING:
                    raise ValueError(f"{self.spec['name']}: the cell {cell!r} is too wide; widen its column")
                x, anchor = place(align, left + CELL_PADDING, right - left - 2 * CELL_PADDING)
                self.draw.text((x, self.top + height / 2), cell, ink, font, anchor=anchor + "m")
                if item.get("grid", False):
                    self.draw.rectangle((left, self.top, right, self.top + height), outline=ink)
            self.top += height
        self.top += item.get("after", 8)


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Lines no wider than `width`; lines that fit keep their indentation."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for piece in PIECES.findall(line):
            if current and font.getlength(current + piece.rstrip()) > width:
                lines.append(current.rstrip())
                current = piece.lstrip()
            else:
                current += piece
        lines.append(current)
    return lines


def place(align: str, left: float, width: float) -> tuple[float, str]:
    """Where text aligned l, c or r starts, and Pillow's horizontal anchor for it."""
    return {"l": (left, "l"), "c": (left + width / 2, "m"), "r": (left + width, "r")}[align]


def draw_page(spec: Spec, fonts: Fonts, seed: int) -> Image.Image:
    """The page of `spec`, turned by `tilt` degrees and with `grain` as a scan or photograph would have.

    Raises:
        ValueError: text does not fit.
    """
    page = Page(spec, fonts)
    for shape in spec.get("shapes", []):
        page.shape(shape)
    for item in spec.get("flow", []):
        page.flow(item)
    for label in spec.get("labels", []):
        page.label(label)
    image = page.image
    if "tilt" in spec:
        image = image.rotate(
            spec["tilt"], Image.Resampling.BICUBIC, expand=True, fillcolor=spec.get("table_top", "#8a7f74")
        )
    if "grain" in spec:
        noise = np.random.default_rng(seed).normal(0, spec["grain"], (image.height, image.width, 1))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image
