import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import HermiteActivation, OrthoFxError, freeze_, param_groups, revert_
from ortho_fx.polynomial.conversion import to_polynomial
from ortho_fx.polynomial.costs import polynomial_report
from ortho_fx.rewriting.anneal import AnnealedActivation, Annealing

pytestmark = pytest.mark.slow


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))


def data(seed=0, size=512):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def sites(model):
    return [module for module in model if isinstance(module, HermiteActivation)]


def trained(model, annealing, optimizer, start, end):
    """Trains from step `start` to before `end`; returns the losses."""
    losses = []
    for step in range(start, end):
        x = data(100 + step, 64)
        loss = F.mse_loss(model(x), torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3]], 1))
        losses.append(loss.item())
        loss = loss + 0.1 * annealing.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        annealing.step()
    return losses


def test_the_model_starts_as_it_was_and_goes_over_in_equal_steps():
    model, x = network(), data()
    before = model(x)
    annealing = Annealing(model, degree=2, batches=[x, data(1)], steps=4)
    assert [site.function for site in annealing.report.replaced] == ["relu", "gelu"]
    torch.testing.assert_close(model(x), before, atol=0, rtol=0)
    z, site = torch.linspace(-3, 3, 31), model[1]
    polynomial = HermiteActivation(2)
    polynomial.load_state_dict(site.state_dict())
    for taken in (1, 2, 3, 4, 4):
        annealing.step()
        share = taken / 4
        assert annealing.share == share
        torch.testing.assert_close(site(z), (1 - share) * z.relu() + share * polynomial(z))
    assert annealing.done


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_polynomials_are_the_closest_ones_under_all_batches(degree):
    model = network().double()
    batches = [data(seed).double() for seed in range(4)]
    inputs = model[:1](torch.cat(batches)).detach()
    Annealing(model, degree=degree, batches=batches, steps=1).step()
    # The remainder of ReLU is orthogonal to all polynomials of the degree, up to the histogram's error.
    remainder = (inputs.relu() - model[1](inputs)).detach()
    for k in range(degree + 1):
        assert abs((remainder * inputs**k).mean()) < 2e-3 * inputs.pow(2 * k).mean().sqrt()
    assert remainder.square().mean() < ((0.32, 0.2, 0.2)[degree - 1] * inputs.std()) ** 2


def test_it_ends_with_plain_expansions_whose_parameters_the_optimizer_has():
    model = network()
    annealing = Annealing(model, degree=3, batches=[data()], steps=20)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-2))
    losses = trained(model, annealing, optimizer, 0, 30)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    last, keys = model(data()), list(model.state_dict())
    annealing.finish()
    annealing.finish()
    assert [type(site) for site in sites(model)] == [HermiteActivation] * 2
    assert all(site.config.degree == 3 and site.bounds is None and not list(site.buffers()) for site in sites(model))
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(data()), last)
    assert to_polynomial(model).degree == 9
    revert_(model)
    assert isinstance(model[1], nn.ReLU)


def test_the_penalty_is_on_what_lies_beyond_the_reach():
    model = nn.Sequential(nn.ReLU())
    annealing = Annealing(model, batches=[torch.tensor([-1.0, 1.0]).repeat(50) * 2 + 1], steps=1, reach=2.0)
    inside = torch.tensor([-2.9, 4.9], requires_grad=True)
    model(inside)
    assert annealing.penalty().item() == 0
    x = torch.tensor([1.0, 7.0, -5.0, 3.0], requires_grad=True)
    model(x)
    model(x)
    value = annealing.penalty()  # two inputs are 3 deviations away, in each of two calls
    assert value.item() == pytest.approx(2 * (1 + 1) / 4)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.tolist() == pytest.approx([0, 0.5, -0.5, 0])
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    with pytest.raises(OrthoFxError, match="no activation was called in train mode since the last penalty"):
        annealing.penalty()


