"""The calls in source of real models: which of them the mode gets, under which names, and whether values agree."""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from architectures import Spec, build
from function_mode_calls import Calls, answer_by, enter, leave, with_mode
from oracle import tensors
from torch import Tensor, nn

from ortho_fx import Site
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.search import find_occurrences
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.recognise import function_of
from ortho_fx.passes.vocabulary.targets import choose_targets

COVERAGE = Path(__file__).parent / "results" / "coverage.json"
IN_SOURCE = ("function", "method", "built in forward", "formula", "call")


def is_source(occurrence: Occurrence) -> bool:
    return occurrence.site.kind in IN_SOURCE


class Marker(Expansion):
    """A function that is no activation, and how often it is called."""

    calls = 0

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        self.calls += 1
        return 0.6 * x + 0.2 * torch.cos(x)


Frames = tuple[tuple[str, int, int, int], ...]  # each as file, first and last line, instruction; the innermost first
LOG: list[tuple[nn.Module, list[tuple[str, Frames]]]] = []


class Seen(Calls):
    """Notes the calls of each forward and where they stand, and changes nothing."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self.calls: list[tuple[str, Frames]] = []
        LOG.append((owner, self.calls))

    def answer(self, name, func, args, kwargs):
        frame, frames = sys._getframe(2), []
        while frame is not None and frame.f_code.co_filename != enter.__code__.co_filename:
            first, last, *_ = list(frame.f_code.co_positions())[frame.f_lasti // 2]
            if "/torch/" not in frame.f_code.co_filename:
                frames.append((Path(frame.f_code.co_filename).name, first or 0, last or first or 0, frame.f_lasti))
            frame = frame.f_back
        self.calls.append((name, tuple(frames)))
        return func(*args, **kwargs)


Log = list[tuple[str, list[tuple[str, Frames]]]]  # the calls of each forward, by the owner's name


def seen(model: nn.Module, run: Callable[[nn.Module], Any]) -> Log:
    """What modes of all modules but PyTorch's and activations get in one run."""
    names = {module: name for name, module in model.named_modules()}
    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in names]
    classes = {m: type(m) for m in names if not isinstance(m, Expansion) and function_of(m) is None}
    classes = {m: cls for m, cls in classes.items() if cls.__module__.split(".")[0] != "torch"}
    LOG.clear()
    try:
        for module, cls in classes.items():
            module.__class__ = with_mode(cls, Seen)
        run(model)
        return [(names[owner], calls) for owner, calls in LOG if calls]
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
        for hook in hooks:
            hook.remove()


Forward = Callable[[nn.Module], list[Tensor]]


