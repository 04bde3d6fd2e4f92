"""`fit`, and its result `Fit`, which makes a module or a plot."""

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
        """Plots value and derivative of fit and function over the interval, and the errors.

        Raises:
            OrthoFxError: the file cannot be written, or matplotlib is missing.
        """
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
        config: the expansion (`ExpansionConfig()` when omitted); its init is ignored.
        weight: w is "gaussian" (the density of N(mean, std^2), on the whole line or on the interval), "uniform" on the
            interval, or "measured" (the histogram of the samples).
        interval: lower and upper end, in units of x. Errors are stated on it; without one, on mean +- 5 std or on the
            range of the samples.
        derivative_weight: zero or more; in units of x^2.
        mean, std: of the Gaussian weight; `config.clamp` counts standard deviations from this mean.
        samples: the inputs that weight "measured" counts, in any shape and floating dtype; their mean and standard
            deviation replace `mean` and `std`.

    Returns:
        The fit, with its parameters in float64 and its errors.

    Raises:
        OrthoFxError: a function that returns NaN, infinity or another shape, an interval with its ends exchanged,
            samples that are empty or constant, fewer nodes than coefficients, an unknown weight, a weight without the
            interval or samples that it needs, or a number out of range.

    Source: weighted least squares; the frequencies and knots take Gauss-Newton steps (Golub and Pereyra, 1973;
    Kaufman, 1975), and knots start with the density of de Boor, A Practical Guide to Splines.

    Examples:
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
