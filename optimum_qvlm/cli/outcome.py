"""How commands end: exit codes, and what is said where."""

import json
import sys
from collections.abc import Callable
from typing import Any

from optimum_qvlm.errors import HubError, QVLMError

REFUSED, HUB_FAILED = 2, 3


def finish(program: str, work: Callable[[], None], *, as_json: bool = False) -> int:
    """Run `work`; returns the exit code: 0 done, 2 input that was refused, 3 the Hub refused or was not reached.

    Refusals are said on stderr, and with `as_json` as an object with `error` on stdout too. Other errors are
    raised: they are bugs, and their traceback is wanted.
    """
    try:
        work()
    except QVLMError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        return HUB_FAILED if isinstance(error, HubError) else REFUSED
    return 0


def print_json(value: Any) -> None:
    """One object on stdout, in one line that no library can break up."""
    print(json.dumps(value, ensure_ascii=False), flush=True)
