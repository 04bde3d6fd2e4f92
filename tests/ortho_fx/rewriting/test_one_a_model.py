"""Granularity "model": one expansion at every place of the same activation."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from ortho_fx import (
    Annealing,
    ExpansionActivation,
    ExpansionConfig,
    OrthoFxError,
    calibrate_,
    expansion_config,
    freeze_,
    param_groups,
    revert_,
    rewrite_,
    rewrite_like_,
)
from ortho_fx.activations.expansion import make_activation
from ortho_fx.models.gpt2 import GPT2, PRESETS
from ortho_fx.models.weights import load_model, save_weights
from ortho_fx.numerics.histogram import Histogram

ONE = ExpansionConfig("fourier", 3, granularity="model")


class Block(nn.Module):
    """An activation as a module, and one as a call."""

    def __init__(self, act):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), act

    def forward(self, x):
        return x + F.relu(self.act(self.linear(x)))


def blocks(*acts):
    torch.manual_seed(0)
    return nn.Sequential(*map(Block, acts))


def expansions(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpansionActivation)}


def test_all_blocks_hold_one_expansion_for_each_activation():
    model = blocks(nn.GELU(), nn.GELU(), nn.GELU())
    report = rewrite_(model, ONE)
    assert [(site.name, site.expansion, site.parameters) for site in report.replaced] == [
        ("0.relu_expansion_0", "fourier 3 a model", 10),
        ("0.act", "fourier 3 a model", 10),
        ("1.relu_expansion_0", "fourier 3 a model, that of 0.relu_expansion_0", 0),
        ("1.act", "fourier 3 a model, that of 0.act", 0),
        ("2.relu_expansion_0", "fourier 3 a model, that of 0.relu_expansion_0", 0),
        ("2.act", "fourier 3 a model, that of 0.act", 0),
    ]
    assert str(report).endswith("6 replaced, 0 left, 20 new parameters")
    assert model[0].act is model[1].act is model[2].act
    assert list(expansions(model)) == ["0.act", "0.relu_expansion_0"]
    (group,) = (g for g in param_groups(model, lr=1e-3) if g["name"] == "expansions")
    assert sum(p.numel() for p in group["params"]) == 20
    x = torch.randn(5, 4)
    assert report.check(x).passed
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert str(rewrite_(model, ONE)).endswith("already held 2 expansions")


@pytest.mark.parametrize(
    ("acts", "count"),
    [
        ((nn.GELU(), nn.GELU("tanh")), 2),
        ((nn.ReLU(), nn.ReLU(inplace=True)), 2),
        ((nn.GELU(), F.gelu), 2),
        ((F.gelu, F.gelu), 1),
        ((functools.partial(F.gelu, approximate="tanh"), functools.partial(F.gelu, approximate="tanh")), 1),
        ((functools.partial(F.gelu, approximate="tanh"), functools.partial(F.gelu)), 2),
    ],
)
def test_only_the_same_activation_is_shared_and_comes_back_at_every_place(acts, count):
    model, x = blocks(*acts), torch.randn(5, 4)
    expected = model(x)
    rewrite_(model, ONE)
    assert len({id(block.act) for block in model}) == count
    revert_(model)
    assert [type(block.act) for block in model] == [type(act) for act in acts]
    assert torch.equal(model(x), expected)
    rewrite_(model, "fourier3")  # as if it had never been rewritten
    assert model[0].act is not model[1].act


def test_every_place_gets_its_own_activation_back():
    """Activations that learn look the same and compute something else."""
    model, x = blocks(nn.PReLU(init=0.1), nn.PReLU(init=0.7), shared := nn.PReLU(init=0.4), shared), torch.randn(9, 4)
    acts, expected = [block.act for block in model], model(x)
    for copied in (lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        one = copied(model)
        rewrite_(one, {"*.act": ONE}, targets=["prelu"])
        assert len({id(block.act) for block in one}) == 1
        two = copied(one)
        revert_(two)
        torch.testing.assert_close(two(x), expected)
        assert two[2].act is two[3].act
        if two is model:
            assert all(block.act is act for block, act in zip(model, acts, strict=True))
        assert not any(name.startswith("_replaced") for block in two for name in vars(block))


def test_a_copy_that_does_not_know_what_stood_there_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(init=0.1), nn.Linear(4, 4), nn.PReLU(init=0.7))
    graph = fx.symbolic_trace(model)
    for one, copy_of in ((graph, copy.deepcopy), (model, lambda model: model[:2])):
        rewrite_(one, ONE, targets=["prelu"])
        other = copy_of(one)
        with pytest.raises(OrthoFxError, match="1: the copy of a graph or of a container does not know which PReLU"):
            revert_(other)
        assert isinstance(other.get_submodule("1"), ExpansionActivation)


def test_configs_of_patterns_share_apart():
    model = blocks(*(nn.GELU() for _ in range(4)))
    rewrite_(model, {"[01].act": ONE, "2.act": {"basis": "hermite", "granularity": "model"}, "3.act": "fourier3"})
    first, second, third, last = (block.act for block in model)
    assert first is second
    assert len({id(first), id(third), id(last)}) == 3
    again = blocks(*(nn.GELU() for _ in range(4)))
    rewrite_like_(again, expansion_config(model))
    assert expansion_config(again) == expansion_config(model)
    assert again[0].act is again[1].act


def test_a_graph_shares_its_nodes():
    traced, x = fx.symbolic_trace(blocks(nn.GELU(), nn.GELU())), torch.randn(5, 4)
    expected = traced(x)
    rewrite_(traced, ONE)
    assert traced.relu_expansion is traced.relu_1_expansion
    traced(x).sum().backward()
    revert_(traced)
    assert torch.equal(traced(x), expected)


def test_it_starts_for_the_inputs_of_all_its_places():
    model = blocks(nn.GELU(), nn.GELU())
    model[1].linear.weight.data *= 9
    x, seen = torch.randn(512, 4), []
    handles = [block.linear.register_forward_hook(lambda *a: seen.append(a[2])) for block in model]
    for init in ("calibrated", "fit"):
        one, seen[:] = copy.deepcopy(model), []
        one(x)
        config = ExpansionConfig("hermite", 3, init, "model")
        rewrite_(one, {"*.act": config}, example_inputs=x)
        inputs = Histogram()
        if init == "fit":  # measured before the rewrite, in the model as it was
            for part in seen[:2]:
                inputs.add(part.detach())
            expected, _ = make_activation(config, reference=F.gelu).initial_values(inputs)
            for name, value in expected.items():
                torch.testing.assert_close(
                    one[0].act.get_parameter(name).detach(), torch.from_numpy(value).float(), atol=2e-3, rtol=2e-3
                )
        else:
            (site,) = calibrate_(one, [x]).sites
            assert site.samples == 2 * x.numel()
    for handle in handles:
        handle.remove()


def test_states_files_and_copies_keep_it_one(tmp_path):
    model, x = blocks(nn.GELU(), nn.GELU()), torch.randn(5, 4)
    rewrite_(model, ONE)
    model[0].act.coefficients.data += 1
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for source in (expansion_config(model), model.state_dict(), tmp_path / "state.pt", model):
        again = blocks(nn.GELU(), nn.GELU())
        rewrite_like_(again, source)
        assert again[0].act is again[1].act
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), model(x))
    plain = blocks(nn.GELU(), nn.GELU())
    report = rewrite_like_(plain, dict(model.state_dict()))  # without what PyTorch keeps beside the tensors
    assert plain[0].act is not plain[1].act
    assert report.notes == (
        "the tensors at 0.act, 1.act, 0.relu_expansion_0, 1.relu_expansion_0 are equal, and do not tell whether the "
        "source has one expansion there: here each has its own. expansion_config(model) tells it",
    )
    twin = copy.deepcopy(model)
    assert twin[0].act is twin[1].act
    freeze_(twin)
    assert twin[0].act is twin[1].act
    torch.testing.assert_close(twin(x), model(x))
    revert_(twin)
    assert [type(block.act) for block in twin] == [nn.GELU, nn.GELU]


def test_a_gpt2_keeps_it_one_in_its_file(tmp_path):
    model, tokens = GPT2(PRESETS["small"]), torch.randint(256, (1, 8))
    rewrite_(model, ONE)
    for case in (model, copy.deepcopy(model)):
        if case is not model:
            freeze_(case)
        save_weights(case, tmp_path / "one.safetensors", {})
        again = load_model(tmp_path / "one.safetensors").eval()
        assert len({id(block.mlp.act) for block in again.blocks}) == 1
        assert torch.equal(again(tokens), case.eval()(tokens))


def test_annealing_ends_with_one_polynomial():
    model, x = blocks(nn.ReLU(), nn.ReLU()), torch.randn(64, 4)
    annealing = Annealing(model, batches=[x], steps=2, granularity="model")
    for _ in range(2):
        annealing.step()
    annealing.finish()
    assert model[0].act is model[1].act
    assert torch.isfinite(model(x)).all()


def test_compiled_it_computes_the_same():
    model, x = blocks(nn.GELU(), nn.GELU()), torch.randn(5, 4)
    rewrite_(model, ONE)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    with_compiler, _ = model[0].act.coefficients.grad.clone(), model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(with_compiler, model[0].act.coefficients.grad)


def test_the_hook_of_the_compiler_refuses_it():
    with pytest.raises(OrthoFxError, match=r"call rewrite_\(model, config\) before torch.compile"):
        torch.compile(blocks(nn.GELU()), backend="ortho_fx", options={"granularity": "model"})(torch.randn(5, 4))


def test_hooks_two_dtypes_and_two_devices_are_refused_and_nothing_changes():
    model = blocks(nn.GELU(), nn.GELU())
    model[1].act.register_forward_hook(lambda *a: None)
    with pytest.raises(OrthoFxError, match=r"^1\.act: one expansion for 2 sites would call the hooks"):
        rewrite_(model, ONE)
    assert not expansions(model)
    model = blocks(nn.GELU(), nn.GELU())
    model[1].bfloat16()
    with pytest.raises(OrthoFxError, match=r"at 0\.\w+, on cpu in float32, and at 1\.\w+, on cpu in bfloat16: choose"):
        rewrite_(model, ONE)
    assert not expansions(model)
    model[1].to("meta", torch.float32)
    with pytest.raises(OrthoFxError, match=r"on cpu in float32, and at .* on meta in float32"):
        rewrite_(model, ONE)


def test_a_source_that_shares_is_refused_where_the_model_has_half_of_it_already():
    model, half = blocks(nn.GELU(), nn.GELU()), blocks(nn.GELU(), nn.GELU())
    rewrite_(model, {"*.act": ONE})
    rewrite_(half, {"0.act": ONE})
    with pytest.raises(OrthoFxError, match=r"two activations at 0\.act and 1\.act, and the source one expansion"):
        rewrite_like_(half, expansion_config(model))
