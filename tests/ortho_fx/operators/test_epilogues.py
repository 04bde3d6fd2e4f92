"""Expansions go into the matrix product before them, where Inductor writes the product itself, as GELU does.

On a CPU this is inference with frozen weights and `max_autotune`.
"""

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ortho_fx import rewrite_, torch_private
from ortho_fx.operators import generated_code
from tests.kinds import config_of

pytestmark = pytest.mark.slow

# Only the template, so that no timing decides; all compilation in this process.
TEMPLATES = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP",
    "compile_threads": 1,
}


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()


def calls(model, x):
    """The kernels that compiled code calls; the model's and its results agree."""
    torch.compiler.reset()
    settings = torch_private.load(torch_private.TESTS).inductor.patch(TEMPLATES)
    with torch.no_grad(), generated_code.generated_code() as codes, settings:
        assert_close(torch.compile(model)(x), model(x), rtol=1e-4, atol=1e-5)
    (code,) = codes
    return re.findall(r"^\s+(cpp_fused_\w+)\(", code, re.MULTILINE)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the template packs weights by oneDNN")
def test_a_product_takes_the_expansion_with_it():
    x = torch.randn(384, 64, generator=torch.Generator().manual_seed(1))
    first, second = calls(block(), x)
    assert "addmm_gelu" in first
    assert "addmm" in second
    for basis in ("hermite", "fourier", "tropical_rational"):
        model = block()
        rewrite_(model, config_of(basis, 2))
        found = calls(model, x)
        products = [name for name in found if "addmm" in name]
        assert len(products) == 2
        assert basis in products[0]
        # What prepares the parameters of some bases.
        assert len(found) <= 3, found
