"""The layer of each parameter, for learning rates that fall with the distance from the output.

A model of timm says in `group_matcher()` how the names of its parameters tell their layers. In other models the blocks
of the longest list are the layers: the items of an nn.ModuleList or nn.Sequential.
"""

from __future__ import annotations

import bisect
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.modules.undecayed import learned_parameters
from ortho_fx.passes.vocabulary.sites import WRAPPERS, join, plain_name

# Layers are sorted by such keys.
_Key = tuple[float, ...]
_TOP: _Key = (math.inf,)
# By timm's convention the last number of a key that belongs to the layer before it.
_WITH_PREVIOUS = 99999


def layers_of(model: nn.Module) -> tuple[dict[int, int], int]:
    """The layer of each parameter by its id, from 0 at the input on, and the number of the last layer.

    Only the model's own parameters make layers, so expansions change no layer of theirs. An expansion is in the layer
    that its name says, or else in that of the parameters before it.

    Raises:
        OrthoFxError: neither a `group_matcher()` nor a list of blocks, or more than one that could be meant.
    """
    parameters = list(model.named_parameters())
    learned = learned_parameters(model)
    matched = list(_matched(model))
    if len(matched) > 1:
        names = ", ".join(prefix or type(module).__name__ for prefix, module in matched)
        raise OrthoFxError(
            f"layer_decay: {names} have a group_matcher() each, and none tells the depth of the whole "
            f"{type(model).__name__}: call param_groups for each of them"
        )
    keys = _matcher_keys(*matched[0], model) if matched else _block_keys(model)
    own = sorted({keys[id(parameter)] for _, parameter in parameters if id(parameter) not in learned})
    number: dict[_Key, int] = {}
    for key in own:
        joins = bool(number) and key[-1] == _WITH_PREVIOUS
        number[key] = max(number.values(), default=-1) + (not joins)
    layers: dict[int, int] = {}
    last = 0
    for _, parameter in parameters:
        key = keys[id(parameter)]
        if id(parameter) not in learned:
            last = layers[id(parameter)] = number[key]
        elif key == _TOP:
            layers[id(parameter)] = last
        else:
            layers[id(parameter)] = number[own[max(bisect.bisect_right(own, key) - 1, 0)]]
    return layers, max(number.values(), default=0)


