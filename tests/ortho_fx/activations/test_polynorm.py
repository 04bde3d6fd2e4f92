"""PolyNorm: its formula, its start, its range, and what it refuses."""

import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, PolyNormActivation, find_sites


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("degree", [1, 3, 8])
@pytest.mark.parametrize("dim", [-1, 1])
def test_it_is_the_sum_of_normalised_powers(degree, dim):
    activation = PolyNormActivation(degree, dim=dim, dtype=torch.float64)
    with torch.no_grad():
        activation.weight.copy_(noise(degree))
        activation.bias.fill_(0.5)
    x = noise(3, 6, 5).requires_grad_()
    powers = [x**k / ((x**k).square().mean(dim, True) + 1e-6).sqrt() for k in range(1, degree + 1)]
    expected = sum(w * p for w, p in zip(activation.weight, powers, strict=True)) + 0.5
    torch.testing.assert_close(activation(x), expected)
    assert torch.autograd.gradcheck(activation, x)


@pytest.mark.parametrize("degree", [1, 3, 5])
def test_the_start_keeps_the_size_of_signals(degree):
    y = PolyNormActivation(degree)(noise(64, 20_000, dtype=torch.float32))
    assert y.square().mean().item() == pytest.approx(1, abs=0.02)
    assert PolyNormActivation(degree, "paper").weight.tolist() == pytest.approx([1 / degree] * degree)


def test_the_start_for_a_depth_is_that_of_hermite_over_many_features():
    x = noise(4, 100_000)
    hermite = HermiteActivation(3, "depth:100", dtype=torch.float64)
    y = PolyNormActivation(3, "depth:100", dtype=torch.float64)(x)
    torch.testing.assert_close(y, hermite(x), atol=0.05, rtol=0.05)
    assert y.square().mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6e4])
def test_powers_of_large_and_absent_signals_are_finite(scale, dtype):
    x = (scale * torch.linspace(-1, 1, 33)).to(dtype).requires_grad_()
    y = PolyNormActivation(8)(x)
    assert y.dtype == dtype
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()


def test_no_elements():
    assert PolyNormActivation()(torch.empty(0, 4)).shape == (0, 4)


def test_it_is_no_basis_and_no_site():
    with pytest.raises(OrthoFxError, match=r"polynorm is no basis: .* build ortho_fx.PolyNormActivation\(\) into"):
        ExpansionConfig("polynorm")
    assert find_sites(nn.Sequential(nn.Linear(4, 4), PolyNormActivation())) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degree": 9}, "degree of PolyNorm must be an integer from 1 to 8; got 9"),
        ({"init": "fit"}, "init of PolyNorm must be stable, paper or depth:L; got 'fit'"),
        ({"dim": "last"}, "dim must be an integer; got 'last'"),
        ({"eps": 0}, "eps must be a finite number above zero; got 0"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(OrthoFxError) as caught:
        PolyNormActivation(**settings)
    assert str(caught.value) == message


def test_wrong_inputs_are_named():
    with pytest.raises(OrthoFxError, match=r"with a dimension 2; got torch.float32 of shape \(2, 3\)"):
        PolyNormActivation(dim=2)(torch.ones(2, 3))
    with pytest.raises(OrthoFxError, match=r"takes a floating-point tensor with a dimension -1; got torch\.int64"):
        PolyNormActivation()(torch.ones(2, dtype=torch.int64))


@pytest.mark.slow
def test_compiled_it_is_the_same():
    torch.compiler.reset()
    activation, x = PolyNormActivation(), noise(8, 64, dtype=torch.float32).requires_grad_()
    leaves = [x, *activation.parameters()]
    results = []
    for function in (activation, torch.compile(activation, fullgraph=True)):
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
