"""A call is replaced only where the module is reached by its name, and names are the variables that Python says."""

import ast
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, find_sites, rewrite_
from ortho_fx.passes.source.scopes import Scopes

CLOSE = ExpansionConfig("tropical_rational", 32, "fit")


def hiding(function):
    def call(*arguments, **named):
        return function(*arguments, **named)

    return call


def passing(function):
    def call(this, *arguments):
        return function(this, *arguments)

    return call


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Comprehension(Base):
    def forward(this, x):
        return sum([F.gelu(h) for h in (this.linear(x), x)])


class Iterable(Base):
    def forward(self, x):
        return torch.stack([row + 1 for row in F.gelu(self.linear(x))])


class Lambda(Base):
    def forward(self, x):
        return (lambda y: self.linear(F.gelu(y)))(x)


class InnerFunction(Base):
    def forward(self, x):
        def inner(y, scale=F.gelu(x)):  # noqa: B008
            return F.gelu(y) + scale

        return inner(self.linear(x))


class InnerClass(Base):
    def forward(self, x):
        class Inner:
            def call(this, y):
                return F.gelu(y)

        return Inner().call(self.linear(x))


class Passed(Base):
    @passing
    def forward(self, x):
        return F.gelu(self.linear(x))


class Shadowed(Base):
    """A name of an outer function is another variable inside."""

    def forward(self, x):
        def inner(F):
            return F.gelu(x)

        return inner(self) + F.gelu(x)

    def gelu(self, x):
        return 2 * x


class LocalFunction(Base):
    def forward(self, x):
        def gelu(y):
            return y + 1

        return gelu(x) + F.gelu(self.linear(x))


@pytest.mark.parametrize(
    ("cls", "replaced"),
    [
        *((Comprehension, 1), (Iterable, 1), (Lambda, 1), (InnerFunction, 2), (InnerClass, 1), (Passed, 1)),
        *((Shadowed, 1), (LocalFunction, 1)),
    ],
)
def test_calls_in_inner_scopes_are_replaced_and_compute_what_they_did(cls, replaced):
    torch.manual_seed(0)
    module, x = cls().double(), torch.randn(100, 4, dtype=torch.float64)
    expected = module(x)
    report = rewrite_(module, CLOSE, example_inputs=x)
    assert len(report.replaced) == replaced
    assert not report.left
    assert (module(x) - expected).norm() < 0.01 * expected.norm()


class Hidden(Base):
    @hiding
    def forward(self, x):
        return F.gelu(self.linear(x))


class Reassigned(Base):
    def forward(self, x):
        me = self
        self = None
        return F.gelu(me.linear(x))


class Deleted(Base):
    def forward(self, x):
        y = self.linear(x)
        del self
        return F.gelu(y)


class SetInside(Base):
    def forward(self, x):
        def change():
            nonlocal self
            self = None

        y = self.linear(x)
        change()
        return F.gelu(y)


class Argument(Base):
    def forward(self, x):
        def inner(self):
            return F.gelu(self)

        return inner(self.linear(x))


class LambdaArgument(Base):
    def forward(self, x):
        return (lambda self: F.gelu(self))(self.linear(x))


class Variable(Base):
    def forward(self, x):
        return sum(F.gelu(self) for self in [self.linear(x)])


class Method(Base):
    def forward(self, x):
        class Inner:
            def call(self, y):
                return F.gelu(y)

        return Inner().call(self.linear(x))


class Starred(Base):
    def forward(*arguments):
        return F.gelu(arguments[0].linear(arguments[1]))


NO_SELF = "forward takes no self by a name of its own"
SET = "forward sets or deletes self"
OTHER = "self is another variable where forward calls it"


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        *((Hidden, NO_SELF), (Reassigned, SET), (Deleted, SET), (SetInside, SET), (Starred, NO_SELF)),
        *((Argument, OTHER), (LambdaArgument, OTHER), (Variable, OTHER), (Method, OTHER)),
    ],
)
def test_where_the_module_has_no_name_the_call_is_left(cls, reason):
    module, x = nn.Sequential(cls(), nn.GELU()), torch.randn(3, 4)
    expected = module[0](x)
    report = rewrite_(module)
    assert [site.reason for site in report.left] == [reason]
    assert torch.equal(module[0](x), expected)


def helper(x):
    return F.gelu(x).flip(0)


def test_a_helper_is_left_where_one_of_its_calls_cannot_reach_the_module():
    class Calling(Base):
        def forward(self, x):
            return helper(x) + (lambda self: helper(self))(self.linear(x))

    (site,) = find_sites(Calling())
    assert site.reason == OTHER


def test_a_helper_that_is_handed_on_is_left():
    class Handing(Base):
        def forward(self, x):
            return functools.reduce(lambda y, f: f(y), [helper, helper], x)

    (site,) = find_sites(Handing())
    assert (site.function, "handed on as a function" in site.reason) == ("gelu", True)


def binders(text):
    """Which scope each use of `x` has, by the number of bindings there; None for a global."""
    definition = ast.parse(text).body[0]
    scopes = Scopes(definition)
    names = [n for n in ast.walk(definition) if isinstance(n, ast.Name) and n.id == "x" and isinstance(n.ctx, ast.Load)]
    return [None if scopes.binder(n) is None else scopes.binder(n) is scopes.top for n in names]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(): return x", [None]),
        ("def f(x): return [x for y in x]", [True, True]),
        ("def f(): return [x for x in y]", [False]),
        ("def f(x): return [1 for x in x]", [True]),
        ("def f():\n global x\n x = 1\n return x", [None]),
        ("def f(x):\n class A:\n  x = x\n  def g(self): return x", [False, True]),
        ("def f():\n import x.y\n return x", [True]),
        ("def f():\n [(x := y) for y in z]\n return x", [True]),
        ("def f():\n try: pass\n except E as x: pass\n return x", [True]),
        ("def f():\n match y:\n  case [*x]: return x", [True]),
        ("def f(x): return lambda x=x: x", [True, False]),
    ],
)
def test_names_are_the_variables_that_python_says(text, expected):
    assert sorted(map(str, binders(text))) == sorted(map(str, expected))
