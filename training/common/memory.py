"""What the allocator does with memory that a training step has freed."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt, in GNU's malloc.h
MOST = 2**31 - 1  # bytes kept beyond what is in use
LARGE = 2**25  # bytes; no threshold can be higher


def keep_freed_memory() -> None:
    """Let this process keep what it frees for what it takes next, up to 2 GB.

    GNU's allocator gives freed memory back to the system above a few megabytes and takes it anew in the next step, page
    by page: tens of thousands of page faults, up to a tenth of a training step on a CPU. Does nothing where the C
    library has no such settings.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(TRIM_THRESHOLD, MOST)
    mallopt(MMAP_THRESHOLD, LARGE)
    mallopt(MMAP_MAX, 0)  # tensors above 32 MB too
