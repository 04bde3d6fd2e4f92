"""`Annealing`: turns activations into polynomials of low degree during fine-tuning.

Under the distribution of its inputs, an activation f is a series of orthonormal polynomials. The terms up to a degree
form the closest polynomial p of that degree, which `rewrite_` computes in closed form with init="fit". The remainder is
f - p. Annealing multiplies the remainder by a factor that goes from 1 to 0:
    y = p + (1 - s) (f - p) = (1 - s) f + s p.
The model starts unchanged and ends with polynomials only. (Starting from an expansion of degree 8 and removing its
degrees one by one gives the same p. But at such degrees, inputs outside of the range of the fit give unbounded values.)

Polynomial networks fail because of such inputs: weights change, inputs leave the range of the fit, and large outputs of
one layer become larger in the next. So a penalty is added for inputs outside of the measured range.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx.activations.expansion import ExpansionActivation, HermiteActivation, one_input
from ortho_fx.arguments import checked_model, is_integer, is_number
from ortho_fx.batches import Batch, batches_of, why_empty
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.revert import revert_expansions
from ortho_fx.rewriting.calibration import calibrate_expansions
from ortho_fx.rewriting.rewrite import RewriteReport, rewrite_

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class AnnealedActivation(HermiteActivation):
    """y(x) = (1 - s) f(x) + s p(x), with the replaced activation f and a Hermite expansion p; `Annealing` makes it.

    Parameters and state dict are those of the expansion. The buffers `share` (s) and `mean` and `std` (of the measured
    inputs) are not saved.
    """

    share: Tensor
    mean: Tensor
    std: Tensor
    reach: float
    excesses: list[Tensor]

    def forward(self, x: Tensor | None = None, inplace: bool = False, **named: Tensor) -> Tensor:
        assert self.reference is not None
        x = one_input(self, x, named)
        if self.training and torch.is_grad_enabled():
            deviations = ((x.float() - self.mean) / self.std).abs()
            self.excesses.append(F.relu(deviations - self.reach).square().mean())
        return torch.lerp(self.reference(x), super().forward(x), self.share.to(x.dtype))

    def __getstate__(self) -> dict[str, Any]:
        # Tensors in an autograd graph cannot be copied.
        return {**self.__dict__, "excesses": []}


class Annealing:
    r"""Replaces the activations of a model by polynomials, gradually and in place: y(x) = (1 - s) f(x) + s p(x).

    The original activation is f, p is a `HermiteActivation` fitted under the inputs that f gets from the batches, and
    s = min(1, step / steps). Make the `Annealing` before the optimizer, add `penalty` to the loss, call `step` after
    each step of the optimizer, and `finish` at the end:

        annealing = Annealing(model, degree=2, batches=batches, steps=300)
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
        for inputs, targets in data:
            loss = cross_entropy(model(inputs), targets) + 0.1 * annealing.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            annealing.step()
        annealing.finish()

    After `steps` steps the model is polynomial; train it for twice as many steps more. Parameters keep their size and
    stay the same objects, also in `finish`, so an optimizer is not affected. Shapes and dtypes are those of
    `HermiteActivation`.

    Args:
        model: any module; its activations are found as in `rewrite_`.
        degree: the degree of the polynomials, from 1 to 32; 2 and 3 are usual.
        batches: a DataLoader, or an iterable with a tensor, a tuple of positional arguments or a map of keyword
            arguments for each call of the model. Of a DataLoader's items the model gets its inputs, as in `calibrate_`.
            The model runs on them once, without gradients, in its current mode (train or eval).
        limit: the most batches that are used; all of them when omitted.
        steps: the number of calls of `step` until s = 1; one or more.
        reach: inputs within this number of standard deviations from the measured mean add nothing to `penalty`.
        granularity: "model", "layer", "channel" or "group:N", as in `ExpansionConfig`.
        targets: activation functions by name, as in `rewrite_`.

    Attributes:
        report: the report of `rewrite_`: what was replaced and what was left.

    Raises:
        OrthoFxError: steps or a reach that are not above zero, no batch, a model with nothing to replace, or an error
            of `rewrite_` or `calibrate_`. The model is then unchanged.

    Source: the transition from ReLU to polynomials is that of Baruch et al., arXiv 2111.03362; the closest polynomial
    under a density is the truncated orthogonal expansion (Szego, Orthogonal Polynomials).
    """

    report: RewriteReport

    def __init__(
        self,
        model: nn.Module,
        *,
        degree: int = 2,
        batches: Iterable[Batch] | DataLoader[Any],
        limit: int | None = None,
        steps: int,
        reach: float = 3.0,
        granularity: str = "layer",
        targets: Iterable[str] | None = None,
    ) -> None:
        checked_model(model)
        if not is_integer(steps) or steps < 1:
            raise OrthoFxError(f"steps must be an integer above zero; got {steps!r}")
        if not is_number(reach) or reach <= 0:
            raise OrthoFxError(f"reach must be a number above zero; got {reach!r}")
        config = ExpansionConfig("hermite", degree, "fit", granularity)
        given = batches_of(model, batches, limit)
        first = next(given, None)
        if first is None:
            raise OrthoFxError(f"the fits need inputs, and {why_empty(batches)}")
        earlier = {id(module) for module in model.modules()}
        self.report = rewrite_(model, config, targets=targets, example_inputs=first)
        try:
            self._start(model, itertools.chain([first], given), reach, earlier)
        except BaseException:
            revert_expansions(model, lambda module: id(module) not in earlier)
            raise
        self.steps, self.steps_taken = steps, 0

    def _start(self, model: nn.Module, batches: Iterable[Batch], reach: float, earlier: Collection[int]) -> None:
        """Makes the new expansions annealed, and measures their inputs."""
        self._sites: dict[str, ExpansionActivation] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, ExpansionActivation) and id(module) not in earlier
        }
        if not self._sites:
            raise OrthoFxError(f"{type(model).__name__} has no activation to replace, only expansions from before")
        for site in self._sites.values():
            for name, start in (("share", 0.0), ("mean", 0.0), ("std", 1.0)):
                site.register_buffer(name, site.get_parameter("coefficients").new_full((), start), persistent=False)
            site.__class__ = AnnealedActivation
            site.reach, site.excesses = reach, []  # type: ignore[assignment]
        # The share is 0, so every site gets the inputs that it gets in the original model.
        measured = calibrate_expansions(model, self._sites, batches)
        for statistics in measured.sites:
            site = self._sites[statistics.name]
            site.get_buffer("mean").fill_(statistics.mean)
            site.get_buffer("std").fill_(statistics.std)
        self._forget()

    @property
    def share(self) -> float:
        """s, the weight of the polynomial."""
        return self.steps_taken / self.steps

    @property
    def done(self) -> bool:
        """Whether s is 1, so that all activations are polynomials."""
        return self.steps_taken == self.steps

    def penalty(self) -> Tensor:
        r"""\sum over sites of mean(max(0, |x - mean| / std - reach)^2), over the inputs since the last penalty.

        It is a scalar to add to the loss, for example with a factor of 0.1. Only inputs in train mode with gradients
        count.

        Raises:
            OrthoFxError: no site was called in this way since the last penalty.
        """
        excesses = [value for site in self._sites.values() for value in getattr(site, "excesses", ())]
        if not excesses:
            raise OrthoFxError("no activation was called in train mode since the last penalty: call the model first")
        self._forget()
        return torch.stack([value.to(excesses[0].device) for value in excesses]).sum()

    def step(self) -> None:
        """Increases s by 1 / steps, up to 1."""
        self.steps_taken = min(self.steps_taken + 1, self.steps)
        self._set_share()
        self._forget()

    def finish(self) -> None:
        """Turns the sites into plain `HermiteActivation`s without a clamp, with the parameters that the optimizer has.

        A second call changes nothing.

        Raises:
            OrthoFxError: s is below 1, so the function of the model would jump.
        """
        if not self.done:
            raise OrthoFxError(f"{self.steps_taken} of {self.steps} steps are taken: call finish after the last")
        for site in self._sites.values():
            if isinstance(site, AnnealedActivation):
                for name in ("share", "mean", "std", "reach", "excesses"):
                    delattr(site, name)
                site.__class__ = HermiteActivation  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """The steps taken, and the measured means and deviations; the model's state dict has the expansions."""
        inputs = {
            name: [site.get_buffer("mean").item(), site.get_buffer("std").item()]
            for name, site in self._sites.items()
            if isinstance(site, AnnealedActivation)
        }
        return {"steps": self.steps, "steps_taken": self.steps_taken, "inputs": inputs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state, on a new `Annealing` with the same settings; load the model's state dict as well.

        Raises:
            OrthoFxError: the state has other fields, sites or steps.
        """
        if set(state) != {"steps", "steps_taken", "inputs"}:
            raise OrthoFxError(f"the state must have steps, steps_taken and inputs; got {', '.join(map(str, state))}")
        if state["steps"] != self.steps:
            raise OrthoFxError(f"the state is of {state['steps']} steps; this annealing takes {self.steps}")
        if set(state["inputs"]) != set(self._sites):
            raise OrthoFxError(f"the state is of {', '.join(state['inputs'])}; the sites are {', '.join(self._sites)}")
        self.steps_taken = state["steps_taken"]
        self._set_share()
        for name, (mean, std) in state["inputs"].items():
            self._sites[name].get_buffer("mean").fill_(mean)
            self._sites[name].get_buffer("std").fill_(std)

    def _set_share(self) -> None:
        for site in self._sites.values():
            if isinstance(site, AnnealedActivation):
                site.share.fill_(self.share)

    def _forget(self) -> None:
        for site in self._sites.values():
            if isinstance(site, AnnealedActivation):
                site.excesses.clear()
