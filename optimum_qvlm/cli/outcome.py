"""How commands end: exit codes, and what is said where."""

import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

from optimum_qvlm.errors import HubError, QVLMError
from optimum_qvlm.files import strict_json

REFUSED, HUB_FAILED = 2, 3

_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey (all controls but line break and tab, and those of writing direction), and halves of
characters, which cannot be written."""


def finish(program: str, work: Callable[[], None], *, as_json: bool = False) -> int:
    """Run `work`; returns the exit code: 0 done, 2 input that was refused, 3 the Hub refused or was not reached.

    Refusals are said on stderr, and with `as_json` as an object with `error` on stdout too. Other errors are
    raised: they are bugs, and their traceback is wanted.
    """
    try:
        work()
    except QVLMError as error:
        say(f"{program}: error: {error}", to=sys.stderr)
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        return HUB_FAILED if isinstance(error, HubError) else REFUSED
    return 0


def say(text: str, *, to: TextIO | None = None) -> None:
    """Print text in which names may stand that somebody else chose; on stdout where `to` is None."""
    stream = sys.stdout if to is None else to
    print(printable(text, stream.encoding), file=stream, flush=True)


def printable(text: str, encoding: str | None) -> str:
    """`text` with escapes for what a terminal would obey, and for what `encoding` does not have."""
    shown = _UNSHOWN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    coding = encoding or "utf-8"
    return shown.encode(coding, "backslashreplace").decode(coding)


def print_json(value: Any) -> None:
    """One object on stdout, in one line of ASCII that no library can break up and every terminal can show."""
    print(strict_json.dumps(value), flush=True)
