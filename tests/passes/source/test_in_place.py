"""A call that writes to its input is replaced by one that does, so every other name of that tensor sees the change."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from ortho_fx import ExpansionConfig, find_sites, revert_, rewrite_

EXACT = ExpansionConfig("tropical_rational", 32, "fit")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.flag = nn.Linear(8, 8), True


class OtherName(Base):
    def forward(self, x):
        y = self.linear(x)
        z = y
        F.relu_(y)
        return y + z


class Positional(Base):
    def forward(self, x):
        y = self.linear(x)
        z = y
        F.relu(y, True)
        return y + z


class Flag(Base):
    def forward(self, x):
        y = self.linear(x)
        z = y
        y = F.leaky_relu(y, 0.2, inplace=self.flag) + 1
        return y + z


class Formula(Base):
    def forward(self, x):
        y = self.linear(x)
        z = y
        y *= torch.sigmoid(y)
        return y + z


class FormulaByMethod(Base):
    def forward(self, x):
        y = self.linear(x)
        z = y
        y.mul_(y.sigmoid())
        return z


class View(Base):
    def forward(self, x):
        y = self.linear(x)
        v = y[:, :4]
        v.relu_()
        return y


class Slice(Base):
    def forward(self, x):
        y = self.linear(x)
        F.relu(y[:, :4], inplace=True)
        return y


class Item(Base):
    def forward(self, x):
        y = {"kept": self.linear(x)}
        y["kept"].relu_()
        return y["kept"] * 1


class BuiltThere(Base):
    def forward(self, x):
        y = self.linear(x)
        z = y
        nn.ReLU(inplace=True)(y)
        return y + z


class Argument(Base):
    def forward(self, x):
        y = self.linear(x)
        self.change(y)
        return y

    def change(self, x):
        x.relu_()


class InComprehension(Base):
    def forward(self, x):
        y = self.linear(x)
        return sum([F.relu(h, inplace=True) for h in (y, 2 * y)]) + y


class InIterable(Base):
    def forward(self, x):
        h = self.linear(x)
        return torch.stack([row + h[0] for row in F.relu(h, inplace=True)])


class InInner(Base):
    def forward(self, x):
        h = self.linear(x)
        return checkpoint(lambda: F.relu(h * 1, inplace=True) + h, use_reentrant=False)


def squash(x):
    return x.mul_(x.sigmoid())


class ByHelper(Base):
    def forward(self, x):
        y = self.linear(x)
        z = y
        squash(y)
        return y + z


CLASSES = [
    *(OtherName, Positional, Flag, Formula, FormulaByMethod, View, Slice, Item, BuiltThere, Argument),
    *(InComprehension, InIterable, InInner, ByHelper),
]


@pytest.mark.parametrize("cls", CLASSES)
def test_other_names_of_the_input_see_the_change(cls):
    torch.manual_seed(0)
    module, x = cls().double(), torch.randn(200, 8, dtype=torch.float64)
    expected = module(x)
    module.linear.weight.grad = None
    expected.square().sum().backward()
    gradient = module.linear.weight.grad.clone()
    report = rewrite_(module, EXACT, example_inputs=x)
    assert len(report.replaced) == 1
    y = module(x)
    assert (y - expected).norm() < 0.01 * expected.norm()
    module.linear.weight.grad = None
    y.square().sum().backward()
    assert (module.linear.weight.grad - gradient).norm() < 0.05 * gradient.norm()
    assert report.check(x).passed


@pytest.mark.parametrize("cls", [OtherName, View, InComprehension])
def test_a_compiled_module_writes_as_well(cls):
    module, x = cls(), torch.randn(5, 8)
    rewrite_(module, EXACT)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_the_argument_of_the_caller_is_changed():
    class Changing(nn.Module):
        def forward(self, x):
            return F.relu_(x)

    module, x = Changing(), torch.randn(5, 8)
    rewrite_(module, EXACT)
    y = x.clone()
    assert module(y) is y
    torch.testing.assert_close(y, x.relu(), atol=1e-4, rtol=0)


def test_what_has_no_other_name_is_not_written():
    class Fresh(Base):
        def forward(self, x):
            return F.relu(self.linear(x) + x, inplace=True)

    module = Fresh()
    rewrite_(module, EXACT)
    assert "copy_" not in fx.symbolic_trace(module).code


def test_a_formula_that_changes_its_input_on_the_way_is_left():
    class OnTheWay(Base):
        def forward(self, x):
            y = self.linear(x)
            return F.relu_(y) ** 2 + y

    (site,) = find_sites(OnTheWay())
    assert site.reason == "it changes its input in place on the way to its result"


def test_a_formula_that_writes_to_a_part_of_itself_leaves_its_input():
    class Part(Base):
        def forward(self, x):
            y = self.linear(x)
            return torch.sigmoid(y).mul_(y) + y

    torch.manual_seed(0)
    module, x = Part().double(), torch.randn(200, 8, dtype=torch.float64)
    expected = module(x)
    assert len(rewrite_(module, EXACT, example_inputs=x).replaced) == 1
    assert (module(x) - expected).norm() < 0.01 * expected.norm()


def test_a_function_that_is_kept_and_works_in_place_is_left():
    class Keeping(Base):
        def __init__(self, act, **flags):
            super().__init__()
            self.act, self.flags = act, flags

        def forward(self, x):
            return self.act(self.linear(x), inplace=True)

    for act in (F.relu_, F.relu):
        (site,) = find_sites(Keeping(act))
        assert site.reason == "it may write to its input, and an expansion in its place would not"


def test_calls_of_a_child_that_works_in_place_write_as_well():
    class Twice(Base):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.linear(x)
            z = y
            self.act(y)
            return self.act(z - 1) + z

    torch.manual_seed(0)
    module, x = Twice().double(), torch.randn(200, 8, dtype=torch.float64)
    expected = module(x)
    assert len(rewrite_(module, EXACT, sharing="site", example_inputs=x).replaced) == 2
    assert (module(x) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("kind", ["traced", "exported"])
def test_views_in_a_graph_see_the_change(kind):
    torch.manual_seed(0)
    module, x = View().double(), torch.randn(200, 8, dtype=torch.float64)
    expected = module(x)
    graph = fx.symbolic_trace(module) if kind == "traced" else torch.export.export(module, (x,)).module()
    assert len(rewrite_(graph, EXACT, example_inputs=x).replaced) == 1
    assert (graph(x) - expected).norm() < 0.01 * expected.norm()
    graph(x).sum().backward()
    revert_(graph)
    assert torch.equal(graph(x), expected)
