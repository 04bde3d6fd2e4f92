"""Frozen expansions: equal to their expansions, with no more terms than needed, and modules like any other."""

import copy
import math
import pickle
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ortho_fx import (
    ExpansionConfig,
    FourierActivation,
    HermiteActivation,
    OrthoFxError,
    TropicalActivation,
    TropicalRationalActivation,
    find_sites,
    rewrite_,
)
from ortho_fx.activations.expansion import make_activation
from ortho_fx.activations.freeze import FrozenExpansion, freeze_
from ortho_fx.bases import BASES
from ortho_fx.bases.fourier import wave_frequencies
from ortho_fx.bases.hermite import recurrence_error
from tests.kinds import KINDS, basis_of, config_of

pytestmark = pytest.mark.slow

CHANNELS = 4
CLASSES = [HermiteActivation, FourierActivation, TropicalActivation, TropicalRationalActivation]


@st.composite
def expansions(draw, dtype=torch.float64, kinds=KINDS):
    """Expansions with random parameters. Coarse ones have zeros, equal frequencies and lines that meet in one point."""
    kind = draw(st.sampled_from(kinds))
    basis = basis_of(kind)
    degree = draw(st.sampled_from([1, 2, 3, 6, basis.degrees[-1]]))
    granularity = draw(st.sampled_from(["layer", "layer", "channel", "group:2"]))
    clamp = draw(st.sampled_from([None, None, 2.0]))
    config = config_of(kind, degree, granularity=granularity, clamp=clamp)
    activation = make_activation(config, channels=None if granularity == "layer" else CHANNELS, dtype=dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    coarse = draw(st.booleans())
    with torch.no_grad():
        for parameter in basis.parameters:
            tensor = getattr(activation, parameter.name)
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values.mul(2).round().div(2) if coarse else values)
    return activation


def inputs(dtype=torch.float64):
    """Inputs from -8 to 8 for each channel."""
    return torch.linspace(-8, 8, 257, dtype=dtype).unsqueeze(1).repeat(1, CHANNELS)


def rounding(activation, x):
    """A bound of the rounding error of the result, in units of eps: to first order, and at least four."""
    low, high = (-math.inf, math.inf) if activation.bounds is None else activation.bounds.tolist()
    x = x.double().clamp(low, high).numpy()
    values = {p.name: getattr(activation, p.name).detach().double().numpy() for p in activation.basis.parameters}
    values = {
        name: value.repeat(CHANNELS // value.shape[1], 1) if value.ndim > 1 else value[:, None].repeat(CHANNELS, 1)
        for name, value in values.items()
    }
    if activation.basis.name == "hermite":
        size = 2.5 * recurrence_error(values["coefficients"], x[:, 0])
    elif activation.basis.name == "fourier":
        factorials = np.array([float(math.factorial(k + 1)) for k in range(activation.config.degree)])
        frequencies = wave_frequencies(values)
        angles = np.abs(frequencies[:, None] * x) + np.abs(values["phases"][:, None])
        waves = np.abs(values["coefficients"] / factorials[:, None])[:, None] * (2 + angles)
        size = (4 + len(waves)) * (np.abs(values["constant"]) + waves.sum(0))
    elif "offsets" not in values:
        size = general_rounding(activation.basis, values, x)
    else:
        lines = [("slopes", "offsets"), ("denominator_slopes", "denominator_offsets")]
        size = 4 * sum(
            (np.abs(values[slopes][:, None] * x) + np.abs(values[offsets][:, None])).max(0)
            for slopes, offsets in lines
            if slopes in values
        )
    return torch.from_numpy(np.maximum(size, 4))


def general_rounding(basis, values, x):
    """The effect of a relative error of eps in every number that enters, times a multiple of their count."""
    numbers = [torch.from_numpy(values[p.name]) for p in basis.parameters]
    z = torch.from_numpy(x)
    grad_x, terms = basis.derivatives(torch.ones_like(z), z, *numbers)
    learned = [row for p, rows in zip(basis.parameters, numbers, strict=True) if p.learnable for row in rows]
    fixed = sum(rows.abs().sum(0) for p, rows in zip(basis.parameters, numbers, strict=True) if not p.learnable)
    size = sum((term() * number).abs() for term, number in zip(terms, learned, strict=True))
    size = size + grad_x().abs() * (z.abs() + fixed) + z.abs()
    return (4 + 8 * len(learned)) * size.numpy()


@settings(max_examples=150, deadline=None)
@given(expansions())
def test_a_frozen_expansion_equals_it(activation):
    x = inputs()
    frozen = FrozenExpansion(activation)
    exact, y = activation(x), frozen(x)
    assert not list(frozen.parameters())
    assert ((y - exact).abs() <= torch.finfo(torch.float64).eps * rounding(activation, x)).all()
    torch.testing.assert_close(y, exact, rtol=1e-11, atol=1e-11)


@settings(max_examples=100, deadline=None)
@given(expansions(torch.float32), st.sampled_from([0.01, 1.0, 5.0]))
def test_it_rounds_like_it_in_float32(activation, scale):
    x = inputs(torch.float32) * scale
    y = FrozenExpansion(activation)(x)
    own, bound = activation(x), torch.finfo(torch.float32).eps * rounding(activation, x)
    exact = activation.double()(x.double())
    # High orders of Chebyshev polynomials overflow far outside; the range is that of the expansion.
    assert ((y - exact).abs() <= bound)[own.isfinite()].all()
    if activation.basis.name == "hermite":  # a quarter of its bound holds for the recurrence itself
        assert ((own - exact).abs() <= bound / 4).all()


@settings(max_examples=60, deadline=None)
@given(expansions())
def test_gradients_of_every_order_are_those_of_the_expansion(activation):
    # Knots of coarse lines lie at fractions with small denominators. At a knot two gradients are right.
    x = (inputs() + math.pi / 1000).requires_grad_()
    actual, expected = FrozenExpansion(activation)(x), activation(x)
    for _ in range(2 if "tropical" in activation.basis.name else 3):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
        if not (actual.requires_grad and expected.requires_grad):  # the slope of a line is constant
            break
        actual, expected = (
            torch.autograd.grad(y.sum(), x, create_graph=True, materialize_grads=True)[0] for y in (actual, expected)
        )


def least_lines(slopes, offsets):
    """Number of lines that the maximum needs, by exact arithmetic: those on top between neighbouring crossings."""
    lines = sorted({(Fraction(s), Fraction(b)) for s, b in zip(slopes, offsets, strict=True)})
    knots = sorted({(d - b) / (s - t) for s, b in lines for t, d in lines if s != t})
    between = [knots[0] - 1, *((x + y) / 2 for x, y in pairwise(knots)), knots[-1] + 1] if knots else [Fraction(0)]
    return len({max(lines, key=lambda line: line[0] * x + line[1]) for x in between})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), min_size=2, max_size=9))
