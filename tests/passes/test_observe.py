import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx.passes.observe import observe
from ortho_fx.passes.vocabulary.targets import choose_targets


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.linear, self.leaky = nn.Linear(6, 4), nn.LeakyReLU(0.2)
        self.unused = nn.GELU()

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = F.gelu(self.linear(x.permute(0, 2, 3, 1)), approximate="tanh")
        return self.leaky(x.mean((1, 2)))


def test_probes_see_what_the_model_computes_and_leave_it_alone():
    model, x = Mixed(), torch.randn(5, 3, 6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    observations = observe(model, choose_targets(None), x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = {}
    for name, module in (("act", model.act), ("leaky", model.leaky)):
        module.register_forward_pre_hook(lambda _, args, name=name: expected.update({name: args[0].clone()}))
    model(x)
    gelu, relu, leaky, unused = observations
    for observation, name, channels, dim in ((relu, "act", 6, 1), (leaky, "leaky", 4, -1)):
        assert observation.inputs.samples == expected[name].numel()
        assert abs(observation.inputs.mean - expected[name].double().mean().item()) < 1e-6
        assert abs(observation.inputs.std - expected[name].double().std(correction=0).item()) < 1e-6
        assert (observation.channels, observation.channel_dim, observation.problem) == (channels, dim, "")
    assert (gelu.channels, gelu.channel_dim) == (4, -1)
    assert unused.problem == "example_inputs do not reach it"


def test_different_channels_at_one_site_are_a_problem():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.act = nn.Linear(4, 8), nn.Linear(8, 2), nn.GELU()

        def forward(self, x):
            return self.act(self.second(self.act(self.first(x))))

    (seen,) = observe(Twice(), choose_targets(None), torch.randn(3, 4))
    assert seen.problem == "it is called with 8 channels and with 2"
