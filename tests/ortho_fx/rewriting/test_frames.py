"""The hook in frames other than the call of one model: steps over several networks, and frames after a graph break."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, rewrite_
from ortho_fx.rewriting import frames

pytestmark = pytest.mark.slow

compile_step = functools.partial(torch.compile, backend="ortho_fx", options={"basis": "hermite", "degree": 4})


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


class Owner:
    """Holds networks but is no module itself."""

    def __init__(self, nets):
        self.nets, self.by_name = nets, {"first": [nets[0]], "second": nets[1]}

    def step(self, x):
        return self.nets[1](self.nets[0](x))

    def named(self, x):
        return self.by_name["second"](self.by_name["first"][0](x))


NETS: list[nn.Module] = []


def over_globals(x):
    for net in NETS:
        x = net(x)
    return x


def of_globals(nets):
    NETS[:] = nets
    return over_globals


def closure(nets):
    kept = {"nets": nets}
    return lambda x: kept["nets"][1](nets[0](x))


def a_loss(nets):
    return lambda x: F.mse_loss(nets[1](nets[0](x)), x)


def arguments(nets):
    step = compile_step(lambda d, g, x: d(g(x)))
    return lambda x: step(nets[1], nets[0], x)


def a_dict(nets):
    step = compile_step(lambda nets, x: nets["d"](nets["g"](x)))
    return lambda x: step({"d": nets[1], "g": nets[0]}, x)


@pytest.mark.parametrize(
    "make",
    [
        arguments,
        a_dict,
        lambda nets: compile_step(closure(nets)),
        lambda nets: compile_step(of_globals(nets)),
        lambda nets: compile_step(Owner(nets).step),
        lambda nets: compile_step(Owner(nets).named),
        lambda nets: compile_step(a_loss(nets)),
    ],
    ids=["arguments", "a dict", "a closure", "globals", "an object", "a list in a dict", "a loss"],
)
def test_every_network_of_a_step_is_rewritten(make):
    torch.compiler.reset()
    torch.manual_seed(0)
    nets = [network().double(), network().double()]
    references = copy.deepcopy(nets)
    for reference in references:
        rewrite_(reference, ExpansionConfig("hermite", 4))
    x = torch.randn(3, 4, dtype=torch.float64)
    step = make(nets)
    for _ in range(2):
        output = references[1](references[0](x))
        y = step(x)
        torch.testing.assert_close(y, output if y.shape else F.mse_loss(output, x))
    for net, reference in zip(nets, references, strict=True):
        assert isinstance(net[1], HermiteActivation)
        assert list(net.state_dict()) == list(reference.state_dict())


class BreaksFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        print(end="")
        return F.gelu(self.fc(x))


class BreaksBetween(nn.Module):
    """After the graph break come half of its own activations, and layers without activations."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = network(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = F.silu(self.a(x))
        if x.sum().item() > 1e9:
            x = x + 1
        return self.c(F.gelu(self.b(x)))


class BreaksTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.fc = BreaksBetween(), nn.Linear(4, 4)

    def forward(self, x):
        print(end="")
        x = self.inner(x).relu()
        print(end="")
        return F.gelu(self.fc(x))


@pytest.mark.parametrize("cls", [BreaksFirst, BreaksBetween, BreaksTwice])
def test_what_comes_after_a_graph_break_is_rewritten_too(cls, recwarn):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = cls().double()
    reference = copy.deepcopy(model)
    rewrite_(reference, ExpansionConfig("hermite", 4))
    x = torch.randn(3, 4, dtype=torch.float64)
    compiled = compile_step(model)
    for _ in range(3):
        expected = reference(x)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert not [w for w in recwarn if str(w.message).startswith("ortho_fx")]


class TwoOnALine(nn.Module):
    def forward(self, x):
        return F.gelu(x) + F.gelu(x.sum() if x.sum().item() > 1e9 else -x)


def test_calls_of_which_nobody_knows_are_left_for_one_call_and_named():
    torch.compiler.reset()
    model = TwoOnALine()
    compiled, x = compile_step(model), torch.randn(2, 4)
    with pytest.warns(UserWarning, match=r"ortho_fx left gelu at .*test_frames\.py:\d+: no module's own code calls it"):
        compiled(x)
    torch.testing.assert_close(compiled(x), model(x))
    assert len(list(model.parameters())) == 2


@pytest.mark.smoke
def test_several_activations_that_are_left_are_one_warning():
    torch.compiler.reset()
    net = network()
    with pytest.warns(UserWarning, match="ortho_fx left") as caught:
        compile_step(lambda x: F.gelu(net(x)) + F.silu(x))(torch.randn(2, 4))
    (text,) = (str(w.message) for w in caught if str(w.message).startswith("ortho_fx"))
    assert text.startswith("ortho_fx left gelu at ")
    assert ", silu at " in text


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model)


class ModelEmaV3(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)


class EMAModel:
    def __init__(self, model):
        self.shadow_params = [parameter.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("average", [averaged, ModelEmaV3, EMAModel])
def test_an_average_that_was_made_before_is_refused(average):
    torch.compiler.reset()
    model = network()
    kept = average(model)
    with pytest.raises(OrthoFxError, match=f"the average {type(kept).__name__} would miss the new parameters: call"):
        compile_step(model)(torch.randn(2, 4))
    assert isinstance(model[1], nn.ReLU)
    other = nn.Sequential(nn.Linear(4, 9), nn.ReLU())
    compile_step(other)(torch.randn(2, 4))
    assert isinstance(other[1], HermiteActivation)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("L['nets']['d'].0", True),
        ("L['nets'][\"d\"]", False),
        ("L['nets']['missing']", False),
        ("L['nets'].d", False),
        ("G['nets']", False),
        ("L['model']._modules['0']", True),
        ("L['many'][-1].2", True),
        ("L['nets']['d'].__closure__()", False),
        ("torch.nn", False),
    ],
)
def test_paths_of_dynamo(path, found):
    net = network()
    frame = type("Frame", (), {"f_locals": {"nets": {"d": net}, "model": net, "many": [net]}, "f_globals": {}})()
    assert isinstance(frames._resolve(path, frame), nn.Module) == found
