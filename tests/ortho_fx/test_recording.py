"""A recorder keeps the values of its steps, also over a resumption, and draws them."""

import numpy as np
import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, OrthoFxError, Recorder, rewrite_
from ortho_fx.plots import load_pyplot


def small(expansion="fourier3", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.ReLU())
    rewrite_(model, expansion, **options)
    return model


def train(model, recorder, steps, first=0):
    """Moves all parameters by one each step; returns the coefficients of site 1 after each."""
    seen = [model[1].coefficients.detach().clone()]
    for step in range(first + 1, first + steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        seen.append(model[1].coefficients.detach().clone())
        recorder.step(step)
    return seen


def test_every_nth_step_is_a_copy_of_the_parameters():
    model = small()
    recorder = Recorder(nn.parallel.DataParallel(model).module, every=2)
    seen = train(model, recorder, 5)
    course = recorder.courses["1"]
    assert list(recorder.courses) == ["1", "3"]
    assert course.steps == [0, 2, 4]
    for step, values in zip(course.steps, course.values, strict=True):
        assert torch.equal(values["coefficients"], seen[step])
        assert values.keys() == dict(model[1].named_parameters()).keys()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    model[1].load_state_dict(course.values[1])
    torch.testing.assert_close(course.at(1)(x), model.double()[1](x))


def test_steps_are_counted_where_they_are_not_told():
    recorder = Recorder(small(), every=3)
    for _ in range(7):
        recorder.step()
    assert recorder.courses["3"].steps == [0, 3, 6]


def test_a_resumed_recorder_goes_on_and_records_repeated_steps_once():
    model = small()
    recorder = Recorder(model)
    train(model, recorder, 4)
    state = recorder.state_dict()
    train(model, recorder, 2, first=4)
    resumed = small()
    again = Recorder(resumed)
    again.load_state_dict(state)
    assert again.courses["1"].steps == [0, 1, 2, 3, 4]
    seen = train(resumed, again, 2, first=2)  # from a checkpoint of step 2
    assert again.courses["1"].steps == [0, 1, 2, 3, 4]
    assert torch.equal(again.courses["1"].values[4]["coefficients"], seen[2])
    with pytest.raises(OrthoFxError, match=r"^the state is of a recorder of other sites: 3$"):
        Recorder(rewrite_(nn.Sequential(nn.Linear(4, 4), nn.GELU()), "hermite2").model).load_state_dict(state)


def test_wrong_arguments_are_named():
    with pytest.raises(OrthoFxError, match="holds no expansion to record: call rewrite_ first"):
        Recorder(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    for every in (0, 1.5, True):
        with pytest.raises(OrthoFxError, match=f"every must be an integer above zero; got {every}"):
            Recorder(small(), every=every)


def test_the_picture_has_a_row_for_each_site(tmp_path):
    model = small(ExpansionConfig("hermite", granularity="channel"), example_inputs=torch.randn(2, 4))
    recorder = Recorder(model)
    train(model, recorder, 2)
    figure = recorder.figure((-1, 1))
    left, right = figure.axes[:2]
    for line in left.lines:  # each step adds one to every coefficient
        assert line.get_xdata().tolist() == [0, 1, 2]
        assert line.get_ydata() == pytest.approx([0, 1, 2], abs=1e-6)
    x = torch.tensor(right.lines[2].get_xdata())
    assert (x.min(), x.max()) == (-1, 1)
    expected = model.double()[1](x[:, None].expand(-1, 6)).mean(1).detach().numpy()
    assert right.lines[2].get_ydata() == pytest.approx(expected, abs=1e-6)
    load_pyplot().close(figure)
    recorder.plot(tmp_path / "expansions.png")
    from matplotlib import image

    assert np.std(image.imread(tmp_path / "expansions.png")[..., :3]) > 0.02
