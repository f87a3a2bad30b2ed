"""What `optimum-cli export qvlm` does: load with quantization, save, upload, say what came out."""

import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any

from optimum_qvlm.cli.loading import how_to_load, load_model
from optimum_qvlm.cli.outcome import finish, print_json, say
from optimum_qvlm.cli.qvlm_options import COMPRESSED_TENSORS
from optimum_qvlm.cli.records import read_dataset
from optimum_qvlm.errors import ConfigError, QVLMError
from optimum_qvlm.report.precision import readable_bytes
from optimum_qvlm.settings import nested_names

PROGRAM = "optimum-cli export qvlm"


def main(args: Namespace) -> int:
    """Run the command; returns the exit code, see `finish`."""
    return finish(PROGRAM, lambda: export(args), as_json=args.json)


def export(args: Namespace) -> None:
    """Quantize `args.model`, save it in `args.output`, and upload it if asked."""
    started = time.perf_counter()
    check_output(args.output, args.model, args.subfolder)
    arguments = config_arguments(args)

    from optimum_qvlm.hf.saving.push import require_access
    from optimum_qvlm.hf.saving.save import require_writable

    config = make_config(args.paper, arguments)
    require_exportable(args.format, config)
    require_writable(args.output)
    if args.dry_run:
        tried = try_out(args, config)
        if args.json:
            print_json(tried.to_dict())
        else:
            say(str(tried))
        return
    if args.push_to_hub is not None:
        require_access(args.push_to_hub)
    model = load_model(args, quantization_config=config)
    names = save_model(model, args)
    saved = outcome(args.output, config.scheme, time.perf_counter() - started)
    if not args.json:
        say(f"Saved the {config.scheme} model in {args.output}: {saved['files']} files, {saved['size']}")
    if args.push_to_hub is not None:
        saved |= push(args, names)
    if args.json:
        print_json(saved)


def check_output(output: Path, model: str, subfolder: str | None = None) -> None:
    """Refuse, before hours are spent, a folder that could not be written or holds the model itself."""
    try:
        place, taken = output.resolve(), output.exists() and not output.is_dir()
        sources = [Path(model).resolve(), (Path(model) / (subfolder or "")).resolve()] if Path(model).is_dir() else []
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise QVLMError(f"output {output} or model {model} is no usable path ({error}); name another one") from error
    if taken:
        raise QVLMError(f"output {output} is a file; name a folder")
    if output.is_symlink() and not output.exists():
        raise QVLMError(f"output {output} is a link that leads nowhere; name a folder")
    if place in sources:
        raise QVLMError(f"output {output} is the folder of the full-precision model; name another one")


def config_arguments(args: Namespace) -> dict[str, Any]:
    """Keyword arguments for `QVLMConfig`: every option that was given and has the name of one.

    Raises:
        DataError: the file given as `--dataset` cannot be used.
    """
    from optimum_qvlm import QVLMConfig

    given = vars(args)
    asked = {name: given[name] for name in signature(QVLMConfig).parameters if name in given}
    return asked | former_options(given) | ({"dataset": read_dataset(args.dataset)} if "dataset" in asked else {})


def former_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that options of before ask for, each with a line on stderr that says how it is written now."""
    moved: dict[str, Any] = {}
    for former, (argument, name) in nested_names(former=True).items():
        if former in given:
            moved.setdefault(argument, dict(given.get(argument) or {}))[name] = given[former]
            former_is_now(former, f"--{argument} {name}=VALUE")
    if "exact_decode" in given:
        moved["decode_tokens"] = 0
        former_is_now("exact_decode", "--decode-tokens 0")
    return moved


def former_is_now(former: str, now: str) -> None:
    """Say that an option will go."""
    option = former.replace("_", "-")
    print(f"{PROGRAM}: warning: --{option} is deprecated, write {now}", file=sys.stderr)


def try_out(args: Namespace, config: Any) -> Any:
    """What an export would do, tried; the rehearsal saves on the disk that the output would be on."""
    from optimum_qvlm import dry_run

    output = args.output.absolute()
    folder = next(parent for parent in (output, *output.parents) if parent.is_dir())
    auto_class, options = how_to_load(args, to_quantize=True)
    return dry_run(args.model, config, model_class=auto_class, folder=folder, **options)


def require_exportable(form: str, config: Any) -> None:
    """Refuse, before hours are spent, what could not be written in a format."""
    if form == COMPRESSED_TENSORS and not config.servable:
        raise ConfigError(
            f"--format {form} writes what other runtimes can do in a forward, and without --servable the search would "
            "use transforms that they cannot; add --servable, or leave --format out"
        )


def make_config(paper: int | None, arguments: dict[str, Any]) -> Any:
    """The configuration; with `paper` bits the paper's mode, changed by the arguments that were given."""
    from optimum_qvlm import QVLMConfig

    return QVLMConfig(**arguments) if paper is None else QVLMConfig.paper(paper, **arguments)


def outcome(output: Path, scheme: str, seconds: float) -> dict[str, Any]:
    """What lies in the output folder, as JSON values."""
    paths = [path for path in output.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in paths)
    return {
        "output": str(output.resolve()),
        "scheme": scheme,
        "files": len(paths),
        "bytes": total,
        "size": readable_bytes(total),
        "seconds": round(seconds, 2),
    }


def save_model(model: Any, args: Namespace) -> list[str]:
    """Save the model in the output folder; returns the names of its files."""
    if args.format == COMPRESSED_TENSORS:
        from optimum_qvlm import export_compressed_tensors

        return export_compressed_tensors(model, args.output)
    from optimum_qvlm.hf.saving.save import save

    return save(model, args.output, repo_id=args.push_to_hub)


def push(args: Namespace, names: list[str]) -> dict[str, Any]:
    """Upload the model's files from the output folder; returns repository and commit."""
    from optimum_qvlm.hf.saving.push import Upload

    with stopped_at_once():
        info = Upload(repo_id=args.push_to_hub, private=args.private or None).send(args.output, names)
    if not args.json:
        say(f"Pushed it to {info.commit_url}")
    return {"repo": args.push_to_hub, "commit": info.oid, "url": info.commit_url}


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process without waiting for files under way.

    During an upload nothing has to be tidied up here, and nothing is committed there until the end; but the threads
    of huggingface_hub would first finish their files, which may take hours.
    """

    def stop(number: int, _: FrameType | None) -> None:
        print(f"{PROGRAM}: interrupted; nothing was committed, what was saved stays", file=sys.stderr, flush=True)
        os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
