"""Text that somebody else chose, made fit to be shown: in a terminal or in a page."""

import re

_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What a terminal would obey (all controls but line break and tab, and those of writing direction), and halves of
characters and what is none, which cannot be written."""


def shown(text: str) -> str:
    """`text` with escapes in place of what would be obeyed and not shown."""
    return _UNSHOWN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
