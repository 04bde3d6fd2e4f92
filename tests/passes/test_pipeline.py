"""The pipeline: its order, graphs before and after every pass, kinds of graph, and passes that are off or refuse."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, find_sites, revert_, rewrite_
from ortho_fx.passes.graph.text import graph_text
from ortho_fx.passes.pipeline import DISABLE_VARIABLE, GRAPHS_VARIABLE, PASSES, run

CLOSE = ExpansionConfig("tropical_rational", 32, "fit")


class Network(nn.Module):
    """Calls a module twice, a function and a gate."""

    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.SiLU()

    def forward(self, x):
        h = self.act(self.linear(self.act(x)))
        return torch.sigmoid(F.gelu(h) + h)


def network():
    torch.manual_seed(0)
    return Network().double()


def batch():
    return torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dynamo_graph(model, x):
    """The graph that Dynamo hands to a backend."""
    found = []

    def keep(graph_module, inputs):
        found.append((graph_module, inputs))
        return graph_module

    torch.compiler.reset()
    torch.compile(model, backend=keep)(x)
    ((graph_module, inputs),) = found
    return graph_module, inputs


def test_the_order():
    assert_expected_inline(
        "\n".join(PASSES),
        """\
find
choose
substitute
initialise
lower""",
    )


def test_the_order_is_printed():
    command = [sys.executable, "-c", "from ortho_fx.passes.pipeline import PASSES; print(PASSES)"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert_expected_inline(
        printed,
        """\
1 find        Lists every activation, gates included, and notes its `Site` on its nodes
2 choose      Gives each site its config, or the reason why it is left
3 substitute  Puts an expansion, with init "stable", in the place of each chosen site
4 initialise  Gives each new expansion the start that its config asks for
5 lower       Puts operators in the place of the calls of expansions, those of earlier runs as well
""",
    )


def test_every_pass_before_and_after(tmp_path):
    graph = fx.symbolic_trace(network())
    record = run(graph, ExpansionConfig("hermite", 2), graphs=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["0_before.txt", *(f"{i}_{name}.txt" for i, name in enumerate(PASSES, 1))]
    before, found, chosen, substituted, initialised, lowered = (file.read_text() for file in files)
    assert_expected_inline(
        before,
        """\
graph of the model:
  x = input
  act = self.act(x)
  linear = self.linear(act)
  act_1 = self.act(linear)
  gelu = torch._C._nn.gelu(act_1)
  add = operator.add(gelu, act_1)
  sigmoid = torch.sigmoid(add)
  return sigmoid
""",
    )
    assert_expected_inline(
        found,
        """\
graph of the model:
  x = input
  act = self.act(x)  # act: silu, not decided
  linear = self.linear(act)
  act_1 = self.act(linear)  # act: silu, not decided
  gelu = torch._C._nn.gelu(act_1)  # gelu_expansion: gelu, not decided
  add = operator.add(gelu, act_1)
  sigmoid = torch.sigmoid(add)  # sigmoid_expansion: sigmoid, not decided
  return sigmoid
""",
    )
    assert_expected_inline(
        chosen,
        """\
graph of the model:
  x = input
  act = self.act(x)  # act: silu, hermite 2
  linear = self.linear(act)
  act_1 = self.act(linear)  # act: silu, hermite 2
  gelu = torch._C._nn.gelu(act_1)  # gelu_expansion: gelu, hermite 2
  add = operator.add(gelu, act_1)
  sigmoid = torch.sigmoid(add)  # sigmoid_expansion: sigmoid, left: it is a gate unless it is named as a target
  return sigmoid
""",
    )
    assert_expected_inline(
        substituted,
        """\
graph of the model:
  x = input
  act = self.act(x)  # act: silu, hermite 2
  linear = self.linear(act)
  act_1 = self.act(linear)  # act: silu, hermite 2
  gelu_expansion = self.gelu_expansion(act_1)  # gelu_expansion: gelu, hermite 2
  add = operator.add(gelu_expansion, act_1)
  sigmoid = torch.sigmoid(add)  # sigmoid_expansion: sigmoid, left: it is a gate unless it is named as a target
  return sigmoid

