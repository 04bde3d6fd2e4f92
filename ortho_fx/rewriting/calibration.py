"""`calibrate_`: expansions initialised for the pre-activations that a model really has.

A stable expansion f_1 is made for inputs N(0, 1). GPT-2's weights start at a standard deviation of 0.02, which gives
its pre-activations one of about 0.2 to 0.6, and there f_1 is little more than a large constant. One pass over real
batches measures the mean mu and the standard deviation sigma at every site, and
    f(x) = sigma f_1((x - mu) / sigma)
has the gains of f_1 for inputs N(mu, sigma^2): E[f'^2] = 1, and E[f^2] = sigma^2. Each basis holds f exactly in its own
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.activations.originals import unchanged_on_failure
from ortho_fx.batches import Batch, call
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.passes.vocabulary.expansions import LearnableExpansion
from ortho_fx.processes import measured

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SiteStatistics:
    """What came into one expansion.

    Attributes:
        name: qualified name of the expansion.
        mean, std: mean and standard deviation (of the population).
        samples: how many numbers were seen.
        fit_rmse: root mean square error, over these inputs, of the fit that init="fit" starts from; else None.
    """

    name: str
    mean: float
    std: float
    samples: int
    fit_rmse: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_` measured, printed as a table; `uncalled` are the expansions that no batch reached."""

    sites: tuple[SiteStatistics, ...]
    uncalled: tuple[str, ...]

    def __str__(self) -> str:
        width = max([len(site.name) for site in self.sites] + [4])
        fits = any(site.fit_rmse is not None for site in self.sites)
        lines = [f"{'name':{width}}  {'mean':>10}  {'std':>10}  {'samples':>10}" + "  fit rmse" * fits]
        for site in self.sites:
            error = "" if site.fit_rmse is None else f"{site.fit_rmse:8.2g}"
            row = f"{site.name:{width}}  {site.mean:10.4g}  {site.std:10.4g}  {site.samples:10}  {error}"
            lines.append(row.rstrip())
        lines += [f"{name:{width}}  not called" for name in self.uncalled]
        return "\n".join(lines)


def calibrate_(
    model: nn.Module, batches: Iterable[Batch], *, process_group: ProcessGroup | str | None = None
) -> Calibration:
    """Runs the model over batches and initialises each expansion for the inputs that it got, in place.

    Every expansion starts again from its `config.init`: what it had learned is gone. "stable", "calibrated" and
    "paper" are rescaled to the mean and deviation, "fit" fits the replaced function anew, weighted by the histogram of
    the inputs. Clamps move with them. The model runs without gradients, in the mode (train or eval) that it is in; one
    with batch normalisation that has not been trained yet should be in train mode, since in eval mode it normalises by
    running statistics that are not its data's.

    Where `torch.distributed` is initialised, every process has to call it, and each expansion starts from the inputs of
    all of them, so that they start equal. Values go into the original parameters: sharded, parametrized or pruned.

    Args:
        model: a model with expansions.
        batches: a tensor, a tuple of positional arguments or a map of keyword arguments for each call of the model.
        process_group: the processes that hold the same model, such as those of data parallelism beside pipeline
            stages; all of them when omitted, and "alone" for this one only.

    Raises:
        OrthoFxError: a model without expansions, no batch, a site whose inputs are constant or not finite, a
            parametrization that cannot be inverted, parameters that are offloaded, or processes that hold different
            sites; the model is then as it was.
    """
    expansions = {name: module for name, module in model.named_modules() if isinstance(module, ExpansionActivation)}
    if not expansions:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to calibrate: call rewrite_ first")
    return calibrate_expansions(model, expansions, batches, process_group)


def calibrate_expansions(
    model: nn.Module,
    expansions: Mapping[str, LearnableExpansion],
    batches: Iterable[Batch],
    process_group: ProcessGroup | str | None = None,
) -> Calibration:
    """The same for some of the model's expansions, by their names."""
    seen_by_each = measured(lambda: _inputs(model, expansions, batches), process_group)
    inputs = {name: Histogram.merged([each[name] for each in seen_by_each]) for name in expansions}
    called = {name: seen for name, seen in inputs.items() if seen.samples}
    if not called:
        raise OrthoFxError(
            "no batch reached an expansion: batches is empty, the model calls none of them, or it is on the meta device"
        )
    for name, seen in called.items():
        if not seen.finite:
            raise OrthoFxError(f"the inputs of {name} are not finite")
        if seen.constant:
            raise OrthoFxError(f"the inputs of {name} are constant ({seen.mean:g}): they have no scale to fit to")
    for name in called:
        if any(parameter.is_meta for parameter in expansions[name].parameters()):
            raise OrthoFxError(
                f"the parameters of {name} are on the meta device between the calls: calibrate before offloading"
            )
    starts = {name: expansions[name].initial_values(seen) for name, seen in called.items()}
    sites = []
    with _gathered_by_fsdp1(model), unchanged_on_failure(expansions[name] for name in called):
        for name, (values, _) in starts.items():
            expansions[name].set_parameters(values)
    for name, seen in called.items():
        _, fitted = starts[name]
        sites.append(SiteStatistics(name, seen.mean, seen.std, seen.samples, fitted.rmse if fitted else None))
    return Calibration(tuple(sites), tuple(name for name in expansions if name not in called))


def _inputs(
    model: nn.Module, expansions: Mapping[str, LearnableExpansion], batches: Iterable[Batch]
) -> dict[str, Histogram]:
    """What the batches of this process bring to each expansion."""
    inputs = {name: Histogram() for name in expansions}
    handles = [
        expansion.register_forward_pre_hook(lambda _, args, seen=inputs[name]: seen.add(args[0]))
        for name, expansion in expansions.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _gathered_by_fsdp1(model: nn.Module) -> AbstractContextManager[None]:
    """Where FullyShardedDataParallel keeps the parameters as pieces of one, a context that has them whole."""
    if any(cls.__name__ == "FullyShardedDataParallel" for module in model.modules() for cls in type(module).__mro__):
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel.summon_full_params(model)
    return nullcontext()