def test_a_maximum_keeps_the_lines_that_it_needs(lines):
    slopes, offsets = (np.array(numbers, dtype=float) / 2 for numbers in zip(*lines, strict=True))
    activation = TropicalActivation(len(lines) - 1, dtype=torch.float64)
    activation.set_parameters({"slopes": slopes, "offsets": offsets})
    frozen = FrozenExpansion(activation)
    needed = least_lines(slopes, offsets)
    if needed == 1:
        assert frozen.form == "polynomial"
    else:
        assert (frozen.form, len(frozen.slopes)) == ("maximum", needed)


def test_a_clamp_leaves_the_lines_within_it():
    activation = TropicalActivation(64, clamp=0.5)
    frozen = FrozenExpansion(activation)
    assert 2 < len(frozen.slopes) < 40
    x = torch.linspace(-3, 3, 1001)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.testing.assert_close(frozen(x.to(dtype)), activation(x.to(dtype)))
    with torch.no_grad():
        activation.bounds.fill_(0.25)
    assert FrozenExpansion(activation).form in ("polynomial", "maximum")
    torch.testing.assert_close(FrozenExpansion(activation)(x), activation(x))
    activation.set_parameters({"bounds": np.zeros(2), "slopes": np.arange(65.0), "offsets": np.zeros(65)})
    assert FrozenExpansion(activation).form == "polynomial"


def test_a_denominator_of_one_line_is_folded_away():
    frozen = FrozenExpansion(TropicalRationalActivation(6, init="paper"))
    assert frozen.form == "maximum"
    assert len(frozen.slopes) == 2
    activation = TropicalRationalActivation(2)
    activation.set_parameters({name: np.ones(3) for name in ("slopes", "offsets", "denominator_slopes")})
    assert FrozenExpansion(activation).form == "polynomial"


def test_groups_keep_what_each_needs():
    activation = TropicalActivation(5, granularity="group:2", channels=4)
    with torch.no_grad():
        activation.offsets[:] = torch.tensor([[0.0, 9, 9, 9, 9, 0], [9.0, 0, 0, 0, 0, 9]]).T
    frozen = FrozenExpansion(activation)
    assert frozen.slopes.shape == (4, 4)
    for shape in ((3, 4, 5, 5), (7, 4)):
        x = torch.randn(shape) * 20
        torch.testing.assert_close(frozen(x), activation(x))
    last = torch.randn(2, 5, 5, 4) * 20
    torch.testing.assert_close(frozen(last), activation(last))
    with pytest.raises(OrthoFxError, match=r"^FrozenExpansion has 4 channels; got shape \(2, 5\)$"):
        frozen(torch.randn(2, 5))


