import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ortho_fx import cli
from ortho_fx.models import gpt2

pytestmark = pytest.mark.slow


def run(capsys, *arguments):
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "gpt2", "--basis", "foo"],
            "basis must be one of hermite, fourier, tropical, tropical_rational, chebyshev, ",
        ),
        (["train", "gpt2", "--degree", "40"], "degree of hermite must be an integer from 1 to 32; got 40"),
        (["train", "gpt2", "--degree", "x"], "argument --degree: must be a whole number from 0 up; got 'x'"),
        (["train", "gpt2", "--basis", "hermite", "--tied"], "tied is for the frequencies of fourier; hermite has none"),
        (["train", "bert"], "cannot read recipe bert: No such file or directory; recipes are TOML files, and"),
        (["train", "gpt2", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["train", "gpt2", "--out", "/dev/null/run"], "cannot write to /dev/null/run: Not a directory"),
        (["train", "gpt2", "--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume"),
        (["train"], "the following arguments are required: RECIPE"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out.count("Traceback")) == (2, 0)
    assert err.startswith(f"ortho-fx: error: {message}")
    assert err.count("\n") == 1


def test_training_from_the_command_line_beside_gelu(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "test", gpt2.GPT2Config(256, 16, 1, 2, 16))
    monkeypatch.chdir(tmp_path)
    common = ["train", "gpt2", "--size", "test", "--steps", "3", "--batch-size", "4", "--no-compile"]
    tied = ["--basis", "fourier", "--tied", "--out", "tied"]
    code, out, _ = run(capsys, *common, *tied)
    assert (code, "gpt2 test with fourier 5 tied, 3 steps, in tied" in out) == (0, True)
    assert run(capsys, *common, *tied, "--resume")[0] == 0
    assert "tied is True there and False here" in run(capsys, *common, *tied[:2], *tied[3:], "--resume")[2]
    code, out, _ = run(capsys, *common, "--basis", "fourier", "--beside-gelu")
    assert code == 0
    assert "gpt2 test with fourier 5, 3 steps, in runs/gpt2-test-fourier5" in out
    assert "fourier 5 loss" in out
    assert "gelu loss" in out
    assert (tmp_path / "runs" / "gpt2-test-fourier5" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "gpt2-test-gelu" / "metrics.jsonl").exists()
    shutil.rmtree(tmp_path / "runs" / "gpt2-test-gelu" / "checkpoints")
    assert run(capsys, *common, "--basis", "fourier", "--beside-gelu", "--resume")[0] == 0
    code, _, err = run(capsys, *common, "--basis", "fourier")
    assert code == 2
    assert "holds a checkpoint: pass --resume or --overwrite" in err


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "test", gpt2.GPT2Config(256, 16, 1, 2, 16))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(
        'model = "gpt2"\nsize = "test"\nbasis = "fourier"\ndegree = 4\ntied = true\n'
        'steps = 3\nbatch_size = 4\ncompile = false\nout = "mine"\n'
    )
    return str(path)


def test_options_go_before_the_recipe(capsys, recipe):
    code, out, _ = run(capsys, "train", recipe, "--steps", "2", "--out", "two")
    assert (code, "gpt2 test with fourier 4 tied, 2 steps, in two" in out) == (0, True)
    # The recipe's degree and `tied` belong to its own basis, so another basis starts from its defaults.
    code, out, _ = run(capsys, "train", recipe, "--basis", "hermite")
    assert (code, "gpt2 test with hermite 3, 3 steps, in mine" in out) == (0, True)
    code, out, _ = run(capsys, "train", recipe, "--basis", "none", "--overwrite")
    assert (code, "gpt2 test with gelu, 3 steps, in mine" in out) == (0, True)
    assert run(capsys, "train", recipe, "--no-tied", "--overwrite")[0] == 0


def test_text_is_prepared_trained_on_and_drawn(capsys, recipe, tmp_path):
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    code, out, _ = run(capsys, *"data book.txt tokens --tokenizer bpe --vocabulary 300".split())
    assert code == 0
    assert "vocabulary" in out
    code, _, err = run(capsys, *"data book.txt tokens".split())
    assert (code, err.count("\n")) == (2, 1)
    assert "tokens" in err
    assert run(capsys, "train", recipe, "--data", "tokens")[0] == 0
    assert json.loads((tmp_path / "mine" / "run.json").read_text())["bytes_per_token"] > 1
    code, out, _ = run(capsys, "plot", "mine", "--out", "pictures")
    assert code == 0
    drawn = [Path(line) for line in out.splitlines()]
    assert {path.name for path in drawn} >= {"loss.png", "norm.png"}
    assert all(path.stat().st_size > 10_000 for path in drawn)
    code, _, err = run(capsys, "plot", "tokens")
    assert (code, err) == (2, "ortho-fx: error: tokens is not a run directory: it has no run.json\n")


def test_activations_are_compared(capsys, recipe):
    command = ["compare", recipe, "--activations", "hermite:3", "--seeds", "2", "--no-timing", "--out", "compared"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith(("gelu ", "hermite:3 "))]
    assert len(rows) >= 2
    assert sorted(path.name for path in Path("compared").glob("compare.*")) == [
        "compare.csv",
        "compare.json",
        "compare.md",
        "compare.png",
        "compare.tex",
    ]
    assert "±" in out
    code, _, err = run(capsys, *command, "--activations", "bessel:3")
    assert (code, "got 'bessel:3'" in err) == (2, True)


def test_sigterm_saves_and_exits_with_143(recipe, tmp_path):
    code = (
        "import sys; from ortho_fx.models import gpt2; from ortho_fx.cli import main; "
        "gpt2.PRESETS['test'] = gpt2.GPT2Config(256, 16, 1, 2, 16); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "train", recipe, "--steps", "100000", "--eval-every", "5"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("step"):
            break
    child.terminate()
    out, err = child.communicate()
    assert child.returncode == 143
    stopped = int(re.search(r"stopped after step (\d+) and saved\n", out)[1])
    checkpoint = tmp_path / "mine" / "checkpoints" / f"step-{stopped:08d}"
    assert (checkpoint / "state.json").exists()
    assert err == f"ortho-fx: terminated; mine/checkpoints/{checkpoint.name} is kept: go on with --resume\n"


def test_an_interrupt_exits_with_130(capsys, monkeypatch):
    for told, shown in (("", ""), ("step 3 is kept", "; step 3 is kept")):

        def interrupt(*arguments, told=told, **settings):
            raise KeyboardInterrupt(told)

        monkeypatch.setattr("ortho_fx.models.training.loop.train", interrupt)
        code, _, err = run(capsys, "train", "gpt2")
        assert code == 130
        assert err == f"ortho-fx: interrupted{shown}\n"


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


def test_fit_and_bench_tie_frequencies(capsys):
    _, out, _ = run(capsys, *"fit gelu --basis fourier --degree 3 --tied".split())
    lines = {name: values for name, *values in map(str.split, out.splitlines()[3:])}
    assert [len(values) for values in lines.values()] == [1, 3, 1, 3]
    arguments = "bench --bases fourier --degrees 2 --tied --elements 6144 --rounds 1 --eager --no-peers"
    code, out, _ = run(capsys, *arguments.split())
    assert (code, "fourier 2 tied" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fit swoosh", "unknown target 'swoosh'; targets are relu, "),
        ("fit gelu --interval 5 -5", "interval must be two finite numbers, the lower one first; got (5.0, -5.0)"),
        ("fit gelu --weight uniform", "weight 'uniform' needs an interval"),
        ("fit gelu --basis sine", "basis must be one of hermite, "),
        ("fit gelu --basis hermite --tied", "tied is for the frequencies of fourier; hermite has none"),
        ("fit gelu --plot missing/fit.png", "cannot write missing/fit.png: "),
    ],
)
def test_fit_names_mistakes_in_one_line(arguments, message, capsys):
    code, _, err = run(capsys, *arguments.split())
    assert code == 2
    assert err.startswith(f"ortho-fx: error: {message}")
    assert err.count("\n") == 1


def test_bench_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = "bench --bases hermite --degrees 2 3 --elements 6144 --rounds 1 --eager --no-peers --json".split()
    code, out, err = run(capsys, *arguments, str(file))
    assert (code, err) == (0, "")
    title, header, *lines, written = out.splitlines()
    assert title.startswith("activation, 2 x 3072, float32, eager, ")
    assert header.split()[:4] == ["forward", "ms", "backward", "ms"]
    assert [line.split("  ")[0] for line in lines] == ["gelu", "copy", "hermite 2", "hermite 3"]
    assert written == f"written to {file}"
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["gelu", "copy", "hermite 2", "hermite 3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench --what vit", "what must be one of activation, mlp, gpt2, convnext; got 'vit'"),
        ("bench --bases sine", "basis must be one of hermite, "),
        ("bench --degrees 40", "degree of hermite must be an integer from 1 to 32; got 40"),
        ("bench --bases hermite --tied", "tied is for the frequencies of fourier, and the bases are hermite"),
        ("bench --elements ten", "argument --elements: must be a whole number from 1 up; got 'ten'"),
        ("bench --device tpu", "device must be cpu or cuda; got 'tpu'"),
        ("bench --granularity group:7 --elements 3072 --eager", "3072 channels do not divide into 7 groups"),
        ("bench --json missing/bench.json", "cannot write missing/bench.json: No such file or directory"),
    ],
)
def test_bench_names_mistakes_in_one_line(arguments, message, capsys):
    code, _, err = run(capsys, *arguments.split())
    assert code == 2
    assert err.startswith(f"ortho-fx: error: {message}")
    assert err.count("\n") == 1


def test_a_shell_that_asks_gets_completions():
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": "ortho-fx exp", "COMP_POINT": "12"}
    asked["_ARGCOMPLETE_STDOUT_FILENAME"] = "/dev/stdout"
    command = [sys.executable, "-m", "ortho_fx.cli"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["export"]
