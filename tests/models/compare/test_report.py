"""Tables, numbers and pictures of comparisons that were made by hand."""

import json
import math

import expecttest
import pytest

from ortho_fx import OrthoFxError
from ortho_fx.models.compare.report import ComparedRun, Comparison, StepCost, difference, equal_time_step, spread

SETTINGS = {
    "model": "gpt2",
    "size": "tiny",
    "data": "some text",
    "steps": 400,
    "batch_size": 16,
    "dtype": "float32",
    "device": "cpu",
}
ENVIRONMENT = {"date": "2026-01-02", "hardware": "some CPU", "threads": 2, "versions": {"torch": "2.13.0"}}


def run(activation, seed, losses, diverged=None, accuracies=None):
    """A run with a validation every hundred steps."""
    validations = {100 * n: {"validation_loss": loss} for n, loss in enumerate(losses, 1)}
    for step, accuracy in zip(validations, accuracies or (), strict=False):
        validations[step]["accuracy"] = accuracy
    size = 0 if activation == "gelu" else 16
    return ComparedRun(activation, seed, f"{activation}-seed{seed}", 1000 + size, size, validations, 0.011, diverged)


def comparison():
    runs = [
        run("gelu", 0, [3.0, 2.5, 2.2, 2.00]),
        run("slow", 0, [2.9, 2.4, 2.1, 1.90]),
        run("fast", 0, [3.1, 2.6, 2.3, 2.05]),
        run("gelu", 1, [3.0, 2.5, 2.2, 2.10]),
        run("slow", 1, [2.9, 2.4, 2.1, 1.94]),
        run("fast", 1, [3.1], diverged="the loss is nan at step 150"),
    ]
    costs = {
        "gelu": StepCost(0.010, 1.0, 2_000_000, 20),
        "slow": StepCost(0.013, 1.25, 2_100_000, 20),
        "fast": StepCost(0.008, 0.8, 1_900_000, 20),
    }
    return Comparison(SETTINGS, "gelu", ["gelu", "slow", "fast"], ENVIRONMENT, runs, costs, ENVIRONMENT)


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

At equal steps, after 400:
      expansion parameters  validation loss  difference  in stds  better  finished  diverged
gelu                     0  2.0500 +- 0.0707           -        -       -         2         0
slow                    16  1.9200 +- 0.0283     -0.1300     -1.8  2 of 2         2         0
fast                    16       2.0500 +- -     +0.0500        -  0 of 1         1         1

At equal time, that of 400 steps of gelu:
      ms a step  in training   time  peak memory  step  of the time  validation loss  difference
gelu         10           11  1.000        1.000   400         100%  2.0500 +- 0.0707           -
slow         13           11  1.250        1.050   300          94%  2.1000 +- 0.0000     +0.0500
fast          8           11  0.800        0.950   400          80%       2.0500 +- -     +0.0500

+- is the sample standard deviation over seeds. A difference is the mean over the seeds that both finished of the value
less that of gelu, also in units of the larger of the two deviations.
"time" and "peak memory" are ratios to gelu of a training step, measured in turns in one process (some CPU, 2 threads,
2026-01-02), medians; memory is what a step allocates beyond weights, optimizer state and inputs. "in training" is the
median of the runs' own steps, whatever else the machine did.
At equal time, a slower activation is read at its last validation within the time, where its learning rate has not
come down, which is to its disadvantage; a faster one has time left.
fast diverged with seed 1: the loss is nan at step 150""",
        )

    def test_markdown(self):
        self.check(
            comparison().report(markdown=True),
            """\
**gpt2 tiny, 1,000 parameters, some text, 400 steps, batch size 16, 2 seeds, float32 on cpu (some CPU), torch 2.13.0,
2026-01-02**

At equal steps, after 400:

|   | expansion parameters | validation loss | difference | in stds | better | finished | diverged |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `gelu` | 0 | 2.0500 +- 0.0707 | - | - | - | 2 | 0 |
| `slow` | 16 | 1.9200 +- 0.0283 | -0.1300 | -1.8 | 2 of 2 | 2 | 0 |
| `fast` | 16 | 2.0500 +- - | +0.0500 | - | 0 of 1 | 1 | 1 |

At equal time, that of 400 steps of gelu:

|   | ms a step | in training | time | peak memory | step | of the time | validation loss | difference |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `gelu` | 10 | 11 | 1.000 | 1.000 | 400 | 100% | 2.0500 +- 0.0707 | - |
| `slow` | 13 | 11 | 1.250 | 1.050 | 300 | 94% | 2.1000 +- 0.0000 | +0.0500 |
| `fast` | 8 | 11 | 0.800 | 0.950 | 400 | 80% | 2.0500 +- - | +0.0500 |

- +- is the sample standard deviation over seeds. A difference is the mean over the seeds that both finished of the
  value less that of gelu, also in units of the larger of the two deviations.
- "time" and "peak memory" are ratios to gelu of a training step, measured in turns in one process (some CPU, 2
  threads, 2026-01-02), medians; memory is what a step allocates beyond weights, optimizer state and inputs. "in
  training" is the median of the runs' own steps, whatever else the machine did.
- At equal time, a slower activation is read at its last validation within the time, where its learning rate has not
  come down, which is to its disadvantage; a faster one has time left.
- fast diverged with seed 1: the loss is nan at step 150""",
        )

    def test_one_seed_without_times(self):
        one = comparison()
        one.runs, one.costs = one.runs[:2], {}
        self.check(
            str(one),
            """\
gpt2 tiny, 1,000 parameters, some text, 400 steps, batch size 16, 1 seed, float32 on cpu (some CPU), torch 2.13.0,
2026-01-02

