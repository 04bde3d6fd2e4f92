"""Pictures of comparisons that were made by hand."""

import pytest

from ortho_fx import OrthoFxError
from ortho_fx.models.compare import plot
from ortho_fx.models.compare.costs import StepCost
from ortho_fx.models.compare.plot import plot_comparison
from ortho_fx.models.compare.report import ComparedRun, Comparison

LABELS = ["gelu", "hermite:3", "tropical_rational:6,expansion_lr=0.02,init=fit", *(f"fourier:{n}" for n in range(1, 8))]


def comparison(images):
    """Two seeds of ten activations; the second seed of the last one diverged before its first validation."""
    runs = []
    for seed in range(2):
        for number, label in enumerate(LABELS):
            validations = {step: {"validation_loss": 3 - step / 400 + number / 10 + seed / 20} for step in (200, 400)}
            for measured in validations.values() if images else ():
                measured["accuracy"] = 0.5 + number / 20
            diverged = seed == 1 and label == LABELS[-1]
            ended = "the loss is nan" if diverged else None
            runs.append(ComparedRun(label, seed, "", 100, 0, {} if diverged else validations, 0.1, ended, 400))
    return Comparison({"steps": 400, "size": "tiny"}, "gelu", LABELS, {}, runs)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_a_picture_of_what_finished(tmp_path, images, ending):
    path = tmp_path / f"picture.{ending}"
    plot_comparison(comparison(images), path)
    assert path.stat().st_size > 10_000


def test_a_picture_needs_a_run_that_finished_and_a_place(tmp_path):
    drawn = comparison(False)
    with pytest.raises(OrthoFxError, match=r"^cannot write .*nowhere/picture\.png: "):
        plot_comparison(drawn, tmp_path / "nowhere" / "picture.png")
    drawn.runs = drawn.runs[-1:]
    with pytest.raises(OrthoFxError, match=r"^there is no finished run to draw$"):
        plot_comparison(drawn, tmp_path / "picture.png")


def test_the_second_column_has_runs_of_equal_time_over_seconds(tmp_path, monkeypatch):
    timed = comparison(False)
    timed.activations = LABELS[:2]
    timed.costs = {"gelu": StepCost(0.5, 1.0, 1, 1), "hermite:3": StepCost(0.25, 0.5, 1, 1)}
    longer = {400: {"validation_loss": 2.0}, 800: {"validation_loss": 1.0}}
    timed.runs.append(ComparedRun("hermite:3", 0, "", 100, 0, longer, 0.1, None, 800))
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    plot_comparison(timed, tmp_path / "picture.png")
    steps, seconds, _ = drawn[0].axes
    assert [line.get_xdata().tolist() for line in steps.lines] == [[200, 400], [200, 400]]
    gelu, hermite = seconds.lines
    assert gelu.get_xdata().tolist() == [100, 200]
    assert hermite.get_xdata().tolist() == [100, 200]
    assert hermite.get_ydata().tolist() == [2.0, 1.0]
    assert seconds.get_xlabel() == "seconds of training steps"
    assert gelu.get_color() != hermite.get_color()


def test_a_kind_that_the_reference_alone_has_is_left_out(tmp_path, monkeypatch):
    timed = comparison(False)
    timed.activations = LABELS[:2]
    timed.costs = {"gelu": StepCost(0.5, 1.0, 1, 1), "hermite:3": StepCost(0.25, 0.5, 1, 1)}
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    plot_comparison(timed, tmp_path / "picture.png")
    longer = {400: {"validation_loss": 2.0}, 800: {"validation_loss": 1.0}}
    timed.runs = [run for run in timed.runs if run.activation == "gelu"]
    plot_comparison(timed, tmp_path / "picture.png")
    timed.runs.append(ComparedRun("hermite:3", 0, "", 100, 0, longer, 0.1, None, 800))
    plot_comparison(timed, tmp_path / "picture.png")
    titles = [[axis.get_title() for axis in figure.axes] for figure in drawn]
    curves = "mean and range over 2 seeds"
    steps = [f"equal steps: {curves}", "at equal steps: each seed, and the mean"]
    assert titles == [steps, steps, [f"equal time: {curves}", "at equal time: each seed, and the mean"]]
    ends = drawn[2].axes[-1]
    assert [line.get_xdata().tolist() for line in ends.lines[-2:]] == [[1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("size", "fallen", "label", "scale"),
    [
        ("tiny", 0.5, "validation loss (nats)", "linear"),
        ("custom", 0.001, "validation loss", "log"),
        ("custom", -1.0, "validation loss", "linear"),
    ],
)
def test_the_axis_of_the_loss(tmp_path, monkeypatch, size, fallen, label, scale):
    known = comparison(True)
    known.settings["size"] = size
    for run in known.runs:
        if run.diverged is None:
            run.validations[200]["accuracy"] = 0.01
            run.validations[400] = {"validation_loss": fallen, "accuracy": 0.99}
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    plot_comparison(known, tmp_path / "picture.png")
    curves, ends, accuracies, _ = drawn[0].axes
    assert accuracies.get_yscale() == "linear"
    assert (curves.get_ylabel(), ends.get_xlabel(), curves.get_yscale()) == (label, label, scale)
    low, high = curves.get_ylim()
    assert low < fallen < 3 < high
