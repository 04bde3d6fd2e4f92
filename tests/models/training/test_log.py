"""The rows of a run are on the disk: at once, in every format, and after a crash."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from ortho_fx import OrthoFxError
from ortho_fx.models.runs.files import read_rows
from ortho_fx.models.training.log import COLUMNS, RunLog


def rows(first, last):
    return [
        {"step": s, "loss": 1.0 / s, "lr": 1e-3, "gradient_norm": 2.0, "seconds": 0.5} for s in range(first, last + 1)
    ]


def site_rows(step):
    values = {"mean": 0.0, "low": -1.0, "high": 1.0, "output_rms": 1.0, "reach": 2.0}
    return [{"step": step, "site": f"blocks.{i}.act", "std": 1.0 + i, "drift": 0.1 * step, **values} for i in range(2)]


def written(directory, until=6, first=0):
    log = RunLog(directory, first, writes=True)
    for row in rows(first + 1, until):
        log.row(row)
        if row["step"] % 2 == 0:
            log.site_rows(site_rows(row["step"]))
    log.close()
    return log


def read_csv(directory):
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def scalars(directory, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_are_readable_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path / "run", 0, writes=True)
    assert (log.kept, log.kept_sites) == ([], [])
    row = {**rows(1, 1)[0], "validation_loss": 1.5, "note": "beside the columns"}
    log.row(row)
    log.site_rows(site_rows(1))
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == [row]
    assert read_rows(tmp_path / "run" / "sites.jsonl") == site_rows(1)
    (line,) = read_csv(tmp_path / "run")
    assert tuple(line) == COLUMNS
    assert line == {
        **{"step": "1", "loss": "1.0", "lr": "0.001", "gradient_norm": "2.0", "seconds": "0.5"},
        **{"skipped": "", "validation_loss": "1.5", "accuracy": "", "mfu": ""},
    }
    log.close()


def test_a_killed_run_loses_nothing_that_it_wrote(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from ortho_fx.models.training.log import RunLog
log = RunLog(Path(sys.argv[1]), 0, writes=True)
for step in range(1, 4):
    log.row({"step": step, "loss": float(step), "lr": 0.1})
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in read_csv(tmp_path)] == ["1", "2", "3"]
    assert scalars(tmp_path, "loss/training") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_resuming_drops_what_will_be_written_again(tmp_path):
    written(tmp_path)
    for name in ("metrics.jsonl", "sites.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 3, "lo')
    log = RunLog(tmp_path, 3, writes=True)
    assert log.kept == rows(1, 3)
    assert log.kept_sites == site_rows(2)
    assert read_rows(tmp_path / "metrics.jsonl") == rows(1, 3)
    assert read_rows(tmp_path / "sites.jsonl") == site_rows(2)
    assert [row["step"] for row in read_csv(tmp_path)] == ["1", "2", "3"]
    log.row(rows(4, 4)[0])
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == rows(1, 4)
    assert [row["loss"] for row in read_csv(tmp_path)] == [str(row["loss"]) for row in rows(1, 4)]
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_starts_anew_replaces_what_was_there(tmp_path):
    written(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("not rows of ours\n\n")
    log = written(tmp_path, until=2)
    assert log.kept == []
    assert read_rows(tmp_path / "metrics.jsonl") == rows(1, 2)
    assert len(read_csv(tmp_path)) == 2
    assert [step for step, _ in scalars(tmp_path, "loss/training")] == [1, 2]


def test_numbers_that_are_not_finite_are_valid_json_and_come_back_as_nan(tmp_path):
    log = RunLog(tmp_path, 0, writes=True)
    log.row({"step": 1, "loss": math.nan, "gradient_norm": math.inf, "skipped": True})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        **{"step": 1, "loss": None, "gradient_norm": None},
        "skipped": True,
    }
    log = RunLog(tmp_path, 1, writes=True)
    assert math.isnan(log.kept[0]["loss"])
    assert log.kept[0]["skipped"] is True
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == text
    (line,) = read_csv(tmp_path)
    assert (line["loss"], line["skipped"]) == ("nan", "1")


def test_other_processes_write_nothing(tmp_path):
    log = written(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    log = RunLog(tmp_path / "run", 3, writes=False)
    log.row(rows(4, 4)[0])
    log.site_rows(site_rows(4))
    log.close()
    assert log.kept == []
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_tensorboard_shows_each_step_once_after_a_resumption(tmp_path):
    written(tmp_path)
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which contain the time in seconds
    log = RunLog(tmp_path, 3, writes=True)
    log.row({**rows(4, 4)[0], "loss": 9.0, "validation_loss": 2.0, "accuracy": 0.5})
    log.site_rows(site_rows(4))
    log.close()
    expected = [(row["step"], pytest.approx(row["loss"])) for row in rows(1, 3)] + [(4, 9.0)]
    assert scalars(tmp_path, "loss/training") == expected
    assert scalars(tmp_path, "loss/validation") == [(4, 2.0)]
    assert scalars(tmp_path, "validation/accuracy") == [(4, 0.5)]
    assert [step for step, _ in scalars(tmp_path, "training/gradient_norm")] == [1, 2, 3, 4]
    assert scalars(tmp_path, "sites_std/blocks.1.act") == [(2, 2.0), (4, 2.0)]
    assert scalars(tmp_path, "sites_drift/blocks.0.act") == [(2, pytest.approx(0.2)), (4, pytest.approx(0.4))]


def test_without_tensorboard_there_is_no_event_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    written(tmp_path)
    rows_only = ["coefficients.jsonl", "metrics.csv", "metrics.jsonl", "sites.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == rows_only


def test_coefficients_are_dropped_and_kept_like_other_rows(tmp_path):
    def coefficients(step):
        return [{"step": step, "site": "act", "parameters": {"constant": [float(step)], "slopes": [[1.0], [None]]}}]

    log = RunLog(tmp_path, 0, writes=True, logger="none")
    for step in (0, 2, 4):
        log.coefficient_rows(coefficients(step))
    counts = {name: rows.count for name, rows in log.flush().items()}
    assert counts == {"metrics.jsonl": 0, "sites.jsonl": 0, "coefficients.jsonl": 3}
    log.close()
    log = RunLog(tmp_path, 3, writes=True, logger="none")
    assert [row["step"] for row in read_rows(tmp_path / "coefficients.jsonl")] == [0, 2]
    log.coefficient_rows(coefficients(5))
    log.close()
    assert read_rows(tmp_path / "coefficients.jsonl") == [*coefficients(0), *coefficients(2), *coefficients(5)]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OrthoFxError, match=r"^cannot write .*/file/run: Not a directory$"):
        RunLog(tmp_path / "file" / "run", 0, writes=True)
    (tmp_path / "run" / "sites.jsonl").mkdir(parents=True)
    with pytest.raises(OrthoFxError, match=r"^cannot write .*/sites\.jsonl: Is a directory$"):
        RunLog(tmp_path / "run", 0, writes=True)


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    log = RunLog(tmp_path, 0, writes=True)
    monkeypatch.setattr(log._files[0], "_file", Full())
    with pytest.raises(OrthoFxError, match=r"^cannot write .*metrics\.jsonl: No space left on device$"):
        log.row(rows(1, 1)[0])


def test_a_write_that_is_cut_short_is_gone_on_with(tmp_path, monkeypatch):
    class Slow:
        text = b""

        def write(self, data):
            self.text += bytes(data[:3])
            return min(len(data), 3)

    log = RunLog(tmp_path, 0, writes=True)
    slow = Slow()
    monkeypatch.setattr(log._files[0], "_file", slow)
    log.row(rows(1, 1)[0])
    assert json.loads(slow.text) == rows(1, 1)[0]


def test_a_damaged_row_in_the_middle_is_named(tmp_path):
    written(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "{oops", *lines[2:]]) + "\n")
    with pytest.raises(OrthoFxError, match=r"metrics\.jsonl line 2 is not a row with a step: '{oops'"):
        RunLog(tmp_path, 3, writes=True)
