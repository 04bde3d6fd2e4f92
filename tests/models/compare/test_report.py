"""Tables, numbers and files of comparisons that were made by hand."""

import csv
import io
import json
from pathlib import Path

import expecttest
import pytest

from ortho_fx import OrthoFxError
from ortho_fx.models.compare.costs import StepCost, equal_time_steps
from ortho_fx.models.compare.report import ComparedRun, Comparison, Facts
from ortho_fx.models.compare.tuning import Trial

SETTINGS = {
    "model": "gpt2",
    "size": "tiny",
    "data": "some text",
    "steps": 400,
    "warmup": 100,
    "batch_size": 16,
    "dtype": "float32",
    "device": "cpu",
    "tune": 2,
    "tune_steps": 100,
}
ENVIRONMENT = {"date": "2026-01-02", "hardware": "some CPU", "threads": 2, "versions": {"torch": "2.13.0"}}
PLACE = "some CPU, 2 threads, 2026-01-02"


def run(activation, seed, losses, diverged=None, accuracies=None, steps=400):
    """A run with evenly spaced validations."""
    validations = {steps * n // len(losses): {"validation_loss": loss} for n, loss in enumerate(losses, 1)}
    for step, accuracy in zip(validations, accuracies or (), strict=False):
        validations[step]["accuracy"] = accuracy
    size = 0 if activation == "gelu" else 16
    folder = f"{activation}-seed{seed}"
    return ComparedRun(activation, seed, folder, 1000 + size, size, validations, 0.011, diverged, steps, 0.004)


def comparison():
    """Of "slow" and its reference there are runs of equal time; "same" takes as long as the reference."""
    runs = [
        run("gelu", 0, [3.0, 2.5, 2.2, 2.00]),
        run("slow", 0, [2.9, 2.4, 2.1, 1.90]),
        run("slow", 0, [2.4, 1.95], steps=320),
        run("same", 0, [3.1, 2.6, 2.3, 2.05]),
        run("gelu", 1, [3.0, 2.5, 2.2, 2.10]),
        run("slow", 1, [2.9, 2.4, 2.1, 1.94]),
        run("slow", 1, [2.4, 2.01], steps=320),
        run("same", 1, [3.1], diverged="the loss is nan at step 150"),
    ]
    costs = {
        "gelu": StepCost(0.010, 1.0, 2_000_000, 20, PLACE),
        "slow": StepCost(0.013, 1.25, 2_100_000, 20, PLACE),
        "same": StepCost(0.010, 1.005, 1_900_000, 20, PLACE),
    }
    trials = [
        Trial("gelu", 0, 0.004, None, 100, 10_000, 2.5),
        Trial("gelu", 1, 0.002, None, 100, 10_000, 2.6),
        Trial("slow", 0, 0.004, None, 100, 10_000, None),
        Trial("slow", 1, 0.002, 0.01, 100, 10_000, 2.4),
    ]
    facts = {"gelu": Facts(1000, True), "slow": Facts(1016, True), "same": Facts(1004, False)}
    names = ["gelu", "slow", "same"]
    return Comparison(SETTINGS, "gelu", names, ENVIRONMENT, runs, costs, trials, facts)


class TestTables(expecttest.TestCase):
    def check(self, text, expected):
        # expecttest accepts only ASCII.
        self.assertExpectedInline(text.replace("±", "+-"), expected, skip=1)

    def test_text(self):
        self.check(
            comparison().report(),
            """\
gpt2 tiny, 1,000 parameters, some text, 400 steps, batch size 16, 2 seeds, float32 on cpu (some CPU), torch 2.13.0,
2026-01-02

Difference to gelu, validation loss, with the 95 % interval of Student's t:
                    at equal steps                 at equal time  at equal parameters
gelu                             -                             -                    -
slow  -0.1300 (-0.5112 to +0.2512)  -0.0700 (-0.3241 to +0.1841)                    -
same                       +0.0500                       +0.0500              +0.0500

The lowest at equal time is slow. Its validation loss there minus that of each other:
      difference            95 % (t)    95 % (bootstrap)  better
gelu     -0.0700  -0.3241 to +0.1841  -0.0885 to -0.0515  2 of 2
same     -0.1000                   -                   -  1 of 1

At equal steps, after 400:
           parameters  of them in expansions  validation loss  difference            95 % (t)    95 % (bootstrap)  better  finished  diverged
gelu            1,000                      0  2.0500 +- 0.0707           -                   -                   -       -         2         0
slow  1,016 (+1.60 %)                     16  1.9200 +- 0.0283     -0.1300  -0.5112 to +0.2512  -0.1578 to -0.1023  2 of 2         2         0
same  1,004 (+0.40 %)                     16       2.0500 +- -     +0.0500                   -                   -  0 of 1         1         1

At equal time, that of 400 steps of gelu:
      ms a step  in training   time  peak memory  steps  validation loss  difference            95 % (t)    95 % (bootstrap)  better  diverged
gelu         10           11  1.000        1.000    400  2.0500 +- 0.0707           -                   -                   -       -         0
slow         13           11  1.250        1.050    320  1.9800 +- 0.0424     -0.0700  -0.3241 to +0.1841  -0.0885 to -0.0515  2 of 2         0
same         10           11  1.005        0.950    400       2.0500 +- -     +0.0500                   -                   -  0 of 1         1

Learning rates, chosen after 100 steps of a seed that is not reported:
      trials     lr  expansion_lr  its loss  loss at the first rates       at the edge
gelu       2  0.004             -    2.5000                   2.5000                lr
slow       2  0.002          0.01    2.4000                 diverged  lr, expansion_lr
same       0      -             -         -                        -                 -

+- is the sample standard deviation over seeds. A difference is the mean, over the seeds that both finished, of the
value less that of gelu with the same seed. Its intervals are those of Student's t and of the bootstrap over seeds,
which is too narrow for few seeds.
Runs of one seed see the same batches. They start from the same weights, but for same, whose weights have other shapes
and are drawn anew.
Other than gelu in parameters by more than 1 %: slow.
"time" and "peak memory" are ratios to gelu of a training step, measured in turns in one process (some CPU, 2 threads,
2026-01-02), medians; memory is what a step allocates beyond weights, optimizer state and inputs. "in training" is the
median of the runs' own steps, whatever else the machine did.
At equal time an activation has a run of its own, whose schedule ends with the time of the reference's run. If that is
within 1 % of the same number of steps, it is the same run.
The lowest is chosen by the same runs as its differences are taken from, so they are a little too large where others
are close.
Every activation has the same number of trials around its first rates, on the same batches; they are read on the
validation data. A best rate at the edge of what was tried may not be the best.
same diverged with seed 1 in 400 steps: the loss is nan at step 150""",  # noqa: E501
        )

    def test_markdown_of_the_first_table(self):
        self.check(
            "\n\n".join(comparison().report(markdown=True).split("\n\n")[:3]),
            """\
**gpt2 tiny, 1,000 parameters, some text, 400 steps, batch size 16, 2 seeds, float32 on cpu (some CPU), torch 2.13.0,
2026-01-02**

Difference to gelu, validation loss, with the 95 % interval of Student's t:

|   | at equal steps | at equal time | at equal parameters |
| --- | ---: | ---: | ---: |
| `gelu` | - | - | - |
| `slow` | -0.1300 (-0.5112 to +0.2512) | -0.0700 (-0.3241 to +0.1841) | - |
| `same` | +0.0500 | +0.0500 | +0.0500 |""",
        )

    def test_one_seed_without_times_and_trials(self):
        one = comparison()
        one.runs, one.costs, one.trials, one.facts = one.runs[:2], {}, [], {}
        self.check(
            str(one),
            """\
gpt2 tiny, some text, 400 steps, batch size 16, 1 seed, float32 on cpu (some CPU), torch 2.13.0, 2026-01-02

Difference to gelu, validation loss, with the 95 % interval of Student's t:
      at equal steps  at equal parameters
gelu               -                    -
slow         -0.1000                    -
same               -                    -

The lowest at equal steps is slow. Its validation loss there minus that of each other:
      difference  95 % (t)  95 % (bootstrap)  better
gelu     -0.1000         -                 -  1 of 1
same           -         -                 -       -

At equal steps, after 400:
      parameters  of them in expansions  validation loss  difference  95 % (t)  95 % (bootstrap)  better  finished  diverged
gelu           -                      0       2.0000 +- -           -         -                 -       -         1         0
slow           -                     16       1.9000 +- -     -0.1000         -                 -  1 of 1         1         0
same           -                      -                -           -         -                 -       -         0         0

+- is the sample standard deviation over seeds. A difference is the mean, over the seeds that both finished, of the
value less that of gelu with the same seed. Its intervals are those of Student's t and of the bootstrap over seeds,
which is too narrow for few seeds.
The lowest is chosen by the same runs as its differences are taken from, so they are a little too large where others
are close.""",  # noqa: E501
        )

    def test_images(self):
        images = comparison()
        images.runs = [
            run("gelu", 0, [0.4, 0.3], accuracies=[0.7, 0.80]),
            run("slow", 0, [0.4, 0.2], accuracies=[0.7, 0.86]),
            run("gelu", 1, [0.4, 0.3], accuracies=[0.7, 0.82]),
            run("slow", 1, [0.4, 0.3], accuracies=[0.7, 0.82]),
        ]
        images.activations, images.costs, images.trials = ["gelu", "slow"], {}, []
        self.check(
            "\n\n".join(str(images).split("\n\n")[1:4]),
            """\
Difference to gelu, validation loss, with the 95 % interval of Student's t:
                    at equal steps  at equal parameters
gelu                             -                    -
slow  -0.0500 (-0.6853 to +0.5853)                    -

Difference to gelu, accuracy in points, with the 95 % interval of Student's t:
                at equal steps  at equal parameters
gelu                         -                    -
slow  +3.00 (-35.12 to +41.12)                    -

At equal steps, after 400:
           parameters  of them in expansions  validation loss  difference            95 % (t)    95 % (bootstrap)  better    accuracy %                difference  finished  diverged
gelu            1,000                      0  0.3000 +- 0.0000           -                   -                   -       -  81.00 +- 1.41                         -         2         0
slow  1,016 (+1.60 %)                     16  0.2500 +- 0.0707     -0.0500  -0.6853 to +0.5853  -0.0962 to -0.0038  1 of 2  84.00 +- 2.83  +3.00 (-35.12 to +41.12)         2         0""",  # noqa: E501
        )


def test_an_outcome_at_equal_steps_time_and_parameters():
    slow, same = comparison().outcome("slow"), comparison().outcome("same")
    assert slow.equal_time_steps == 320
    assert {seed: held["validation_loss"] for seed, held in slow.at_equal_time.items()} == {0: 1.95, 1: 2.01}
    assert slow.memory_ratio == 1.05
    assert slow.more_parameters == pytest.approx(0.016)
    assert slow.at_equal_parameters == {}  # more than 1 %
    assert same.equal_time_steps == 400
    assert same.at_equal_time == same.at_equal_steps == same.at_equal_parameters == {0: {"validation_loss": 2.05}}
    assert [run.seed for run in same.diverged] == [1]


def test_ratios_are_to_the_reference_whichever_was_measured_first():
    other = comparison()
    other.reference, other.activations = "slow", ["slow", "gelu", "same"]
    assert other.outcome("gelu").time_ratio == 1 / 1.25
    assert other.outcome("gelu").equal_time_steps == 500
    assert other.outcome("slow").equal_time_steps == 400


def test_the_training_loss_stands_beside_the_validation_loss():
    known = comparison()
    assert "training loss" not in str(known)
    for number, one in enumerate(known.runs[:3]):
        one.training_loss = 1.5 + number / 10
    known.activations = ["gelu", "slow"]
    _, header, rows = next(table for table in known._tables() if table[0].startswith("At equal steps"))
    cells = [row[header.index("training loss")] for row in rows]
    assert cells == ["1.5000 ± -", "1.6000 ± -"]
    _, header, rows = next(table for table in known._tables() if table[0].startswith("At equal time"))
    cells = [row[header.index("training loss")] for row in rows]
    assert cells == ["1.5000 ± -", "1.7000 ± -"]
    assert '"training loss" is the mean over the last twentieth of the steps' in " ".join(str(known).split())
    lines = list(csv.DictReader(known.csv().splitlines()))
    (found,) = (
        line
        for line in lines
        if (line["activation"], line["equal"], line["measure"]) == ("slow", "steps", "training_loss")
    )
    assert (found["seeds"], found["pairs"]) == ("1", "1")
    assert float(found["difference"]) == pytest.approx(0.1)
    again = Comparison.from_dict(json.loads(json.dumps(known.to_dict())))
    assert again.runs == known.runs


def test_a_problem_of_ones_own_is_named_once_and_has_no_nats():
    own = comparison()
    own.settings = SETTINGS | {"model": "poisson.py:Poisson", "size": "custom", "data": "poisson.py:Poisson"}
    assert str(own).startswith("poisson.py:Poisson, 1,000 parameters, 400 steps, batch size 16, 2 seeds, float32")
    assert (own.loss_unit, comparison().loss_unit) == (None, "nats")


@pytest.mark.parametrize(
    ("lowest", "digits"), [(2.0, 4), (0.1, 4), (0.0123, 4), (0.00987, 5), (0.00031, 6), (-0.00031, 6)]
)
def test_small_losses_are_written_with_three_digits(lowest, digits):
    small = comparison()
    small.runs = [run("gelu", 0, [2.5, 2 * lowest]), run("slow", 0, [2.4, lowest])]
    small.trials, small.costs = [], {}
    assert small.loss_digits == digits
    _, header, rows = next(table for table in small._tables() if table[0].startswith("At equal steps"))
    cells = [dict(zip(header, row, strict=False)) for row in rows]
    assert cells[1]["validation loss"] == f"{lowest:.{digits}f} ± -"
    assert cells[1]["difference"] == f"{-lowest:+.{digits}f}"
    small.runs[0].validations[400]["validation_loss"] = 0.0
    assert small.loss_digits == digits


def test_an_activation_without_a_measured_step_has_no_value_at_equal_time():
    known = comparison()
    del known.costs["same"]
    for _, header, rows in known._tables():
        assert {len(row) for row in rows} == {len(header)}
    _, header, rows = known._tables()[0]
    assert header == ["", "at equal steps", "at equal time", "at equal parameters"]
    assert rows[2] == ["same", "+0.0500", "-", "+0.0500"]
    found = [(row["activation"], row["equal"]) for row in csv.DictReader(io.StringIO(known.csv()))]
    assert ("same", "time") not in found
    assert ("same", "parameters") in found


def test_steps_of_equal_time():
    assert equal_time_steps(1500, 1.25) == 1200
    assert equal_time_steps(1500, 0.5) == 3000
    assert equal_time_steps(1500, 1.009) == equal_time_steps(1500, 0.9905) == 1500
    assert equal_time_steps(10, 100.0) == 0


def test_csv_has_a_line_for_each_equality():
    rows = list(csv.DictReader(io.StringIO(comparison().csv())))
    found = {(row["activation"], row["equal"]): row for row in rows}
    assert list(found)[:3] == [("gelu", "steps"), ("gelu", "time"), ("gelu", "parameters")]
    assert ("slow", "parameters") not in found
    slow = found["slow", "time"]
    assert (slow["steps"], slow["seeds"], slow["better"], slow["lr"]) == ("320", "2", "2", "0.004")
    assert float(slow["difference"]) == pytest.approx(-0.07)
    assert float(slow["t_low"]) < float(slow["bootstrap_low"]) < -0.07 < float(slow["bootstrap_high"])
    assert found["gelu", "steps"]["difference"] == ""


def test_runs_that_end_within_the_warmup_are_told():
    short = comparison()
    assert "end within the warmup" not in str(short)
    short.settings = {**SETTINGS, "warmup": 401}
    assert "Runs of 400 steps end within the warmup of 401: no learning rate reaches" in " ".join(str(short).split())


def test_latex_has_every_table():
    text = comparison().latex()
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 5
    assert "expansion\\_lr" in text
    assert text.isascii()


def test_a_comparison_survives_json():
    before = comparison()
    assert Comparison.from_dict(json.loads(json.dumps(before.to_dict()))) == before


@pytest.mark.parametrize("name", ["gpt2", "convnext"])
def test_a_committed_file_of_version_1_is_read(name):
    path = Path(__file__).parents[3] / "benchmarks" / "results" / f"compare_{name}.json"
    values = json.loads(path.read_text())
    old = Comparison.from_dict(values)
    assert old.activations == values["activations"]
    assert all(old.outcome(activation).at_equal_steps for activation in old.activations)
    assert old.costs["gelu"].measured
    assert f"{old.reference} " in str(old)


def test_without_a_finished_run_there_is_still_a_table():
    none = comparison()
    none.runs = [none.runs[-1]]
    assert "same diverged with seed 1 in 400 steps: the loss is nan at step 150" in str(none)
    none.runs = []
    assert str(none).startswith("gpt2 tiny, 1,000 parameters, some text, 400 steps, batch size 16, 0 seeds")


def test_values_that_are_no_comparison_say_so():
    with pytest.raises(OrthoFxError, match=r"^comparison has version None; this release reads versions 1 and 2$"):
        Comparison.from_dict({})
    with pytest.raises(OrthoFxError, match=r"^not a comparison: TypeError: .*unexpected keyword argument 'speed'$"):
        Comparison.from_dict({**comparison().to_dict(), "speed": 1})
