"""Fixtures for several test files."""

import warnings

import pytest
import torch


@pytest.fixture
def process_group(tmp_path):
    """A process group of this process alone, as DDP and FSDP2 need it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def without_loops():
    """Makes it an error if `torch.vmap` has no rule for an operator and would call it once for each member."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop because we have not yet implemented the batching")
        yield
