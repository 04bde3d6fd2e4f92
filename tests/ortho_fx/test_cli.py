import subprocess
import sys

import pytest

from ortho_fx import cli
from ortho_fx.models import gpt2


def run(capsys, *arguments):
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "gpt2", "--basis", "foo"],
            "basis must be one of hermite, fourier, tropical, tropical_rational; got",
        ),
        (["train", "gpt2", "--degree", "40"], "degree of hermite must be an integer from 1 to 32; got 40"),
        (["train", "gpt2", "--degree", "x"], "argument --degree: invalid int value: 'x'"),
        (["train", "bert"], "model must be one of gpt2, convnext; got 'bert'"),
        (["train", "gpt2", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["train", "gpt2", "--out", "/dev/null/run"], "cannot write to /dev/null/run: Not a directory"),
        (["train", "gpt2", "--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume"),
        (["train"], "the following arguments are required: model"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out.count("Traceback")) == (2, 0)
    assert err.startswith(f"ortho-fx: error: {message}")
    assert err.count("\n") == 1


def test_training_from_the_command_line_beside_gelu(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "small", gpt2.GPT2Config(256, 16, 1, 2, 16))
    monkeypatch.chdir(tmp_path)
    common = ["train", "gpt2", "--size", "small", "--steps", "3", "--batch-size", "4", "--no-compile"]
    code, out, _ = run(capsys, *common, "--basis", "fourier", "--beside-gelu")
    assert code == 0
    assert "gpt2 small with fourier 5, 3 steps, in runs/gpt2-small-fourier5" in out
    assert "fourier 5 loss" in out
    assert "gelu loss" in out
    assert (tmp_path / "runs" / "gpt2-small-fourier5" / "checkpoint.pt").exists()
    assert (tmp_path / "runs" / "gpt2-small-gelu" / "metrics.jsonl").exists()
    (tmp_path / "runs" / "gpt2-small-gelu" / "checkpoint.pt").unlink()
    assert run(capsys, *common, "--basis", "fourier", "--beside-gelu", "--resume")[0] == 0
    code, _, err = run(capsys, *common, "--basis", "fourier")
    assert code == 2
    assert "holds a checkpoint: pass --resume or --overwrite" in err


def test_an_interrupt_exits_with_130(capsys, monkeypatch):
    def interrupt(parsed):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", interrupt)
    code, _, err = run(capsys, "train", "gpt2")
    assert code == 130
    assert err == "ortho-fx: interrupted; go on with --resume\n"


def test_help_and_version_work_as_a_module():
    for argument, expected in (("--help", "train GPT-2 or ConvNeXt"), ("--version", "ortho-fx 0.")):
        done = subprocess.run([sys.executable, "-m", "ortho_fx.cli", argument], capture_output=True, text=True)
        assert done.returncode == 0
        assert expected in done.stdout


def test_fit_prints_and_draws(tmp_path, capsys):
    plot = tmp_path / "fit.png"
    arguments = "fit gelu --basis tropical_rational --weight uniform --interval -5 5 --plot".split()
    code, out, _ = run(capsys, *arguments, str(plot))
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "tropical_rational 6 fit of gelu, uniform weight, errors on [-5, 5]"
    assert [line.split()[0] for line in lines[3:7]] == [
        "slopes",
        "offsets",
        "denominator_slopes",
        "denominator_offsets",
    ]
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fit swoosh", "unknown target 'swoosh'; targets are relu, "),
        ("fit gelu --interval 5 -5", "interval must be two finite numbers, the lower one first; got (5.0, -5.0)"),
        ("fit gelu --weight uniform", "weight 'uniform' needs an interval"),
        ("fit gelu --basis sine", "basis must be one of hermite, "),
        ("fit gelu --plot missing/fit.png", "cannot write missing/fit.png: "),
    ],
)
def test_fit_names_mistakes_in_one_line(arguments, message, capsys):
    code, _, err = run(capsys, *arguments.split())
    assert code == 2
    assert err.startswith(f"ortho-fx: error: {message}")
    assert err.count("\n") == 1