parameters of expansions:
  act.coefficients = 0.5, 0.7071, -0.7071
  gelu_expansion.coefficients = 0.5, 0.7071, -0.7071
""",
    )
    assert initialised == substituted
    assert_expected_inline(
        lowered,
        """\
graph of the model:
  x = input
  act_coefficients = self.act.coefficients
  hermite_default = ortho_fx.hermite.default(x, act_coefficients, 1)  # act: silu, hermite 2
  linear = self.linear(hermite_default)
  act_coefficients_1 = self.act.coefficients
  hermite_default_1 = ortho_fx.hermite.default(linear, act_coefficients_1, 1)  # act: silu, hermite 2
  gelu_expansion_coefficients = self.gelu_expansion.coefficients
  hermite_default_2 = ortho_fx.hermite.default(hermite_default_1, gelu_expansion_coefficients, 1)  # gelu_expansion: gelu, hermite 2
  add = operator.add(hermite_default_2, hermite_default_1)
  sigmoid = torch.sigmoid(add)  # sigmoid_expansion: sigmoid, left: it is a gate unless it is named as a target
  return sigmoid

parameters of expansions:
  act.coefficients = 0.5, 0.7071, -0.7071
  gelu_expansion.coefficients = 0.5, 0.7071, -0.7071
""",  # noqa: E501
    )
    assert_expected_inline(
        str(record),
        """\
pass        edits
find        4
choose      4
substitute  2
initialise  2
lower       3

name               kind    function  expansion                                          parameters
gelu_expansion     node    gelu      hermite 2                                          3
sigmoid_expansion  node    sigmoid   left: it is a gate unless it is named as a target
act                module  silu      hermite 2                                          3""",
    )


def test_initialise_sets_what_the_config_asks_for(tmp_path):
    graph = fx.symbolic_trace(network())
    (site,) = (site for site in run(graph, {"act": ExpansionConfig("hermite", 2, "paper")}, graphs=tmp_path).replaced)
    assert graph.act.config == ExpansionConfig("hermite", 2, "paper")
    assert site.expansion == "hermite 2"
    substituted, initialised = (
        (tmp_path / name).read_text().splitlines()[-1] for name in ("3_substitute.txt", "4_initialise.txt")
    )
    assert_expected_inline(
        f"{substituted}\n{initialised}",
        """\
  act.coefficients = 0.5, 0.7071, -0.7071
  act.coefficients = 0.5, 0.7071, 0.7071""",
    )


def test_an_exported_program():
    x = batch()
    graph = torch.export.export(network(), (x,)).module()
    run(graph, ExpansionConfig("hermite", 2))
    assert_expected_inline(
        graph_text(graph),
        """\
graph of the model:
  linear_weight = self.linear.weight
  linear_bias = self.linear.bias
  x = input
  _guards_fn = self._guards_fn(x)
  silu_expansion_coefficients = self.silu_expansion.coefficients
  hermite_default = ortho_fx.hermite.default(x, silu_expansion_coefficients, 1)  # silu_expansion: silu, hermite 2
  linear = aten.linear.default(hermite_default, linear_weight, linear_bias)
  silu_1_expansion_coefficients = self.silu_1_expansion.coefficients
  hermite_default_1 = ortho_fx.hermite.default(linear, silu_1_expansion_coefficients, 1)  # silu_1_expansion: silu, hermite 2
  gelu_expansion_coefficients = self.gelu_expansion.coefficients
  hermite_default_2 = ortho_fx.hermite.default(hermite_default_1, gelu_expansion_coefficients, 1)  # gelu_expansion: gelu, hermite 2
  add = aten.add.Tensor(hermite_default_2, hermite_default_1)
  sigmoid = aten.sigmoid.default(add)  # sigmoid_expansion: sigmoid, left: it is a gate unless it is named as a target
  return (sigmoid,)

