"""Recognises activations by the values that they compute, under any name.

Libraries have their own classes and functions for GELU and similar activations. A candidate is evaluated in float64 at
points where the functions of the table differ, and is identified with the function that it agrees with. For a family
with a setting (leaky ReLU's slope, swish's beta), the setting is first computed from one value. Candidates are leaf
modules without parameters or buffers, of which a copy is run, and functions whose source is only tensor arithmetic, so
that running them has no side effects.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx.passes.vocabulary.elementwise import METHODS, bends, operation_of
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED, attribute, cached_by_meaning
from ortho_fx.passes.vocabulary.targets import EVERY_TARGET, OURS, TARGETS, Reference, cached

_TOLERANCE = 2e-6
# Multiples of 1/12 up to |x| = 8; a clipped GELU may differ beyond that. They are shuffled to detect an operation that
# mixes elements. Settings are computed from the values at some of the points.
POINTS = (torch.randperm(192, generator=torch.Generator()).double() - 96) / 12
_PROBES = tuple(int((POINTS == x).nonzero()) for x in (-8.0, -1.0, 0.0, 1.0, 7.0))


def match(function: Callable[[Tensor], Tensor]) -> Reference | None:
    """The scalar function of the table that an elementwise function computes; None for none of them."""
    value = evaluated(function, POINTS)
    if value is None:
        return None
    for reference in _candidates(*value[list(_PROBES)].tolist()):
        if torch.allclose(reference(POINTS), value, rtol=_TOLERANCE, atol=_TOLERANCE):
            return reference
    return None


def _candidates(lowest: float, minus: float, zero: float, plus: float, highest: float) -> Iterator[Reference]:
    """References that agree with a function's values at -8, -1, 0, 1 and 7."""
    for name, settings in (
        ("relu", {}),
        ("gelu", {"approximate": "none"}),
        ("gelu", {"approximate": "tanh"}),
        ("silu", {}),
        *((name, {}) for name in ("mish", "hardswish", "relu6", "selu", "relu_squared")),
        *((name, {}) for name in ("sigmoid", "tanh", "hardsigmoid", "softsign", "softplus")),
    ):
        yield Reference(name, tuple(settings.items()))
    if 0 < plus < 1:
        yield Reference("swish", (("beta", _rounded(math.log(plus / (1 - plus)))),))
    if -1 < minus < 0:
        yield Reference("leaky_relu", (("negative_slope", _rounded(-minus)),))
    if minus < 0:
        yield Reference("elu", (("alpha", _rounded(minus / math.expm1(-1.0))),))
    if lowest < highest:
        yield Reference("hardtanh", (("min_val", lowest), ("max_val", highest)))
    for target in TARGETS[OURS:]:
        yield Reference(target.name)


def _rounded(setting: float) -> float:
    return float(f"{setting:.9g}")


