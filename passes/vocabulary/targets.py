"""The one table of activations: which callables are activations, and which scalar function each computes.

Every search for activations reads this table. It holds module classes, functions (in-place ones too), tensor methods
and ATen operators; `recognise` compares other callables with its functions. Sigmoid, tanh and similar functions are
gates more often than activations, so they are replaced only when they are named as targets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ortho_fx.errors import OrthoFxError


@dataclass(frozen=True)
class Target:
    """One activation function and every callable of PyTorch that computes it.

    `gate` marks a function that is bounded, or for another reason rarely a plain activation: it is replaced only when
    it is named. `in_place` holds the functions that also write to their argument. `settings` are the arguments besides
    the input that change the function, in order; modules keep them as attributes of the same names.
    """

    name: str
    modules: tuple[type[nn.Module], ...]
    functions: tuple[Callable[..., Any], ...]
    in_place: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    gate: bool = False
    settings: tuple[str, ...] = ()

    def reference(self, values: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> Reference | None:
        """The scalar function of a call with these further arguments; None if they are not constant."""
        given = {**dict(zip(self.settings, values, strict=False)), **(named or {})}
        settings = tuple((name, given[name]) for name in self.settings if name in given)
        if not all(isinstance(value, bool | int | float | str) for _, value in settings):
            return None
        return Reference(self.name, settings)

    def reference_of(self, module: nn.Module) -> Reference | None:
        """The scalar function of a module of one of the target's classes."""
        return self.reference(named={name: getattr(module, name) for name in self.settings})


@dataclass(frozen=True)
class Reference:
    """A scalar function by the name of its target, with its settings: callable, hashable, picklable."""

    target: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        if self.target not in BY_NAME:
            raise OrthoFxError(f"activation {self.target!r} is not known here: call register_activation first")
        return BY_NAME[self.target].functions[0](x, **dict(self.settings))

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.target}({arguments})" if arguments else self.target


def swish(x: Tensor, beta: float = 1.702) -> Tensor:
    """x sigmoid(beta x); beta = 1.702 is also called quick GELU."""
    return x * torch.sigmoid(beta * x)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return F.relu(x).square()


def self_gated(x: Tensor, formula: str) -> Tensor:
    """A product of x with a gate of x that has no name, given by its formula in `x`, `torch`, `F` and `math`."""
    return eval(formula, {"__builtins__": {}, "torch": torch, "F": F, "math": math, "x": x})


TARGETS: list[Target] = [
    Target("relu", (nn.ReLU,), (F.relu, torch.relu), (F.relu_, torch.relu_), ("relu", "relu_")),
    Target("relu6", (nn.ReLU6,), (F.relu6,)),
    Target("leaky_relu", (nn.LeakyReLU,), (F.leaky_relu,), (F.leaky_relu_,), settings=("negative_slope",)),
    Target("elu", (nn.ELU,), (F.elu,), (F.elu_,), settings=("alpha",)),
    Target("celu", (nn.CELU,), (F.celu, torch.celu), (F.celu_, torch.celu_), settings=("alpha",)),
    Target("selu", (nn.SELU,), (F.selu, torch.selu), (F.selu_, torch.selu_)),
    Target("gelu", (nn.GELU,), (F.gelu,), settings=("approximate",)),
    Target("silu", (nn.SiLU,), (F.silu,)),
    Target("mish", (nn.Mish,), (F.mish,)),
    Target("hardswish", (nn.Hardswish,), (F.hardswish,)),
    Target("rrelu", (nn.RReLU,), (F.rrelu, torch.rrelu), (F.rrelu_, torch.rrelu_), settings=("lower", "upper")),
    Target("relu_squared", (), (relu_squared,)),
    Target("swish", (), (swish,), settings=("beta",)),
    Target("self_gated", (), (self_gated,), settings=("formula",)),
    Target("prelu", (nn.PReLU,), (F.prelu, torch.prelu), gate=True),
    Target("softplus", (nn.Softplus,), (F.softplus,), gate=True, settings=("beta", "threshold")),
    Target("sigmoid", (nn.Sigmoid,), (F.sigmoid, torch.sigmoid), (torch.sigmoid_,), ("sigmoid", "sigmoid_"), gate=True),
    Target("hardsigmoid", (nn.Hardsigmoid,), (F.hardsigmoid,), gate=True),
    Target("tanh", (nn.Tanh,), (F.tanh, torch.tanh), (torch.tanh_,), ("tanh", "tanh_"), gate=True),
    Target("hardtanh", (nn.Hardtanh,), (F.hardtanh,), (F.hardtanh_,), gate=True, settings=("min_val", "max_val")),
    Target("softsign", (nn.Softsign,), (F.softsign,), gate=True),
]
# Those after these are from outside.
OURS = len(TARGETS)
BY_NAME: dict[str, Target] = {target.name: target for target in TARGETS}


