import copy
import json

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import fx, nn

from ortho_fx import ExpansionConfig, FourierActivation, HermiteActivation, OrthoFxError, find_sites, rewrite_
from ortho_fx.bases import BASES
from ortho_fx.passes.graph import substitute


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(self.linear(x)) + F.silu(x)


class Gate(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x.mean(1, keepdim=True))


def model():
    return nn.Sequential(Block(), nn.ReLU(inplace=True), Gate(), Block())


def test_the_report_is_a_table():
    config = {"0.*": ExpansionConfig("fourier", 4), "1": None, "re:.*act": ExpansionConfig("hermite", 2)}
    assert_expected_inline(
        str(rewrite_(model(), config)),
        """\
name                   kind      function  expansion                                          parameters
1                      module    relu      left: excluded by its name
0.silu_expansion_0     function  silu      fourier 4                                          13
0.act                  module    gelu      fourier 4                                          13
2.sigmoid_expansion_0  function  sigmoid   left: it is a gate unless it is named as a target
3.silu_expansion_0     function  silu      left: excluded by its name
3.act                  module    gelu      hermite 2                                          3
3 replaced, 3 left, 29 new parameters""",
    )


def test_find_sites_changes_nothing_and_names_what_rewrite_replaces():
    network = model()
    before = repr(network)
    names = [site.name for site in find_sites(network)]
    assert repr(network) == before
    assert names == [site.name for site in rewrite_(network).sites]


def test_gates_are_replaced_only_when_named():
    network = model()
    (gate,) = (site for site in find_sites(network) if site.function == "sigmoid")
    assert gate.reason == "it is a gate unless it is named as a target"
    report = rewrite_(network, targets=["sigmoid"])
    assert [site.name for site in report.replaced] == ["2.sigmoid_expansion_0"]


def test_a_second_rewrite_changes_nothing_and_says_so():
    network = model()
    rewrite_(network)
    before = copy.deepcopy(network.state_dict())
    summary = str(rewrite_(network)).splitlines()[-1]
    assert summary == "0 replaced, 1 left, 0 new parameters; the model already held 5 expansions"
    assert before.keys() == network.state_dict().keys()


def test_sites_that_were_left_can_be_replaced_later():
    network = model()
    rewrite_(network, {"*.act": ExpansionConfig("hermite")})
    report = rewrite_(network)
    assert [site.name for site in report.replaced] == ["1", "0.silu_expansion_0", "3.silu_expansion_0"]
    assert isinstance(network[0].act, HermiteActivation)
    assert isinstance(network[0].silu_expansion_0, FourierActivation)
    network(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_shared_activation_stays_shared():
    act = nn.GELU()
    network = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act), "b": act})
    (site,) = rewrite_(network).sites
    assert (site.name, site.aliases) == ("b", ("a.1", "a.3")) or (site.name, site.aliases) == ("a.1", ("a.3", "b"))
    assert network["a"][1] is network["a"][3] is network["b"]
    assert isinstance(network["b"], FourierActivation)


def test_an_instance_outside_of_the_model_is_not_touched():
    process_wide = nn.GELU()
    network = nn.Sequential(nn.Linear(4, 4), process_wide)
    rewrite_(network)
    assert type(process_wide) is nn.GELU


def test_transformer_layers_leave_the_fused_path_that_would_skip_the_expansion():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True).eval()
    assert [site.kind for site in rewrite_(layer).replaced] == ["attribute"]
    with torch.no_grad():
        layer.activation.coefficients.normal_()
        x = torch.randn(2, 3, 8)
        fast = layer(x)
    torch.testing.assert_close(layer(x), fast)


def test_graph_modules_are_rewritten_node_by_node():
    class Network(nn.Module):
        def forward(self, x):
            y = x + 1
            F.relu(y, inplace=True)
            return y + F.gelu(input=x) + x.relu()

    graph = fx.symbolic_trace(Network())
    rewrite_(graph)
    assert_expected_inline(
        graph.code.strip(),
        """\
def forward(self, x):
    add = x + 1
    relu_expansion = self.relu_expansion(add);  add = None
    gelu_expansion = self.gelu_expansion(x)
    add_1 = relu_expansion + gelu_expansion;  relu_expansion = gelu_expansion = None
    relu_1_expansion = self.relu_1_expansion(x);  x = None
    add_2 = add_1 + relu_1_expansion;  add_1 = relu_1_expansion = None
    return add_2""",
    )
    assert str(rewrite_(graph)).startswith("0 replaced")


def test_parameters_are_placed_like_their_neighbours():
    network = model().to(torch.float64)
    network[3].to(torch.bfloat16)
    rewrite_(network)
    assert network[0].act.coefficients.dtype == torch.float64
    assert network[3].act.coefficients.dtype == torch.bfloat16
    with torch.device("meta"):
        on_meta = model()
    rewrite_(on_meta)
    assert on_meta[0].act.coefficients.is_meta
    network.eval()
    rewrite_(evaluated := model().eval())
    assert not evaluated[0].act.training


