"""What a module's class holds of activation calls, over all of its methods and the functions that these call by name.

A call is replaced where the module's own `forward` (or `__call__`) surely comes to it. Every other function of the
class, and what only `super()` reaches, is read as well, so that an activation in it is listed with the reason.
"""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ortho_fx.passes.source.editor import CallEditor
from ortho_fx.passes.source.methods import Method, Scalar
from ortho_fx.passes.source.reader import Call, ChildCall
from ortho_fx.passes.vocabulary.activates import activates
from ortho_fx.passes.vocabulary.meaning import (
    UNRESOLVED,
    cached_by_meaning,
    functions_of,
    is_plain,
    names_in,
    own_classes,
    unwrapped,
)
from ortho_fx.passes.vocabulary.recognise import recognise
from ortho_fx.passes.vocabulary.targets import EVERY_TARGET

# What gives parameters their values, and computes nothing.
_INITIALISERS = ("_init_weights", "init_weights", "reset_parameters")
# What runs when a module is called.
ENTRIES = ("forward", "__call__")
_HANDED_ON = "{} is handed on as a function, and where that is called is not known"


@dataclass(frozen=True)
class Source:
    """The code that a module runs: its class, and what of the instance decides which activations that code calls.

    Attributes:
        cls: the class as it was written.
        constants: plain values of attributes by which an activation is chosen, such as `self.config.hidden_act`.
        split: children whose every call in the source is a site of its own.
        replaced: the calls that are replaced by expansions of their own name.
        shared: the calls that are replaced by the expansion of another call, each with the name of that.
    """

    cls: type
    constants: frozenset[tuple[str, Scalar]] = frozenset()
    split: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()
    # Pickles from before calls could share an expansion have none.
    shared: frozenset[tuple[str, str]] = frozenset()

    def expansions(self) -> dict[str, str]:
        """The replaced calls, each with the name of its expansion."""
        return {**{name: name for name in self.replaced}, **dict(self.shared)}

    @property
    def plain(self) -> Source:
        """The same code with nothing replaced."""
        return replace(self, replaced=frozenset(), shared=frozenset())


