"""The operators: exact derivatives of every order and kind, dtypes, what is saved, and how they trace."""

import gc
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.library import opcheck

from ortho_fx import ExpansionConfig, torch_private
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import BASES
from ortho_fx.numerics.initialisation import initial_parameters
from ortho_fx.operators import expand, operator
from ortho_fx.operators.formulas import forward_formula
from ortho_fx.operators.generated_code import generated_code
from ortho_fx.operators.support import formulas_digest
from tests.h100 import triton_code
from tests.kinds import COMPILED, KINDS, basis_of, config_of

pytestmark = pytest.mark.slow


def arguments(kind, degree, dtype=torch.float64, shape=(4, 5)):
    activation = make_activation(config_of(kind, degree), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, [getattr(activation, p.name) for p in basis_of(kind).parameters]


@pytest.mark.parametrize("degree", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_first_and_second_derivatives_agree_with_finite_differences(name, degree):
    x, parameters = arguments(name, degree)
    op = operator(basis_of(name))
    assert gradcheck(op, (x, *parameters), check_forward_ad=True)
    assert gradgradcheck(op, (x, *parameters), check_fwd_over_rev=True)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_held_after_a_step(name):
    op = operator(basis_of(name))

    def step():
        x, parameters = arguments(name, 4)
        (first,) = torch.autograd.grad(op(x, *parameters).sum(), x, create_graph=True)
        first.sum().backward()

    def tensors():
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    step()
    before = tensors()
    for _ in range(3):
        step()
    # What earlier tests have left may go in the meantime.
    assert tensors() <= before


@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 6, 3), 1), ((2, 3, 6), -1), ((6,), 0), ((2, 6, 2, 2), -3)])
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("name", KINDS)
def test_groups_of_channels_are_expansions_of_their_own(name, groups, shape, channel_dim):
    _, parameters = arguments(name, 3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def spread(p):
        noise = 0.1 * torch.randn(p.shape[0], groups, generator=generator, dtype=torch.float64)
        return (p.detach().unsqueeze(1) + noise).requires_grad_(p.requires_grad)

    grouped = [spread(p) for p in parameters]
    op = operator(basis_of(name))
    y = op(x, *grouped, channel_dim)
    pieces = x.chunk(groups, channel_dim)
    apart = [op(piece, *(p[:, g] for p in grouped)) for g, piece in enumerate(pieces)]
    torch.testing.assert_close(y, torch.cat(apart, channel_dim))
    learned = [x, *(p for p in grouped if p.requires_grad)]
    seed = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(torch.cat(apart, channel_dim), learned, seed)
    for actual, exact in zip(torch.autograd.grad(y, learned, seed), expected, strict=True):
        torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("name", COMPILED)
def test_operators_with_groups_pass_pytorchs_own_checks_and_gradgradcheck(name):
    x, parameters = arguments(name, 2, shape=(2, 4, 3))
    grouped = [p.detach().unsqueeze(1).repeat(1, 2).requires_grad_(p.requires_grad) for p in parameters]
    assert gradgradcheck(lambda *a: operator(basis_of(name))(*a, 1), (x, *grouped), check_fwd_over_rev=True)
    assert set(opcheck(operator(basis_of(name)), (x, *grouped, 1)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("degree", [1, 2, 5, 8])
@pytest.mark.parametrize("name", ["hermite", "chebyshev", "fourier", "gelu_series", "silu_series"])
def test_terms_in_one_tensor_are_those_of_the_formula(name, degree):
    x, parameters = arguments(name, degree, shape=(3, 2, 7))
    parameters = [p.detach()[:, None] + 0.1 * torch.arange(2.0, dtype=p.dtype) for p in parameters]
    together = BASES[name].together(x.detach(), *(p[:, None, :, None] for p in parameters))
    columns = [p.unsqueeze(-1) for p in parameters]
    slope, terms = BASES[name].derivatives(torch.ones_like(x), x.detach(), *columns)
    torch.testing.assert_close(together.value(), BASES[name].evaluate(x.detach(), *columns))
    torch.testing.assert_close(together.slope(), slope())
    torch.testing.assert_close(together.terms(), torch.stack([term() for term in terms]))


class Counted(torch_private.load(torch_private.TESTS).TorchDispatchMode):
    """Notes the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    @property
    def count(self):
        return len(self.calls)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def along(function):
    """The derivative of an elementwise function, by forward mode."""
    return lambda t: jvp(function, (t,), (torch.ones_like(t),))[1]


def operations(name, degree):
    """How many operations the second derivative takes by autograd, and by nested forward mode."""
    x, parameters = arguments(name, degree)
    with Counted() as by_autograd:
        (first,) = torch.autograd.grad(expand(BASES[name], x, *parameters).sum(), x, create_graph=True)
        torch.autograd.grad(first.sum(), x, create_graph=True)

    with Counted() as by_jvp:
        along(along(lambda t: expand(BASES[name], t, *parameters)))(x)
    return by_autograd.count, by_jvp.count


@pytest.mark.parametrize("name", ["hermite", "chebyshev", "fourier", "gelu_series"])
def test_operations_of_a_second_derivative_hardly_grow_with_the_degree(name):
    for small, large in zip(operations(name, 2), operations(name, 8), strict=True):
        assert large < 1.7 * small


CLOSED = [("hermite", False), ("chebyshev", False), ("fourier", False), ("fourier", True)]


@pytest.mark.parametrize("shape", [(), (3,)], ids=["a layer", "a channel"])
@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize(("name", "tied"), CLOSED)
def test_forward_mode_calls_the_operator_of_the_derivative(name, tied, degree, shape):
    basis = BASES[name]
    values = initial_parameters(ExpansionConfig(name, degree, tied=tied)).values()
    parameters = [torch.as_tensor(v).reshape(-1, *(1 for _ in shape)).repeat(1, *shape) + 0.1 for v in values]
    x = torch.linspace(-3, 3, 15, dtype=torch.float64).reshape(5, 3)

    def formula(t):
        return forward_formula(basis)(t, *parameters, channel_dim=1)

    with Counted() as counted:
        second = along(along(lambda t: expand(basis, t, *parameters)))(x)
    torch.testing.assert_close(second, along(along(formula))(x))
    assert [call for call in counted.calls if call.startswith("ortho_fx")] == [f"ortho_fx.{name}.default"] * 4


def test_forward_mode_rounds_half_precision_once():
    x, parameters = torch.linspace(-3, 3, 64), initial_parameters(ExpansionConfig("fourier", 5)).values()
    parameters = [torch.as_tensor(v, dtype=torch.float32) for v in parameters]

    def slope(x, direction):
        return jvp(lambda t: expand(BASES["fourier"], t, *parameters), (x,), (direction,))[1]

    half = x.bfloat16()
    direction = 0.3 * torch.ones_like(half)
    # A number that is rounded once is off by at most this part of it.
    torch.testing.assert_close(
        slope(half, direction).float(), slope(half.float(), direction.float()), rtol=2**-8, atol=1e-6
    )


def test_third_derivative_of_a_cubic_is_its_leading_coefficient():
    x, (coefficients,) = arguments("hermite", 3)
    y = expand(BASES["hermite"], x, coefficients).sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
        third, y = y, y.sum()
    torch.testing.assert_close(third, coefficients[3].expand_as(x))


@pytest.mark.parametrize("name", COMPILED)
def test_operators_pass_pytorchs_own_checks(name):
    x, parameters = arguments(name, 3)
    results = opcheck(operator(basis_of(name)), (x, *parameters))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", KINDS)
def test_only_the_input_and_the_parameters_are_saved(name):
    x, parameters = arguments(name, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        operator(basis_of(name))(x, *parameters)
    assert sorted(saved) == sorted(t.data_ptr() for t in (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_the_rounded_float32_result(name, dtype):
    _, parameters = arguments(name, 5, torch.float32)
    x = torch.linspace(-8, 8, 4001).to(dtype)
    y = operator(basis_of(name))(x, *parameters)
    assert y.dtype == dtype
    assert torch.equal(y, operator(basis_of(name))(x.float(), *parameters).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_have_the_dtypes_of_their_tensors_and_agree_with_float64(name, dtype):
    x, parameters = arguments(name, 5, torch.float32, shape=(64, 32))
    x = x.detach().to(dtype).requires_grad_()
    operator(basis_of(name))(x, *parameters).float().square().mean().backward()
    exact = [x.detach().double().requires_grad_(), *(p.detach().double().requires_grad_() for p in parameters)]
    operator(basis_of(name))(*exact).square().mean().backward()
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


@pytest.mark.parametrize("name", KINDS)
def test_shapes_without_elements_or_dimensions(name):
    _, parameters = arguments(name, 3)
    for shape in ((), (0, 3)):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = operator(basis_of(name))(x, *parameters)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("channel_dim", [None, 0, 1, -1])
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.usefixtures("without_loops")
def test_one_call_for_a_batch_is_a_call_for_each_member(name, channel_dim):
    """Any of the arguments may be batched, in any dimension, for the forward and the backward operator."""
    _, parameters = arguments(name, 2)
    generator = torch.Generator().manual_seed(2)
    further = () if channel_dim is None else (channel_dim,)
    backward = getattr(torch.ops.ortho_fx, f"{basis_of(name).name}_backward").default

    def batched(shape, at):
        return torch.randn((*shape[:at], 3, *shape[at:]), generator=generator, dtype=torch.float64)

    size = (2,) if further else ()
    shapes = [(4, 4), (4, 4), *((*p.shape, *size) for p in parameters)]
    for op, first in ((operator(basis_of(name)), 1), (backward, 0)):
        for batches in itertools.product([None, 0, 1], [None, 2], [None, 0, 1], [None, 1]):
            dims = (*batches[first:3], *(batches[3] for _ in parameters[1:]))
            if all(dim is None for dim in dims):
                continue
            tensors = [
                batched(shape, 0)[0] if dim is None else batched(shape, dim)
                for shape, dim in zip(shapes[first:], dims, strict=False)
            ]
            together = vmap(lambda *t, op=op: op(*t, *further), in_dims=dims)(*tensors)
            for member in range(3):
                picked = [t if d is None else t.select(d, member) for t, d in zip(tensors, dims, strict=True)]
                apart = op(*picked, *further)
                if op is not backward:
                    torch.testing.assert_close(together[member], apart)
                else:
                    torch.testing.assert_close(tuple(t[member] for t in together), tuple(apart))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("without_loops")
def test_a_batch_saves_its_inputs_and_parameters_alone(name):
    activation = make_activation(config_of(name, 3))
    stacked = {n: p.detach().repeat(4, 1).requires_grad_() for n, p in activation.named_parameters()}
    x, saved = torch.randn(4, 50, requires_grad=True), {}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = vmap(lambda p, row: functional_call(activation, p, (row,)))(stacked, x)
    assert y.requires_grad
    inputs = [x, *stacked.values(), *activation.buffers()]
    assert sum(saved.values()) == sum(t.untyped_storage().nbytes() for t in inputs)


def test_the_first_of_tied_pieces_takes_the_gradient_under_every_transform():
    activation = make_activation(ExpansionConfig("tropical_rational", 3, init="paper"), dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in activation.named_parameters()}

    def total(p, t):
        return functional_call(activation, p, (t,)).sum()

    activation(x).sum().backward()
    expected = {name: p.grad for name, p in activation.named_parameters()}
    assert expected["denominator_offsets"].tolist() == [-20.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(grad(total)(parameters, x), expected)
    torch.testing.assert_close(grad(lambda p: vmap(total, (None, 0))(p, x).sum())(parameters), expected)
    each = vmap(grad(total), (None, 0))(parameters, x)
    torch.testing.assert_close({name: g.sum(0) for name, g in each.items()}, expected)


def test_third_derivatives_under_transforms():
    _, (coefficients,) = arguments("hermite", 3)
    cubic, x = coefficients.detach(), torch.tensor(0.3, dtype=torch.float64)
    third = grad(grad(grad(lambda t: expand(BASES["hermite"], t, cubic))))
    torch.testing.assert_close(third(x), cubic[3])
    torch.testing.assert_close(torch.compile(third, backend="aot_eager", fullgraph=True)(x), cubic[3])


@pytest.mark.parametrize("groups", [None, 5])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_holds_no_operator_of_ours(name, groups):
    x, parameters = arguments(name, 3, torch.float32)
    if groups:
        parameters = [p.detach().unsqueeze(1).repeat(1, groups).requires_grad_(p.requires_grad) for p in parameters]
    torch.compiler.reset()
    compiled = torch.compile(lambda t: expand(basis_of(name), t * 2, *parameters) + t, fullgraph=True)
    sources = [x, *(p for p in parameters if p.requires_grad)]
    with generated_code() as codes:
        y = compiled(x)
        actual = torch.autograd.grad(y.square().sum(), sources)
    assert len(codes) == 2
    for code in codes:
        assert "ortho_fx" not in code
    torch.testing.assert_close(y, expand(basis_of(name), x * 2, *parameters) + x)
    expected = torch.autograd.grad((expand(basis_of(name), x * 2, *parameters) + x).square().sum(), sources)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [None, 3])
def test_tied_frequencies_are_free_ones_that_are_multiples(groups):
    generator = torch.Generator().manual_seed(3)
    behind = () if groups is None else (groups,)
    tied = [torch.randn(n, *behind, generator=generator, dtype=torch.float64).requires_grad_() for n in (1, 6, 1, 6)]
    constant, coefficients, frequency, phases = tied
    orders = torch.arange(1, 7, dtype=torch.float64).reshape(6, *(1 for _ in behind))
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64).requires_grad_()
    y = expand(BASES["fourier"], x, *tied)
    free = expand(BASES["fourier"], x, constant, coefficients, orders * frequency, phases)
    torch.testing.assert_close(y, free)
    seed = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    actual, expected = (torch.autograd.grad(result, [x, *tied], seed) for result in (y, free))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("groups", [None, 3072])
def test_the_weights_of_tied_waves_are_computed_once_and_kept_for_the_backward_pass(groups):
    settings = {} if groups is None else {"granularity": "channel"}
    activation = make_activation(config_of("fourier tied", 5, **settings), channels=groups, channel_dim=-1)
    code = triton_code(activation, torch.empty(4096, 3072, device="meta", requires_grad=True))
    whole = 4096 * 3072
    # Forward: the weights, then the expansion. Backward: the input's gradient, the sums, the other gradients from them.
    assert [math.prod(kernel.numels.values()) >= whole for kernel in code.forward.kernels] == [False, True]
    assert [math.prod(kernel.numels.values()) >= whole for kernel in code.backward.kernels] == [True, False, False]


def test_cache_key_names_the_formulas():
    torch.compile(make_activation(ExpansionConfig("hermite")), backend="aot_eager")(torch.ones(3))
    assert f"[ortho_fx {formulas_digest()}" in torch.compiler.config.cache_key_tag