parameters of expansions:
  silu_expansion.coefficients = 0.5, 0.7071, -0.7071
  silu_1_expansion.coefficients = 0.5, 0.7071, -0.7071
  gelu_expansion.coefficients = 0.5, 0.7071, -0.7071
""",  # noqa: E501
    )


def test_the_graph_of_an_exported_program_itself():
    x, model = batch(), network()
    program = torch.export.export(model, (x,))
    record = run(program.graph_module, CLOSE)
    assert len(record.replaced) == 3
    torch.testing.assert_close(program.module()(x), model(x), rtol=0.01, atol=0.01)


def test_the_graph_of_dynamo():
    graph, _ = dynamo_graph(network(), batch())
    run(graph, ExpansionConfig("hermite", 2))
    assert_expected_inline(
        graph_text(graph),
        """\
graph of the model:
  l_x_ = input
  l_self_modules_linear_parameters_weight_ = input
  l_self_modules_linear_parameters_bias_ = input
  silu_expansion_coefficients = self.silu_expansion.coefficients
  hermite_default = ortho_fx.hermite.default(l_x_, silu_expansion_coefficients, 1)  # silu_expansion: silu, hermite 2
  linear = torch._C._nn.linear(hermite_default, l_self_modules_linear_parameters_weight_, l_self_modules_linear_parameters_bias_)
  h_expansion_coefficients = self.h_expansion.coefficients
  hermite_default_1 = ortho_fx.hermite.default(linear, h_expansion_coefficients, 1)  # h_expansion: silu, hermite 2
  gelu_expansion_coefficients = self.gelu_expansion.coefficients
  hermite_default_2 = ortho_fx.hermite.default(hermite_default_1, gelu_expansion_coefficients, 1)  # gelu_expansion: gelu, hermite 2
  add = operator.add(hermite_default_2, hermite_default_1)
  sigmoid = torch.sigmoid(add)  # sigmoid_expansion: sigmoid, left: it is a gate unless it is named as a target
  return (sigmoid,)

parameters of expansions:
  silu_expansion.coefficients = 0.5, 0.7071, -0.7071
  h_expansion.coefficients = 0.5, 0.7071, -0.7071
  gelu_expansion.coefficients = 0.5, 0.7071, -0.7071