class TargetTable:
    """The targets chosen for one rewrite, indexed by everything that a search can meet.

    `named` says that they were named, rather than taken by default.
    """

    def __init__(self, targets: Iterable[Target], *, named: bool = False) -> None:
        self.named = named
        self.names: set[str] = set()
        self.modules: dict[type[nn.Module], Target] = {}
        self.functions: dict[Hashable, Target] = {}
        self.in_place: set[Hashable] = set()
        self.methods: dict[str, Target] = {}
        for target in targets:
            self.add(target)

    def add(self, target: Target) -> None:
        self.names.add(target.name)
        self.modules |= dict.fromkeys(target.modules, target)
        self.functions |= dict.fromkeys((*target.functions, *target.in_place), target)
        self.in_place.update(target.in_place)
        self.methods |= dict.fromkeys(target.methods, target)
        for name in target.methods:
            self.functions[getattr(Tensor, name)] = target
            if name.endswith("_"):
                self.in_place.add(getattr(Tensor, name))

    def of_node(self, node: fx.Node) -> Target | None:
        """The target of a graph node that calls a function, an ATen operator or a method; None for other nodes."""
        if node.op == "call_function":
            return self.of_function(node.target)
        return self.methods.get(str(node.target)) if node.op == "call_method" else None

    def of_function(self, function: object) -> Target | None:
        if isinstance(function, PACKET):
            function = next(iter(overloads_of(function)), None)
        if isinstance(function, OPERATOR):
            target = BY_NAME.get(_operator_name(function)) if function.namespace == "aten" else None
            return target if target is not None and target.name in self.names else None
        try:
            return self.functions.get(function)
        except Exception:  # unhashable, or with a hash of its own that raises: no function of ours
            return None


# The class of operators in a graph, such as torch.ops.aten.relu.default.
OPERATOR = type(torch.ops.aten.relu.default)
# The class of all its overloads, such as torch.ops.aten.relu.
PACKET = type(torch.ops.aten.relu)


def overloads_of(packet: Any) -> list[Any]:
    """The overloads of an operator."""
    return [getattr(packet, name) for name in packet.overloads()]


EVERY_TARGET = TargetTable(TARGETS)
_caches: list[Any] = []
_Cached = TypeVar("_Cached", bound=Callable[..., Any])


def cached(maxsize: int) -> Callable[[_Cached], _Cached]:
    """As `functools.lru_cache`, for what depends on the table: a new target empties it."""

    def decorate(function: _Cached) -> _Cached:
        kept: Any = functools.lru_cache(maxsize)(function)
        _caches.append(kept)
        return kept

    return decorate


def cached_elsewhere(kept: Any) -> None:
    """Lets a new target empty a cache of another kind as well."""
    _caches.append(kept)


def add_target(target: Target) -> None:
    """Adds a target to the table of every target."""
    TARGETS.append(target)
    BY_NAME[target.name] = target
    EVERY_TARGET.add(target)
    for kept in _caches:
        kept.cache_clear()


def _operator_name(operator: Any) -> str:
    return operator._schema.name.removeprefix("aten::").removesuffix("_")


def may_change_input(node: fx.Node) -> bool:
    """Whether an activation's node writes to its input as well."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if isinstance(node.target, OPERATOR):
        return node.target._schema.is_mutable
    return node.target in EVERY_TARGET.in_place or bool(node.kwargs.get("inplace", False))


def choose_targets(names: Iterable[str] | None) -> TargetTable:
    """The table of the named activation functions; without names, of all functions that are not gates.

    Raises:
        OrthoFxError: an unknown name.
    """
    if names is None:
        return TargetTable(target for target in TARGETS if not target.gate)
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Iterable):
        raise OrthoFxError(f"targets must be names of activation functions; got {names!r}")
    names = tuple(names)
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise OrthoFxError(f"unknown target {', '.join(map(repr, unknown))}; targets are {', '.join(BY_NAME)}")
    return TargetTable((BY_NAME[name] for name in names), named=True)
