"""Elements of HTML and SVG. Whatever is not an element itself is escaped, so no name can become one."""

from collections.abc import Iterable

from markupsafe import Markup, escape

from optimum_qvlm.report.shown import shown

LONGEST = 2000
"""Characters of one text: a report that came from elsewhere may hold a name of any length."""

Content = Markup | str | None


def element(name: str, *content: Content, **attributes: str | float | None) -> Markup:
    """`<name attributes>content</name>`. None is left out; `_` stands for `-`, at the end of a name for nothing."""
    inside = Markup("").join(text(child) for child in content if child is not None)
    return Markup("<{}{}>{}</{}>").format(Markup(name), _attributes(attributes), inside, Markup(name))


def void(name: str, **attributes: str | float | None) -> Markup:
    """An element of HTML that has no content, as `meta`."""
    return Markup("<{}{}>").format(Markup(name), _attributes(attributes))


def joined(parts: Iterable[Content]) -> Markup:
    """The parts one after the other."""
    return Markup("").join(text(part) for part in parts if part is not None)


def text(value: Markup | str) -> Markup:
    """An element as it is; any other text escaped, cut to `LONGEST`, and without what is not shown."""
    if isinstance(value, Markup):
        return value
    return escape(clipped(shown(value), LONGEST))


def clipped(value: str, longest: int) -> str:
    """`value`, or its beginning with an ellipsis where it is longer."""
    return value if len(value) <= longest else f"{value[: longest - 1]}…"


def _attributes(attributes: dict[str, str | float | None]) -> Markup:
    given = [(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None]
    return Markup("").join(
        Markup(' {}="{}"').format(Markup(name), _number(value) if isinstance(value, float | int) else text(value))
        for name, value in given
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