def evaluated(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor | None:
    """The values of a function at the points, in the points' shape; None if it fails or they are not finite."""
    # Random activations draw numbers. The fork keeps the model's own random numbers unchanged.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            value = function(points.clone())
        except Exception:  # a candidate may not be made for such a tensor
            return None
    if not isinstance(value, Tensor) or value.shape != points.shape or not value.is_floating_point() or value.is_meta:
        return None
    return value.double() if value.isfinite().all() else None


def changes_input(function: Any) -> bool:
    """Whether what is recognised as an activation also writes to its argument."""
    if EVERY_TARGET.of_function(function) is not None:
        return function in EVERY_TARGET.in_place
    if type(function) in EVERY_TARGET.modules:
        return bool(getattr(function, "inplace", False))
    x = POINTS.reshape(2, 4, 4, 6).clone()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            (_copied(function).eval() if isinstance(function, nn.Module) else function)(x)
        except Exception:
            return False
    return not torch.equal(x.flatten(), POINTS)


def recognise(candidate: object) -> Reference | None:
    """The scalar function of any kind of callable; None if it is no known activation."""
    if isinstance(candidate, nn.Module):
        return recognise_module(candidate)
    if isinstance(candidate, functools.partial):
        target = EVERY_TARGET.of_function(candidate.func)
        if target is not None and not candidate.args and candidate.keywords.keys() <= {*target.settings, "inplace"}:
            return target.reference(named={k: v for k, v in candidate.keywords.items() if k != "inplace"})
        return None
    target = EVERY_TARGET.of_function(candidate)
    if target is not None:
        return target.reference()
    if isinstance(candidate, types.FunctionType):
        return recognise_function(candidate)
    of = candidate.__self__ if isinstance(candidate, types.MethodType | types.BuiltinFunctionType) else None
    if isinstance(of, type) and issubclass(of, torch.autograd.Function) and candidate == of.apply:
        return match(of.apply) if _takes_one(of.forward, skip=1) else None  # type: ignore[arg-type]
    if isinstance(candidate, torch.jit.ScriptFunction):
        return match(candidate) if len(list(candidate.graph.inputs())) == 1 else None
    return None


def recognise_module(module: nn.Module) -> Reference | None:
    """The scalar function of a module; None if it is no activation, or has parameters or buffers."""
    target = EVERY_TARGET.modules.get(type(module))
    if target is not None:
        return None if target.name == "prelu" else target.reference_of(module)
    if module._parameters or module._buffers or not _is_leaf(module):
        return None
    key = _key(module)
    if key is None:
        return _probed(module)
    return _of_module(type(module), key, _Unhashed(module))


# The attributes that every module has.
OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


def _key(module: nn.Module) -> tuple[Hashable, ...] | None:
    """The values besides its class that decide the function of a leaf module; None if they cannot be compared."""
    parts: list[Hashable] = []
    for name, value in sorted(vars(module).items()):
        if name in OWN_ATTRIBUTES:
            continue
        if isinstance(value, functools.partial):
            value = (value.func, value.args, tuple(sorted(value.keywords.items())))
        elif isinstance(value, types.MethodType):
            value = value.__func__ if value.__self__ is module else None
        elif not isinstance(value, bool | int | float | str | types.FunctionType | types.BuiltinFunctionType | None):
            return None
        parts.append((name, value))
    return tuple(parts)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children, its class is not PyTorch's, and it can be called with one tensor."""
    cls = type(module)
    if module._modules or isinstance(module, torch.jit.ScriptModule):
        return False
    if (cls.__module__ or "").split(".")[0] == "torch" or not isinstance(cls.forward, types.FunctionType):
        return False
    return _takes_one(cls.forward, skip=1)


class _Unhashed:
    """Wraps an argument so that a cache ignores it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashed)

    def __hash__(self) -> int:
        return 0


@cached(maxsize=1024)
def _of_module(cls: type, key: tuple[Hashable, ...], module: _Unhashed) -> Reference | None:
    return _probed(module.value)


def _probed(module: nn.Module) -> Reference | None:
    try:
        modes = [_copied(module).train(), _copied(module).eval()]
    except Exception:  # a module that cannot be copied is not run
        return None
    # Most activations take any shape, but some accept only images or sequences.
    for shape in ((2, 4, 4, 6), (8, 24), (4, 6, 8)):
        in_training, in_evaluation = (match(functools.partial(_shaped, module, shape)) for module in modes)
        if in_training is not None and in_training == in_evaluation:
            return in_training
    return None


def _copied(module: nn.Module) -> nn.Module:
    """A copy without hooks: hooks could have side effects."""
    bare = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks"):
            vars(bare)[name] = type(value)()
    return copy.deepcopy(bare)


def _shaped(module: nn.Module, shape: tuple[int, ...], x: Tensor) -> Tensor:
    return module(x.reshape(shape)).reshape(x.shape)


def computes_unknown_function(module: nn.Module) -> bool:
    """Whether a leaf module of a class from outside of PyTorch computes a nonlinear function of each element."""
    if not _is_leaf(module):
        return False
    parameters = list(module.parameters())
    if any(isinstance(p, nn.UninitializedParameter) or p.is_meta for p in parameters):  # it cannot be run
        return False
    small = sum(p.numel() for p in parameters) <= 4096
    return small and _of_class(type(module), _Unhashed(module))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _of_class(cls: type, module: _Unhashed) -> bool:
    try:
        copied = _copied(module.value).eval()
    except Exception:
        return False
    x = POINTS.reshape(2, 4, 4, 6).to(next(copied.parameters(), POINTS))
    inputs = (x, x.flatten().roll(1).reshape(x.shape), -x, x / 2, torch.zeros_like(x))
    values = [evaluated(copied, points) for points in inputs]
    if any(value is None for value in values):
        return False
    y, mixed, turned, half, zero = (value.flatten() for value in values if value is not None)
    linear = torch.allclose(y + turned, 2 * zero) and torch.allclose(y + zero, 2 * half)
    return torch.equal(mixed, y.roll(1)) and not linear


@cached_by_meaning(maxsize=4096)
def recognise_function(function: types.FunctionType) -> Reference | None:
    """The scalar function of a Python function of one tensor. It is run only if its source is only arithmetic."""
    if not (_takes_one(function, skip=0) and _may_bend(function) and is_arithmetic(function)):
        return None
    return match(function)


def _may_bend(function: types.FunctionType) -> bool:
    """Whether a function's names include a nonlinear operation. This cheap test avoids reading most sources."""
    called = (function.__globals__.get(name) for name in function.__code__.co_names)
    return any(map(bends, function.__code__.co_names)) or any(isinstance(f, types.FunctionType) for f in called)


def _takes_one(function: types.FunctionType, skip: int) -> bool:
    """Whether a function can be called with one argument after `skip` others."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    by_name = [p for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    return len(required) == 1 and not by_name and parameters[0] is required[0]


@cached_by_meaning(maxsize=4096)
def is_arithmetic(function: types.FunctionType) -> bool:
    """Whether a function's source is only elementwise arithmetic: assignments to names, branches and returns."""
    if inspect.unwrap(function) is not function:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, TypeError, IndexError):
        return False
    # The source of a lambda is the whole statement around it, which may hold other lambdas.
    lambdas = [n.body for n in ast.walk(tree) if isinstance(n, ast.Lambda) and _compiles_to(n, function.__code__)]
    body: list[Any] = tree.body if isinstance(tree, ast.FunctionDef) else lambdas[:1]
    names = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    names.pop(function.__name__, None)  # recursion is not arithmetic
    return 0 < len(body) <= 12 and all(_allowed(node, names) for part in body for node in ast.walk(part))


