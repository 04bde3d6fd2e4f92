"""`rewrite_` and `find_sites`: from any model to the same model with learnable activations, and what was done to it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ortho_fx.activations.expansion import make_activation
from ortho_fx.batches import Batch
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes import pipeline
from ortho_fx.passes.context import ConfigMap, shares
from ortho_fx.passes.observe import observe
from ortho_fx.passes.revert import revert_expansions
from ortho_fx.passes.search import find_occurrences
from ortho_fx.passes.vocabulary import expansions
from ortho_fx.passes.vocabulary.sites import Site, format_sites
from ortho_fx.passes.vocabulary.targets import choose_targets
from ortho_fx.rewriting.calibration import calibrate_expansions
from ortho_fx.rewriting.check import Check, check_model

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

expansions.provide(expansions.Maker(make_activation, calibrate_expansions))


@dataclass(frozen=True)
class RewriteReport:
    """What `rewrite_` did: every site with its fate; `print(report)` is a table.

    Attributes:
        sites: the sites in the order of the model's modules, those that were left with the reason.
        earlier: how many expansions the model held before.
        model: the model.
    """

    sites: tuple[Site, ...]
    earlier: int = 0
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def replaced(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.reason)

    @property
    def left(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.reason)

    def check(self, inputs: Batch) -> Check:
        """Runs copies of the model with these inputs in train and in eval mode, and names what is not as it should be:
        expansions that are never called, or in one mode only, and in-place activations whose input is read again.

        Raises:
            OrthoFxError: a model that holds no expansion any more, or that cannot be copied.
        """
        assert self.model is not None
        return check_model(self.model, inputs)

    def to_json(self) -> str:
        """The sites as a JSON list, each with the fields of `Site`."""
        return json.dumps([asdict(site) for site in self.sites], indent=1)

    def __str__(self) -> str:
        parameters = sum(site.parameters for site in self.replaced)
        summary = f"{len(self.replaced)} replaced, {len(self.left)} left, {parameters} new parameters"
        if self.earlier:
            summary += f"; the model already held {self.earlier} expansions"
        return f"{format_sites(self.sites)}\n{summary}" if self.sites else summary


def find_sites(
    model: nn.Module,
    example_inputs: Batch | None = None,
    *,
    targets: Iterable[str] | None = None,
    sharing: str = "instance",
) -> list[Site]:
    """The activations that `rewrite_` would replace, and those that it would not, with the reason; changes nothing.

    Args:
        model: any module.
        example_inputs: what to run a copy of the model with; sites that it does not reach are then listed with that.
        targets: activation functions by name ("relu", "gelu", "sigmoid" ...); by default every one that is not a gate.
        sharing: as in `rewrite_`.

    Raises:
        OrthoFxError: a target or a sharing that is not known, or a scripted model.
    """
    table, share = choose_targets(targets), shares(sharing)
    sites = [occurrence.site for occurrence in find_occurrences(_checked(model), table, share=share)]
    if example_inputs is None:
        return sites
    observations = observe(model, table, example_inputs, share=share)
    unreached = "example_inputs do not reach it"
    return [
        site if site.reason or seen.inputs.samples else replace(site, reason=unreached)
        for site, seen in zip(sites, observations, strict=True)
    ]


def rewrite_(
    model: nn.Module,
    config: ExpansionConfig | ConfigMap | None = None,
    *,
    targets: Iterable[str] | None = None,
    sharing: str = "instance",
    example_inputs: Batch | None = None,
    disable: Iterable[str] = (),
    process_group: ProcessGroup | str | None = None,
) -> RewriteReport:
    """Replaces the activations of a model by learnable expansions, in place.

    Activation modules are swapped, those of libraries as well as PyTorch's: a leaf module without parameters is known
    by what it computes. A module that calls an activation in its own methods, or spells its formula out there, gets a
    subclass of its class whose methods call an expansion in its place. Parameters take the device and the dtype of
    their neighbours. Rewrite before the optimizer, DDP or FSDP see the model. A second call finds nothing more to do.

    Args:
        model: any module; a `torch.fx.GraphModule`, such as an exported program's, is rewritten in its graph.
        config: one config for every site (`ExpansionConfig()` when omitted), or a map from patterns of site names to
            configs, of which the first that matches counts: an exact name, a glob ("blocks.*.act") or "re:" with a
            regular expression for the whole name. None as a config leaves the sites alone, as does no match.
        targets: activation functions by name; by default every one that is not a gate.
        sharing: "instance" (a module that stands in several places, or is called several times, is one expansion) or
            "site" (each place and each call in its owner's source has its own).
        example_inputs: a tensor, a tuple of positional arguments or a map of keyword arguments; a copy of the model is
            run with it. Needed for init="calibrated" and for expansions a channel or group, which take the
            dimension of their channels from the layers before; with it, init="fit" weighs by the inputs that each
            activation really gets (by N(mean, std^2) of them where they are few), where it otherwise takes N(0, 1).
        disable: passes of `ortho_fx.passes.pipeline` to leave out, by name; "lower" is left out in any case.
        process_group: where `torch.distributed` is initialised, the processes whose example_inputs count together; all
            of them when omitted, each of which has to call this, and "alone" for this one only.

    Raises:
        OrthoFxError: a model with nothing to replace, a scripted model, one that DDP, FSDP or tensor parallelism has
            wrapped or sharded already, a device that is gone, a pattern that matches
            no site, patterns that disagree on a shared site, a target or a pass that is not known, a config that needs
            example_inputs, or inputs that are constant or not finite. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> print(rewrite_(model, ExpansionConfig(basis="hermite", degree=3)))
        name  kind    function  expansion  parameters
        1     module  gelu      hermite 3  4
        1 replaced, 0 left, 4 new parameters
    """
    record = pipeline.run(
        _checked(model),
        config,
        targets=targets,
        sharing=sharing,
        example_inputs=example_inputs,
        # Hooks, `freeze_` and `calibrate_` reach the calls of the modules, which whatever compiles the model lowers.
        disable=(*((disable,) if isinstance(disable, str) else disable), "lower"),
        process_group=process_group,
    )
    return RewriteReport(record.sites, record.earlier, model)


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
    """Puts back every activation that `rewrite_` replaced: the model as it was, with what it has learned elsewhere.

    Expansions that were built into the model, and replaced nothing, stay.

    Raises:
        OrthoFxError: a model in which no activation was replaced.
    """
    names = revert_expansions(_checked(model), lambda expansion: True)
    if not names:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion that rewrite_ put there")
    kept = (name for name, module in model.named_modules() if isinstance(module, expansions.Expansion))
    return RevertReport(names, tuple(kept))


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise OrthoFxError(f"the model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise OrthoFxError(f"{model.original_name} is scripted: rewrite the module that it was scripted from")
    return model
