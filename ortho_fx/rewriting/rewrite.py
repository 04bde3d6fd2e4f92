"""`rewrite_`, `find_sites`, `revert_`: replace the activations of a model by expansions, list them, put them back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ortho_fx.activations.expansion import make_activation
from ortho_fx.arguments import checked_model
from ortho_fx.batches import Batch
from ortho_fx.config import ExpansionConfig, configs_of
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes import pipeline
from ortho_fx.passes.context import checked_sharing
from ortho_fx.passes.observe import observe
from ortho_fx.passes.revert import revert_expansions
from ortho_fx.passes.search import find_occurrences
from ortho_fx.passes.vocabulary import expansions
from ortho_fx.passes.vocabulary.recognise import OWN_ATTRIBUTES
from ortho_fx.passes.vocabulary.sites import Site, format_sites, join
from ortho_fx.passes.vocabulary.targets import choose_targets
from ortho_fx.rewriting.adapters import adapters_that_miss, held_by_adapters, tell
from ortho_fx.rewriting.calibration import calibrate_expansions
from ortho_fx.rewriting.check import Check, check_model
from ortho_fx.rewriting.late import watch_optimizers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

expansions.provide(expansions.Maker(make_activation, calibrate_expansions))


@dataclass(frozen=True)
class RewriteReport:
    """The result of `rewrite_`: what happened to every site; `print(report)` shows a table.

    Attributes:
        sites: the sites, in the order of the model's modules; a site that was left has the reason.
        earlier: how many expansions the model held before.
        model: the model.
        notes: what has to be done besides, a sentence each; each was a warning as well.
    """

    sites: tuple[Site, ...]
    earlier: int = 0
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def replaced(self) -> tuple[Site, ...]:
        """The activations that were replaced; of several calls that share an expansion, each is one."""
        return tuple(call for site in self.sites if not site.reason for call in site.calls)

    @property
    def left(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.reason)

    def check(self, inputs: Batch) -> Check:
        """Runs copies of the model on these inputs in train and in eval mode, and reports problems.

        Problems are expansions that are never called or in one mode only, in-place activations whose input is read
        again, outputs that are not finite, and activations that run although this report does not name them.

        Raises:
            OrthoFxError: the model no longer holds an expansion.
        """
        assert self.model is not None
        return check_model(self.model, inputs, self.sites)

    def to_json(self) -> str:
        """The sites as a JSON list, each with the fields of `Site`."""
        return json.dumps([asdict(site) for site in self.sites], indent=1)

    def __str__(self) -> str:
        parameters = sum(site.parameters for site in self.replaced)
        summary = f"{len(self.replaced)} replaced, {len(self.left)} left, {parameters} new parameters"
        if self.earlier:
            summary += f"; the model already held {self.earlier} expansions"
        summary = "\n".join([summary, *self.notes])
        return f"{format_sites(self.sites)}\n{summary}" if self.sites else summary


def find_sites(
    model: nn.Module,
    example_inputs: Batch | None = None,
    *,
    targets: Iterable[str] | None = None,
    sharing: str = "instance",
) -> list[Site]:
    """Lists the activations that `rewrite_` would replace, and those that it would leave, with the reason.

    Args:
        model: any module; it is not changed.
        example_inputs: inputs for a run of a copy of the model; a site that the run does not reach then has that as its
            reason.
        targets: activation functions by name ("relu", "gelu", "sigmoid" ...); by default all that are not gates.
        sharing: as in `rewrite_`.

    Returns:
        The sites, in the order of the model's modules. The reason is empty for those that would be replaced.

    Raises:
        OrthoFxError: an unknown target or sharing, or a scripted model.
    """
    table = choose_targets(targets)
    sites = [
        occurrence.site for occurrence in find_occurrences(_checked(model), table, sharing=checked_sharing(sharing))
    ]
    if example_inputs is None:
        return sites
    observations = observe(model, table, example_inputs, sharing=sharing)
    unreached = "example_inputs do not reach it"
    return [
        site if site.reason or seen.inputs.samples else replace(site, reason=unreached)
        for site, seen in zip(sites, observations, strict=True)
    ]


def rewrite_(
    model: nn.Module,
    config: ExpansionConfig | str | Mapping[str, Any] | None = None,
    *,
    basis: str | None = None,
    targets: Iterable[str] | None = None,
    sharing: str = "instance",
    example_inputs: Batch | None = None,
    disable: Iterable[str] = (),
    process_group: ProcessGroup | str | None = None,
) -> RewriteReport:
    """Replaces the activations of a model by learnable expansions, in place.

    Activation modules are replaced, both PyTorch's and those of libraries: a leaf module without parameters is
    identified by the values that it computes. A module may also call an activation in its own methods, or write out its
    formula there. It then gets a subclass of its class, whose methods call an expansion instead. Parameters take the
    device and the dtype of neighbouring parameters. The model's `no_weight_decay()`, which other libraries ask for,
    names them too. Call `rewrite_` before you make the optimizer, DDP or FSDP. A second call changes nothing.

    Args:
        model: any module; a `torch.fx.GraphModule`, such as that of an exported program, is rewritten in its graph.
        config: one config for every site (`ExpansionConfig()` when omitted), or a map from patterns of site names to
            configs. A config may be an `ExpansionConfig`, a name ("fourier", or "hermite3" for degree 3), or a map of
            the fields of `ExpansionConfig`. A pattern is an exact name, a glob ("blocks.*.act"), or "re:" with a
            regular expression for the whole name. The first pattern that matches decides. Sites with the config None or
            without a match are left.
        basis: the basis, for a call without a config: `rewrite_(model, basis="fourier")`.
        targets: activation functions by name; by default all that are not gates.
        sharing: "instance" (a module that stands in several places, or is called several times, becomes one expansion,
            and so do calls in source of which one run makes one at most, see `ortho_fx.passes.source.alternatives`),
            "call" (the same, but each call of a function in source gets its own expansion) or "site" (each place, and
            each call in the owner's source, gets its own expansion).
        example_inputs: a tensor, a tuple of positional arguments or a map of keyword arguments, on which a copy of the
            model runs. It is needed for init="calibrated", and for expansions per channel or group, whose channel
            dimension follows from the layers before. With it, init="fit" weights the fit by the measured inputs of each
            activation (by N(mean, std^2) of them if they are few); without it, by N(0, 1).
        disable: names of passes of `ortho_fx.passes.pipeline` to leave out; "lower" is always left out.
        process_group: where `torch.distributed` is initialised, the processes whose example_inputs count together; all
            of them when omitted, each of which has to call this, and "alone" for this one only.

    Returns:
        Every site, with its expansion or the reason why it was left.

    Raises:
        OrthoFxError: a model with nothing to replace, a scripted model, a model that DDP, FSDP or tensor
            parallelism has wrapped or sharded already, a device that is not available, a pattern that matches no site,
            patterns that disagree on a shared site, an unknown target or pass, a config that needs
            example_inputs, or inputs that are constant or not finite. The model is then unchanged.

    Source: the expansions are those of Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> print(rewrite_(model, ExpansionConfig(basis="hermite", degree=3)))
        name  kind    function  expansion  parameters
        1     module  gelu      hermite 3  4
        1 replaced, 0 left, 4 new parameters
    """
    if basis is not None:
        if config is not None:
            raise OrthoFxError(f"the basis {basis!r} comes on top of a config: put it into the config")
        config = ExpansionConfig(basis)
    record = pipeline.run(
        _checked(model),
        configs_of(config),
        targets=targets,
        sharing=sharing,
        example_inputs=example_inputs,
        # Without `lower` the expansions stay module calls, which hooks, `freeze_` and `calibrate_` need. The compiler
        # of the model lowers them later.
        disable=(*((disable,) if isinstance(disable, str) else disable), "lower"),
        process_group=process_group,
    )
    new = list(dict.fromkeys(one.expansion for one in record.occurrences if one.expansion is not None))
    tell(model, new)
    watch_optimizers(model, new)
    missed = (*_optimizers_that_miss(model, new), *adapters_that_miss(model, new))
    notes = (*record.advice, *missed) if record.replaced else ()
    for note in notes:
        warnings.warn(f"ortho_fx: {note}", stacklevel=2)
    return RewriteReport(record.sites, record.earlier, model, notes)


def _optimizers_that_miss(model: nn.Module, new: Sequence[expansions.Expansion]) -> Iterator[str]:
    """A sentence for each optimizer that a module of the model keeps, and that does not have the new parameters."""
    kept = [
        (join(prefix, key), optimizer)
        for prefix, module in model.named_modules()
        if not isinstance(module, expansions.Expansion)
        for key, value in vars(module).items()
        if key not in OWN_ATTRIBUTES
        for optimizer in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        )
        if isinstance(optimizer, torch.optim.Optimizer)
    ]
    if not kept:
        return
    ours = {id(parameter) for expansion in new for parameter in expansion.parameters()}
    parameters = {id(parameter) for parameter in model.parameters()} - ours
    for name, optimizer in kept:
        has = {id(one) for group in optimizer.param_groups for one in group["params"]}
        if has & parameters and not ours <= has:
            yield (
                f"the optimizer {name} ({type(optimizer).__name__}) was made before the rewrite and does not have the "
                "new parameters, which would not learn: make it anew"
            )


@dataclass(frozen=True)
class RevertReport:
    """What `revert_` did; `print(report)` is a line each.

    Attributes:
        names: the qualified names of the expansions, frozen ones as well, that are gone.
        kept: those of the expansions that stay, since they were built into the model.
    """

    names: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*(f"{name}: reverted" for name in self.names), *(f"{name}: kept" for name in self.kept)])


def revert_(model: nn.Module) -> RevertReport:
    """Puts back every activation that `rewrite_` replaced, in place; all other parameters keep their learned values.

    Expansions that were built into the model, and replaced nothing, stay.

    Raises:
        OrthoFxError: a model in which no activation was replaced, one whose expansions belong to adapters, or a
            scripted model.
    """
    if held_by_adapters(_checked(model)):
        raise OrthoFxError(
            f"the expansions of this {type(model).__name__} belong to its adapters: model.unload() removes both, and "
            "model.merge_and_unload() makes the expansions the model's own"
        )
    names = revert_expansions(model, lambda expansion: True)
    if not names:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion that rewrite_ put there")
    kept = (name for name, module in model.named_modules() if isinstance(module, expansions.Expansion))
    return RevertReport(names, tuple(kept))


def _checked(model: nn.Module) -> nn.Module:
    checked_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise OrthoFxError(f"{model.original_name} is scripted: rewrite the module that it was scripted from")
    return model