""",  # noqa: E501
    )


@pytest.mark.parametrize("kind", ["traced", "exported", "dynamo"])
def test_values_and_gradients_are_those_of_eager(kind):
    model, x = network(), batch()
    graph, inputs = fx.symbolic_trace(model), (x,)
    if kind == "exported":
        graph = torch.export.export(model, (x,)).module()
    elif kind == "dynamo":
        graph, inputs = dynamo_graph(model, x)
    record = run(graph, ExpansionConfig("hermite", 4))
    by_name = {site.name: graph.get_submodule(site.name) for site in record.replaced}
    expansions = list(by_name.values())
    # A graph of operators has a site for each call; a traced graph keeps the module that both calls share.
    first, second, last = expansions if len(expansions) == 3 else (by_name["act"], by_name["act"], expansions[0])

    def eager(x):
        h = second(model.linear(first(x)))
        return torch.sigmoid(last(h) + h)

    parameters = [parameter for expansion in expansions for parameter in expansion.parameters()]
    (output,) = outputs if isinstance(outputs := graph(*inputs), tuple) else (outputs,)
    torch.testing.assert_close(output, eager(x), rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(output.square().sum(), parameters)
    torch.testing.assert_close(got, torch.autograd.grad(eager(x).square().sum(), parameters), rtol=1e-10, atol=1e-10)


def test_graphs_inside_of_graphs():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def checkpointed(x):
        return checkpoint(model, x, use_reentrant=False) * 2

    x = torch.randn(3, 4)
    graph, inputs = dynamo_graph(checkpointed, x)
    record = run(graph, ExpansionConfig("hermite", 2))
    (site,) = record.replaced
    assert site.name.count(".") == 1
    assert record.edits["lower"] == 1
    (output,) = graph(*inputs)
    torch.testing.assert_close(output, graph.get_submodule(site.name)(model[0](x)) * 2)


@pytest.mark.parametrize("kind", ["traced", "exported"])
def test_a_second_run_edits_nothing(kind):
    model = network()
    graph = fx.symbolic_trace(model) if kind == "traced" else torch.export.export(model, (batch(),)).module()
    first = run(graph)
    code = graph.code
    second = run(graph)
    assert min(first.edits.values()) > 0
    assert second.edits == dict.fromkeys(PASSES, 0)
    assert second.earlier == len(first.replaced)
    assert graph.code == code


def test_what_was_lowered_can_be_put_back():
    model, x = network(), batch()
    graph = fx.symbolic_trace(model)
    expected = graph(x)
    names = [site.name for site in run(graph).replaced]
    assert sorted(revert_(graph).names) == sorted(names)
    assert torch.equal(graph(x), expected)
    assert not any("ortho_fx" in node.meta for node in graph.graph.nodes if node.name == "gelu")


def test_an_expansion_with_a_clamp_or_hooks_stays_a_call():
    graph = fx.symbolic_trace(network())
    assert run(graph, ExpansionConfig("hermite", 2, clamp=3.0)).edits["lower"] == 0
    graph = fx.symbolic_trace(network())
    rewrite_(graph)
    graph.act.register_forward_hook(lambda *_: None)
    assert run(graph).edits["lower"] == 1
    assert "self.act(" in graph.code


def test_rewrite_leaves_the_calls_of_modules():
    graph = fx.symbolic_trace(network())
    report = rewrite_(graph, ExpansionConfig("hermite", 2))
    assert [site.name for site in report.sites] == ["gelu_expansion", "sigmoid_expansion", "act"]
    assert [site.name for site in report.sites] == [site.name for site in find_sites(fx.symbolic_trace(network()))]
    assert "self.gelu_expansion(" in graph.code


DISABLED = {"find": 0, "choose": 3, "substitute": 3, "initialise": 1, "lower": 1}


@pytest.mark.parametrize(("name", "left"), DISABLED.items())
@pytest.mark.parametrize("way", ["argument", "rewrite_", "environment"])
def test_a_pass_is_disabled_by_its_name(name, left, way, monkeypatch):
    graph = fx.symbolic_trace(network())
    code, config = graph.code, ExpansionConfig("hermite", 2, "paper")
    if way == "environment":
        monkeypatch.setenv(DISABLE_VARIABLE, f" {name},")
    names = () if way == "environment" else name
    if way == "rewrite_":
        if name == "find":
            assert not rewrite_(graph, config, disable=names).sites
        else:
            assert len(rewrite_(graph, config, disable=names).left) == left
    else:
        record = run(graph, config, disable=names)
        assert name not in record.edits
        assert f"{name:<10}  disabled" in str(record)
        assert len(record.left) == left
    if name in ("find", "choose", "substitute"):
        assert graph.code == code
    elif name == "initialise":
        assert graph.act.config.init == "stable"
        assert torch.equal(graph.act.coefficients, HermiteActivation(2, dtype=torch.float64).coefficients)
    else:
        assert "self.act(" in graph.code


def test_sites_tell_which_pass_was_disabled():
    graph = fx.symbolic_trace(network())
    assert_expected_inline(
        str(run(graph, disable=["substitute"])),
        """\
pass        edits
find        4
choose      4
substitute  disabled
initialise  0
lower       0

