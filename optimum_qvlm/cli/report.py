"""What `optimum-cli qvlm report` does: draw the report of one model, or of two, and write it as a page."""

from argparse import Namespace
from pathlib import Path

from optimum_qvlm.cli.outcome import finish, say
from optimum_qvlm.errors import QVLMError
from optimum_qvlm.files.atomic import replace_file, work_folder
from optimum_qvlm.hf.format.inspection import Inspection, inspect_checkpoint
from optimum_qvlm.report.page.document import render_comparison, render_page
from optimum_qvlm.report.page.reading import Reading

SUFFIXES = (".html", ".htm")


def main(args: Namespace) -> int:
    """Run the command; returns the exit code, see `finish`."""
    return finish("optimum-cli qvlm report", lambda: report(args))


def report(args: Namespace) -> None:
    """Write the page.

    Raises:
        QVLMError: a model cannot be read, or the page not be written.
    """
    require_page(args.output)
    first = read(args.model, args.revision, args.variant)
    if args.compare is None:
        page = render_page(first)
    else:
        page = render_comparison(first, read(args.compare, None, args.variant))
    try:
        with work_folder(args.output) as work:
            replace_file(args.output, page.encode(), work=work)
    except OSError as error:
        raise QVLMError(f"{args.output} cannot be written ({error}); name another file with --output") from error
    say(f"Wrote {args.output}: open it in a browser")


def require_page(output: Path) -> None:
    """Refuse, before anything is read, a name that is no page's: a slip would replace another file.

    Raises:
        QVLMError: says what is wrong with it.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise QVLMError(f"output {output} does not end in {' or '.join(SUFFIXES)}; name a page")
    if output.is_dir():
        raise QVLMError(f"output {output} is a folder; name a file in it")


def read(name: str, revision: str | None, variant: str | None) -> Reading:
    """What the page shows of a model: its report, and for what that lacks, the record in config.json.

    Raises:
        QVLMError: it is not there, not quantized by this package, or not whole.
    """
    found = inspect_checkpoint(name, revision=revision, variant=variant)
    return Reading(name=called(found), report=record_of(found) | dict(found.report), files=found.files)


def called(found: Inspection) -> str:
    """The last part of a folder's path, or the repository."""
    return Path(found.name).resolve().name if found.commit is None else found.name


def record_of(found: Inspection) -> dict[str, object]:
    """What config.json knows of a calibration."""
    record = found.config.record
    assert record is not None, "inspection refuses others"
    return {
        "settings": {"scheme": found.config.scheme, "vision_scheme": found.config.vision_scheme},
        "modules": {name: module.to_dict() for name, module in record.modules.items()},
        "blocks": record.blocks,
        "calibration": record.calibration,
    }
