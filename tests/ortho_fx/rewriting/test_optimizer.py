import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ortho_fx import ExpansionConfig, OrthoFxError, param_groups, rewrite_


def test_weights_decay_and_nothing_else():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4, 2))
    tied = model[4]
    model.append(tied)
    model[0].bias.requires_grad_(False)
    rewrite_(model)
    groups = {group["name"]: group for group in param_groups(model, lr=1e-3, weight_decay=0.1, expansion_lr=1e-2)}
    settings = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert settings == {"decay": (1e-3, 0.1), "no_decay": (1e-3, 0.0), "expansions": (1e-2, 0.0)}
    members = {name: {id(p) for p in group["params"]} for name, group in groups.items()}
    assert members["decay"] == {id(model[0].weight), id(model[4].weight)}
    assert members["no_decay"] == {id(model[1].weight), id(model[1].bias), id(model[4].bias)}
    assert members["expansions"] == {id(p) for p in model[2].parameters()}
    torch.optim.AdamW(groups.values())


def test_empty_groups_are_dropped_and_wrong_rates_named():
    assert [group["name"] for group in param_groups(nn.Linear(2, 2, bias=False), lr=0.1)] == ["decay"]
    with pytest.raises(OrthoFxError, match=r"^expansion_lr must be a number, zero or more; got -1$"):
        param_groups(nn.Linear(2, 2), lr=0.1, expansion_lr=-1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.GELU()
        self.table = nn.Parameter(torch.zeros(2, 4))

    def no_weight_decay(self):
        return ["table"]

    def forward(self, x):
        return self.act(self.linear(x))


class Network(nn.Module):
    """An embedding, blocks with a projection between them, and a head; `position` is not to be decayed."""

    def __init__(self, blocks=3):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4))
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.blocks.insert(2, nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"position"}

    def forward(self, x):
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Checkpointed(nn.Module):
    """A wrapper with the name of PyTorch's checkpoint_wrapper."""

    def __init__(self, inside):
        super().__init__()
        self._checkpoint_wrapped_module = inside


def per_channel(model):
    rewrite_(model, ExpansionConfig(granularity="channel"), example_inputs=torch.randn(2, 4))
    return model


def by_name(model, **settings):
    """The rate, the decay and the group of each parameter, by its name without wrappers."""
    groups = param_groups(model, lr=1.0, weight_decay=0.1, expansion_lr=10.0, **settings)
    found = {id(p): (group["lr"], group["weight_decay"], group["name"]) for group in groups for p in group["params"]}
    wrappers = ("_orig_mod", "module", "_checkpoint_wrapped_module")
    return {
        ".".join(part for part in name.split(".") if part not in wrappers): found[id(parameter)]
        for name, parameter in model.named_parameters()
    }


def test_names_of_the_model_and_of_modules_inside_of_it_do_not_decay():
    groups = by_name(per_channel(Network()))
    assert {name for name, group in groups.items() if group[1] > 0} == {
        *(f"blocks.{block}.linear.weight" for block in (0, 1, 3)),
        "blocks.2.weight",
        "head.weight",
    }
    assert groups["blocks.0.act.coefficients"] == (10.0, 0.0, "expansions")


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("no_weight_decay", lambda: {"0.weight"}),
        ("no_weight_decay", ["0.weight"]),
        ("no_weight_decay", lambda: {"0.*": "a pattern"}),
        ("no_weight_decay_keywords", lambda: {"0.wei"}),
    ],
)
def test_forms_in_which_a_model_names_parameters(attribute, value):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    setattr(model, attribute, value)
    assert by_name(model) == {"0.weight": (1.0, 0.0, "no_decay"), "1.weight": (1.0, 0.1, "decay")}


def test_names_that_are_none_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].no_weight_decay = lambda: "weight"
    with pytest.raises(OrthoFxError, match=r"^0.no_weight_decay of Linear must give names, a set .* got 'weight'$"):
        param_groups(model, lr=0.1)


def test_rates_fall_with_the_distance_from_the_output():
    rates = {name: group[0] for name, group in by_name(per_channel(Network()), layer_decay=0.5).items()}
    assert rates["position"] == 0.5**4
    assert rates["blocks.0.linear.weight"] == rates["blocks.0.linear.bias"] == rates["blocks.0.table"] == 0.5**3
    assert rates["blocks.1.linear.weight"] == 0.5**2
    # Between two blocks: with the second.
    assert rates["blocks.2.weight"] == rates["blocks.3.linear.weight"] == 0.5
    assert rates["head.weight"] == 1.0
    assert [rates[f"blocks.{block}.act.coefficients"] for block in (0, 1, 3)] == [1.25, 2.5, 5.0]


def test_expansions_make_no_layers_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    model.group_matcher = lambda coarse: {"layers": r"^(\d)", "nothing": None}
    plain = by_name(model, layer_decay=0.5)
    rewritten = by_name(per_channel(model), layer_decay=0.5)
    assert plain.items() <= rewritten.items()
    assert rewritten["1.coefficients"] == (2.5, 0.0, "layer_0.expansions")
    assert rewritten["3.coefficients"] == (5.0, 0.0, "layer_1.expansions")


