import pytest
import torch.distributed as dist

from ortho_fx import OrthoFxError
from ortho_fx.models.training.processes import join, launched

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}
NAMES = (*WHOLE, "LOCAL_RANK", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_is_launched_if_its_environment_says_so(monkeypatch):
    assert not launched()
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # which images of clusters set for all programs
    assert not launched()
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert launched()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "0"}, "the environment has RANK, and not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start several"),
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE, and not RANK, "),
        ({"TORCHELASTIC_RUN_ID": "x"}, "the environment has TORCHELASTIC_RUN_ID, and not RANK, "),
        ({**WHOLE, "MASTER_PORT": ""}, "has RANK, WORLD_SIZE, and not MASTER_PORT: "),
        ({**WHOLE, "RANK": "one"}, "RANK in the environment must be a whole number; got 'one'"),
        ({**WHOLE, "RANK": "-1"}, "RANK in the environment must be a whole number; got '-1'"),
        ({**WHOLE, "RANK": "2"}, "RANK in the environment must be below WORLD_SIZE, 2; got 2"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, changes, message):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OrthoFxError, match=message):
        join("cpu").__enter__()


def test_processes_that_do_not_find_each_other_are_named(monkeypatch):
    def fail(backend):
        raise dist.DistNetworkError("The client socket has timed out\nsecond line")

    monkeypatch.setattr(dist, "init_process_group", fail)
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OrthoFxError, match=r"^the processes of this run do not find each other: .* timed out$"):
        join("cpu").__enter__()
