"""`PolynomialSite`: what `polynomial_report` says about one activation."""

from __future__ import annotations

from dataclasses import dataclass

from ortho_fx.polynomial.evaluation import Evaluation


@dataclass(frozen=True)
class PolynomialSite:
    """One Hermite activation, as a polynomial of its input.

    Attributes:
        name: qualified name.
        calls: the number of calls in one call of the model.
        cost: the cost of one evaluation; its degree does not count leading coefficients that are zero.
        low, high: the range of the observed inputs, which is the domain of the Chebyshev basis.
        mean, std: mean and standard deviation (of the population) of these inputs.
        samples: the number of these inputs.
        monomial: c_0 .. c_n with y = sum_k c_k x^k, for each group of channels (one group if all channels share).
        chebyshev: the same for y = sum_k c_k T_k((2 x - low - high) / (high - low)).
    """

    name: str
    calls: int
    cost: Evaluation
    low: float
    high: float
    mean: float
    std: float
    samples: int
    monomial: tuple[tuple[float, ...], ...]
    chebyshev: tuple[tuple[float, ...], ...]

    @property
    def openfhe(self) -> tuple[tuple[float, ...], ...]:
        """The Chebyshev coefficients as OpenFHE's `EvalChebyshevSeries(x, coefficients, low, high)` takes them.

        It counts half of the first one: y = c_0 / 2 + sum_{k > 0} c_k T_k. Its `EvalPoly` takes `monomial` as it is.
        """
        return tuple((2 * one[0], *one[1:]) for one in self.chebyshev)
