"""What a page shows of a report. Anybody may have written the report: what is odd in it counts as absent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.report.figures import is_figure
from optimum_qvlm.report.precision import part_of, scheme_of

MOST_ROWS = 4000
"""Entries of one list that are read: a page stays small enough to open."""

LARGEST_LAYER = 10_000
"""Number of a layer at most."""

Figure = int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class DependencyRow:
    """How much a layer leaves open about the next one of its part, in nats."""

    part: str
    layer: int
    entropy: Figure
    marginal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRow:
    """Layers that were searched together, and their error before and after; None where it was not measured."""

    part: str
    first: int
    last: int
    before: Figure | None = None
    after: Figure | None = None
    seconds: Figure | None = None

    @property
    def span(self) -> str:
        """As in `2-4`."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """Error of a layer's output, and of its image tokens and its text tokens alone where both are told apart."""

    part: str
    number: int
    name: str
    error: Figure
    image_error: Figure | None = None
    text_error: Figure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRow:
    """Errors of a site: rounded to nearest, at its own optimum, and as chosen."""

    name: str
    nearest: Figure
    found: Figure
    chosen: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """One linear. `record` is None where it was kept in full precision.

    `layer` is the first number in its name, None where there is none; `kind` is what comes behind it.
    """

    name: str
    part: str
    layer: int | None
    kind: str
    record: ModuleRecord | None

    @property
    def scheme(self) -> str:
        """As in `w4a8`."""
        return "full precision" if self.record is None else scheme_of(self.record)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """A prompt with the greedy answers of both models. `images` are `data:` addresses."""

    prompt: str
    reference: str
    answer: str
    images: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A report and what is known beside it.

    Attributes:
        name: what the model is called.
        report: content of `qvlm_report.json`.
        files: bytes of each weight file; empty where they are not known.
    """

    name: str
    report: Mapping[str, Any]
    files: Mapping[str, int] = field(default_factory=dict)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A field that is an object; empty where it is none."""
        return _mapping(self.report.get(name))

    def entries(self, name: str) -> list[Mapping[str, Any]]:
        """The objects of a field that is a list."""
        return _entries(self.report.get(name))

    @cached_property
    def dependencies(self) -> list[DependencyRow]:
        """In order."""
        return [
            DependencyRow(
                part=entry["part"],
                layer=entry["layer"],
                entropy=entry["entropy"],
                marginal=entry.get("marginal") is True,
            )
            for entry in self.entries("dependency")
            if isinstance(entry.get("part"), str) and is_layer(entry.get("layer")) and is_figure(entry.get("entropy"))
        ]

    @cached_property
    def blocks(self) -> list[BlockRow]:
        """In order."""
        return [
            BlockRow(
                part=entry["part"],
                first=entry["first"],
                last=entry["last"],
                **{name: _error(entry.get(name)) for name in ("before", "after", "seconds")},
            )
            for entry in self.entries("blocks")
            if isinstance(entry.get("part"), str)
            and is_layer(entry.get("first"))
            and is_layer(entry.get("last"))
            and entry["first"] <= entry["last"]
        ]

    @cached_property
    def layers(self) -> list[LayerRow]:
        """In order, numbered within their part."""
        counts: dict[str, int] = {}
        rows = []
        for entry in self.entries("layers"):
            part, name, error = entry.get("part"), entry.get("layer"), _error(entry.get("error"))
            if not isinstance(part, str) or not isinstance(name, str) or error is None:
                continue
            number = counts[part] = counts.get(part, -1) + 1
            image, words = _error(entry.get("image_error")), _error(entry.get("text_error"))
            rows.append(LayerRow(part=part, number=number, name=name, error=error, image_error=image, text_error=words))
        return rows

    @cached_property
    def sites(self) -> list[SiteRow]:
        """In order."""
        rows = []
        for entry in self.entries("sites"):
            errors = {name: _error(entry.get(name)) for name in ("nearest", "found", "chosen")}
            if isinstance(entry.get("site"), str) and all(error is not None for error in errors.values()):
                rows.append(SiteRow(name=entry["site"], **errors))  # type: ignore[arg-type]
        return rows

    @cached_property
    def modules(self) -> list[ModuleRow]:
        """Quantized linears, then those that were kept."""
        records = {name: _record(values) for name, values in list(self.mapping("modules").items())[:MOST_ROWS]}
        rows = [_module(name, record) for name, record in records.items() if record is not None]
        return rows + [_module(name, None) for name in self.kept]

    @cached_property
    def kept(self) -> dict[str, str]:
        """Linears in full precision, and why; no reason in reports of earlier releases."""
        names = self.report.get("kept_in_full_precision")
        reasons = self.mapping("kept_reasons")
        return {
            name: reason if isinstance(reason := reasons.get(name), str) else ""
            for name in (names[:MOST_ROWS] if isinstance(names, list) else ())
            if isinstance(name, str)
        }

    @cached_property
    def samples(self) -> list[SampleRow]:
        """Greedy answers side by side, where the user allowed to keep them."""
        rows = []
        for entry in _entries(self.mapping("fidelity").get("samples")):
            texts = [entry.get(name) for name in ("prompt", "reference", "answer")]
            images = entry.get("images")
            if all(isinstance(text, str) for text in texts):
                shown = tuple(image for image in (images if isinstance(images, list) else ()) if isinstance(image, str))
                rows.append(SampleRow(prompt=texts[0], reference=texts[1], answer=texts[2], images=shown))  # type: ignore[arg-type]
        return rows

    @cached_property
    def parts(self) -> list[str]:
        """Names of the parts of the chain, in order."""
        named = [row.part for row in self.layers], [row.part for row in self.blocks]
        return list(dict.fromkeys([*named[0], *named[1]]))

    def figure(self, name: str, holder: Mapping[str, Any] | None = None) -> Figure | None:
        """A number of the report, or of an object in it; None where it is not known."""
        value = (self.report if holder is None else holder).get(name)
        return value if is_figure(value) else None


def is_layer(value: object) -> bool:
    """Whether it can be the number of a layer."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_LAYER


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _entries(value: object) -> list[Mapping[str, Any]]:
    return [entry for entry in (value[:MOST_ROWS] if isinstance(value, list) else ()) if isinstance(entry, Mapping)]


def _error(value: object) -> Figure | None:
    return value if is_figure(value) and value >= 0 else None


def _record(values: object) -> ModuleRecord | None:
    """None where the record is not whole, or its grids are none."""
    if not isinstance(values, Mapping):
        return None
    try:
        record = ModuleRecord.from_dict(values)
        sound = record.weight is not None and (record.activation is None or record.activation.bits > 0)
    except (TypeError, ValueError):
        return None
    rotation = record.format.rotation
    turned = rotation is None or (isinstance(rotation, int) and is_figure(rotation))
    clips = is_figure(record.format.activation_clip) and is_figure(record.weight_clip)
    return record if sound and turned and clips and isinstance(record.site, str) else None


def _module(name: str, record: ModuleRecord | None) -> ModuleRow:
    components = name.split(".")
    place = next((n for n, c in enumerate(components) if c.isdecimal() and len(c) < 6), None)
    if place is None:
        return ModuleRow(name=name, part=part_of(name), layer=None, kind=name, record=record)
    kind = ".".join("*" if component.isdecimal() else component for component in components[place + 1 :])
    part = ".".join(components[:place])
    return ModuleRow(name=name, part=part, layer=int(components[place]), kind=kind, record=record)
