"""Networks run under encryption; what polynomial/encryption.py says about the libraries is measured.

Each library is skipped where it is not installed. OpenFHE has wheels for some releases of Python only.
"""

import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import nn

from ortho_fx import HermiteActivation, polynomial_report
from ortho_fx.polynomial.encryption import openfhe_levels
from ortho_fx.polynomial.evaluation import evaluation

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[3] / "examples" / "encrypted_inference.py"


@pytest.fixture(scope="module", params=["openfhe", "tenseal"])
def library(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(request.param, exc_type=ImportError)


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("examples_encrypted_inference", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_a_network_runs_on_an_encrypted_image(library, example):
    """Two activations, so that every product but the first gets what a product, a bias and a polynomial have left."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 8), HermiteActivation(3), nn.Linear(8, 8), HermiteActivation(2), nn.Linear(8, 4))
    model, images = nn.Sequential(*layers), torch.randn(32, 16)
    report = polynomial_report(model, [images])
    row = example.evaluate(library.__name__, model, report, images[:1], torch.zeros(1, dtype=torch.long))
    assert row["levels_used"] == row["levels_predicted"]
    assert row["largest_error"] < 1e-3
    assert row["same_classes"] == 1


def report_of_one(degree):
    model = nn.Sequential(nn.Linear(2, 2), HermiteActivation(degree), nn.Linear(2, 2))
    return polynomial_report(model, [torch.randn(16, 2)])


def test_levels_and_coefficients_of_openfhe():
    openfhe = pytest.importorskip("openfhe", exc_type=ImportError)
    parameters = openfhe.CCParamsCKKSRNS()
    parameters.SetSecurityLevel(openfhe.SecurityLevel.HEStd_NotSet)  # a small ring: only arithmetic is measured
    parameters.SetRingDim(2**11)
    parameters.SetMultiplicativeDepth(10)
    parameters.SetScalingModSize(50)
    context = openfhe.GenCryptoContext(parameters)
    features = openfhe.PKESchemeFeature
    for feature in (features.PKE, features.KEYSWITCH, features.LEVELEDSHE, features.ADVANCEDSHE):
        context.Enable(feature)
    keys = context.KeyGen()
    context.EvalMultKeyGen(keys.secretKey)
    points = np.linspace(-3, 3, 16)
    encrypted = context.Encrypt(keys.publicKey, context.MakeCKKSPackedPlaintext(points.tolist()))
    generator = np.random.default_rng(0)
    for degree in (1, 2, 3, 5, 6, 7, 13, 14, 27, 28, 59, 60, 119, 120):
        coefficients = generator.standard_normal(degree + 1) / np.arange(1, degree + 2)
        if degree <= 5:
            result = context.EvalPoly(encrypted, coefficients.tolist())
            exact = Polynomial(coefficients)(points)
        else:
            result = context.EvalChebyshevSeries(encrypted, coefficients.tolist(), -4, 4)
            exact = Chebyshev([coefficients[0] / 2, *coefficients[1:]], domain=[-4, 4])(points)
        found = context.Decrypt(result, keys.secretKey)
        found.SetLength(len(points))
        assert np.abs(np.array(found.GetRealPackedValue()) - exact).max() < 1e-6, degree
        assert result.GetLevel() - encrypted.GetLevel() == openfhe_levels(degree), degree


def test_openfhe_takes_the_proposed_parameters():
    openfhe = pytest.importorskip("openfhe", exc_type=ImportError)
    report = report_of_one(2)
    for scale, more in ((40, 0), (40, 1), (50, 3), (55, 0), (56, 0)):
        parameters = report.to_openfhe(scale_bits=scale, extra_levels=more)
        # OpenFHE refuses a ring that is too small; without ours it takes the same.
        assert parameters.context().GetRingDimension() == parameters.ring_dimension
        free = openfhe.CCParamsCKKSRNS()
        free.SetSecurityLevel(openfhe.SecurityLevel.HEStd_128_classic)
        free.SetMultiplicativeDepth(parameters.levels)
        free.SetScalingModSize(scale)
        free.SetFirstModSize(parameters.first_modulus_bits)
        assert openfhe.GenCryptoContext(free).GetRingDimension() == parameters.ring_dimension


def test_levels_of_tenseal():
    tenseal = pytest.importorskip("tenseal")
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=2**14, coeff_mod_bit_sizes=[60, *[40] * 5, 60], n_threads=1
    )
    context.global_scale = 2**40
    points, generator = np.linspace(-1, 1, 16), np.random.default_rng(0)
    encrypted = tenseal.ckks_vector(context, points.tolist())
    for degree in (1, 2, 3, 4, 7, 8, 15, 16):
        coefficients = generator.standard_normal(degree + 1)
        result = encrypted.polyval(coefficients.tolist())
        used = encrypted.ciphertext()[0].coeff_modulus_size() - result.ciphertext()[0].coeff_modulus_size()
        assert used == evaluation(degree).levels, degree
        np.testing.assert_allclose(result.decrypt(), Polynomial(coefficients)(points), atol=1e-3)


def test_seal_refuses_more_bits_than_the_table():
    tenseal = pytest.importorskip("tenseal")
    report = report_of_one(2)
    parameters = report.to_tenseal(extra_levels=3)  # 120 + 7 * 40 bits in 2^14
    parameters.context()
    sizes = [*parameters.coeff_mod_bit_sizes, 40]  # 440 bits, and 438 are secure
    with pytest.raises(ValueError, match="parameters are not set correctly"):
        tenseal.context(tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=2**14, coeff_mod_bit_sizes=sizes)
