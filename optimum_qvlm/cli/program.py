"""What `python -m optimum_qvlm` does: run an installed Python program in this process.

The program runs as its own command runs it: with the same `sys.argv`, `sys.path`, `__main__` and exit status. Only the
import of this package comes first.
"""

import difflib
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from optimum_qvlm.errors import QVLMError
from optimum_qvlm.version import __version__

USAGE = "usage: python -m optimum_qvlm [--help] [--version] PROGRAM [ARGUMENTS ...]"
HELP = f"""\
{USAGE}

Run an installed Python program with quantized models made known to transformers. PROGRAM is one of

  NAME       a command of an installed package, as lm_eval or transformers
  -m MODULE  a module, as `python -m MODULE` runs it
  FILE.py    a script

Everything behind it belongs to the program.

examples:
  python -m optimum_qvlm transformers serve llava-w4a8
  python -m optimum_qvlm lm_eval --model hf --model_args pretrained=llama-w4a16 --tasks arc_easy
  python -m optimum_qvlm -m lm_eval --model hf --model_args pretrained=llama-w4a16 --tasks arc_easy

exit status: that of the program; 2 where no such program can be run
"""
REFUSED = 2
SUGGESTIONS = 3


def main() -> NoReturn:
    """Run the program that `sys.argv` names, and end as it ends."""
    words = sys.argv[1:]
    if not words:
        print(f"{USAGE}\npython -m optimum_qvlm: error: name a program to run, as in lm_eval", file=sys.stderr)
        sys.exit(REFUSED)
    if words[0] in ("-h", "--help"):
        print(HELP, end="")
        sys.exit(0)
    if words[0] == "--version":
        print(f"optimum-qvlm {__version__}")
        sys.exit(0)
    try:
        run = find_program(words)
    except QVLMError as error:
        print(f"python -m optimum_qvlm: error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    sys.exit(run())


class Module:
    """`-m MODULE`: runs as `__main__`, with the working folder first on the path, as Python has put it there."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name, self.arguments = name, arguments

    def __call__(self) -> None:
        sys.argv = [self.name, *self.arguments]
        runpy.run_module(self.name, run_name="__main__", alter_sys=True)


class Script:
    """A file of Python: runs as `__main__`, with its own folder first on the path."""

    def __init__(self, path: str, arguments: Sequence[str]) -> None:
        self.path, self.arguments = path, arguments

    def __call__(self) -> None:
        sys.argv = [self.path, *self.arguments]
        replace_working_folder(Path(self.path).resolve().parent)
        runpy.run_path(self.path, run_name="__main__")


class Command:
    """A command that a package declares: a function, whose result is the exit status."""

    def __init__(self, entry: EntryPoint, arguments: Sequence[str]) -> None:
        self.entry, self.arguments = entry, arguments

    def __call__(self) -> Any:
        folder = Path(sysconfig.get_path("scripts"))
        installed = folder / self.entry.name
        sys.argv = [str(installed) if installed.exists() else self.entry.name, *self.arguments]
        replace_working_folder(folder)
        # Processes that multiprocessing spawns import what this names, and with it our package. Of a package's
        # `__main__`, which stands here now, they import nothing.
        sys.modules["__main__"].__spec__ = sys.modules[__name__].__spec__
        return self.entry.load()()


def find_program(words: Sequence[str]) -> Module | Script | Command:
    """What to run for `words`, the program and its arguments.

    Raises:
        QVLMError: there is no such program, or it is not one of Python, or one of another Python.
    """
    name, arguments = words[0], words[1:]
    if name == "-m":
        return _find_module(arguments)
    if name.startswith("-"):
        raise QVLMError(f"unknown option {name}; options of the program come behind its name, see --help")
    commands = {entry.name: entry for entry in reversed(tuple(entry_points(group="console_scripts")))}
    if name in commands:
        return Command(commands[name], arguments)
    return _find_script(name, arguments, list(commands))


def replace_working_folder(folder: Path) -> None:
    """Put `folder` where Python put the working folder: scripts do not import what happens to lie in the latter."""
    if not sys.flags.safe_path:
        sys.path[0] = str(folder)


def _find_module(words: Sequence[str]) -> Module:
    if not words:
        raise QVLMError("-m needs the name of a module, as in -m lm_eval")
    name = words[0]
    try:
        spec = find_spec(name)
        runnable = spec is not None and (not spec.submodule_search_locations or find_spec(f"{name}.__main__"))
    except (ImportError, ValueError) as error:
        raise QVLMError(f"module {name!r} cannot be found for {sys.executable} ({error})") from error
    if spec is None:
        raise QVLMError(
            f"there is no module {name!r} for {sys.executable}; install its package there, or use another Python"
        )
    if not runnable:
        raise QVLMError(f"{name!r} is a package without a __main__ module, which Python cannot run; name a command")
    return Module(name, words[1:])


def _find_script(name: str, arguments: Sequence[str], commands: list[str]) -> Script:
    """A script by its path, or one that lies on PATH although no package declares it."""
    path = name if Path(name).is_file() else shutil.which(name)
    if path is None:
        raise QVLMError(_unknown(name, commands))
    if Path(path).suffix == ".py":
        return Script(path, arguments)
    interpreter = _interpreter(Path(path))
    if "python" not in interpreter:
        raise QVLMError(f"{path} is not a Python program, so optimum_qvlm cannot be imported in it")
    if not _is_this_python(interpreter):
        raise QVLMError(
            f"{path} runs in another Python ({interpreter}) than this one ({sys.executable}); install optimum-qvlm "
            f"there, and use that Python's `python -m optimum_qvlm {name}`"
        )
    return Script(path, arguments)


def _interpreter(path: Path) -> str:
    """What the first line of a script names; empty for other files."""
    with path.open("rb") as file:
        line = file.readline(1024)
    return line[2:].decode(errors="replace").strip() if line.startswith(b"#!") else ""


def _is_this_python(interpreter: str) -> bool:
    """Whether a script's first line leads here: it names this environment, or whichever Python comes first."""
    words = interpreter.split()
    if Path(words[0]).name == "env":
        return True
    return Path(words[0]).parent in (Path(sys.executable).parent, Path(sys.prefix, "bin"))


def _unknown(name: str, commands: list[str]) -> str:
    """What is said of a name that leads nowhere, with the nearest way out."""
    close = difflib.get_close_matches(name, commands, SUGGESTIONS)
    module = name.replace("-", "_")
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif module.isidentifier() and find_spec(module) is not None:
        hint = f"to run the module of this name, put -m before it: python -m optimum_qvlm -m {module}"
    else:
        hint = "install its package there, or give the path of a script"
    return f"there is no program {name!r} for {sys.executable}; {hint}"
