"""Parameters and refusals. What is measured under encryption is in tests/ortho_fx/integrations/test_encrypted.py."""

import builtins
import json
import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import nn

from ortho_fx import HermiteActivation, OrthoFxError, freeze_, polynomial_report
from ortho_fx.polynomial.encryption import SECURE_BITS, openfhe_levels


def network(*degrees, width=8):
    torch.manual_seed(0)
    layers = [layer for degree in degrees for layer in (nn.Linear(width, width), HermiteActivation(degree))]
    return nn.Sequential(*layers, nn.Linear(width, 4)).double()


def inputs(scale=1.0):
    return scale * torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def report_of(model, batch=None):
    return polynomial_report(model, [inputs() if batch is None else batch])


def test_tenseal_has_one_prime_a_level_and_the_smallest_secure_ring():
    report = report_of(network(2, 3))
    parameters = report.to_tenseal()
    assert parameters.levels == report.levels == 3 + 2 + 2
    assert parameters.coeff_mod_bit_sizes == (60, *[40] * 7, 60)
    assert (parameters.modulus_bits, parameters.ring_dimension, parameters.slots) == (400, 2**14, 2**13)
    assert SECURE_BITS[2**13] < parameters.modulus_bits <= SECURE_BITS[2**14]
    smaller = report.to_tenseal(scale_bits=30)
    assert (smaller.modulus_bits, smaller.ring_dimension) == (330, 2**14)
    assert report.to_tenseal(extra_levels=1).modulus_bits == 440
    assert report.to_tenseal(extra_levels=1).ring_dimension == 2**15
    assert [site.coefficients for site in parameters.sites] == [site.monomial for site in report.sites]
    assert {site.method for site in parameters.sites} == {"polyval"}


def test_openfhe_counts_the_levels_of_its_own_evaluation():
    # EvalPoly takes a level more than a search at degrees 3, 6 and 7; the series one more for its range.
    assert [openfhe_levels(degree) for degree in range(1, 17)] == [1, 2, 3, 3, 3, *[5] * 8, *[6] * 3]
    assert [openfhe_levels(degree) for degree in (27, 28, 32)] == [6, 7, 7]
    report = report_of(network(3, 7))
    assert (report.levels, report.openfhe_levels) == (3 + 2 + 3, 3 + 3 + 5)
    parameters = report.to_openfhe(extra_levels=2)
    assert parameters.levels == 13
    assert [site.levels for site in parameters.sites] == [3, 5]
    assert [site.method for site in parameters.sites] == ["EvalPoly", "EvalChebyshevSeries"]


@pytest.mark.parametrize(
    ("scale", "levels", "ring"),
    [
        (40, 4, 14),
        (55, 4, 14),
        (56, 4, 15),
        (40, 5, 15),
        (40, 13, 15),
        (40, 14, 16),
        (40, 29, 16),
        (40, 30, 17),
    ],
)
def test_the_ring_dimension_is_that_which_openfhe_takes(scale, levels, ring):
    report = report_of(network(1))
    parameters = report.to_openfhe(scale_bits=scale, extra_levels=levels - report.openfhe_levels)
    assert (parameters.levels, parameters.ring_dimension) == (levels, 2**ring)
    assert SECURE_BITS[2 ** (ring - 1)] < parameters.modulus_bits <= SECURE_BITS[2**ring]


def test_coefficients_are_in_each_librarys_convention_and_in_the_widened_range():
    report = report_of(network(4, 8))
    wide = report.to_openfhe(margin=0.25)
    for site, own in zip(report.sites, wide.sites, strict=True):
        extra = 0.25 * (site.high - site.low)
        assert (own.low, own.high) == pytest.approx((site.low - extra, site.high + extra))
        points = np.linspace(own.low, own.high, 40)
        exact = Polynomial(site.monomial[0])(points)
        if own.method == "EvalPoly":
            np.testing.assert_allclose(Polynomial(own.coefficients[0])(points), exact)
        else:  # the library counts half of the first coefficient
            first, *others = own.coefficients[0]
            series = Chebyshev([first / 2, *others], domain=[own.low, own.high])
            np.testing.assert_allclose(series(points), exact, rtol=1e-9, atol=1e-9)


def test_a_network_that_is_too_deep_is_refused_in_one_sentence():
    report = report_of(network(2))
    assert report.to_tenseal(extra_levels=19 - report.levels).ring_dimension == 2**15
    with pytest.raises(OrthoFxError) as caught:
        report.to_tenseal(extra_levels=20 - report.levels)
    assert str(caught.value) == (
        "the network takes 20 levels, and SEAL's largest ring dimension, 32768, allows 19 of 40 bits at 128-bit "
        "security: take lower degrees, fewer layers or a smaller scale_bits=, or bootstrap in between"
    )
    deep = 61 - report.openfhe_levels
    assert report.to_openfhe(scale_bits=40, extra_levels=deep).ring_dimension == 2**17
    with pytest.raises(OrthoFxError, match=r"takes 61 levels, and OpenFHE's .*, 131072, allows \d+ of 50"):
        report.to_openfhe(extra_levels=deep)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = HermiteActivation(2)

    def forward(self, x):
        return self.act(x) if x.sum() > -1e9 else x