def test_waves_of_one_frequency_become_one():
    activation = FourierActivation(6, dtype=torch.float64)
    activation.set_parameters(
        {
            "coefficients": np.array([1.0, 2.0, 3.0, 0.0, 5.0, 6.0]),
            "frequencies": np.array([1.0, -1.0, 0.0, 2.0, 3.0, 1.0]),
        }
    )
    frozen = FrozenExpansion(activation)
    assert frozen.frequencies.tolist() == [1.0, 3.0]
    torch.testing.assert_close(frozen(inputs()), activation(inputs()), rtol=1e-14, atol=1e-14)
    activation.set_parameters({"frequencies": np.zeros(6)})
    assert FrozenExpansion(activation).form == "polynomial"


def test_tied_waves_stay_multiples_of_one():
    frozen = FrozenExpansion(FourierActivation(tied=True))
    assert repr(frozen) == "FrozenExpansion(fourier 5 tied, form='harmonics', terms=5)"
    torch.testing.assert_close(frozen.frequencies, torch.tensor([0.35]))
    activation = FourierActivation(3, tied=True, granularity="channel", channels=2, dtype=torch.float64)
    activation.set_parameters({"frequencies": np.zeros(1)})
    assert FrozenExpansion(activation).form == "polynomial"
    with torch.no_grad():
        activation.frequencies[0, 1] = 2.0
        activation.coefficients[2] = 0.0
    frozen, x = FrozenExpansion(activation), torch.linspace(-3, 3, 14, dtype=torch.float64).view(7, 2)
    assert len(frozen.cosine_amplitudes) == 2
    torch.testing.assert_close(frozen(x), activation(x), rtol=1e-14, atol=1e-14)


def test_waves_below_rounding_are_dropped():
    assert len(FrozenExpansion(FourierActivation(64)).amplitudes) == 14
    assert len(FrozenExpansion(FourierActivation(64, tied=True)).cosine_amplitudes) == 14
    assert len(FrozenExpansion(FourierActivation(64, dtype=torch.float64)).amplitudes) < 26


def test_hermite_is_a_sum_of_powers_where_that_is_as_accurate():
    activation = HermiteActivation(3)
    frozen = FrozenExpansion(activation)
    a = activation.coefficients.detach()
    powers = torch.stack([a[0] - a[2] / 2, a[1] - a[3] / 2, a[2] / 2, a[3] / 6])
    torch.testing.assert_close(frozen.monomial_coefficients, powers)
    assert FrozenExpansion(HermiteActivation(16, init="fit", reference=F.gelu)).form == "recurrence"
    with torch.no_grad():
        activation.coefficients[2:] = 0
    assert len(FrozenExpansion(activation).monomial_coefficients) == 2


def one_of_each_form(**settings):
    yield FrozenExpansion(HermiteActivation(3, **settings))
    highest = HermiteActivation(10, **settings)
    highest.set_parameters({"coefficients": np.eye(11)[10]})
    yield FrozenExpansion(highest)
    yield FrozenExpansion(FourierActivation(tied=True, **settings))
    yield from (FrozenExpansion(cls(**settings)) for cls in CLASSES[1:])


