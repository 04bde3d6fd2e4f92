"""Graphs with forward and backward: an activation is replaced together with its backward, or left with a reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from ortho_fx import ExpansionConfig, OrthoFxError, revert_
from ortho_fx.passes.graph.text import graph_text
from ortho_fx.passes.pipeline import run
from ortho_fx.passes.vocabulary.targets import TARGETS
from tests.kinds import KINDS, config_of

WITH_GATES = [target.name for target in TARGETS]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "relu6": F.relu6,
    "elu": lambda x: F.elu(x, 0.5),
    "celu": lambda x: F.celu(x, 0.5),
    "selu": F.selu,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
}


def weights():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return w, torch.randn(3, 4, generator=generator, dtype=torch.float64)


def step_with(*activations):
    """Loss and gradients of a network with two activations, each inside a residual sum or before a product."""
    first, second = activations

    def loss_of(w, x):
        h = x + first(x @ w)
        return (second(h @ w) @ w).square().mean()

    def step(w, x):
        loss = loss_of(w, x)
        return loss, *torch.autograd.grad(loss, (w,))

    return loss_of, step


def assert_is_derivative(graph, record):
    """Asserts that the graph gives the results of eager autograd with the same expansions, in float64."""
    w, x = weights()
    expansions = [copy.deepcopy(graph.get_submodule(site.name)) for site in record.replaced]
    loss = step_with(*expansions)[0](w, x)
    parameters = {
        f"{site.name}.{name}": parameter
        for site, expansion in zip(record.replaced, expansions, strict=True)
        for name, parameter in expansion.named_parameters()
    }
    assert tuple(parameters) == record.gradients
    expected = (loss, *torch.autograd.grad(loss, (w, *parameters.values())))
    with torch.no_grad():
        torch.testing.assert_close(graph(w, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_both_directions_are_replaced(name):
    graph = make_fx(step_with(ACTIVATIONS[name], ACTIVATIONS[name])[1])(*weights())
    record = run(graph, targets=WITH_GATES)
    assert len(record.replaced) == 2
    assert_is_derivative(graph, record)


@pytest.mark.parametrize("kind", KINDS)
def test_every_basis_has_both_directions(kind):
    graph = make_fx(step_with(F.gelu, F.relu)[1])(*weights())
    assert_is_derivative(graph, run(graph, config_of(kind)))


def test_before_and_after():
    def step(w, x):
        loss = F.relu(x @ w).sum()
        return loss, *torch.autograd.grad(loss, (w,))

    graph = make_fx(step)(*weights())
    assert_expected_inline(
        graph_text(graph).replace("detach", "alias"),  # PyTorch 2.13 makes detach what 2.14 makes alias
        """\
graph of the model:
  w_1 = input
  x_1 = input
  mm = aten.mm.default(x_1, w_1)
  relu = aten.relu.default(mm)
  alias = aten.alias.default(relu)
  sum_1 = aten.sum.default(relu)
  ones_like = aten.ones_like.default(sum_1, pin_memory=False, memory_format=torch.preserve_format)
  expand = aten.expand.default(ones_like, [3, 4])
  alias_1 = aten.alias.default(alias)
  threshold_backward = aten.threshold_backward.default(expand, alias_1, 0)
  t = aten.t.default(x_1)
  mm_1 = aten.mm.default(t, threshold_backward)
  return (sum_1, mm_1)
""",
    )
    record = run(graph, ExpansionConfig("hermite", 2))
    assert_expected_inline(
        graph_text(graph),
        """\
graph of the model:
  w_1 = input
  x_1 = input
  mm = aten.mm.default(x_1, w_1)
  relu_expansion_coefficients = self.relu_expansion.coefficients
  hermite_default = ortho_fx.hermite.default(mm, relu_expansion_coefficients)  # relu_expansion: relu, hermite 2
  sum_1 = aten.sum.default(hermite_default)
  ones_like = aten.ones_like.default(sum_1, pin_memory=False, memory_format=torch.preserve_format)
  expand = aten.expand.default(ones_like, [3, 4])
  hermite_backward_default = ortho_fx.hermite_backward.default(expand, mm, relu_expansion_coefficients)
  getitem = operator.getitem(hermite_backward_default, 0)
  getitem_1 = operator.getitem(hermite_backward_default, 1)
  t = aten.t.default(x_1)
  mm_1 = aten.mm.default(t, getitem)
  return (sum_1, mm_1, getitem_1)

parameters of expansions:
  relu_expansion.coefficients = 0.5, 0.7071, -0.7071
""",
    )
    assert_expected_inline(
        str(record),
        """\
pass        edits
find        1
choose      1
substitute  1
initialise  1
lower       0

name            kind  function  expansion  parameters
relu_expansion  node  relu      hermite 2  3

