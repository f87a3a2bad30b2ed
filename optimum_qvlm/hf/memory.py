"""CPU memory that was freed, given back to the system."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Let the system have the pages of freed tensors, where the C library can: glibc keeps them else.

    Weights that are repacked one after the other leave holes, which came to a quarter of a small quantized model.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
