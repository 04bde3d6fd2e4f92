"""The passes in their order, and `run`, which takes a model through them.

    find        lists the activations of every graph and module, and notes each on its nodes
    choose      gives each site its config, by targets and name patterns, or the reason why it is left
    substitute  puts a call of a child module at each chosen site; two operators if the graph holds the backward
    initialise  sets the new parameters to the values that the config's init asks for
    lower       replaces each call by one operator node, for a backend that takes the graph as it is

A pass is a function `(model, context) -> number of edits`. The model may be a graph module, may hold graph modules, or
may have none. The context carries the record of each site from one pass to the next. A second run edits nothing. A pass
is switched off by its name, with `disable=` or the environment variable ORTHO_FX_DISABLE_PASSES (names separated by
commas). `graphs=FOLDER` or ORTHO_FX_GRAPHS=FOLDER writes the graphs before and after every pass into files that can be
compared. README.md in this folder describes the design, and how to add a pass.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx, nn

from ortho_fx.batches import Batch
from ortho_fx.config import ExpansionConfig, SiteConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.context import ConfigMap, Context, checked_sharing
from ortho_fx.passes.graph.choose import choose
from ortho_fx.passes.graph.find import find
from ortho_fx.passes.graph.initialise import initialise
from ortho_fx.passes.graph.lower import lower
from ortho_fx.passes.graph.substitute import substitute
from ortho_fx.passes.graph.text import graph_text
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.revert import revert_expansions
from ortho_fx.passes.vocabulary import expansions
from ortho_fx.passes.vocabulary.meaning import one_look
from ortho_fx.passes.vocabulary.sites import NOTE, Site, format_sites
from ortho_fx.passes.vocabulary.targets import choose_targets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Pass = Callable[[nn.Module, Context], int]


class Passes(dict[str, Pass]):
    """The passes by name, in their order. Each is a function `(model, context) -> number of edits`.

    `print(PASSES)` lists them, each with the first sentence of its docstring.
    """

    def __repr__(self) -> str:
        width = max(map(len, self))
        told = (re.split("[;.]", one.__doc__ or "")[0] for one in self.values())
        lines = (f"{name:<{width}}  {text}" for name, text in zip(self, told, strict=True))
        return "\n".join(f"{number} {line}" for number, line in enumerate(lines, 1))


PASSES = Passes(find=find, choose=choose, substitute=substitute, initialise=initialise, lower=lower)

DISABLE_VARIABLE, GRAPHS_VARIABLE = "ORTHO_FX_DISABLE_PASSES", "ORTHO_FX_GRAPHS"


@dataclass(frozen=True)
class Record:
    """What a run of the passes did; `print(record)` shows two tables.

    Attributes:
        edits: the number of edits of each pass that ran, by its name.
        sites: every site; a site that was left has the reason.
        disabled: the passes that were switched off.
        earlier: how many expansions the model held before.
        gradients: the names of the new parameters whose gradients are the last outputs of the graph, in order; empty
            unless a graph holds its own backward.
        occurrences: what the passes know about each site.
    """

    edits: Mapping[str, int]
    sites: tuple[Site, ...]
    disabled: tuple[str, ...] = ()
    earlier: int = 0
    gradients: tuple[str, ...] = ()
    occurrences: tuple[Occurrence, ...] = field(default=(), repr=False, compare=False)

    @property
    def replaced(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.reason)

    @property
    def left(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.reason)

    @property
    def advice(self) -> tuple[str, ...]:
        """What a user of the rewritten model has to know besides."""
        told = (one.advice for one in self.occurrences if one.expansion is not None)
        return tuple(dict.fromkeys(filter(None, told)))

    def __str__(self) -> str:
        width = max(map(len, PASSES))
        lines = [f"{'pass':<{width}}  edits"]
        for name in PASSES:
            fate = "disabled" if name in self.disabled else "not run"
            lines.append(f"{name:<{width}}  {self.edits.get(name, fate)}")
        if self.sites:
            lines += ["", format_sites(self.sites)]
        if self.gradients:
            lines += ["", f"gradients after the other outputs: {', '.join(self.gradients)}"]
        return "\n".join(lines)


def run(
    model: nn.Module,
    config: ExpansionConfig | ConfigMap | None = None,
    *,
    targets: Iterable[str] | None = None,
    sharing: str = "instance",
    example_inputs: Batch | None = None,
    disable: Iterable[str] = (),
    until: str | None = None,
    graphs: str | os.PathLike[str] | None = None,
    maker: expansions.Maker | None = None,
    process_group: ProcessGroup | str | None = None,
    known: Mapping[str, SiteConfig] | None = None,
) -> Record:
    """Takes a model through `PASSES`, in place.

    Args:
        model: a graph module, from `symbolic_trace`, `torch.export`, `make_fx` or Dynamo, or any other module.
        config, targets, sharing, example_inputs, process_group: as in `ortho_fx.rewrite_`.
        disable: names of passes to leave out.
        until: the last pass to run; all passes run when omitted. A run that ends before substitute changes only notes.
        graphs: a folder for the graphs before and after each pass: 0_before.txt, 1_find.txt and so on.
        maker: makes and calibrates expansions; ortho_fx's own when omitted.
        known: what is known of sites from an earlier rewrite, by name; their channels then need no example_inputs.

    Returns:
        The record of the run: the number of edits of each pass, and every site.

    Raises:
        OrthoFxError: an unknown pass, target or sharing, a model with nothing to replace, or an error of a pass. The
            model is then unchanged.
    """
    disabled = disabled_passes(disable)
    _check_name(until, "until=")
    modules = list(model.modules())
    context = Context(
        config=config,
        table=choose_targets(targets),
        sharing=checked_sharing(sharing),
        example_inputs=example_inputs,
        maker=maker or expansions.provided(),
        replaces=until not in ("find", "choose") and {"find", "substitute"}.isdisjoint(disabled),
        process_group=process_group,
        known=known or {},
        graphs=tuple(module for module in modules if isinstance(module, fx.GraphModule)),
        earlier=sum(isinstance(module, expansions.Expansion) for module in modules),
    )
    folder = _folder(graphs)
    _write(folder, "0_before", model)
    notes = {(owner, node.name): node.meta.get(NOTE) for owner in context.graphs for node in owner.graph.nodes}
    backups: dict[fx.GraphModule, fx.Graph] = {}
    edits = {}
    try:
        for number, (name, run_pass) in enumerate(PASSES.items(), 1):
            if name == "substitute" and name not in disabled:
                backups = {owner: copy.deepcopy(owner.graph) for owner in context.graphs}
            if name not in disabled:
                with one_look():
                    edits[name] = run_pass(model, context)
            else:
                _leave_undone(name, context)
            _write(folder, f"{number}_{name}", model)
            if name == until:
                break
    except BaseException:
        _undo(model, context, backups, notes)
        raise
    return Record(
        edits,
        tuple(occurrence.site for occurrence in context.occurrences),
        tuple(disabled),
        context.earlier,
        tuple(_gradients(context)),
        tuple(context.occurrences),
    )


def disabled_passes(names: Iterable[str]) -> list[str]:
    """The passes that these names and the environment variable switch off, in order.

    Raises:
        OrthoFxError: an unknown pass name.
    """
    asked = [(name, "disable=") for name in ((names,) if isinstance(names, str) else names)]
    asked += [(name.strip(), DISABLE_VARIABLE) for name in os.environ.get(DISABLE_VARIABLE, "").split(",")]
    for name, where in asked:
        _check_name(name, where)
    return [name for name in PASSES if any(name == other for other, _ in asked)]


def _check_name(name: str | None, where: str) -> None:
    if name and name not in PASSES:
        raise OrthoFxError(f"unknown pass {name!r} in {where}; passes are {', '.join(PASSES)}")


def _leave_undone(name: str, context: Context) -> None:
    """Marks the sites that stay because this pass is disabled, with that as the reason."""
    for occurrence in context.occurrences:
        undecided = name == "choose" or (name == "substitute" and occurrence.config is not None)
        if undecided and not occurrence.site.reason:
            occurrence.config = None
            occurrence.describe(reason=f"the pass {name} is disabled", expansion=None)
            occurrence.note()


def _gradients(context: Context) -> Iterable[str]:
    for occurrence in context.occurrences:
        if occurrence.expansion is not None and occurrence.backward is not None:
            yield from (f"{occurrence.site.name}.{name}" for name in occurrence.expansion.basis.learnable)


def _undo(
    model: nn.Module,
    context: Context,
    backups: Mapping[fx.GraphModule, fx.Graph],
    notes: Mapping[tuple[fx.GraphModule, str], Site | None],
) -> None:
    """Puts the model back as it was before the run."""
    ours = [occurrence for occurrence in context.occurrences if occurrence.expansion is not None]
    if ours:
        for owner, graph in backups.items():
            owner.graph = graph
    for occurrence in ours:
        key = occurrence.site.name.rpartition(".")[2]
        if occurrence.match is not None and key in occurrence.owner._modules:
            delattr(occurrence.owner, key)
    chosen = {id(occurrence.expansion) for occurrence in ours}
    revert_expansions(model, lambda expansion: id(expansion) in chosen)
    for owner in context.graphs:
        for node in owner.graph.nodes:
            note = notes.get((owner, node.name))
            node.meta.pop(NOTE, None)
            if note is not None:
                node.meta[NOTE] = note


# The folders into which this process has written graphs, each with the number of runs.
_WRITTEN: dict[Path, int] = {}


def _folder(graphs: str | os.PathLike[str] | None) -> Path | None:
    """The folder for the graphs of this run; each run after the first gets its own subfolder."""
    if graphs is not None:
        return Path(graphs)
    asked = os.environ.get(GRAPHS_VARIABLE)
    if not asked:
        return None
    folder = Path(asked)
    number = _WRITTEN[folder] = _WRITTEN.get(folder, 0) + 1
    return folder if number == 1 else folder / f"run_{number}"


def _write(folder: Path | None, name: str, model: nn.Module) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(graph_text(model), encoding="utf-8")