gradients after the other outputs: relu_expansion.coefficients""",
    )


def test_a_fit_starts_with_the_derivative_of_what_was_there():
    w, x = weights()
    graph = make_fx(step_with(F.gelu, F.gelu)[1])(w, x)
    expected = graph(w, x)
    run(graph, ExpansionConfig("hermite", 16, "fit"))
    torch.testing.assert_close(graph(w, x)[:2], expected, rtol=0.05, atol=0.05)


def test_a_second_run_edits_nothing_and_revert_refuses():
    graph = make_fx(step_with(F.gelu, torch.sigmoid)[1])(*weights())
    run(graph)
    code = graph.code
    assert set(run(graph).edits.values()) == {0}
    assert graph.code == code
    with pytest.raises(OrthoFxError, match=r"^gelu_expansion stands in a graph that holds its backward, which cannot"):
        revert_(graph)


def grad_of(loss, w, **settings):
    return torch.autograd.grad(loss, (w,), **settings)


def twins(w, x):
    h = x @ w
    return grad_of((F.gelu(h) + F.gelu(h)).mean(), w)


def twice(w, x):
    (gradient,) = grad_of(F.gelu(x @ w).exp().mean(), w, create_graph=True)
    return grad_of(gradient.exp().sum(), w)


def hessian_product(w, x):
    (gradient,) = grad_of(F.relu(x @ w).exp().mean(), w, create_graph=True)
    return grad_of(gradient, w, grad_outputs=torch.ones_like(w))


def vector_product(w, x):
    return grad_of(F.gelu(x @ w), w, grad_outputs=x)


def forward_derivative(w, x):
    return torch.func.jvp(lambda w: F.gelu(x @ w), (w.detach(),), (w.detach(),))


def checkpointed(w, x):
    return grad_of(checkpoint(lambda x: F.gelu(F.gelu(x @ w) @ w), x, use_reentrant=False).mean(), w)


def input_without_gradient(w, x):
    return grad_of((F.gelu(x) @ w).exp().mean(), w)


def in_place(w, x):
    return grad_of(F.relu(x @ w, inplace=True).exp().mean(), w)


def formula(w, x):
    h = x @ w
    return grad_of((h * torch.sigmoid(1.702 * h)).mean(), w)


def one_output(w, x):
    return torch.func.grad(lambda w: F.gelu(x @ w).mean())(w.detach())


LEFT = [
    (twins, "gelu_backward, gelu_backward_1 may be the backward of gelu_1 as well"),
    (twice, "the graph is differentiated more than once"),
    (hessian_product, "it has 3 backward nodes .*: it is differentiated more than once"),
    (
        vector_product,
        "its backward starts from no loss of the graph: which way it goes is not known",
    ),
    (forward_derivative, "its backward starts from no loss of the graph"),
    (checkpointed, "it is computed again for the backward, as checkpointing does"),
    (input_without_gradient, "the graph holds a backward, but no node of it is that of this activation"),
    (in_place, "it changes its input in place, in a graph that holds its backward"),
    (formula, "the graph holds its backward as several nodes"),
    (one_output, "the graph holds its backward, and returns no tuple that the new gradients could join"),
]


@pytest.mark.parametrize(("step", "reason"), LEFT, ids=[step.__name__ for step, _ in LEFT])
def test_what_is_not_certain_is_left_with_its_reason(step, reason):
    graph = make_fx(step)(*weights())
    code = graph.code
    with pytest.raises(OrthoFxError, match=rf"^no activation of {step.__name__} can be replaced: .*({reason})"):
        run(graph)
    assert graph.code == code


@pytest.mark.parametrize("activation", [F.relu, F.gelu, F.silu, F.elu])
@pytest.mark.parametrize("vector", [False, True], ids=["loss", "vector"])
def test_a_backward_in_pieces_is_never_taken_for_a_forward(activation, vector):
    def step(w, x):
        y = activation(x @ w)
        return (y, *grad_of(y, w, grad_outputs=x)) if vector else grad_of(y.exp().mean(), w)

    graph = make_fx(step, decomposition_table=dict(torch.export.default_decompositions().items()))(*weights())
    code = graph.code
    with pytest.raises(OrthoFxError, match=r"may be a part of its backward|but no node|as several nodes"):
        run(graph)
    assert graph.code == code


def test_settings_that_need_more_than_the_pair_are_left():
    graph = make_fx(step_with(F.gelu, F.relu)[1])(*weights())
    with pytest.raises(OrthoFxError, match="clamp cannot be had in a graph that holds its backward"):
        run(graph, ExpansionConfig(clamp=3.0))


def test_a_graph_of_the_forward_alone_is_replaced_as_such():
    w, x = weights()
    graph = make_fx(lambda w, x: x + F.gelu(x @ w) @ w)(w, x)
    record = run(graph, ExpansionConfig("hermite", 3))
    assert record.gradients == ()
    expansion = graph.get_submodule(record.replaced[0].name)
    torch.testing.assert_close(graph(w, x), x + expansion(x @ w) @ w)


def test_a_backward_around_a_graph_is_seen():
    w, x = weights()
    branch = make_fx(lambda x: F.gelu(x) * 2)(x)
    graph = make_fx(step_with(F.gelu, F.relu)[1])(w, x)
    graph.add_module("branch", branch)
    record = run(graph)
    assert [site.name for site in record.replaced] == ["gelu_expansion", "relu_expansion"]
    assert [(site.name, site.reason) for site in record.left] == [
        ("branch.gelu_expansion", "a graph around it holds a backward")
    ]


def test_symbolic_shapes_change_nothing():
    def step(w, x):
        loss = F.gelu((x @ w).reshape(x.shape[0] * w.shape[1])).exp().mean()
        return loss, *grad_of(loss, w)

    w, x = weights()
    graph = make_fx(step, tracing_mode="symbolic")(w, x)
    (site,) = run(graph, ExpansionConfig("fourier", 3)).replaced
    expansion = graph.get_submodule(site.name)
    loss = expansion((x @ w).flatten()).exp().mean()
    expected = (loss, *torch.autograd.grad(loss, (w, *expansion.parameters())))
    torch.testing.assert_close(graph(w, x), expected)


def test_a_forward_whose_backward_is_another_graph_is_left():
    graph = make_fx(lambda primals_1, primals_2: F.gelu(primals_2 @ primals_1))(*weights())
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), ("primals_1", "primals_2"), strict=True):
        node.target = name
    with pytest.raises(OrthoFxError, match="its backward starts from no loss of the graph"):
        run(graph)