def test_an_expansion_that_no_pattern_matches_is_where_the_parameters_before_it_are():
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(4, 4))
    model.add_module("act", nn.GELU())
    model.add_module("head", nn.Linear(4, 2))
    model.group_matcher = lambda coarse: {"stem": r"^stem", "head": [(r"^head", (1,))]}
    assert by_name(per_channel(model), layer_decay=0.5)["act.coefficients"][2] == "layer_0.expansions"


def test_a_matcher_may_be_a_function_and_join_layers():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    model.group_matcher = lambda coarse: lambda name: {"0": 0, "1": (0, 1), "2": (0, 99999)}.get(name[0])
    assert [group[0] for group in by_name(model, layer_decay=0.5).values()] == [0.25, 0.5, 0.5, 1.0]
    model.group_matcher = lambda coarse: {"all": r"(.)\.(weight)"}
    with pytest.raises(OrthoFxError, match=r"group_matcher\(\) of Sequential captures \['0', 'weight'\] of 0.weight;"):
        param_groups(model, lr=0.1, layer_decay=0.5)
    model.group_matcher = lambda coarse: None
    with pytest.raises(OrthoFxError, match=r"must give a map of patterns or a function; got NoneType$"):
        param_groups(model, lr=0.1, layer_decay=0.5)


def test_a_matcher_inside_of_a_training_module_counts():
    class Task(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.before, self.network, self.behind = nn.Linear(2, 2), network, nn.Linear(2, 2)

    network = Network(blocks=2)
    network.group_matcher = lambda coarse: {"stem": "^position", "blocks": r"^blocks\.(\d+)"}
    rates = {name: group[0] for name, group in by_name(Task(network), layer_decay=0.5).items()}
    inside = {name: group[0] for name, group in by_name(network, layer_decay=0.5).items()}
    assert {name: rates[f"network.{name}"] for name in inside} == inside
    assert rates["before.weight"] == rates["network.position"] / 2
    assert rates["behind.weight"] == 1.0
    twice = Task(network)
    twice.second = nn.Sequential(Network())
    twice.second[0].group_matcher = network.group_matcher
    with pytest.raises(OrthoFxError, match=r"network, second\.0 have a group_matcher\(\) each, and none tells"):
        param_groups(twice, lr=0.1, layer_decay=0.5)


def test_models_whose_layers_are_not_known_are_refused():
    with pytest.raises(OrthoFxError, match=r"needs the layers of Linear, which has no nn\.ModuleList .* group_matcher"):
        param_groups(nn.Linear(2, 2), lr=0.1, layer_decay=0.5)
    towers = nn.ModuleDict({"text": Network(), "image": Network()})
    expected = r"several lists of blocks: those in text \(3 of Block\), image \(3 of Block\)\. Give it a method"
    with pytest.raises(OrthoFxError, match=expected):
        param_groups(towers, lr=0.1, layer_decay=0.5)
    for value in (0, 1.5, True, "0.5"):
        with pytest.raises(OrthoFxError, match=r"^layer_decay must be a number above 0 and at most 1; got"):
            param_groups(Network(), lr=0.1, layer_decay=value)


def test_lists_of_one_module_follow_each_other_and_lists_inside_of_blocks_do_not_count():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.layer1, self.layer2 = (nn.Sequential(Network(), Network()) for _ in range(2))

    rates = {name: group[0] for name, group in by_name(Stages(), layer_decay=0.5).items()}
    assert rates["stem.weight"] == 0.5**4
    assert [rates[f"layer{a}.{b}.head.weight"] for a in (1, 2) for b in (0, 1)] == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.5}])
def test_wrappers_change_no_group(settings):
    expected = by_name(per_channel(Network()), **settings)
    assert by_name(torch.compile(per_channel(Network())), **settings) == expected
    assert by_name(DistributedDataParallel(torch.compile(per_channel(Network()))), **settings) == expected
    model = per_channel(Network())
    for number in range(4):
        model.blocks[number] = torch.compile(Checkpointed(model.blocks[number]))
    assert by_name(model, **settings) == expected
    model = per_channel(Network())
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert type(model.position).__name__ == "DTensor"
    assert by_name(model, **settings) == by_name(torch.compile(model), **settings) == expected


class FullyShardedDataParallel(nn.Module):
    """A stand-in with the name of PyTorch's, whose parameters have lost their shapes."""

    def __init__(self, name):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(8)))


def test_pieces_without_shapes_are_refused():
    with pytest.raises(OrthoFxError, match=r"in one parameter, .* wrap the model with use_orig_params=True"):
        param_groups(nn.Sequential(FullyShardedDataParallel("_flat_param")), lr=0.1)
    pieces = FullyShardedDataParallel("weight")
    assert len(param_groups(pieces, lr=0.1)) == 1
    with pytest.raises(OrthoFxError, match=r"a matrix looks like a bias: call param_groups inside of FullyShardedData"):
        param_groups(pieces, lr=0.1, weight_decay=0.1)
