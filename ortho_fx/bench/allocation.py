"""How the C library gives memory to a measurement."""

from __future__ import annotations

import ctypes
import platform

import torch


class Reuse:
    """Tells glibc to keep freed memory, for the rest of the process: blocks that were freed lie there already."""

    active = False
    # Of mallopt(3), from malloc.h.
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

    @classmethod
    def start(cls, headroom: int) -> bool:
        """Whether malloc now reuses what is freed, with so many bytes in one piece at hand."""
        if platform.libc_ver()[0] != "glibc":
            return False
        # No mmap of its own for a large block, and no trimming of the heap when one is freed.
        mallopt = ctypes.CDLL(None).mallopt
        cls.active = bool(mallopt(cls.M_MMAP_MAX, 0) and mallopt(cls.M_TRIM_THRESHOLD, -1))
        torch.empty(headroom, dtype=torch.uint8).fill_(0)
        return cls.active


def buffers_are_reused() -> bool:
    """Whether this process keeps freed memory by now, as measurements without `fresh` make it do."""
    return Reuse.active


def page_faults() -> int | None:
    """Minor page faults of this process so far; None where the system does not count them."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