@dataclass
class Analysis:
    """What a source holds: methods and helpers with the calls of each, in the order of the search.

    Attributes:
        methods: the functions that were read, and the calls in each.
        helpers: the helpers that each function calls.
        references: the places of each function that name another of these, each with that other.
        asked: the attributes of the module that were asked for as constants, and `used` those that decided something.
        children: the calls of what the module keeps.
    """

    methods: list[tuple[Method, list[Call]]] = field(default_factory=list)
    helpers: dict[types.FunctionType, list[types.FunctionType]] = field(default_factory=dict)
    references: dict[types.FunctionType, list[tuple[ast.AST, types.FunctionType]]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    children: list[ChildCall] = field(default_factory=list)

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(call for _, calls in self.methods for call in calls)


@cached_by_meaning(maxsize=4096, of=lambda source: source.cls)
def analyse(source: Source) -> Analysis:
    """Reads every function of a source."""
    return _Reader(source).read()


class _Reader:
    """Reads the functions of a source in turn."""

    def __init__(self, source: Source) -> None:
        self.source, self.analysis, self.numbers = source, Analysis(), dict[str, int]()
        self.constants = dict(source.constants)
        self._read: set[tuple[types.FunctionType, bool]] = set()
        self._seen: set[types.FunctionType] = set()

    def read(self) -> Analysis:
        self._reached([(name, None) for name in ENTRIES], "")
        for name, member in self._members():
            for function in functions_of(member):
                if function not in self._seen and not _is_torchs(function) and activates(function):
                    self._method(name, function, _why_not(name, member))
        for name, function in self._overridden():
            if function not in self._seen and not _is_torchs(function) and activates(function):
                self._method(name, function, f"{name} is called through super()")
        return self.analysis

    def _overridden(self) -> Iterator[tuple[str, types.FunctionType]]:
        """The functions of base classes that others of the same name hide, as far as some function names that base."""
        classes = list(own_classes(self.source.cls))
        used = [
            set(names_in(unwrapped(function).__code__))
            for base in classes
            for name, member in vars(base).items()
            if name not in ("__init__", *_INITIALISERS)
            for function in functions_of(member)
        ]
        for base in classes[1:]:
            for name, member in vars(base).items():
                for function in functions_of(member):
                    if any(name in names and not names.isdisjoint(("super", base.__name__)) for names in used):
                        yield name, function

    def _members(self) -> Iterator[tuple[str, object]]:
        """The members of the class and of its bases, each the first of its name; without what only makes the module."""
        found: dict[str, object] = {}
        for base in own_classes(self.source.cls):
            for name, member in vars(base).items():
                found.setdefault(name, member)
        makers = {"__init__", *_INITIALISERS, *_called_from(self.source.cls, "__init__", found)}
        yield from ((name, member) for name, member in found.items() if name not in makers)

    def _reached(self, waiting: list[tuple[str, type | None]], unreachable: str) -> None:
        """Reads the methods of these names, from a certain class on, and those that they reach through self."""
        seen = set(waiting)
        found: dict[tuple[str, type | None], list[types.FunctionType]] = {}
        named: list[tuple[Method, ast.AST, tuple[str, type | None]]] = []
        mro = self.source.cls.__mro__
        while waiting:
            name, below = waiting.pop(0)
            bases = mro[mro.index(below) + 1 :] if below else mro
            base = next((base for base in bases if name in base.__dict__), object)
            member = base.__dict__.get(name)
            for function in functions_of(member):
                if _is_torchs(function) or (name == "__call__" and is_plain(base)):
                    continue
                # A method that only super() reaches cannot be overridden in a subclass.
                reason = unreachable or ("" if below is None else f"{name} is called through super()")
                if not isinstance(member, types.FunctionType):
                    reason = reason or _why_not(name, member)
                method = self._method(name, function, reason)
                found.setdefault((name, below), []).append(function)
                for node, reached, after in _names_reached(method, base, mro):
                    named.append((method, node, (reached, after)))
                    if (reached, after) not in seen:
                        seen.add((reached, after))
                        waiting.append((reached, after))
        for method, node, looked_up in named:
            for function in found.get(looked_up, ()):
                self.analysis.references.setdefault(method.outer, []).append((node, function))

    def _method(self, name: str, function: types.FunctionType, unreachable: str) -> Method:
        self._seen.add(function)
        method = Method(name, function, self.constants, cls=self.source.cls, unreachable=unreachable)
        self._add(method, self.source.split)
        return method

    def _add(self, method: Method, split: frozenset[str]) -> None:
        """Adds the calls of a method, and then of the helpers that it calls."""
        analysis = self.analysis
        self._read.add((method.outer, bool(method.unreachable)))
        calls = list(self._calls_of(method, split))
        analysis.methods.append((method, calls))
        method.asked.clear()
        helpers = _helpers_of(method)
        passed = set(method.asked)
        analysis.asked |= passed
        if not method.unreachable:
            analysis.helpers[method.outer] = []
        for helper, (constants, problem, nodes) in helpers.items():
            analysis.references.setdefault(method.outer, []).extend((node, helper) for node in nodes)
            reason = method.unreachable or problem or method.problem()
            if not reason:
                analysis.helpers[method.outer].append(helper)
            self._seen.add(helper)
            if (helper, bool(reason)) not in self._read:
                self._add(Method(helper.__name__, helper, constants, cls=None, unreachable=reason), frozenset())
            if any(calls for read, calls in analysis.methods if read.outer is helper):
                analysis.used |= passed

    def _calls_of(self, method: Method, split: frozenset[str]) -> Iterator[Call]:
        if not method.available:
            yield from _suspects(method, self.numbers)
            return
        editor = CallEditor(method, self.numbers, split)
        for statement in method.definition.body:
            editor.visit(statement)
        self.analysis.asked |= method.asked
        if method.cls is not None:
            self.analysis.children += editor.children
        for child in editor.children:
            self.analysis.used |= child.constants
        problem = method.problem() if editor.found else ""
        for found in editor.found:
            self.analysis.used |= found.constants
            yield replace(found, problem=found.problem or problem)
        yield from _defaults(method, self.numbers)


def _is_torchs(function: types.FunctionType) -> bool:
    return is_plain(function) and is_plain(unwrapped(function))


def _why_not(name: str, member: object) -> str:
    """Why a function of the class that `forward` does not reach as a method of its own stays as it is."""
    if isinstance(member, staticmethod):
        return f"{name} is a static method, which has no module to keep an expansion"
    if isinstance(member, classmethod):
        return f"{name} is a class method, which has no module to keep an expansion"
    if isinstance(member, property | functools.cached_property):
        return f"{name} is a property"
    return f"forward does not reach {name} by its name"


def _called_from(cls: type, start: str, members: Mapping[str, object]) -> set[str]:
    """The methods that no function of the class but `start`, or one of these, names."""
    named = {
        name: {used for function in functions_of(member) for used in names_in(unwrapped(function).__code__)}
        for name, member in members.items()
    }
    found: set[str] = set()
    waiting = sorted(named.get(start, set()) & members.keys())
    while waiting:
        name = waiting.pop()
        others = [other for other, used in named.items() if name in used and other not in found | {start, name}]
        public = not name.startswith("_") and "act" not in name
        if name in found or others or public:
            continue
        found.add(name)
        waiting += sorted(named[name] & members.keys())
    return found


def _names_reached(method: Method, base: type, mro: tuple[type, ...]) -> Iterator[tuple[ast.AST, str, type | None]]:
    """Where a method looks a name up on self, on super() or on a base class, the name, and after which class."""
    for node in ast.walk(method.definition):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Call) and method.is_super(node.value):
            yield node, node.attr, base
        elif method.is_self(node.value):
            yield node, node.attr, None
        elif isinstance(node.value, ast.Name):
            named = method.resolve(node.value)
            if isinstance(named, type) and named in mro[1:] and not is_plain(named):
                yield node, node.attr, mro[mro.index(named) - 1]


