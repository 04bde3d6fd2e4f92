"""Pictures of runs: which files there are, that they are not empty, and what they show."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, rewrite_
from ortho_fx.models.runs import plots as run_plots
from ortho_fx.models.runs.files import read_run
from ortho_fx.models.runs.plots import plot_runs
from ortho_fx.models.training.log import RunLog
from ortho_fx.models.training.monitor import SiteMonitor
from ortho_fx.plots import function_values

pytestmark = pytest.mark.slow


class MLP(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.acts = nn.ModuleList(nn.GELU() for _ in range(layers))

    def forward(self, x):
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = act(layer(x))
        return x


def make_run(directory, expansion=None, *, layers=2, steps=20, accuracy=False, seed=0, broken=()):
    torch.manual_seed(seed)
    model, x = MLP(layers), torch.randn(64, 6)
    if expansion is not None:
        rewrite_(model, expansion, example_inputs=x)
    log, monitor = RunLog(directory, 0, writes=True), SiteMonitor(model)
    (directory / "run.json").write_text(json.dumps({}))
    for step in range(steps + 1):
        if step:
            row = {"step": step, "loss": 3 / step + 0.1 * torch.rand(()).item(), "lr": 1e-3, "gradient_norm": 1 / step}
            if step in broken:
                row |= {"loss": float("nan"), "gradient_norm": float("inf"), "skipped": True}
            if step % 5 == 0:
                row |= {"validation_loss": 3.2 / step} | ({"accuracy": step / 40} if accuracy else {})
            log.row(row)
        if step % 10 == 0:
            log.site_rows(monitor.measure(lambda: model(x), step))
            log.coefficient_rows(monitor.coefficients(step))
            if expansion is not None:
                name = "expansions.safetensors" if step else "expansions-start.safetensors"
                monitor.save_expansions(directory / name, step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
    log.close()
    return read_run(directory)


def picture(path):
    """The pixels of a file, (height, width, channels) from 0 to 1."""
    from matplotlib import image

    return image.imread(path)


@pytest.fixture
def drawn(monkeypatch):
    """The written figures by file name, kept so that tests can look at their contents."""
    figures = {}

    def keep(figure, path, dpi):
        figure.canvas.draw()
        figures[path.name] = figure

    monkeypatch.setattr(run_plots, "save", keep)
    yield figures
    for figure in figures.values():
        run_plots.load_pyplot().close(figure)


def test_the_pictures_of_one_run(tmp_path):
    run = make_run(tmp_path / "run", ExpansionConfig("hermite"), layers=2)
    paths = plot_runs([run], tmp_path / "out")
    names = [
        "loss.png",
        "norm.png",
        "drift.png",
        "coefficients.png",
        "sites/acts.0.png",
        "sites/acts.1.png",
        "sites.png",
    ]
    assert [str(path.relative_to(tmp_path / "out")) for path in paths] == names
    for path in paths:
        height, width, _ = (pixels := picture(path)).shape
        assert 400 < height < 2000, path
        assert 600 < width < 2500, path
        assert pixels[..., :3].std() > 0.02, path
    first, second = (picture(path) for path in paths[4:6])
    assert first.shape != second.shape or not np.array_equal(first, second)


def test_several_runs_share_curves_and_have_sites_of_their_own(tmp_path):
    runs = [
        make_run(tmp_path / "hermite", ExpansionConfig("hermite"), layers=1),
        make_run(tmp_path / "gelu", accuracy=True),
        make_run(tmp_path / "other" / "gelu", ExpansionConfig("fourier", granularity="channel"), layers=1, seed=1),
    ]
    paths = plot_runs(runs, tmp_path / "out")
    names = ["loss.png", "norm.png", "hermite/drift.png", "hermite/coefficients.png", "hermite/sites/acts.0.png"]
    names += ["other-gelu/drift.png", "other-gelu/coefficients.png", "other-gelu/sites/acts.0.png"]
    assert [str(path.relative_to(tmp_path / "out")) for path in paths] == names
    alone = plot_runs(runs[:1], tmp_path / "alone")
    assert not np.array_equal(picture(alone[1]), picture(paths[1]))
    assert picture(paths[0]).shape[1] > picture(alone[0]).shape[1]  # a second panel, for the accuracy


def test_losses_are_labelled_and_smoothed(tmp_path, drawn):
    runs = [make_run(tmp_path / name, seed=seed, accuracy=True) for seed, name in enumerate(("one", "two"))]
    plot_runs(runs, tmp_path)
    losses, accuracies = drawn["loss.png"].axes
    assert [text.get_text() for text in losses.get_legend().texts] == ["one", "two", "training, smoothed", "validation"]
    raw = next(line for line in losses.lines if line.get_linewidth() == 0.5)
    assert raw.get_ydata().tolist() == [row["loss"] for row in runs[0].rows]
    assert losses.get_yscale() == "log"
    assert accuracies.lines[0].get_xydata().tolist() == [[5, 0.125], [10, 0.25], [15, 0.375], [20, 0.5]]


def test_steps_that_were_left_out_are_marked_and_break_nothing(tmp_path, drawn):
    plot_runs([make_run(tmp_path / "run", broken=(7, 8))], tmp_path)
    norm = drawn["norm.png"].axes[0]
    assert [text.get_text() for text in norm.get_legend().texts] == ["run", "run: skipped step"]
    assert next(line for line in norm.lines if line.get_marker() == "x").get_xdata().tolist() == [7, 8]
    smoothed = drawn["loss.png"].axes[0].lines[1].get_ydata()
    assert np.isfinite(smoothed).all()


def test_smoothing_keeps_constants_and_follows_a_step():
    assert run_plots._smoothed(np.full(300, 2.5)) == pytest.approx(2.5)
    smoothed = run_plots._smoothed(np.repeat([0.0, 1.0], 200))
    assert smoothed[199] == 0
    assert smoothed[203] == pytest.approx(0.5)  # four steps are a hundredth of all


def test_coefficients_are_drawn_over_the_steps(tmp_path, drawn):
    run = make_run(tmp_path / "run", ExpansionConfig("hermite"), layers=2)
    plot_runs([run], tmp_path)
    rows = [row for row in run.coefficient_rows if row["site"] == "acts.1"]
    assert [row["step"] for row in rows] == [0, 10, 20]
    left, right = drawn["coefficients.png"].axes[2:]
    values = np.array([row["parameters"]["coefficients"] for row in rows]).reshape(3, -1)
    for line, expected in zip(left.lines, (values - values[0]).T, strict=True):
        assert line.get_xdata().tolist() == [0, 10, 20]
        assert line.get_ydata() == pytest.approx(expected)
    x = torch.tensor(right.lines[0].get_xdata())
    for line, saved in ((right.lines[0], run.start), (right.lines[2], run.now)):
        expected = saved.sites["acts.1"].activation.double()(x).detach().numpy()
        assert line.get_ydata() == pytest.approx(expected, abs=1e-7)
    shown = [text.get_text() for text in drawn["coefficients.png"].axes[1].get_legend().texts]
    assert shown == ["step 0", "step 10", "step 20"]


def test_a_site_shows_the_activation_before_and_after_and_what_it_replaced(tmp_path, drawn):
    run = make_run(tmp_path / "run", ExpansionConfig("hermite"), layers=1)
    plot_runs([run], tmp_path)
    axis = drawn["acts.0.png"].axes[0]
    before, after, replaced = axis.lines
    x = torch.tensor(before.get_xdata())
    for line, saved in ((before, run.start), (after, run.now)):
        expected = saved.sites["acts.0"].activation.double()(x).detach().numpy()
        assert line.get_ydata() == pytest.approx(expected)
    assert replaced.get_ydata() == pytest.approx(torch.nn.functional.gelu(x).numpy())
    texts = [text.get_text() for text in axis.get_legend().texts]
    assert texts == ["start", "step 20", "gelu", "density of x"]
    inputs = run.now.sites["acts.0"].inputs
    assert x[0] < inputs.mean - 2 * inputs.std
    assert x[-1] > inputs.mean + 2 * inputs.std
    assert len(axis.patches) == 2  # the densities


def test_channels_are_a_mean_and_a_band(tmp_path, drawn):
    run = make_run(tmp_path / "run", ExpansionConfig("hermite", granularity="channel"), layers=1)
    plot_runs([run], tmp_path)
    axis = drawn["acts.0.png"].axes[0]
    x = torch.tensor(axis.lines[1].get_xdata())
    y = run.now.sites["acts.0"].activation.double()(x[:, None].expand(-1, 6)).detach().numpy()
    assert axis.lines[1].get_ydata() == pytest.approx(y.mean(1))
    band = axis.collections[1].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(np.quantile(y, 0.9, axis=1).max())
    assert band.min() == pytest.approx(np.quantile(y, 0.1, axis=1).min())
    assert "10-90 % of channels" in [text.get_text() for text in axis.get_legend().texts]


@pytest.mark.parametrize(("dim", "shape"), [(1, (2, 3, 4, 4)), (-3, (2, 3, 4, 4)), (0, (3, 5)), (None, (5, 3))])
def test_channels_are_found_in_their_dimension(dim, shape):
    activation = HermiteActivation(3, granularity="channel", channels=3, channel_dim=dim, dtype=torch.float64)
    with torch.no_grad():
        activation.coefficients += torch.arange(3)
    x = torch.linspace(-2, 2, 3, dtype=torch.float64)
    every = [HermiteActivation(3, dtype=torch.float64) for _ in range(3)]
    for channel, one in enumerate(every):
        one.set_parameters({"coefficients": activation.coefficients[:, channel].detach().numpy()})
    expected = torch.stack([one(x) for one in every], 1).detach().numpy()
    activation(torch.zeros(shape))
    assert function_values(activation, x) == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12, 18, 24, 36, 48])
def test_grids_are_full_and_not_too_wide(count):
    columns = run_plots._columns(count)
    assert columns <= 6
    assert -count % columns <= 1
    assert count <= 6 or columns >= 3


def test_no_text_overlaps_in_a_grid_of_twelve(tmp_path, drawn):
    plot_runs([make_run(tmp_path / "run", ExpansionConfig("tropical"), layers=12)], tmp_path)
    figure = drawn["sites.png"]
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    boxes += [text.get_window_extent() for legend in figure.legends for text in legend.texts]
    assert len(boxes) == 16
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    for axis, below in zip(figure.axes[:4], figure.axes[4:8], strict=True):
        ticks = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]
        assert not any(tick.overlaps(below.title.get_window_extent()) for tick in ticks)


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(OrthoFxError, match=r"^there is no run to draw$"):
        plot_runs([], tmp_path)
    RunLog(tmp_path / "run", 0, writes=True).close()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(OrthoFxError, match=r"^.*/run has no step to draw yet$"):
        plot_runs([read_run(tmp_path / "run")], tmp_path)
    (tmp_path / "file").write_text("")
    run = make_run(tmp_path / "short", steps=1)
    with pytest.raises(OrthoFxError, match=r"^cannot write .*/file: File exists$"):
        plot_runs([run], tmp_path / "file")


def test_names_make_files_in_the_folder_of_the_pictures():
    names = ["/etc/passwd", "../../up", "..", ".", "", "a/b", "a%2Fb", "\x1b[31m", "two\nlines", "x" * 5000, "x" * 5001]
    names += ["blocks.0.mlp.act", "_one", "\udcff", "é"]
    files = [run_plots.file_name(name) for name in names]
    assert len(set(files)) == len(names)
    for file in files:
        assert file.isprintable()
        assert file.isascii()
        assert "/" not in file
        assert not file.startswith(".")
        assert 0 < len(file) <= 200
    assert run_plots.file_name("blocks.0.mlp.act") == "blocks.0.mlp.act"


def test_labels_are_no_mathematics_and_none_is_hidden():
    for name in ("a$\\frac{$b", "_one", "$x$", "two\nlines", "\udcff"):
        label = run_plots.plain(name)
        assert "$" not in label.replace(r"\$", "")
        assert not label.startswith("_")
        assert label.isprintable()
