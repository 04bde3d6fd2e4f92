"""The table of PyTorch releases: README.md has the measured table, and every row is right."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "compat.py"
RESULT = ROOT / "benchmarks" / "results" / "compat.json"


@pytest.fixture
def compat(monkeypatch):
    # The checks import the script by its name, as if it were the main module of a process.
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import compat

    return compat


def record(release, *rows):
    return {"release": release, "build": "CPU", "rows": [list(row) for row in rows]}


def test_the_readme_has_the_table_that_the_records_give():
    done = subprocess.run([sys.executable, SCRIPT, "table"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("| PyTorch | build |")
    assert "## PyTorch releases\n" in (ROOT / "README.md").read_text()
    assert f"\n\n{done.stdout}\n" in (ROOT / "README.md").read_text()


def test_every_row_of_every_release_is_right(compat):
    records = json.loads(RESULT.read_text())
    assert set(records) == set(compat.RELEASES)
    for release, each in records.items():
        assert each["torch"].split("+")[0] == release
        assert {row[0] for row in each["rows"]} == set(compat.COLUMNS)
        assert compat.failures(each) == []


def test_the_releases_are_those_that_the_lowering_is_tested_with(compat):
    from ortho_fx import torch_private

    minors = {tuple(int(number) for number in release.split(".")[:2]) for release in compat.RELEASES}
    assert minors == set(torch_private.TESTED)


def test_a_new_record_takes_the_place_of_its_release_alone(compat):
    old = {"2.9.0": record("2.9.0", ("hook", "a", False, "no")), "2.10.0": record("2.10.0", ("hook", "a", True, "yes"))}
    new = record("2.9.0", ("hook", "a", True, 1e-16))
    merged = compat.merged(old, new)
    assert list(merged) == ["2.10.0", "2.9.0"]
    assert merged == {"2.10.0": old["2.10.0"], "2.9.0": new}
    assert json.loads(compat.written(merged)) == merged
    assert '   ["hook", "a", true, 1e-16]\n' in compat.written(merged)


def test_rows_that_failed_are_in_the_table(compat):
    kernels = ("kernels", "a", True, {"lowering": [1, 2], "plain": [1, 4]})
    good = record("2.2.0", ("lowering", "a", True, "used"), ("values", "a", True, 2e-7), kernels)
    bad = record("2.1.0", ("lowering", "a", False, "no"), ("values", "a", True, 2e-7), ("values", "b", False, "off"))
    (_, _, first, second) = compat.table({"2.2.0": good, "2.1.0": bad}).splitlines()
    assert first.startswith("| 2.2.0 | CPU | used | 1 of 1, 2e-07 |")
    assert first.endswith("| 3 / 5 |")
    assert second.startswith("| 2.1.0 | CPU | **fallback** | **1 of 2, 2e-07** |")
    assert compat.failures(bad) == [["lowering", "a", False, "no"], ["values", "b", False, "off"]]


def test_a_case_that_fails_stops_no_other(compat, monkeypatch, tmp_path):
    import compat_case
    import compat_checks

    def cases():
        def warn():
            warnings.warn("ortho_fx: something is lost", stacklevel=1)

        yield "warns", warn
        yield "raises", lambda: 1 / 0
        yield "is wrong", lambda: compat_case.off(torch.ones(3), -torch.ones(3), 1e-9)
        yield "is right", lambda: 1.5

    monkeypatch.setattr(compat_checks, "CHECKS", {"hook": cases})
    found = compat_checks.check(tmp_path / "record.json")
    assert found["rows"] == [
        ["hook", "warns", True, None],
        ["hook", "raises", False, "ZeroDivisionError: division by zero"],
        ["hook", "is wrong", False, "off by 2.0e+00, more than 1e-09"],
        ["hook", "is right", True, 1.5],
        ["warnings", "warns", False, "ortho_fx: something is lost"],
    ]
    assert compat.read(tmp_path / "record.json") == {found["release"]: found}


def test_checks_that_a_process_did_not_reach_are_failed_rows(compat, monkeypatch, tmp_path):
    import compat_checks

    def ends():
        raise SystemExit

    monkeypatch.setattr(compat_checks, "CHECKS", {"hook": lambda: [("a", int)], "ddp": ends})
    with pytest.raises(SystemExit):
        compat_checks.check(tmp_path / "record.json")
    ((_, found),) = compat.read(tmp_path / "record.json").items()
    assert [row[:3] for row in found["rows"]] == [
        ["hook", "a", True],
        ["ddp", "all", False],
        ["warnings", "all", False],
    ]


def test_an_environment_that_cannot_be_made_is_no_record(compat, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compat, "GIGABYTES", 1e9)
    assert compat.main(["run", "--releases", "2.13.0", "--out", str(tmp_path / "out.json")]) == 1
    assert "2.13.0 was not measured" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