def _suspects(method: Method, numbers: dict[str, int]) -> Iterator[Call]:
    """What may be activation calls in a method without source: names in its code that an activation function has."""
    by_name = {function.__name__: target for function, target in EVERY_TARGET.functions.items()}  # type: ignore[attr-defined]
    for name in names_in(method.function.__code__):
        if name in by_name:
            yield _unread(method, by_name[name].name, method.problem(), numbers)


def _defaults(method: Method, numbers: dict[str, int]) -> Iterator[Call]:
    """The activations that are default arguments: what is called is the argument."""
    function = method.function
    count = function.__code__.co_argcount
    names = function.__code__.co_varnames[:count]
    given = function.__defaults__ or ()
    by_name = (function.__kwdefaults__ or {}).items()
    for name, value in (*zip(names[count - len(given) :], given, strict=True), *by_name):
        callable_ = isinstance(value, types.FunctionType | types.BuiltinFunctionType | functools.partial)
        reference = recognise(value) if callable_ else None
        if reference is not None:
            reason = f"it is the default of the argument {name}, and what that is when it is called is not known"
            yield _unread(method, reference.target, reason, numbers)


def _unread(method: Method, function: str, problem: str, numbers: dict[str, int]) -> Call:
    number = numbers[function] = numbers.get(function, -1) + 1
    code = method.function.__code__
    attribute = f"{function}_expansion_{number}"
    return Call(
        function,
        "function",
        code,
        None,
        None,
        problem=problem,
        attribute=attribute,
        method=method.name,
        line=code.co_firstlineno,
    )


def _helpers_of(method: Method) -> dict[types.FunctionType, tuple[Mapping[str, Scalar], str, list[ast.AST]]]:
    """The functions that a method names and that may hold activations: their arguments that never vary, why their
    calls cannot be replaced, and where they are named."""
    found: dict[types.FunctionType, dict[str, object]] = {}
    problems: dict[types.FunctionType, str] = {}
    nodes: dict[types.FunctionType, list[ast.AST]] = {}
    for node in ast.walk(method.definition) if method.available else ():
        if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        helper = method.resolve(node)
        if not isinstance(helper, types.FunctionType) or recognise(helper) is not None or not activates(helper):
            continue
        call = method.scopes.parents.get(node)
        if isinstance(call, ast.Call) and call.func is node:
            outer = method.scopes.parents.get(call)
            if (isinstance(outer, ast.Call) and outer.func is call) or method.called(call) is not UNRESOLVED:
                continue  # a maker of activations: what it makes is listed where that is called
            given = method.arguments(call, helper)
            problem = method.owner_problem(node)
        elif isinstance(call, ast.Attribute) or _is_decorator(node, method):
            continue
        else:
            given, problem = {}, _HANDED_ON.format(helper.__name__)
        earlier = found.setdefault(helper, given)
        found[helper] = {name: value for name, value in earlier.items() if given.get(name, UNRESOLVED) == value}
        problems[helper] = problems.get(helper) or problem
        nodes.setdefault(helper, []).append(node)
    return {
        helper: (
            {name: value for name, value in given.items() if isinstance(value, Scalar)},
            problems[helper],
            nodes[helper],
        )
        for helper, given in found.items()
    }


def _is_decorator(node: ast.AST, method: Method) -> bool:
    return node not in method.scopes.parents
