"""benchmarks/gpu.py without a GPU: a dry run, and what it does about failures and the time."""

import json

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.slow


def test_a_dry_run_passes(tmp_path):
    path = tmp_path / "gpu.json"
    results = gpu.run(gpu.parts_of(dry=True), 60.0, "cpu", True, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    assert results["versions"]["torch"]
    parts = results["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "ok")
    assert [row["right"] for row in parts["numbers"]["rows"]] == [True, True]
    assert {"gelu", "hermite 3", "squared relu"} <= {row["name"] for row in parts["activation"]["rows"]}
    names = {row["name"] for row in parts["gpt2"]["rows"]}
    assert {"gelu", "hermite 3", "hermite 3 a channel", "squared relu", "swiglu"} <= names
    assert all(row["peak_bytes"] for row in parts["convnext"]["rows"])
    assert parts["code"]["kernels"]["hermite 3"]["backward"] == {"big": 1, "small": 1}


def test_what_fails_is_recorded_and_the_others_run(monkeypatch, tmp_path):
    def fails(*_):
        raise ValueError("no such thing")

    monkeypatch.setattr(gpu, "PARTS", {"gpt2": fails, "code": lambda *_: {"kernels": {}}})
    results = gpu.run(["gpt2", "code"], 1.0, "cpu", True, tmp_path / "gpu.json")
    assert results["parts"]["gpt2"]["status"] == "failed"
    assert results["parts"]["gpt2"]["error"] == "ValueError: no such thing"
    assert "fails" in results["parts"]["gpt2"]["traceback"]
    assert results["parts"]["code"]["status"] == "ok"


def test_what_does_not_fit_is_skipped():
    results = gpu.run(["numbers", "code"], 0.0, "cpu", True, None)
    assert {part["status"] for part in results["parts"].values()} == {"skipped"}


def test_measurements_that_fail_or_do_not_fit_are_listed():
    clock = gpu.Clock(1.0)

    def candidate(name, function):
        return gpu.Candidate(name, "expansion", {"step": function}, "cpu", False)

    def fails(_):
        raise ValueError("no such thing")

    def uses_up_the_time(_):
        clock.deadline = 0.0

    given = [
        candidate("gelu", lambda _: None),
        candidate("broken", fails),
        candidate("long", uses_up_the_time),
        candidate("late", lambda _: None),
    ]
    config = gpu.BenchConfig(what="gpt2", eager=True, rounds=1)
    result = gpu.measured(config, iter(given), clock)
    assert result["failed"] == {"broken": "ValueError: no such thing"}
    assert result["skipped"] == ["late"]
    assert [row["name"] for row in result["rows"] if row["error"] is None] == ["gelu", "long"]


def test_parts_share_the_time_that_is_left(monkeypatch):
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    clock = gpu.Clock(10.0)
    clock.begin("gpt2", ["convnext", "compile"])
    assert clock.deadline == pytest.approx(540 * 4 / 9)
    clock.begin("compile", [])
    assert clock.deadline == 540.0