def _matched(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that have a `group_matcher`."""
    if inspect.getattr_static(module, "group_matcher", None) is not None:
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _matched(child, join(prefix, name))


def _matcher_keys(prefix: str, matched: nn.Module, model: nn.Module) -> dict[int, _Key]:
    """The keys by a module's `group_matcher`; what comes before the module is in layer 0, and after it in the last."""
    ask: Any = matched.group_matcher
    key_of = _reader(matched, ask(coarse=False))
    inside = {id(parameter): key_of(plain_name(name)) for name, parameter in matched.named_parameters()}
    keys: dict[int, _Key] = {}
    entered = False
    for _, parameter in model.named_parameters():
        entered |= id(parameter) in inside
        keys[id(parameter)] = inside.get(id(parameter), _TOP if entered else (-1.0,))
    return keys


def _reader(module: nn.Module, matcher: Any) -> Callable[[str], _Key]:
    """The function that gives the key of a name.

    A matcher is a function, or a map from names of groups to patterns. The key of a name is the position of the first
    group with a pattern that matches, the numbers that the pattern captures, and the numbers that stand beside it.
    """

    def refuse(problem: str) -> OrthoFxError:
        return OrthoFxError(f"layer_decay: group_matcher() of {type(module).__name__} {problem}")

    if callable(matcher):

        def asked(name: str) -> _Key:
            key = matcher(name)
            if key is None:
                return _TOP
            return tuple(map(float, key)) if isinstance(key, Iterable) else (float(key),)

        return asked
    if not isinstance(matcher, Mapping):
        raise refuse(f"must give a map of patterns or a function; got {type(matcher).__name__}")
    rules: list[tuple[re.Pattern[str], int, Sequence[float]]] = []
    for position, patterns in enumerate(matcher.values()):
        if patterns is None:
            continue
        for pattern, beside in [(patterns, None)] if isinstance(patterns, str) else patterns:
            rules.append((re.compile(pattern), position, beside or ()))

    def read(name: str) -> _Key:
        for pattern, position, beside in rules:
            found = pattern.match(name)
            if found:
                captured = [part for part in found.groups() if part is not None]
                try:
                    return (float(position), *map(float, captured), *map(float, beside))
                except ValueError:
                    raise refuse(f"captures {captured} of {name}; a layer needs numbers") from None
        return _TOP

    return read


def _block_keys(model: nn.Module) -> dict[int, _Key]:
    """The keys by position: before the blocks, in one of them, behind them. What is between goes with the next."""
    blocks = _blocks(model)
    inside = {id(parameter): number for number, block in enumerate(blocks) for parameter in block.parameters()}
    keys: dict[int, _Key] = {}
    seen = -1
    learned = learned_parameters(model)
    for _, parameter in model.named_parameters():
        if id(parameter) in inside:
            number = inside[id(parameter)]
            seen = max(seen, number)
            keys[id(parameter)] = (float(number),)
        elif id(parameter) in learned:
            keys[id(parameter)] = _TOP
        elif seen < 0:
            keys[id(parameter)] = (-1.0,)
        else:
            keys[id(parameter)] = (float(seen + 1),) if seen + 1 < len(blocks) else _TOP
    return keys


def _blocks(model: nn.Module) -> list[nn.Module]:
    lists: dict[str, list[nn.Module]] = {}
    simple: dict[str, list[nn.Module]] = {}
    learned = learned_parameters(model)

    def visit(owner: str, name: str, module: nn.Module) -> None:
        if isinstance(module, _LISTS):
            items = [item for item in _items(module) if any(id(one) not in learned for one in item.parameters())]
            made = [item for item in items if item._modules]
            if _repeats(made):
                lists.setdefault(owner, []).extend(made)
                return
            if _repeats(items):
                simple.setdefault(owner, []).extend(items)
        for key, child in module.named_children():
            visit(name, join(name, key), child)

    visit("", "", model)
    # Lists of layers, such as the perceptron of a block, count only where there is no list of blocks.
    found = sorted((lists or simple).items(), key=lambda item: -len(item[1]))
    if not found:
        raise OrthoFxError(
            f"layer_decay needs the layers of {type(model).__name__}, which has no nn.ModuleList or nn.Sequential of "
            "two or more blocks of one class: give it a method group_matcher(coarse=False), as timm's models have, "
            r'that returns such as {"stem": r"^embed", "blocks": r"^blocks\.(\d+)"}'
        )
    (owner, blocks), *others = found
    rivals = [other for other in others if 2 * len(other[1]) >= len(blocks)]
    if rivals:
        shown = ", ".join(
            f"{name or type(model).__name__} ({len(held)} of {type(held[0]).__name__})"
            for name, held in [(owner, blocks), *rivals]
        )
        raise OrthoFxError(
            f"layer_decay needs one order of the layers of {type(model).__name__}, which has several lists of blocks: "
            f"those in {shown}. Give it a method group_matcher(coarse=False), as timm's models have"
        )
    return blocks


_LISTS = (nn.Sequential, nn.ModuleList)


def _items(module: nn.Module) -> Iterator[nn.Module]:
    """The items of a list, and those of lists in it, without their wrappers."""
    for child in map(_unwrapped_module, module.children()):
        if isinstance(child, _LISTS):
            yield from _items(child)
        else:
            yield child


def _unwrapped_module(module: nn.Module) -> nn.Module:
    inside = next((module._modules[key] for key in WRAPPERS if key in module._modules), None)
    return module if inside is None else _unwrapped_module(inside)


def _repeats(items: Sequence[nn.Module]) -> bool:
    return max(Counter(type(item).__qualname__ for item in items).values(), default=0) > 1
