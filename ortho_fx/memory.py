"""How much memory this process can still get; what needs more is refused before work starts."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ortho_fx.errors import OrthoFxError

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that this process can get at most, from the system, its cgroup and its limits; None if unknown.

    Memory that the system uses to cache files counts as available.
    """
    found = [_of_system(), _of_cgroup(), _of_limit()]
    return min((size for size in found if size is not None), default=None)


def require_memory(size: int, what: str) -> None:
    """Raises an `OrthoFxError` that begins with `what` if so many bytes are not available."""
    there = available_memory()
    if there is not None and size > there:
        raise OrthoFxError(f"{what}: that takes {shown(size)} of memory or more, and {shown(there)} are available")


def shown(size: int) -> str:
    """A number of bytes, as text: "1.5 GB"."""
    return f"{size / 1e9:.3g} GB" if size < 10**300 else "far more than any"


def _of_system() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _of_cgroup() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((_CGROUP / "memory.max").read_text())  # "max" is no number: no limit
    return None


def _of_limit() -> int | None:
    """What is left of the limit on the address space, `ulimit -v`."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        return max(limit - used, 0)
    return limit
