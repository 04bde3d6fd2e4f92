"""The numbers of compiled operators: those of the eager operator in float64, up to rounding.

Many inputs run in one graph.
"""

import copy

import pytest
import torch

from ortho_fx.bases import BASES
from tests.kinds import COMPILED_BASES
from tests.ortho_fx.operators.expansions import (
    LAST,
    assert_near,
    exact,
    expansion,
    noise,
    outcome,
    tensors,
    without_caches,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

# Special inputs by name, with the granularity and the number of channels of the expansion.
INPUTS = {
    "four by five": (lambda: noise(4, 5), "layer", None),
    "odd": (lambda: noise(33, 7), "layer", None),
    "images": (lambda: noise(2, 3, 5, 7), "layer", None),
    "channels last": (lambda: noise(2, 3, 5, 7).to(memory_format=LAST), "layer", None),
    "one element": (lambda: noise(1), "layer", None),
    "no dimension": (lambda: noise(), "layer", None),
    "transposed": (lambda: noise(7, 5).t(), "layer", None),
    "every other column": (lambda: noise(6, 8)[:, ::2], "layer", None),
    "expanded": (lambda: noise(7, 1).expand(7, 5), "layer", None),
    "many rows": (lambda: noise(4099, 3), "layer", None),
    "long rows": (lambda: noise(3, 4099), "layer", None),
    "one column": (lambda: noise(5003, 1), "layer", None),
    "one row": (lambda: noise(1, 20011), "layer", None),
    "a channel": (lambda: noise(33, 6), "channel", 6),
    "a channel of images": (lambda: noise(2, 6, 5, 7), "channel", 6),
    "a channel, channels last": (lambda: noise(2, 6, 5, 7).to(memory_format=LAST), "channel", 6),
    "a channel, transposed": (lambda: noise(6, 33).t(), "channel", 6),
    "a channel, many rows": (lambda: noise(4099, 3), "channel", 3),
    "three groups": (lambda: noise(4, 5, 6), "group:3", 6),
    "three groups of images": (lambda: noise(2, 6, 5, 7), "group:3", 6),
}
FEW = ("many rows", "a channel, channels last")


def compiled_together(bases, dtype, labels, degree=3):
    """Runs one graph with an activation for each basis and input; yields (label, activation, outcome, exact)."""
    cases = []
    for number, (basis, label) in enumerate((basis, label) for basis in bases for label in labels):
        make, granularity, channels = INPUTS[label]
        activation = expansion(basis, degree, granularity, channels, number, dtype if dtype.itemsize == 8 else None)
        x = make().to(dtype)
        # Every other gradient is an expanded scalar, as `y.sum().backward()` passes it.
        seed = noise(*x.shape, seed=1, dtype=dtype) if number % 2 else torch.ones((), dtype=dtype).expand(x.shape)
        cases.append((f"{basis}, {label}", activation, x, seed))
    return outcomes(cases)


def outcomes(cases):
    """The same of cases that are made already: (label, activation, input, gradient of the output)."""
    for *_, x, _ in cases:
        x.requires_grad_()
    compiled = torch.compile(lambda *xs: [case[1](x) for case, x in zip(cases, xs, strict=True)], fullgraph=True)
    ys = compiled(*(x for *_, x, _ in cases))
    torch.autograd.backward(ys, [seed for *_, seed in cases])
    for (label, activation, x, seed), y in zip(cases, ys, strict=True):
        gradients = [t.grad for t in tensors(activation, x) if t.requires_grad]
        yield label, activation, [y.detach(), *gradients], exact(activation, x, seed)


@pytest.mark.parametrize(("basis", "labels"), [("hermite", tuple(INPUTS)), *((b, FEW) for b in COMPILED_BASES[1:])])
def test_float32_is_that_of_float64_up_to_rounding(basis, labels):
    for label, _, actual, expected in compiled_together([basis], torch.float32, labels):
        assert_near(actual, expected, 1e-5, label)


def test_float64_is_that_of_the_eager_operator_up_to_rounding():
    for label, _, actual, expected in compiled_together(BASES, torch.float64, ("a channel, channels last",)):
        assert_near(actual, expected, 1e-12, label)


@pytest.mark.parametrize(
    ("dtype", "bases"),
    [(torch.bfloat16, ["hermite", "fourier"]), (torch.float16, ["tropical", "tropical_rational"])],
    ids=["bfloat16", "float16"],
)
def test_half_precision_is_rounded_once(dtype, bases):
    """Values and input gradients are within 2 units in the last place of the exact ones.

    If an exact value is below a thousandth of the largest, its terms cancel; then the unit is that of the thousandth.
    Parameters stay in float32, so their gradients are as close as in float32.
    """
    for label, _, actual, expected in compiled_together(bases, dtype, ("a channel, channels last",)):
        for tensor, reference in zip(actual[:2], expected[:2], strict=True):
            assert tensor.dtype == dtype
            magnitude = reference.abs().clamp(min=1e-3 * float(reference.abs().max()))
            ulp = torch.finfo(dtype).eps * 2.0 ** magnitude.log2().floor()
            assert ((tensor.double() - reference).abs() <= 2 * ulp).all(), label
        assert_near(actual[2:], expected[2:], 1e-5, label)


def test_bfloat16_over_a_wide_range_and_with_parameters_of_that_dtype():
    x, seed = torch.linspace(-8, 8, 4001).bfloat16(), noise(4001, dtype=torch.bfloat16)
    cases = [(basis, expansion(basis, 5).bfloat16(), x.clone(), seed) for basis in COMPILED_BASES]
    for basis, _, actual, expected in outcomes(cases):
        # If the exact value cancels, float32 leaves an error of about 1e-6 of the largest value.
        ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** expected[0].abs().clamp(min=1e-30).log2().floor()
        error = (actual[0].double() - expected[0]).abs()
        assert (error <= 2 * ulp + 1e-6 * expected[0].abs().max()).all(), basis
        assert {t.dtype for t in actual} == {torch.bfloat16}
        assert_near(actual, expected, 0.01, basis)


def test_float16_saturates_as_in_eager_mode():
    activation = expansion("hermite", 5)
    x = torch.tensor([30.0, -30.0, 3.0, 100.0, -100.0] * 7, dtype=torch.float16)
    y = torch.compile(activation, fullgraph=True)(x)
    assert torch.equal(y, activation(x))
    assert y.abs().max() == torch.finfo(torch.float16).max


@pytest.mark.smoke
@pytest.mark.parametrize(("granularity", "channels"), [("layer", None), ("channel", 3)])
def test_no_elements(granularity, channels):
    activation = expansion("hermite", 3, granularity, channels)
    x, seed = torch.empty(0, 3), torch.empty(0, 3)
    actual = outcome(activation, torch.compile(activation, fullgraph=True), x, seed)
    assert_near(actual, exact(activation, x, seed), 0)


def test_several_threads():
    """Each thread adds up sums of its own."""
    activation, x, seed = expansion("fourier", 5), noise(517, 300), noise(517, 300, seed=1)
    with without_caches():
        compiled = torch.compile(activation, fullgraph=True, options={"cpp.threads": 4})
        actual = outcome(activation, compiled, x, seed)
    assert_near(actual, exact(activation, x, seed), 1e-5)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_compiled_waves_far_from_zero_are_nearly_as_exact_as_eager_ones(scale):
    activation, x = expansion("fourier", 5), scale * noise(1 << 16)
    with torch.no_grad():
        true = copy.deepcopy(activation).double()(x.double())
        eager, compiled = ((y.double() - true).abs().max() for y in (activation(x), torch.compile(activation)(x)))
    # Both round the angle, whose error grows with it; compiled, the frequency in turns is rounded as well.
    assert compiled <= 2 * eager