def test_a_state_dict_loads_into_a_freshly_rewritten_model():
    torch.manual_seed(0)
    source, target = model(), model()
    rewrite_(source)
    rewrite_(target)
    with torch.no_grad():
        source[0].act.coefficients.normal_()
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(2, 2),), "Linear has no activation to replace"),
        (
            (nn.GELU(),),
            "no activation of GELU can be replaced: the model: the model itself is the activation, "
            "and nothing holds it",
        ),
        ((torch.relu,), "the model must be a torch.nn.Module; got builtin_function_or_method"),
        ((Block(), {"mlp*": ExpansionConfig()}), "pattern 'mlp*' matches no site; sites are silu_expansion_0, act"),
        (
            (Block(), {"act": "hermit"}),
            f"the config of 'act': basis must be one of {', '.join(BASES)}; got 'hermit'",
        ),
        (
            (Block(), 3),
            'an expansion is an ExpansionConfig, a name such as "hermite3" or a map of fields; got 3',
        ),
        (
            (Block(), {"basis": "hermite", "degre": 3}),
            "unknown option 'degre'; options are basis, degree, init, granularity, clamp, tied, gated",
        ),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(OrthoFxError) as caught:
        rewrite_(*arguments)
    assert str(caught.value) == message


def test_unknown_targets_and_broken_patterns_are_named():
    with pytest.raises(OrthoFxError, match=r"^unknown target 'swoosh'; targets are relu, relu6, "):
        rewrite_(Block(), targets=["swoosh"])
    with pytest.raises(OrthoFxError, match=r"^pattern 're:\(' is no regular expression: "):
        rewrite_(Block(), {"re:(": ExpansionConfig()})


def test_scripted_models_are_refused_and_scripted_children_reported():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    with pytest.raises(OrthoFxError, match=r"^Sequential is scripted: rewrite the module that it was scripted from$"):
        rewrite_(scripted)
    report = rewrite_(nn.Sequential(scripted, nn.ReLU()))
    assert [(site.function, site.reason) for site in report.left] == [("gelu", "scripted code cannot be rewritten")]
    assert [site.name for site in report.replaced] == ["1"]


def test_a_device_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(substitute, "_nearest", lambda *_: (torch.device("cuda:99"), None))
    network = model()
    with pytest.raises(OrthoFxError, match=r"^1 cannot be placed on cuda:99: "):
        rewrite_(network)
    assert isinstance(network[0].act, nn.GELU)


def test_a_module_in_a_list_is_reported():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.acts, self.act = [nn.GELU()], nn.ReLU()

        def forward(self, x):
            return self.acts[0](self.act(x))

    (site,) = rewrite_(Hidden()).left
    assert site.name == "acts[0]"
    assert site.reason == "PyTorch does not see a module in a list: use nn.ModuleList or nn.ModuleDict"


def test_activations_that_learn_already_are_reported():
    class Snake(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x + torch.sin(F.softplus(self.a) * x) ** 2

    reasons = [site.reason for site in rewrite_(nn.Sequential(Snake(), nn.PReLU(), nn.GELU())).left]
    gate = "it is a gate unless it is named as a target"
    prelu = "it learns parameters of its own, and stays unless it is named as a target"
    assert reasons == ["its function learns parameters of its own", prelu, gate]


def test_what_is_kept_as_a_function_or_an_object_is_replaced_or_reported():
    class Callable:
        def __call__(self, x):
            return F.relu(x)

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.other, self.double = lambda x: F.relu(x), Callable(), lambda x: 2 * x
            self.drop = lambda x: F.dropout(F.gelu(x), 0.1)

        def forward(self, x):
            return self.other(self.drop(self.act(x)))

    report = rewrite_(Keeping())
    assert [site.name for site in report.replaced] == ["act"]
    assert [site.name for site in report.left] == ["other", "drop"]
    assert "more than an activation, or no module" in report.left[0].reason


def test_a_scaled_activation_is_listed_once_and_replaced_where_it_is_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.gain = F.gelu, 1.7

        def forward(self, x):
            return self.act(x) * self.gain

    (site,) = find_sites(nn.Sequential(Scaled()))
    assert site.name == "0.act"
    assert site.reason == "its result is rescaled by a constant, and it stays unless it is named as a target"
    report = rewrite_(nn.Sequential(Scaled()), targets=["gelu"])
    assert [(site.name, site.reason) for site in report.sites] == [("0.act", "")]


def test_the_report_reads_as_json():
    report = rewrite_(model())
    assert [site["name"] for site in json.loads(report.to_json())] == [site.name for site in report.sites]


def test_sites_that_inputs_do_not_reach_are_listed():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.GELU(), nn.ReLU()

        def forward(self, x):
            return self.used(x)

    reasons = {site.name: site.reason for site in find_sites(Partly(), torch.randn(2, 3))}
    assert reasons == {"used": "", "unused": "example_inputs do not reach it"}
