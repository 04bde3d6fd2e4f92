"""`calibrate_`: initialises expansions for the measured pre-activations of a model.

A stable expansion f_1 is made for inputs N(0, 1). But GPT-2's weights start with a standard deviation of 0.02, so its
pre-activations have a standard deviation of about 0.2 to 0.6, where f_1 is almost a large constant. One pass over real
batches measures the mean mu and the standard deviation sigma at every site. Then
    f(x) = sigma f_1((x - mu) / sigma)
has the gains of f_1 for inputs N(mu, sigma^2): E[f'^2] = 1, and E[f^2] = sigma^2. Each of our bases represents f
exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.activations.originals import unchanged_on_failure
from ortho_fx.arguments import checked_model
from ortho_fx.batches import Batch, batches_of, call, why_empty
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.passes.vocabulary.expansions import LearnableExpansion
from ortho_fx.processes import measured
from ortho_fx.watch import watching

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.utils.data import DataLoader


@dataclass(frozen=True)
class SiteStatistics:
    """The measured inputs of one expansion.

    Attributes:
        name: qualified name of the expansion.
        mean, std: mean and standard deviation (of the population).
        samples: the number of inputs.
        fit_rmse: root mean square error, over these inputs, of the fit for init="fit"; None for any other init.
    """

    name: str
    mean: float
    std: float
    samples: int
    fit_rmse: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The measurements of `calibrate_`; `print(calibration)` shows a table.

    Attributes:
        sites: the measured inputs of each expansion.
        uncalled: the expansions that no batch reached; they are unchanged.
    """

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
    model: nn.Module,
    batches: Iterable[Batch] | DataLoader[Any],
    *,
    limit: int | None = None,
    process_group: ProcessGroup | str | None = None,
) -> Calibration:
    """Runs a model on batches, and initialises each expansion for its inputs: f(x) = sigma f_1((x - mu) / sigma).

    The change is in place. mu and sigma are the mean and standard deviation of the inputs, and f_1 is the expansion for
    N(0, 1) that `config.init` asks for ("stable", "calibrated" or "paper"). For init "fit", the replaced function is
    fitted again, weighted by the histogram of the inputs. Bounds of a clamp are set for the same inputs. Learned values
    are lost. The model runs without gradients, in its current mode (train or eval). A model with untrained batch
    normalisation should be in train mode, because in eval mode it uses running statistics that do not fit the data.

    Where `torch.distributed` is initialised, every process has to call it, and each expansion starts from the inputs of
    all of them, so that they start equal. Values go into the original parameters: sharded, parametrized or pruned.

    Args:
        model: a model with expansions.
        batches: a DataLoader, or an iterable with a tensor, a tuple of positional arguments or a map of keyword
            arguments for each call of the model. Of a DataLoader's items the model gets its inputs, on its device: the
            leading items of a tuple, as many as forward has positional parameters without a default, and at least one;
            or those keys of a dict that forward takes.
        limit: the most batches that are used; all of them when omitted.
        process_group: the processes that hold the same model, such as those of data parallelism beside pipeline
            stages; all of them when omitted, and "alone" for this one only.

    Returns:
        The measured inputs of each expansion, and the expansions that were not called.

    Raises:
        OrthoFxError: a model without expansions, no batch, a batch that the model cannot be called with, a site whose
            inputs are constant or not finite, a parametrization that cannot be inverted, parameters that are offloaded,
            or processes that hold different sites; the model is then unchanged.

    Source: mean and deviation are merged over batches as by Chan, Golub and LeVeque, 1979.
    """
    expansions = {
        name: module for name, module in checked_model(model).named_modules() if isinstance(module, ExpansionActivation)
    }
    if not expansions:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to calibrate: call rewrite_ first")
    return calibrate_expansions(model, expansions, batches, process_group, limit)


def calibrate_expansions(
    model: nn.Module,
    expansions: Mapping[str, LearnableExpansion],
    batches: Iterable[Batch],
    process_group: ProcessGroup | str | None = None,
    limit: int | None = None,
) -> Calibration:
    """As `calibrate_`, for some of the model's expansions, by their names."""
    given, came = batches_of(model, batches, limit), 0

    def measure() -> dict[str, Histogram]:
        """What the batches of this process bring to each expansion."""
        nonlocal came
        inputs = {name: Histogram() for name in expansions}
        with torch.no_grad(), watching(expansions, lambda name, x, _: inputs[name].add(x)):
            for came, batch in enumerate(given, 1):  # noqa: B007 the text of an error reads it
                call(model, batch)
        return inputs

    seen_by_each = measured(measure, process_group)
    inputs = {name: Histogram.merged([each[name] for each in seen_by_each]) for name in expansions}
    called = {name: seen for name, seen in inputs.items() if seen.samples}
    if not called:
        why = "the model calls none of them, or it is on the meta device" if came else why_empty(batches)
        raise OrthoFxError(f"no batch reached an expansion: {why}")
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


def _gathered_by_fsdp1(model: nn.Module) -> AbstractContextManager[None]:
    """Where FullyShardedDataParallel keeps the parameters as pieces of one, a context that has them whole."""
    if any(cls.__name__ == "FullyShardedDataParallel" for module in model.modules() for cls in type(module).__mro__):
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel.summon_full_params(model)
    return nullcontext()
