"""Controls how the C library allocates memory during a measurement."""

from __future__ import annotations

import ctypes
import platform

import torch


class Reuse:
    """Makes glibc keep freed memory for the rest of the process, so that new blocks cause no page faults."""

    active = False
    # Constants of mallopt(3), from malloc.h.
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

    @classmethod
    def start(cls, headroom: int) -> bool:
        """Starts to reuse freed memory, with `headroom` bytes in one piece; returns whether malloc supports it."""
        if platform.libc_ver()[0] != "glibc":
            return False
        # Large blocks get no separate mmap, and freeing one does not trim the heap.
        mallopt = ctypes.CDLL(None).mallopt
        cls.active = bool(mallopt(cls.M_MMAP_MAX, 0) and mallopt(cls.M_TRIM_THRESHOLD, -1))
        torch.empty(headroom, dtype=torch.uint8).fill_(0)
        return cls.active


def buffers_are_reused() -> bool:
    """Whether this process keeps freed memory; measurements without `fresh` turn this on."""
    return Reuse.active


def page_faults() -> int | None:
    """The minor page faults of this process so far; None if the system does not count them."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