def runs(inputs: dict[str, Any]) -> dict[str, Forward]:
    """Ways to run a model that may take other branches; not every model takes the last two."""

    def run(model: nn.Module, training: bool = False, **changed: Any) -> list[Tensor]:
        model.train(training)
        torch.manual_seed(1)
        with torch.no_grad():
            return [t for t in tensors(model(**{**inputs, **changed})) if t.is_floating_point()]

    found: dict[str, Forward] = {"eval": run, "train": functools.partial(run, training=True)}
    tokens = inputs.get("input_ids")
    if tokens is None or tokens.dim() != 2:
        return found
    length = tokens.shape[1]
    cut = {
        name: value[:, : length // 2]
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length
    }

    def cached(model: nn.Module) -> list[Tensor]:
        model.eval()
        with torch.no_grad():
            output = model(**inputs, use_cache=True)
            (name,) = {"past_key_values", "cache", "cache_params"} & output.keys()
            output = model(input_ids=tokens[:, -1:], use_cache=True, **{name: output[name]})
            return [t for t in tensors(output) if t.is_floating_point()]

    return found | {"half": functools.partial(run, **cut), "cached": cached}


def works(run: Forward, model: nn.Module) -> bool:
    try:
        run(model)
    except Exception:
        return False
    return True


def fates(sites: dict[str, Site], called: dict[str, int], logs: Iterable[Log]) -> tuple[dict[str, str], int]:
    """What the mode makes of each site of the source front end; how many calls it gets that are none of these."""
    where = defaultdict(set)  # the sites that a name stands for
    names = defaultdict(set)  # the names that a site has
    numbers = defaultdict(set)  # how often one forward calls a site
    new = set()
    for log in logs:
        for owner, calls in log:
            in_this = Counter[str]()
            for name, frames in calls:
                at = {site for site in sites if site.rpartition(".")[0] == owner and stands_in(sites[site], frames)}
                new |= set() if at else {(owner, frames)}
                where[owner, name] |= at or {str(frames)}
                in_this.update(at)
                for site in at:
                    names[site].add((owner, name))
            for site, number in in_this.items():
                numbers[site].add(number)
    fate = {}
    for name, site in sites.items():
        if not called[name]:
            fate[name] = "no run calls it, so it has no name"
        elif site.kind == "formula" or not names[name]:
            fate[name] = "not seen: it is computed by other operations"
        elif len(numbers[name]) > 1:
            fate[name] = "names whose number varies"
        elif len(names[name]) > 1:
            fate[name] = "a name for each turn of a loop"
        elif len(where[next(iter(names[name]))]) > 1:
            fate[name] = "a name that another branch has too"
        else:
            fate[name] = "the same"
    return fate, len(new)


def stands_in(site: Site, frames: Frames) -> bool:
    return any(file == name and first <= line <= last for name, first, last, _ in frames for file, line in site.lines)


def measure_model(spec: Spec) -> dict[str, Any]:
    model, inputs = build(spec)
    for one in find_occurrences(model, choose_targets(None)):
        if not is_source(one) and not one.site.reason:
            one.substitute(Marker())
    possible = {name: run for name, run in runs(inputs).items() if works(run, copy.deepcopy(model))}
    edited, answered, watched = (copy.deepcopy(model) for _ in range(3))
    calls = [one for one in find_occurrences(edited, choose_targets(None)) if is_source(one)]
    left = [one.site.reason for one in calls if one.site.reason and "gate" not in one.site.reason]
    calls = [one for one in calls if not one.site.reason]
    markers = {one.site.name: Marker() for one in calls}
    for one in calls:
        one.substitute(markers[one.site.name])
    logs = {name: seen(watched, run) for name, run in possible.items()}
    modules = dict(answered.named_modules())
    found = defaultdict(set)
    for log in (logs["eval"], logs.get("train", [])):
        for owner, forward in log:
            found[owner] |= {name for name, _ in forward}
    for owner, names in found.items():
        answer_by(modules[owner], {name: Marker() for name in names})
    counts = {}
    row: dict[str, Any] = {"left": dict(Counter(left)), "sites": len(calls), "names": sum(map(len, found.values()))}
    differs = []
    for name, run in possible.items():
        before = {site: marker.calls for site, marker in markers.items()}
        wanted, got = run(edited), run(answered)
        counts[name] = {site: marker.calls - before[site] for site, marker in markers.items()}
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(wanted, got, strict=True)):
            differs.append(name)
    row["another_value"] = " ".join(differs)
    called = {site: marker.calls for site, marker in markers.items()}
    fate, row["new"] = fates({one.site.name: one.site for one in calls}, called, logs.values())
    row["fates"] = dict(Counter(fate.values()))
    with_cache = [site for site in called if called[site] and called[site] == counts.get("cached", {}).get(site)]
    row["called_with_a_cache_only"] = len(with_cache)
    row["runs"] = " ".join(possible)
    return {key: value for key, value in row.items() if value not in ("", {}, 0)}


def coverage(pattern: str) -> dict[str, Any]:
    transformers.logging.set_verbosity_error()
    rows = {}
    for known in json.loads(COVERAGE.read_text())["rows"]:
        replaced, left = known.get("replaced", {}), " ".join(known.get("left", {}))
        if (set(replaced) & set(IN_SOURCE) or "only when it runs" in left) and fnmatch.fnmatch(known["name"], pattern):
            row = rows[known["name"]] = measure_model(Spec(known["library"], known["name"]))
            print(known["name"], row, flush=True)
    total = Counter[str]()
    models = Counter[str]()
    for row in rows.values():
        total.update(row.get("fates", {}))
        models.update(row.get("fates", {}).keys())
    summary = {
        "libraries": {library.__name__: library.__version__ for library in (timm, transformers)},
        "models": len(rows),
        "sites that source replaces": sum(row.get("sites", 0) for row in rows.values()),
        "calls that source leaves, gates aside": sum(sum(row.get("left", {}).values()) for row in rows.values()),
        "calls that run, and that only the mode gets": sum(row.get("new", 0) for row in rows.values()),
        "source sites by what the mode makes of them": dict(total.most_common()),
        "models of these": dict(models.most_common()),
        "models with another value": sum("another_value" in row for row in rows.values()),
        "sites that only runs with a cache call": sum(r.get("called_with_a_cache_only", 0) for r in rows.values()),
        "models of these sites": sum("called_with_a_cache_only" in row for row in rows.values()),
    }
    print(json.dumps(summary, indent=1))
    return {"summary": summary, "rows": rows}
