"""`fit`, and what a user does with its result: a module, or a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ortho_fx.activations.expansion import ExpansionActivation, activation_at
from ortho_fx.config import ExpansionConfig
from ortho_fx.numerics.fit import FittedExpansion, fit_expansion
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.plots import plot_fit


class Fit(FittedExpansion):
    __doc__ = FittedExpansion.__doc__

    def activation(
        self,
        *,
        channels: int | None = None,
        channel_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ExpansionActivation:
        """A module that starts at this fit; the arguments are those of `ExpansionActivation`."""
        return activation_at(self, channels=channels, channel_dim=channel_dim, device=device, dtype=dtype)

    def plot(self, path: str | Path) -> None:
        """Draws value and derivative beside those of the function, over the interval; needs matplotlib."""
        plot_fit(self, path)


def fit(
    function: Callable[[Tensor], Tensor],
    config: ExpansionConfig | None = None,
    *,
    weight: str = "gaussian",
    interval: tuple[float, float] | None = None,
    derivative_weight: float = 0.0,
    mean: float = 0.0,
    std: float = 1.0,
    samples: Tensor | Histogram | None = None,
) -> Fit:
    """Fits an expansion y to a function g: minimises the integral of w (y - g)^2 + derivative_weight w (y' - g')^2.

    Args:
        function: any elementwise function that autograd differentiates; it is called with float64 tensors.
        config: the expansion (`ExpansionConfig()` when omitted); its init is not looked at.
        weight: w is "gaussian" (the density of N(mean, std^2), on the whole line or on the interval), "uniform" on the
            interval, or "measured" (the histogram of the samples).
        interval: lower and upper end, in units of x. Errors are stated on it; without one, on mean +- 5 std or on the
            range of the samples.
        derivative_weight: zero or more; in units of x^2.
        mean, std: of the Gaussian weight, and of the inputs that `config.clamp` is in units of.
        samples: what "measured" weighs by; their mean and deviation replace `mean` and `std`.

    Raises:
        OrthoFxError: a function that returns NaN, infinity or another shape, an interval turned around, samples that
            are empty or constant, fewer nodes than coefficients, or an unknown weight.

    Example:
        >>> result = fit(F.gelu, ExpansionConfig("hermite", 8))
        >>> result.rmse < 0.006
        True
    """
    fitted = fit_expansion(
        function,
        config,
        weight=weight,
        interval=interval,
        derivative_weight=derivative_weight,
        mean=mean,
        std=std,
        samples=samples,
    )
    return Fit(**vars(fitted))