At equal steps, after 400:
      expansion parameters  validation loss  difference  in stds  better  finished  diverged
gelu                     0       2.0000 +- -           -        -       -         1         0
slow                    16       1.9000 +- -     -0.1000        -  1 of 1         1         0
fast                     -                -           -        -       -         0         0

+- is the sample standard deviation over seeds. A difference is the mean over the seeds that both finished of the value
less that of gelu, also in units of the larger of the two deviations.""",
        )

    def test_images(self):
        images = comparison()
        images.runs = [
            run("gelu", 0, [1.0, 0.5, 0.4, 0.3], accuracies=[0.5, 0.6, 0.7, 0.80]),
            run("slow", 0, [1.0, 0.5, 0.4, 0.2], accuracies=[0.5, 0.6, 0.7, 0.86]),
            run("gelu", 1, [1.0, 0.5, 0.4, 0.3], accuracies=[0.5, 0.6, 0.7, 0.82]),
            run("slow", 1, [1.0, 0.5, 0.4, 0.3], accuracies=[0.5, 0.6, 0.7, 0.82]),
        ]
        images.activations = ["gelu", "slow"]
        tables = "\n\n".join(str(images).split("\n\n")[1:3])
        self.check(
            tables,
            """\
At equal steps, after 400:
      expansion parameters  validation loss  difference  in stds  better    accuracy %  difference  finished  diverged
gelu                     0  0.3000 +- 0.0000           -        -       -  81.00 +- 1.41           -         2         0
slow                    16  0.2500 +- 0.0707     -0.0500     -0.7  1 of 2  84.00 +- 2.83       +3.00         2         0

At equal time, that of 400 steps of gelu:
      ms a step  in training   time  peak memory  step  of the time  validation loss  difference    accuracy %  difference
gelu         10           11  1.000        1.000   400         100%  0.3000 +- 0.0000           -  81.00 +- 1.41           -
slow         13           11  1.250        1.050   300          94%  0.4000 +- 0.0000     +0.1000  70.00 +- 0.00      -11.00""",  # noqa: E501
        )


@pytest.mark.parametrize(
    ("ratio", "step"),
    [(1.0, 400), (0.8, 400), (1.001, 300), (4 / 3, 300), (1.34, 200), (2.0, 200), (3.0, 100), (4.0, 100), (4.1, None)],
)
def test_equal_time_is_the_last_validation_before_the_reference_ends(ratio, step):
    assert equal_time_step([100, 200, 300, 400], 400, ratio) == step


def test_an_outcome_at_equal_time():
    slow, fast = comparison().outcome("slow"), comparison().outcome("fast")
    assert slow.equal_time_step == 300  # 400 / 1.25 = 320
    assert slow.time_share == 300 * 1.25 / 400
    assert slow.at_equal_time == {0: {"validation_loss": 2.1}, 1: {"validation_loss": 2.1}}
    assert slow.memory_ratio == 1.05
    assert fast.equal_time_step == 400
    assert fast.time_share == 0.8
    assert fast.at_equal_time == fast.final == {0: {"validation_loss": 2.05}}
    assert fast.diverged == [1]


def test_ratios_are_to_the_reference_whichever_was_measured_first():
    other = comparison()
    other.reference, other.activations = "slow", ["slow", "gelu", "fast"]
    assert other.outcome("gelu").time_ratio == 1 / 1.25
    assert other.outcome("fast").time_ratio == 0.8 / 1.25
    assert other.outcome("slow").equal_time_step == 400


def test_differences_are_paired_by_seed():
    def losses(*values):
        return {seed: {"validation_loss": value} for seed, value in values}

    found = difference(losses((0, 1.0), (1, 2.0), (2, 9.0)), losses((1, 2.5), (0, 1.1)), "validation_loss")
    assert found.mean == pytest.approx((-0.1 - 0.5) / 2)
    assert (found.better, found.pairs) == (2, 2)
    own = math.sqrt(((1 - 4) ** 2 + (2 - 4) ** 2 + (9 - 4) ** 2) / 2)
    assert found.in_stds == pytest.approx(found.mean / own)
    assert difference(losses((0, 1.0)), losses((0, 2.0)), "validation_loss").in_stds is None
    assert difference(losses((0, 1.0)), losses((1, 2.0)), "validation_loss") is None
    equal = losses((0, 1.0), (1, 1.0))
    assert difference(equal, equal, "validation_loss").in_stds is None
    accuracy = difference({0: {"accuracy": 0.9}}, {0: {"accuracy": 0.8}}, "accuracy")
    assert accuracy.better == 1


def test_spread_of_one_value_has_no_deviation():
    assert spread([2.0]) == (2.0, None)
    assert spread([1.0, 3.0]) == (2.0, math.sqrt(2))


def test_a_comparison_survives_json():
    before = comparison()
    assert Comparison.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def test_without_a_finished_run_there_is_still_a_table():
    none = comparison()
    none.runs = [none.runs[-1]]
    assert "fast diverged with seed 1: the loss is nan at step 150" in str(none)
    none.runs = []
    assert str(none).startswith("gpt2 tiny, some text, 400 steps, batch size 16, 0 seeds")


def test_values_that_are_no_comparison_say_so():
    with pytest.raises(OrthoFxError, match=r"^comparison has version None; this release reads version 1$"):
        Comparison.from_dict({})
    with pytest.raises(OrthoFxError, match=r"^not a comparison: TypeError: .*unexpected keyword argument 'speed'$"):
        Comparison.from_dict({**comparison().to_dict(), "speed": 1})
