"""Accelerate needs no code of ours: what it saves, loads and offloads is right, and what is made too early is told."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ortho_fx
from ortho_fx import OrthoFxError, param_groups, rewrite_, rewrite_like_

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow


class Net(nn.Module):
    """One activation is a module, and one is called in source."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.c(F.gelu(self.b(self.act(self.a(x)))))


X = torch.linspace(-2, 2, 32).reshape(8, 4)


def made(is_rewritten=True):
    torch.manual_seed(0)
    model = Net()
    if is_rewritten:
        rewrite_(model, "fourier3")
    return model


def prepared(accelerator, model):
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1))
    return accelerator.prepare(model, optimizer)


def train(accelerator, model, optimizer, steps):
    losses = []
    for shift in range(steps):
        loss = model(X + shift).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def accelerator():
    accelerator = accelerate.Accelerator(cpu=True)
    yield accelerator
    accelerator.free_memory()


@pytest.fixture
def saved(accelerator, tmp_path):
    """A trained model, and the folder of its weights."""
    model, optimizer = prepared(accelerator, made())
    train(accelerator, model, optimizer, 2)
    accelerator.save_model(model, tmp_path / "model")
    return accelerator.unwrap_model(model), tmp_path / "model"


def test_a_state_goes_on_as_if_never_stopped(accelerator, tmp_path):
    model, optimizer = prepared(accelerator, made())
    train(accelerator, model, optimizer, 3)
    accelerator.save_state(tmp_path)
    expected = train(accelerator, model, optimizer, 3)
    accelerator.free_memory()
    model, optimizer = prepared(accelerator, made())
    accelerator.load_state(tmp_path)
    assert train(accelerator, model, optimizer, 3) == expected
    accelerator.free_memory()
    prepared(accelerator, made(False))
    with (
        pytest.raises(RuntimeError, match=r"act\.coefficients"),
        pytest.warns(UserWarning, match=r"call ortho_fx.rewrite_like_\(model, state_dict\)"),
    ):
        accelerator.load_state(tmp_path)


def test_saved_weights_are_loaded(saved):
    model, folder = saved
    again = made(False)
    with pytest.warns(UserWarning, match="its own activations: call ortho_fx.rewrite_like_"):
        accelerate.load_checkpoint_in_model(again, folder)
    rewrite_like_(again, folder)
    accelerate.load_checkpoint_in_model(again, folder)
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("is_rewritten", [True, False])
def test_an_empty_model_is_filled(saved, is_rewritten):
    model, folder = saved
    with accelerate.init_empty_weights():
        again = made(is_rewritten)
    if not is_rewritten:
        rewrite_like_(again, folder)
    again = accelerate.load_checkpoint_and_dispatch(again, folder, device_map={"": "cpu"})
    assert torch.equal(again(X), model(X))


def test_offloaded_models_compute_the_same(saved, tmp_path):
    model, folder = saved
    expected, cpu = model(X), torch.device("cpu")
    assert torch.equal(accelerate.cpu_offload(rewrite_again(model), execution_device=cpu)(X), expected)
    assert torch.equal(accelerate.disk_offload(rewrite_again(model), tmp_path / "a", execution_device=cpu)(X), expected)
    parts = {"a": "cpu", "act": "disk", "b": "disk", "c": "cpu", "gelu_expansion_0": "cpu"}
    dispatched = accelerate.load_checkpoint_and_dispatch(
        made(), folder, device_map=parts, offload_folder=tmp_path / "b"
    )
    assert torch.equal(dispatched(X), expected)


def rewrite_again(model):
    again = made()
    again.load_state_dict(model.state_dict())
    return again


def test_after_offloading_a_call_in_source_is_left_with_the_reason():
    model = accelerate.cpu_offload(made(False), execution_device=torch.device("cpu"))
    report = rewrite_(model, "fourier3")
    assert [site.name for site in report.replaced] == ["act"]
    assert "forward of its own" in report.left[0].reason
    assert model(X).isfinite().all()
    with pytest.raises(OrthoFxError, match="meta device"):
        ortho_fx.save_expansions(accelerate.cpu_offload(made(), execution_device=torch.device("cpu")), "a.safetensors")


def test_a_rewrite_after_prepare_is_told_at_the_first_step(accelerator):
    plain = made(False)
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters()))
    rewrite_(model, "fourier3")
    with pytest.warns(UserWarning, match="AdamW trains the Net but not its expansions"):
        train(accelerator, model, optimizer, 1)