def test_what_has_no_parameters_is_refused():
    with pytest.raises(OrthoFxError, match=r"cannot be encrypted, for 3 is not polynomial: GELU is neither affine"):
        report_of(nn.Sequential(*network(2), nn.GELU())).to_openfhe()
    with pytest.raises(OrthoFxError, match=r"levels of the network are not known, since torch\.fx cannot trace it"):
        report_of(Branch()).to_tenseal()
    model = network(2)
    with torch.no_grad():
        model[-1].bias += 1000
    report = report_of(model)
    assert report.largest_output == pytest.approx(model(inputs()).abs().max().item())
    with pytest.raises(OrthoFxError, match=r"outputs reach 100\d, and at scale 2\^50 .* is safe up to 256: take"):
        report.to_openfhe()
    assert report.to_openfhe(scale_bits=45).scale_bits == 45


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale_bits": 60}, "scale_bits must be an integer from 30 to 59; got 60"),
        ({"scale_bits": 40.0}, "scale_bits must be an integer from 30 to 59; got 40.0"),
        ({"margin": -0.1}, "margin must be a number, zero or more; got -0.1"),
        ({"margin": math.nan}, "margin must be a number, zero or more; got nan"),
        ({"extra_levels": -1}, "extra_levels must be an integer, zero or more; got -1"),
    ],
)
def test_arguments_out_of_their_range(arguments, message):
    report = report_of(network(2))
    for method in (report.to_openfhe, report.to_tenseal):
        with pytest.raises(OrthoFxError) as caught:
            method(**arguments)
        assert str(caught.value) == message


def test_the_check_names_each_site_that_leaves_its_range():
    model = network(2, 2)
    parameters = report_of(model).to_openfhe(margin=0)
    parameters.check(model, [inputs()])
    wide = inputs(3.0)
    with pytest.raises(OrthoFxError) as caught:
        parameters.check(model, [wide])
    first = parameters.sites[0]
    x = model[0](wide)
    by = max(first.low - x.min().item(), x.max().item() - first.high)
    low, high = x.min().item(), x.max().item()
    assert str(caught.value).startswith(
        f"the inputs of 1 are in [{low:.4g}, {high:.4g}] and leave its range [{first.low:.4g}, {first.high:.4g}] "
        f"by {by:.3g}; the inputs of 3 are in "
    )
    assert str(caught.value).endswith(": make the report with such inputs, or take a larger margin=")
    report_of(model).to_openfhe(margin=20.0).check(model, [wide])
    freeze_(model)
    with pytest.raises(OrthoFxError, match="the inputs of 1 are in"):
        parameters.check(model, [wide])
    with pytest.raises(OrthoFxError, match="Linear has no expansion '1': take the report's model"):
        parameters.check(model[0], [wide])


def test_printed_and_plain_parameters():
    report = report_of(network(2))
    lines = str(report.to_tenseal()).splitlines()
    assert lines[0] == "TenSEAL: 4 levels, scale 2^40, coeff_mod_bit_sizes [60, 40, 40, 40, 40, 60]"
    assert lines[1] == "ring dimension 16384 with 8192 slots: modulus of 280 bits, 438 are 128-bit secure"
    assert lines[2].split() == ["name", "method", "levels", "low", "high", "coefficients"]
    assert lines[3].split()[:3] == ["1", "polyval", "2"]
    openfhe = report.to_openfhe()
    assert str(openfhe).startswith("OpenFHE: 4 levels, scale 2^50, first modulus of 60 bits\n")
    values = json.loads(json.dumps(openfhe.to_dict()))
    assert (values["slots"], values["first_modulus_bits"]) == (openfhe.slots, 60)
    assert values["sites"][0]["coefficients"] == [list(report.sites[0].monomial[0])]


@pytest.mark.parametrize(("library", "title"), [("openfhe", "OpenFHE"), ("tenseal", "TenSEAL")])
def test_a_missing_library_is_named(library, title, monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == library:
            raise ImportError(f"No module named {name!r}")
        return original(name, *arguments, **keywords)

    parameters = getattr(report_of(network(2)), f"to_{library}")()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OrthoFxError, match=rf"{title} cannot be imported \(No module named '{library}'\): pip install"):
        parameters.context()