name               kind    function  expansion                                          parameters
gelu_expansion     node    gelu      left: the pass substitute is disabled
sigmoid_expansion  node    sigmoid   left: it is a gate unless it is named as a target
act                module  silu      left: the pass substitute is disabled""",
    )


@pytest.mark.parametrize("where", ["disable=", "until=", DISABLE_VARIABLE])
def test_an_unknown_pass_is_named(where, monkeypatch):
    graph = fx.symbolic_trace(network())
    code = graph.code
    if where == DISABLE_VARIABLE:
        monkeypatch.setenv(where, "lower,loer")
    arguments = {"disable=": {"disable": ["loer"]}, "until=": {"until": "loer"}}.get(where, {})
    with pytest.raises(OrthoFxError) as caught:
        run(graph, **arguments)
    assert str(caught.value) == f"unknown pass 'loer' in {where}; passes are {', '.join(PASSES)}"
    if where != "until=":
        with pytest.raises(OrthoFxError, match="unknown pass 'loer'"):
            rewrite_(graph, **arguments)
    assert graph.code == code


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"nothing.*": ExpansionConfig()}, "pattern 'nothing.*' matches no site; sites are gelu_expansion, "),
        ({"act": "hermite"}, "the config of 'act' must be an ExpansionConfig or None; got 'hermite'"),
        ("chebyshev", "config must be an ExpansionConfig or a map of names to them; got str"),
        (ExpansionConfig(init="calibrated"), "init 'calibrated' needs a batch to run"),
    ],
)
def test_a_config_that_cannot_be_met_leaves_the_graph_as_it_was(config, message):
    graph = fx.symbolic_trace(network())
    text = graph_text(graph)
    with pytest.raises(OrthoFxError) as caught:
        run(graph, config)
    assert str(caught.value).startswith(message)
    assert graph_text(graph) == text


def test_an_unknown_basis_is_named_where_the_config_is_made():
    with pytest.raises(OrthoFxError, match=r"^basis must be one of .*; got 'sine'$"):
        run(fx.symbolic_trace(network()), ExpansionConfig("sine"))


def test_a_graph_without_activations_is_named():
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(OrthoFxError, match=r"^Sequential has no activation to replace$"):
        run(graph)


def test_a_failure_after_the_edits_takes_them_back():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.SiLU()

        def forward(self, x):
            return F.gelu(self.act(x))

    graph = fx.symbolic_trace(Two())
    text, code, children = graph_text(graph), graph.code, dict(graph.named_children())
    with pytest.raises(OrthoFxError, match=r"^the inputs of gelu_expansion are constant"):
        run(
            graph,
            {"gelu*": ExpansionConfig(init="calibrated"), "act": ExpansionConfig()},
            example_inputs=torch.ones(8, 4),
        )
    assert (graph_text(graph), graph.code, dict(graph.named_children())) == (text, code, children)
    assert torch.equal(graph(torch.ones(2)), Two()(torch.ones(2)))


def test_the_environment_asks_for_the_graphs(tmp_path, monkeypatch):
    monkeypatch.setenv(GRAPHS_VARIABLE, str(tmp_path))
    run(fx.symbolic_trace(network()))
    rewrite_(fx.symbolic_trace(network()), disable=["initialise"])
    names = [f"{i}_{name}.txt" for i, name in enumerate(["before", *PASSES])]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "run_2"]
    assert sorted(path.name for path in (tmp_path / "run_2").iterdir()) == names
    assert " at 0x" not in "".join(path.read_text() for path in tmp_path.glob("*.txt"))


@pytest.mark.parametrize("way", ["options", "environment"])
def test_the_hook_leaves_out_a_pass(way, monkeypatch, tmp_path):
    if way == "environment":
        monkeypatch.setenv(DISABLE_VARIABLE, "substitute")
    monkeypatch.setenv(GRAPHS_VARIABLE, str(tmp_path))
    options = {"disable": ["substitute"]} if way == "options" else {}
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(model, backend="ortho_fx", options=options)(x), model(x))
    assert isinstance(model[1], nn.ReLU)
    assert "# input_2_expansion: relu, fourier 5" in (tmp_path / "2_choose.txt").read_text()


def test_the_hook_names_an_unknown_pass():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(OrthoFxError) as caught:
        torch.compile(model, backend="ortho_fx", options={"disable": ["loer"]})(torch.randn(2, 4))
    assert str(caught.value) == f"unknown pass 'loer' in disable=; passes are {', '.join(PASSES)}"
    assert isinstance(model[1], nn.ReLU)


def test_no_code_is_traced_twice_without_an_edit():
    graph = fx.symbolic_trace(network())
    forward = type(graph).forward
    run(graph, until="choose")
    assert type(graph).forward is forward
    assert DISABLE_VARIABLE not in os.environ
