"""The operators: exact derivatives of every order, dtypes, what is saved, and how they trace."""

import pytest
import torch
from torch.library import opcheck

from ortho_fx import ExpansionConfig
from ortho_fx.activations import make_activation
from ortho_fx.bases import BASES
from ortho_fx.operators import expand, operator


def arguments(name, degree, dtype=torch.float64, shape=(4, 5)):
    activation = make_activation(ExpansionConfig(name, degree), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, [getattr(activation, p.name) for p in BASES[name].parameters]


@pytest.mark.parametrize("degree", [1, 4])
@pytest.mark.parametrize("name", BASES)
def test_first_and_second_derivatives_agree_with_finite_differences(name, degree):
    x, parameters = arguments(name, degree)
    assert torch.autograd.gradcheck(operator(BASES[name]), (x, *parameters))
    assert torch.autograd.gradgradcheck(operator(BASES[name]), (x, *parameters))


@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 6, 3), 1), ((2, 3, 6), -1), ((6,), 0), ((2, 6, 2, 2), -3)])
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("name", BASES)
def test_groups_of_channels_are_expansions_of_their_own(name, groups, shape, channel_dim):
    _, parameters = arguments(name, 3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def spread(p):
        noise = 0.1 * torch.randn(p.shape[0], groups, generator=generator, dtype=torch.float64)
        return (p.detach().unsqueeze(1) + noise).requires_grad_(p.requires_grad)

    grouped = [spread(p) for p in parameters]
    op = operator(BASES[name])
    y = op(x, *grouped, channel_dim)
    pieces = x.chunk(groups, channel_dim)
    apart = [op(piece, *(p[:, g] for p in grouped)) for g, piece in enumerate(pieces)]
    torch.testing.assert_close(y, torch.cat(apart, channel_dim))
    learned = [x, *(p for p in grouped if p.requires_grad)]
    seed = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(torch.cat(apart, channel_dim), learned, seed)
    for actual, exact in zip(torch.autograd.grad(y, learned, seed), expected, strict=True):
        torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("name", BASES)
def test_operators_with_groups_pass_pytorchs_own_checks_and_gradgradcheck(name):
    x, parameters = arguments(name, 2, shape=(2, 4, 3))
    grouped = [p.detach().unsqueeze(1).repeat(1, 2).requires_grad_(p.requires_grad) for p in parameters]
    assert torch.autograd.gradgradcheck(lambda *a: operator(BASES[name])(*a, 1), (x, *grouped))
    assert set(opcheck(operator(BASES[name]), (x, *grouped, 1)).values()) == {"SUCCESS"}


def test_third_derivative_of_a_cubic_is_its_leading_coefficient():
    x, (coefficients,) = arguments("hermite", 3)
    y = expand(BASES["hermite"], x, coefficients).sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
        third, y = y, y.sum()
    torch.testing.assert_close(third, coefficients[3].expand_as(x))


@pytest.mark.parametrize("name", BASES)
def test_operators_pass_pytorchs_own_checks(name):
    x, parameters = arguments(name, 3)
    results = opcheck(operator(BASES[name]), (x, *parameters))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", BASES)
def test_only_the_input_and_the_parameters_are_saved(name):
    x, parameters = arguments(name, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        operator(BASES[name])(x, *parameters)
    assert sorted(saved) == sorted(t.data_ptr() for t in (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BASES)
def test_half_precision_is_the_rounded_float32_result(name, dtype):
    _, parameters = arguments(name, 5, torch.float32)
    x = torch.linspace(-8, 8, 4001).to(dtype)
    y = operator(BASES[name])(x, *parameters)
    assert y.dtype == dtype
    assert torch.equal(y, operator(BASES[name])(x.float(), *parameters).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BASES)
def test_gradients_have_the_dtypes_of_their_tensors_and_agree_with_float64(name, dtype):
    x, parameters = arguments(name, 5, torch.float32, shape=(64, 32))
    x = x.detach().to(dtype).requires_grad_()
    operator(BASES[name])(x, *parameters).float().square().mean().backward()
    exact = [x.detach().double().requires_grad_(), *(p.detach().double().requires_grad_() for p in parameters)]
    operator(BASES[name])(*exact).square().mean().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for tensor, reference in zip((x, *parameters), exact, strict=True):
        if tensor.requires_grad:
            assert tensor.grad.dtype == tensor.dtype
            error = (tensor.grad.double() - reference.grad).norm()
            assert error <= tolerance * reference.grad.norm()


def test_float16_saturates_without_nan():
    x = torch.tensor([90.0, -90.0], dtype=torch.float16)
    _, parameters = arguments("hermite", 5, torch.float32)
    exact = operator(BASES["hermite"])(x.float(), *parameters)
    assert (exact.abs() > 65504).all()
    assert operator(BASES["hermite"])(x, *parameters).tolist() == [65504 * sign for sign in exact.sign().tolist()]


@pytest.mark.parametrize("name", BASES)
def test_shapes_without_elements_or_dimensions(name):
    _, parameters = arguments(name, 3)
    for shape in ((), (0, 3)):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = operator(BASES[name])(x, *parameters)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("name", BASES)
def test_functional_transforms(name):
    x, parameters = arguments(name, 3)
    x, parameters = x.detach(), [p.detach() for p in parameters]

    def f(t):
        return expand(BASES[name], t, *parameters)

    reference = x.clone().requires_grad_()
    f(reference).sum().backward()
    torch.testing.assert_close(torch.vmap(f)(x), f(x))
    torch.testing.assert_close(torch.vmap(torch.func.grad(lambda row: f(row).sum()))(x), reference.grad)


def test_functional_gradient_compiles():
    x, parameters = arguments("hermite", 3)
    x, parameters = x.detach(), [p.detach() for p in parameters]
    gradient = torch.func.grad(lambda t: expand(BASES["hermite"], t, *parameters).sum())
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True)(x), gradient(x))


@pytest.mark.parametrize("groups", [None, 5])
@pytest.mark.parametrize("name", BASES)
def test_compiled_code_holds_no_operator_of_ours(name, groups):
    from torch._inductor.utils import run_fw_bw_and_get_code

    x, parameters = arguments(name, 3, torch.float32)
    if groups:
        parameters = [p.detach().unsqueeze(1).repeat(1, groups).requires_grad_(p.requires_grad) for p in parameters]
    compiled = torch.compile(lambda t: expand(BASES[name], t * 2, *parameters) + t, fullgraph=True)
    y, codes = run_fw_bw_and_get_code(lambda: compiled(x))
    assert len(codes) == 2
    for code in codes:
        assert "ortho_fx" not in code
    torch.testing.assert_close(y, expand(BASES[name], x * 2, *parameters) + x)


def test_cache_key_names_the_formulas():
    assert "ortho_fx-" in torch.compiler.config.cache_key_tag
