"""A run's directory is read as it was written; errors name the missing file."""

import json
import math

import pytest
import torch
from torch import nn

from ortho_fx import HermiteActivation, OrthoFxError
from ortho_fx.models.runs.files import read_rows, read_run
from ortho_fx.models.training.log import RunLog
from ortho_fx.models.training.monitor import SiteMonitor


def test_everything_that_a_run_wrote_is_read(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4), HermiteActivation(3)), torch.randn(8, 4)
    (tmp_path / "run.json").write_text(json.dumps({"config": {"basis": "hermite", "clamp": None}, "data": "digits"}))
    log, monitor = RunLog(tmp_path, 0, writes=True), SiteMonitor(model)
    start = monitor.measure(lambda: model(x), 0)
    log.site_rows(start)
    monitor.save_expansions(tmp_path / "expansions-start.safetensors", 0)
    log.row({"step": 1, "loss": 2.0, "gradient_norm": math.nan, "skipped": True})
    log.row({"step": 2, "loss": 1.0, "validation_loss": 1.5})
    end = monitor.measure(lambda: model(x), 2)
    log.site_rows(end)
    monitor.save_expansions(tmp_path / "expansions.safetensors", 2)
    run = read_run(str(tmp_path))
    assert run.directory == tmp_path
    assert run.config == {"config": {"basis": "hermite", "clamp": None}, "data": "digits"}
    assert [row["step"] for row in run.rows] == [1, 2]
    assert math.isnan(run.rows[0]["gradient_norm"])
    assert run.validations == [{"step": 2, "loss": 1.0, "validation_loss": 1.5}]
    assert run.site_rows == [*start, *end]
    assert (run.start.step, run.now.step) == (0, 2)
    assert torch.equal(run.now.sites["1"].activation.coefficients, model[1].coefficients)


def test_a_run_of_an_untouched_model_has_no_expansions(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    run = read_run(tmp_path)
    assert (run.rows, run.site_rows, run.start, run.now) == ([], [], None, None)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(OrthoFxError) as caught:
        read_run(tmp_path / "none")
    assert str(caught.value) == f"{tmp_path / 'none'} is not a run directory: it has no run.json"
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(OrthoFxError) as caught:
        read_run(tmp_path)
    assert str(caught.value) == f"{tmp_path} is not a run directory: it has no metrics.jsonl"
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OrthoFxError, match=r"run\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("rest", ["", '{"step": 2, "lo', '{"step"', "\0\0\0\0", "\n", '{"loss": 3.0}'])
def test_a_last_row_that_was_cut_short_is_left_out(tmp_path, rest):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + rest)
    assert read_rows(path) == [{"step": 1, "loss": 2.0}]


def test_rows_that_are_no_rows_are_named_by_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    for line in ("[1]", "3", '{"loss": 3.0}', '{"step": "x"}', "\x80"):
        path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n', encoding="latin-1")
        with pytest.raises(OrthoFxError, match=r"rows\.jsonl line 2 is not a row with a step: "):
            read_rows(path)
    with pytest.raises(OrthoFxError, match=r"^cannot read .*: Is a directory$"):
        read_rows(tmp_path)
