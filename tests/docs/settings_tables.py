"""Tables of all settings for the reference page, from their declaration: `python -m tests.docs.settings_tables`."""

from dataclasses import fields

from optimum_qvlm.settings import NESTED, Settings, declaration

HEAD = ["| argument | type | default | meaning |", "|---|---|---|---|"]


def rows(options: type) -> list[str]:
    """One line of the table for each setting."""
    return [
        f"| `{entry.name}` | {declaration(entry).kind.shown} | `{shown(entry.default)}` | {declaration(entry).help} |"
        for entry in fields(options)
    ]


def shown(default: object) -> str:
    """As it is written in Python."""
    return f'"{default}"' if isinstance(default, str) else repr(default)


def tables() -> dict[str, list[str]]:
    """Lines of each table by the name of its class."""
    return {options.__name__: HEAD + rows(options) for options in (Settings, *NESTED.values())}


if __name__ == "__main__":
    for name, lines in tables().items():
        print(f"\n{name}\n", *lines, sep="\n")
