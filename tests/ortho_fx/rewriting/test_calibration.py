import numpy as np
import pytest
import torch
from torch import nn

from ortho_fx import HermiteActivation, OrthoFxError, calibrate_, gains, rewrite_
from ortho_fx.numerics.initialisation import initial_parameters
from tests.kinds import KINDS, basis_of, config_of


def evaluate(name, values, x):
    basis = basis_of(name)
    parameters = (torch.from_numpy(np.asarray(values[p.name])) for p in basis.parameters)
    return basis.evaluate(x, *basis.prepare(x.dtype, *parameters))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.23), (0.4, 0.5), (-2.0, 3.0)])
@pytest.mark.parametrize("degree", [1, 3, 8])
@pytest.mark.parametrize("name", KINDS)
def test_rescaling_is_the_change_of_variable(name, degree, mean, std):
    start = initial_parameters(config_of(name, degree))
    z = torch.linspace(-4, 4, 101, dtype=torch.float64)
    expected = std * evaluate(name, start, z)
    torch.testing.assert_close(evaluate(name, basis_of(name).rescale(start, mean, std), mean + std * z), expected)


@pytest.mark.parametrize("name", KINDS)
def test_gains_are_those_of_the_inputs_that_were_measured(name):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.GELU())
    rewrite_(model, config_of(name))
    x = (0.7 + 0.3 * torch.randn(4, 50_000, generator=generator)).requires_grad_()
    calibrate_(model, [x[:1], (x[1:3],), {"input": x[3:]}])
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.square().mean().item() == pytest.approx(0.3**2, rel=0.02)
    assert slope.square().mean().item() == pytest.approx(1, rel=0.02)


def test_statistics_are_exact_over_chunks():
    model = nn.Sequential(HermiteActivation())
    x = 1e4 + torch.randn(7, 1000, dtype=torch.float64)
    (site,) = calibrate_(model, x.split(2)).sites
    assert site.samples == 7000
    assert site.mean == pytest.approx(x.mean().item(), rel=1e-12)
    assert site.std == pytest.approx(x.std(correction=0).item(), rel=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_clamps_move_with_the_inputs_and_gains_stay_one(name):
    model = nn.Sequential(nn.GELU())
    rewrite_(model, config_of(name, clamp=2.0))
    x = 5 + 0.3 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    calibrate_(model, [x])
    torch.testing.assert_close(model[0].bounds, torch.tensor([5 - 0.6, 5 + 0.6]), atol=0.01, rtol=0)
    result = gains(model[0], 5.0, 0.3)
    assert (model(x).square().mean() / 0.3**2).item() == pytest.approx(1, rel=0.02)
    assert result.backward == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("name", KINDS)
def test_fits_are_made_anew_for_the_measured_inputs(name):
    model = nn.Sequential(nn.SiLU())
    report = rewrite_(model, config_of(name, 4, "fit"))
    x = 1 + 0.2 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    before = (model(x) - nn.SiLU()(x)).square().mean().sqrt().item()
    (site,) = calibrate_(model, [x]).sites
    after = (model(x) - nn.SiLU()(x)).square().mean().sqrt().item()
    # The first fit of a basis that holds the function is the function.
    assert after < before or before < 1e-6
    # If the fit is almost exact, the rounding of float32 adds to the measured error.
    assert site.fit_rmse == pytest.approx(after, rel=0.05, abs=1e-6)
    assert site.fit_rmse < report.sites[0].fit_rmse or before < 1e-6


def test_expansions_that_no_batch_reaches_are_named_and_kept():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = HermiteActivation(), HermiteActivation()

        def forward(self, x):
            return self.used(x)

    model = Half()
    before = model.unused.coefficients.clone()
    calibration = calibrate_(model, [torch.randn(100)])
    assert calibration.uncalled == ("unused",)
    assert str(calibration).splitlines()[-1] == "unused  not called"
    assert torch.equal(model.unused.coefficients, before)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Linear(2, 2), [], "Linear holds no expansion to calibrate: call rewrite_ first"),
        (nn.Sequential(HermiteActivation()), [], "no batch reached an expansion"),
        (nn.Sequential(HermiteActivation()), [torch.ones(9)], r"the inputs of 0 are constant \(1\)"),
        (nn.Sequential(HermiteActivation()), [torch.tensor([1.0, torch.nan])], "the inputs of 0 are not finite"),
    ],
)
def test_mistakes_are_named_and_change_nothing(model, batches, message):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(OrthoFxError, match=message):
        calibrate_(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