def test_a_run_that_is_resumed_goes_on_as_it_would_have():
    model = network()
    annealing = Annealing(model, degree=2, batches=[data()], steps=12)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    trained(model, annealing, optimizer, 0, 7)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), annealing.state_dict()))
    expected = trained(model, annealing, optimizer, 7, 16)

    resumed = network(seed=3)
    again = Annealing(resumed, degree=2, batches=[data(5)], steps=12)
    optimizer = torch.optim.Adam(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert trained(resumed, again, optimizer, 7, 16) == expected
    again.finish()


def test_copies_between_forward_and_backward_are_as_the_model_is():
    model = network()
    annealing = Annealing(model, batches=[data()], steps=2)
    annealing.step()
    y = model(data())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(data()), y)
    assert annealing.penalty().requires_grad


def test_compiled_models_do_not_compile_again_for_each_step():
    model = network()
    annealing = Annealing(model, batches=[data()], steps=3)
    torch.compiler.reset()
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(model, backend=backend)
    for _ in range(4):
        y = compiled(data())
        assert annealing.penalty().requires_grad
        torch.testing.assert_close(y, model(data()))
        annealing.step()
    assert len(graphs) == 1


def test_what_is_not_finished_is_not_taken_for_its_polynomial():
    model = network()
    annealing = Annealing(model, batches=[data()], steps=2)
    with pytest.raises(OrthoFxError, match=r"1 \(AnnealedActivation\): its forward is not that of its expansion"):
        to_polynomial(model)
    assert [name for name, _ in polynomial_report(model, [data()]).left] == ["1", "3"]
    annealing.step()
    with pytest.raises(OrthoFxError, match="1 of 2 steps are taken: call finish after the last"):
        annealing.finish()


def test_expansions_from_before_are_left_alone():
    model = network()
    model[1] = HermiteActivation(5)
    annealing = Annealing(model, batches=[data()], steps=1)
    assert type(model[1]) is HermiteActivation
    assert type(model[3]) is AnnealedActivation
    annealing.step()
    annealing.finish()
    with pytest.raises(OrthoFxError, match="Sequential has no activation to replace, only expansions from before"):
        Annealing(model, batches=[data()], steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be an integer above zero; got 0"),
        ({"reach": 0.0}, "reach must be a number above zero; got 0.0"),
        ({"batches": []}, "the fits need inputs, and batches is empty"),
        ({"degree": 33}, "degree of hermite must be an integer from 1 to 32; got 33"),
        ({"batches": [data(), torch.full((4, 4), torch.nan)]}, "the inputs of 1 are not finite"),
        ({"targets": ["silu"]}, "no activation of Sequential can be replaced: 1: it is not among the targets"),
    ],
)
def test_mistakes_are_named_and_leave_the_model_as_it_was(settings, message):
    model = network()
    kinds = [type(module) for module in model]
    with pytest.raises(OrthoFxError, match=message):
        Annealing(model, **{"batches": [data()], "steps": 3, **settings})
    assert [type(module) for module in model] == kinds


def test_states_of_something_else_are_refused():
    annealing = Annealing(network(), batches=[data()], steps=3)
    state = annealing.state_dict()
    with pytest.raises(OrthoFxError, match="the state must have steps, steps_taken and inputs; got step"):
        annealing.load_state_dict({"step": 1})
    with pytest.raises(OrthoFxError, match="the state is of 4 steps; this annealing takes 3"):
        annealing.load_state_dict({**state, "steps": 4})
    with pytest.raises(OrthoFxError, match="the state is of 1; the sites are 1, 3"):
        annealing.load_state_dict({**state, "inputs": {"1": [0.0, 1.0]}})


def test_an_unfinished_annealing_is_not_frozen():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    annealing = Annealing(model, degree=2, batches=[torch.randn(64, 4)], steps=4)
    with pytest.raises(OrthoFxError, match=r"still annealed: call finish\(\) of its Annealing before freeze_"):
        freeze_(model)
    for _ in range(4):
        annealing.step()
    annealing.finish()
    freeze_(model)
