import pytest

from ortho_fx import memory
from ortho_fx.errors import OrthoFxError


def test_what_fits_passes_and_what_does_not_is_named():
    there = memory.available_memory()
    assert there is None or there > 0
    memory.require_memory(1, "a byte")
    with pytest.raises(OrthoFxError, match=r"^a batch: that takes 1e\+21 GB of memory or more, and .* are available$"):
        memory.require_memory(10**30, "a batch")
    with pytest.raises(OrthoFxError, match="far more than any"):
        memory.require_memory(10**400, "a batch")


def test_the_smallest_limit_counts(monkeypatch):
    for system, cgroup, limit, expected in ((9, None, 5, 5), (9, 4, None, 4), (None, None, None, None)):
        monkeypatch.setattr(memory, "_of_system", lambda value=system: value)
        monkeypatch.setattr(memory, "_of_cgroup", lambda value=cgroup: value)
        monkeypatch.setattr(memory, "_of_limit", lambda value=limit: value)
        assert memory.available_memory() == expected
    memory.require_memory(10**30, "unknown")
