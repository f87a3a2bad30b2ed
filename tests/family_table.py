"""Prints what every family does under every scheme: `python -m tests.family_table`."""

import argparse
import tempfile
from pathlib import Path

from transformers.utils import logging

from tests.family_cases import Seen, examine
from tests.tiny_families import FAMILIES

SCHEMES = ("w4a16", "w4a8", "w4a4", "w6a6", "w8a8")


def cell(seen: Seen) -> str:
    """Whether the reload is exact, and how far chain and report are from the real forwards."""
    assert seen.reported is not None
    exact = "exact" if seen.reload_exact else "DIFFERS"
    return f"{exact} {seen.chain:.0e} {abs(seen.reported / seen.real - 1):.0e}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    print("each cell: reload bit for bit; largest relative difference of the chain of layers to the real forward;")
    print("relative difference of the reported error of the last decoder layer to that of the whole models\n")
    print("| family | linears | unused layers | " + " | ".join(arguments.schemes) + " |")
    print("|---" * (3 + len(arguments.schemes)) + "|")
    for name in arguments.families:
        cells = []
        for scheme in arguments.schemes:
            with tempfile.TemporaryDirectory() as folder:
                seen = examine(FAMILIES[name], Path(folder), scheme)
            cells.append(cell(seen))
        report = seen.report
        print(f"| {name} | {len(report['modules'])} | {len(report['unused'])} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