def test_every_form_compiles_in_one_graph_with_its_gradients():
    modules = [*one_of_each_form(), FrozenExpansion(HermiteActivation(3, granularity="channel", channels=4, clamp=2.0))]
    forms = {"polynomial", "recurrence", "waves", "harmonics", "maximum", "difference"}
    assert {module.form for module in modules} == forms

    def total(x):
        return sum(module(x) for module in modules)

    x = torch.randn(8, 4, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(total, fullgraph=True)(x), total(x), rtol=1e-5, atol=1e-5)
    traced = torch.compile(total, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(x).sum(), x)[0] for f in (traced, total)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_functional_transforms():
    for frozen in one_of_each_form(dtype=torch.float64):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(frozen(x).sum(), x)
        actual = torch.vmap(torch.func.grad(lambda row, f=frozen: f(row).sum()))(x.detach())
        torch.testing.assert_close(actual, expected)
        assert torch.autograd.gradgradcheck(frozen, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_and_saturates(dtype):
    x = torch.linspace(-8, 8, 4001).to(dtype)
    for frozen in one_of_each_form():
        assert torch.equal(frozen(x), frozen(x.float()).to(dtype))
        assert frozen.half()(x).equal(frozen(x))
        assert all(buffer.dtype == torch.float32 for buffer in frozen.buffers())
    activation = HermiteActivation(5)
    far = torch.tensor([90.0, -90.0], dtype=torch.float16)
    assert torch.equal(FrozenExpansion(activation)(far), activation(far))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(FrozenExpansion(activation.to(dtype))(x), activation(x), rtol=eps, atol=eps)


@pytest.mark.parametrize("cls", CLASSES)
def test_shapes_without_elements_or_dimensions(cls):
    frozen = FrozenExpansion(cls(clamp=3.0))
    for shape in ((), (0, 3)):
        assert frozen(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_pickles_casts_and_state_dicts(cls):
    frozen, other, x = FrozenExpansion(cls(clamp=2.0)), FrozenExpansion(cls(clamp=3.0)), torch.randn(16)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(twin(x), frozen(x))
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(x), frozen(x))
    assert frozen.double()(x.double()).dtype == torch.float64
    assert all(buffer.dtype == torch.float64 for buffer in frozen.buffers())
    assert all(buffer.is_meta for buffer in frozen.to("meta").buffers())


def test_a_state_dict_of_another_form_does_not_load():
    frozen = FrozenExpansion(HermiteActivation(16))
    assert frozen.form == "polynomial"
    state = FrozenExpansion(HermiteActivation(16, init="fit", reference=F.gelu)).state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "monomial_coefficients"'):
        frozen.load_state_dict(state)


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.inner, self.act = nn.Linear(4, 4), act

    def forward(self, x):
        return self.act(self.inner(F.gelu(x)))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_frozen_model_computes_what_it_did(basis, granularity):
    shared = nn.ReLU()
    model = nn.Sequential(Block(shared), Block(shared), nn.Sequential(nn.SiLU())).eval()
    x = torch.randn(5, 4)
    config = ExpansionConfig(basis, granularity=granularity)
    rewrite_(model, config, example_inputs=None if granularity == "layer" else x)
    model[2].train()
    expected = model(x)
    names = tuple(name for name, module in model.named_modules() if hasattr(module, "basis"))
    assert len(names) == 4
    assert freeze_(model).names == names
    torch.testing.assert_close(model(x), expected)
    assert model[0].act is model[1].act
    assert isinstance(model[0].act, FrozenExpansion)
    assert (model[0].act.training, model[2][0].training) == (False, True)
    assert sum(p.numel() for p in model.parameters()) == 40
    assert all(site.reason for site in find_sites(model))
    assert str(freeze_(model)) == "nothing to freeze: every expansion is frozen"


def test_a_compiled_model_runs_what_was_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    rewrite_(model, "hermite")
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 4)
    expected = compiled(x)
    freeze_(model)
    torch.testing.assert_close(compiled(x), expected)
    model[1].monomial_coefficients.zero_()
    assert not compiled(x).any()


def test_what_stood_there_before_is_carried_over():
    activation = HermiteActivation()
    activation._replaced = (nn.GELU(),)
    frozen = FrozenExpansion(activation)
    assert frozen._replaced is activation._replaced
    assert not list(frozen.children())
    assert not hasattr(FrozenExpansion(HermiteActivation()), "_replaced")


def test_repr_says_what_became_of_it():
    shown = [repr(frozen) for frozen in one_of_each_form()]
    assert shown[0] == "FrozenExpansion(hermite 3, form='polynomial', terms=4)"
    assert shown[-1] == "FrozenExpansion(tropical_rational 6, form='difference', terms=7 - 7)"
    grouped = FrozenExpansion(FourierActivation(granularity="group:2", channels=4, clamp=2.0))
    assert repr(grouped) == "FrozenExpansion(fourier 5 group:2 clamp 2, form='waves', terms=5, channels=4)"


def test_what_cannot_be_frozen_is_named():
    with pytest.raises(OrthoFxError, match=r"^Linear holds no expansion to freeze: call rewrite_ first$"):
        freeze_(nn.Linear(2, 2))
    message = r"^the model itself is the HermiteActivation, and nothing holds it: freeze what does$"
    with pytest.raises(OrthoFxError, match=message):
        freeze_(HermiteActivation())
    model = nn.Sequential(nn.Linear(2, 2), FourierActivation(), HermiteActivation(clamp=2.0))
    with torch.no_grad():
        model[2].bounds[1] = math.nan
    with pytest.raises(OrthoFxError, match=r"^2: bounds has values that are not finite$"):
        freeze_(model)
    assert isinstance(model[1], FourierActivation)
    with pytest.raises(OrthoFxError, match=r"^1: constant is on the meta device, and has no values to freeze$"):
        freeze_(model.to("meta"))
    message = r"^FrozenExpansion takes a floating-point tensor; got torch\.int64$"
    with pytest.raises(OrthoFxError, match=message):
        FrozenExpansion(HermiteActivation())(torch.arange(3))


def test_what_cannot_be_traced_says_what_to_do():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    rewrite_(model)
    freeze_(model)
    with pytest.raises(OrthoFxError, match=r"^torch.fx cannot trace a FrozenExpansion: trace before freeze_"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(OrthoFxError, match=r"^TorchScript cannot compile FrozenExpansion: use torch.export"):
        torch.jit.script(model)