def _compiles_to(node: ast.Lambda, code: types.CodeType) -> bool:
    outer = compile(ast.Expression(node), code.co_filename, "eval")
    (inner,) = (constant for constant in outer.co_consts if isinstance(constant, types.CodeType))
    # The bytecode itself is not compared: it depends on the file's imports.
    return all(getattr(inner, part) == getattr(code, part) for part in ("co_varnames", "co_names", "co_consts"))


_HARMLESS = (
    *(ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.If, ast.IfExp, ast.Name, ast.Constant),
    *(ast.Attribute, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.keyword, ast.expr_context, ast.operator),
    *(ast.unaryop, ast.boolop, ast.cmpop),
)


def _allowed(node: ast.AST, names: dict[str, Any]) -> bool:
    if isinstance(node, ast.Attribute):
        return isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            return True
        called = resolve(node.func, names)
        if isinstance(called, types.FunctionType) and operation_of(called) is None:
            return is_arithmetic(called)
        return operation_of(called) is not None
    return isinstance(node, _HARMLESS)


def resolve(node: ast.expr, names: dict[str, Any]) -> object:
    """The object that a dotted name means, looked up through modules only; None if there is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        base = resolve(node.value, names)
        found = attribute(base, node.attr) if isinstance(base, types.ModuleType) else UNRESOLVED
        return None if found is UNRESOLVED else found
    return None


def function_of(module: nn.Module) -> str | None:
    """The name of the activation function that a module computes; None if it is no activation."""
    target = EVERY_TARGET.modules.get(type(module))
    if target is not None:
        return target.name
    reference = recognise_module(module)
    return reference.target if reference is not None else None
