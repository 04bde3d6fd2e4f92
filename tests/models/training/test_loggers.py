"""What Weights & Biases and trackio get of a run, and what happens without them."""

import sys
from types import SimpleNamespace

import pytest

from ortho_fx import OrthoFxError
from ortho_fx.cli import main
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.training.log import RunLog


class Library:
    """Stands for the package: keeps what it is told."""

    def __init__(self):
        self.started, self.logged, self.metrics, self.finished = [], [], [], 0
        self.Settings = lambda **settings: settings

    def init(self, **settings):
        self.started.append(settings)
        return SimpleNamespace(log=self._log, define_metric=self._define, finish=self._finish)

    def _log(self, values, step=None):
        self.logged.append((values, step))

    def _define(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def _finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def library(request, monkeypatch):
    made = Library()
    monkeypatch.setitem(sys.modules, request.param, made)
    made.name = request.param
    return made


def logged(directory, name, first=0):
    log = RunLog(directory, first, True, name, {"basis": "hermite", "degree": 3})
    log.row({"step": first + 1, "loss": 2.0, "lr": 0.1, "seconds": 0.5, "validation_loss": 1.5})
    log.site_rows([{"step": first + 1, "site": site, "std": 1.0, "drift": 0.5} for site in ("a", "b")])
    log.close()
    return log


def test_a_run_is_shown_with_its_settings_and_goes_on_after_a_resumption(tmp_path, library):
    logged(tmp_path / "run", library.name)
    logged(tmp_path / "run", library.name, first=1)
    logged(tmp_path / "run", library.name)  # anew
    first, resumed, anew = library.started
    own = "id" if library.name == "wandb" else "name"
    assert first == resumed
    assert first[own].startswith("run-")
    assert anew[own] != first[own]
    assert (first["project"], first["resume"]) == ("ortho_fx", "allow")
    assert first["config"] == {"basis": "hermite", "degree": 3}
    assert library.finished == 3
    told = [
        {"loss/training": 2.0, "loss/validation": 1.5, "training/lr": 0.1},
        {"sites_std/a": 1.0, "sites_drift/a": 0.5, "sites_std/b": 1.0, "sites_drift/b": 0.5},
    ]
    if library.name == "wandb":
        assert first["dir"] == str(tmp_path / "run")
        assert library.metrics[0] == ("*", "step")
        assert library.logged[:2] == [({**values, "step": 1}, None) for values in told]
    else:
        assert library.logged[:2] == [(values, 1) for values in told]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_errors_of_the_library_are_one_line(tmp_path, library):
    def fail(*arguments, **settings):
        raise ValueError("no account\nlog in")

    offline = "WANDB_MODE=offline needs no account; " if library.name == "wandb" else ""
    log = RunLog(tmp_path / "run", 0, True, library.name)
    log._logger._run.log = log._logger._run.finish = fail
    with pytest.raises(OrthoFxError, match=f"^{library.name} does not take step 1: no account$"):
        log.row({"step": 1, "loss": 2.0})
    with pytest.raises(OrthoFxError, match=f"^{library.name} does not end: no account; the run's own files are whole$"):
        log.close()
    library.init = fail
    message = f"^{library.name} does not start: no account; {offline}--log none shows the run nowhere$"
    with pytest.raises(OrthoFxError, match=message):
        RunLog(tmp_path / "other", 0, True, library.name)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_told_before_the_run_begins(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", "gpt2", "--log", name, "--no-compile"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ortho-fx: error: log '{name}' needs {name}: ")
    assert err.count("\n") == 1
    assert err.endswith("; or choose another by --log\n")
    assert list(tmp_path.iterdir()) == []


def test_other_names_are_refused_and_none_writes_no_events(tmp_path):
    with pytest.raises(OrthoFxError, match="log must be one of tensorboard, wandb, trackio, none; got 'mlflow'"):
        TrainConfig(log="mlflow")
    logged(tmp_path, "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "coefficients.jsonl", "metrics.csv", "metrics.jsonl", "sites.jsonl",
    ]  # fmt: skip
    assert "log" not in TrainConfig(log="none").configuration()
