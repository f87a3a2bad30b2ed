"""Memory that the C library keeps, as Linux counts it."""

import re
import sys
from pathlib import Path

import pytest
import torch

from optimum_qvlm.hf.memory import return_freed_memory

PIECE, COUNT = 64 * 1024, 2000


def anonymous_bytes():
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is counted by Linux")
def test_holes_between_tensors_that_stay_are_given_back():
    """As repacking leaves them: every second tensor is freed, and none of the others lies at the end."""
    pieces = [torch.ones(PIECE, dtype=torch.int8) for _ in range(COUNT)]
    before = anonymous_bytes()

    del pieces[::2]
    return_freed_memory()

    assert before - anonymous_bytes() > 0.8 * PIECE * COUNT / 2
    assert all(bool(piece.all()) for piece in pieces)
