"""Calls of which one run makes one at most share an expansion, if they are one computation."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, find_sites, revert_, rewrite_, rewrite_like_

HERMITE = ExpansionConfig("hermite", 4)
FALCON = {
    **dict.fromkeys(("intermediate_size", "mamba_d_ssm"), 64),
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16},
    **{"mamba_d_state": 8, "mamba_chunk_size": 8},
}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.exact, self.drop = True, nn.Dropout(0.0)


class Arms(Base):
    def forward(self, x, step=False):
        if step:
            x = F.silu(self.a(x))
        else:
            x = F.silu(F.linear(x, self.a.weight, self.a.bias))
        return F.silu(self.b(x))


class Chain(Base):
    def forward(self, x, step=0):
        if step == 1:
            x = F.silu(self.a(x))
        elif step == 2:
            x = F.silu(self.a(x) + 0)
        elif step == 3:
            x = self.a(x)
        else:
            x = F.silu(0 + self.a(x))
        return F.silu(x)


class Expression(Base):
    def forward(self, x, step=False):
        return F.silu(self.a(x)) if step else torch.nn.functional.silu(self.a(x) + 0)


class Match(Base):
    def forward(self, x, step=False):
        match step:
            case True:
                return F.silu(self.a(x))
            case _:
                return F.silu(self.a(x) + 0)


class EarlyReturn(Base):
    def forward(self, x, step=False):
        if step:
            return self.b(F.silu(self.a(x)))
        x = self.a(x)
        return self.b(F.silu(x))


class NestedReturn(Base):
    def forward(self, x, step=False):
        if step is not None:
            x = x + 0
            if step:
                return F.silu(self.a(x))
        return F.silu(self.a(x))


class Methods(Base):
    def step(self, x):
        x = F.silu(self.a(x))
        return F.silu(self.b(x))

    def sequence(self, x):
        x = F.silu(self.a(x) + 0)
        return F.silu(self.b(x))

    def forward(self, x, step=False):
        if step:
            return self.step(x)
        return self.sequence(x)


class ChosenMethod(Methods):
    def forward(self, x, step=False):
        run = self.step if step else self.sequence
        return run(x)


class InTheParent(Methods):
    def forward(self, x, step=False):
        return super().forward(x, step)


def update(x, weight, activation=None):
    x = F.linear(x, weight)
    return F.silu(x) if activation else x


def whole(x, weight, activation=None):
    x = F.linear(x, weight)
    if activation is not None:
        x = F.silu(x)
    return x


class Functions(Base):
    def forward(self, x, step=False):
        if step:
            x = update(x, self.a.weight, "silu")
        else:
            x = whole(x, self.a.weight, activation="silu")
        return self.b(x)


class HalfFunction(Base):
    """The order of calls is that in which Python comes to them, in helpers and in arguments."""

    def forward(self, x, step=0):
        if step == 0:
            x = update(F.silu(x), self.a.weight, "silu")
        elif step == 1:
            x = F.silu(F.linear(F.silu(x), self.a.weight))
        else:
            x = F.silu(x)
            x = F.silu(self.a(x) - self.a.bias)
        return x


class EveryTurn(Base):
    def forward(self, x, step=False):
        for layer in self.layers:
            if step:
                x = F.silu(layer(x))
            else:
                x = F.silu(layer(x) + 0)
        return x


class AskedAgain(Base):
    def forward(self, x, step=False):
        if step:
            x = F.silu(self.a(x))
        if not step:
            x = F.silu(self.a(x) + 0)
        return F.silu(self.b(x))


class Spelled(Base):
    def forward(self, x, step=False):
        x = self.a(x)
        if step:
            x *= torch.sigmoid(x)
            return x
        return F.silu(x)


class FormOfItsOwn(Base):
    def forward(self, x, step=False):
        first, second = self.layers[0], self.layers[1]
        if step:
            return F.silu(first(x))
        return F.silu(self.layers[0](x) + 0 * second.bias.sum().detach())


SHARED = {
    Arms: [2, 1],
    Chain: [3, 1],
    Expression: [2],
    Match: [2],
    EarlyReturn: [2],
    NestedReturn: [2],
    Methods: [2, 2],
    ChosenMethod: [2, 2],
    InTheParent: [2, 2],
    Functions: [2],
    HalfFunction: [3, 3],
    EveryTurn: [2],
    AskedAgain: [2, 1],
    Spelled: [2],
    FormOfItsOwn: [2],
}


def calls(report):
    return [len(site.lines) for site in report.sites if site.kind != "module"]


def perturbed(model, config=HERMITE, **arguments):
    torch.manual_seed(0)
    report = rewrite_(model, config, **arguments)
    with torch.no_grad():
        for site in report.replaced:
            for parameter in model.get_submodule(site.name).parameters():
                parameter.add_(torch.randn_like(parameter))
    return report


@pytest.mark.parametrize("cls", SHARED)
def test_alternatives_share_an_expansion(cls):
    model, x = cls(), torch.randn(3, 4)
    report = perturbed(model)
    assert calls(report) == SHARED[cls]
    assert report.notes == ()
    for step in (1, 2):
        torch.testing.assert_close(model(x, step), model(x, 0))
    if SHARED[cls] == [2]:
        assert report.check(x).passed
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x, True), model(x, True))
    assert not rewrite_(model, HERMITE).replaced
    revert_(model)
    assert type(model) is cls
    torch.testing.assert_close(model(x, True), model(x, False))


class OtherLayers(Base):
    def forward(self, x, step=False):
        if step:
            return F.silu(self.drop(self.a(x)))
        return F.silu(self.drop(self.b(x)))


class OtherItems(Base):
    def forward(self, x, step=False):
        return F.silu(self.layers[0](x)) if step else F.silu(self.layers[1](x))


class OtherTurns(Base):
    def forward(self, x, step=False):
        for number, layer in enumerate(self.layers):
            if number:
                x = F.silu(layer(x))
            else:
                x = F.silu(layer(x) + x)
        return x


class ByASetting(Base):
    def forward(self, x, step=False):
        return F.gelu(self.a(x)) if self.exact else F.gelu(self.a(x), approximate="tanh")


class OtherFunctions(Base):
    def forward(self, x, step=False):
        return F.silu(self.a(x)) if step else F.gelu(self.a(x))


class OneAfterTheOther(Base):
    def forward(self, x, step=False):
        if step:
            x = F.silu(self.a(x))
        return F.silu(self.a(x))


class LaterTurn(Base):
    def forward(self, x, step=False):
        for number in range(2):
            if number:
                return F.silu(self.a(x))
            x = F.silu(self.a(x))
        return x


class AnsweredAnew(Base):
    def forward(self, x, step=False):
        if not step:
            x, step = F.silu(self.a(x)), True
        if step:
            x = F.silu(self.a(x))
        return x


class BothInOneTest(Base):
    def forward(self, x, step=False):
        if F.silu(self.a(x)).sum() > 0:
            return F.silu(self.a(x))
        return x


APART = [
    OtherLayers,
    OtherItems,
    OtherTurns,
    ByASetting,
    OtherFunctions,
    OneAfterTheOther,
    LaterTurn,
    AnsweredAnew,
    BothInOneTest,
]


@pytest.mark.parametrize("cls", APART)
def test_calls_of_two_computations_have_an_expansion_each(cls):
    report = perturbed(cls())
    assert calls(report) == [1, 1]
    assert report.notes == ()


class OtherSettings(Base):
    def forward(self, x, step=False):
        return F.gelu(self.a(x)) if step else F.gelu(self.a(x), approximate="tanh")


class OtherNumbers(Base):
    def forward(self, x, step=False):
        if self.training:
            return F.gelu(self.a(x))
        return F.gelu(F.gelu(self.a(x)))


class OneOfThree(Base):
    """The branch without layers may be that of either layer."""

    def forward(self, x, step=0):
        if step == 0:
            return F.gelu(self.a(x))
        if step == 1:
            return F.gelu(self.b(x))
        return F.gelu(x)


@pytest.mark.parametrize("cls", [OtherSettings, OtherNumbers, OneOfThree])
def test_where_it_cannot_be_told_the_report_says_so(cls):
    model = cls()
    with pytest.warns(UserWarning, match="in branches that exclude each other"):
        report = rewrite_(model, HERMITE)
    assert set(calls(report)) == {1}
    (note,) = report.notes
    assert all(site.name in note for site in report.replaced)
    assert note in str(report)


class Child(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x, step=False):
        if step:
            return self.act(self.a(x))
        return self.act(self.a(x) + 0)


class ChildAndCall(Child):
    def forward(self, x, step=False):
        if step:
            return F.silu(self.a(x))
        return self.act(self.a(x))


class ChildAndCallInBoth(Child):
    def forward(self, x, step=False):
        if step:
            return self.act(self.b(F.silu(self.a(x))))
        return self.act(self.b(F.silu(self.a(x) + 0)))


def test_a_child_in_one_branch_and_a_call_in_the_other_are_noted():
    with pytest.warns(UserWarning, match="^ortho_fx: ChildAndCall calls act and silu_expansion_0 in branches that"):
        report = rewrite_(ChildAndCall(), HERMITE)
    assert len(report.notes) == 1
    assert rewrite_(ChildAndCallInBoth(), HERMITE).notes == ()


@pytest.mark.parametrize(("cls", "sharing"), [(Arms, "call"), (Arms, "site"), (Child, "site")])
def test_calls_that_were_asked_to_stand_apart_are_noted(cls, sharing):
    model, x = cls(), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="_expansion_0 and (silu|act)_expansion_1 in branches that exclude each other"):
        report = perturbed(model, sharing=sharing)
    assert {len(site.lines) for site in report.replaced} == {1}
    assert not torch.allclose(model(x, True), model(x, False))
    assert len(report.notes) == 1


def test_a_child_called_twice_is_one_expansion_where_calls_stand_apart():
    model, x = Child(), torch.randn(3, 4)
    assert [site.name for site in perturbed(model, sharing="call").replaced] == ["act"]
    torch.testing.assert_close(model(x, True), model(x, False))


def test_names_do_not_depend_on_what_is_shared():
    names = {sharing: [site.name for site in find_sites(Arms(), sharing=sharing)] for sharing in ("instance", "call")}
    assert names == {
        "instance": ["silu_expansion_0", "silu_expansion_2"],
        "call": ["silu_expansion_0", "silu_expansion_1", "silu_expansion_2"],
    }


@pytest.mark.filterwarnings("ignore:ortho_fx")
def test_weights_from_before_calls_shared_an_expansion_compute_what_they_did():
    old, x = Methods(), torch.randn(3, 4)
    perturbed(old, sharing="call")
    model = Methods()
    report = rewrite_like_(model, old.state_dict())
    assert len(report.replaced) == 4
    model.load_state_dict(old.state_dict())
    for step in (True, False):
        assert torch.equal(model(x, step), old(x, step))
    rewritten = Methods()
    rewrite_(rewritten, HERMITE)
    with pytest.raises(RuntimeError, match="silu_expansion_2"):
        rewritten.load_state_dict(old.state_dict())


def test_weights_of_a_shared_expansion_load_into_a_fresh_model():
    old, x, model = Methods(), torch.randn(3, 4), Methods()
    perturbed(old)
    assert calls(rewrite_like_(model, old.state_dict())) == [2, 2]
    model.load_state_dict(old.state_dict())
    assert torch.equal(model(x, True), old(x, True))


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Arms, Methods, Functions])
def test_dynamo_takes_shared_expansions(cls):
    model, x = cls(), torch.randn(3, 4)
    perturbed(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in (True, False):
        torch.testing.assert_close(compiled(x, step), model(x, step))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings"), [("Mamba", {"state_size": 4, "time_step_rank": 4}), ("FalconH1", FALCON)]
)
def test_a_sequence_and_steps_with_a_cache_compute_the_same(kind, settings):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, hidden_size=32, num_hidden_layers=2, **settings)
    model, tokens = getattr(transformers, f"{kind}ForCausalLM")(config).eval(), torch.randint(50, (2, 12))
    rewrite_(model, ExpansionConfig("hermite", 8, init="fit"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "expansion" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        sequence = model(tokens).logits
        output = model(tokens[:, :4], use_cache=True)
        logits = [output.logits]
        (cache,) = {"past_key_values", "cache", "cache_params"} & output.keys()
        for step in range(4, tokens.shape[1]):
            output = model(tokens[:, step : step + 1], use_cache=True, **{cache: output[cache]})
            logits.append(output.logits)
    assert sequence.std() > 1e-3
    torch.testing.assert_close(torch.cat(logits, 1), sequence, rtol=0, atol=1e-4)


def test_check_names_the_branch_that_was_not_reached():
    model = Match()
    report = rewrite_(model, "hermite")
    (site,) = report.sites
    assert len(report.replaced) == 2
    assert sum(call.parameters for call in report.replaced) == site.parameters
    check = report.check(torch.randn(3, 4))
    (uncalled,) = check.uncalled
    (reached,) = {call.location for call in report.replaced} - {uncalled.rpartition(" at ")[2]}
    assert uncalled.startswith("silu_expansion_0 at test_alternatives.py:")
    assert reached.startswith("test_alternatives.py:")
    assert str(check).endswith("1 of 1 expansions called")
    assert check.passed
