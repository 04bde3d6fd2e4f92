"""What it costs to evaluate a polynomial of one variable where multiplying two variables is what costs.

The scheme is Paterson and Stockmeyer's, baby steps and giant steps: with the powers x^2 .. x^k and x^2k, x^4k, x^8k
... at hand, p = q x^g + r splits off the coefficients from a giant (or the last baby) step g on, until degrees are at
most k. Among all k and all ways to split, the one with the fewest multiplications is searched whose depth is the
smallest possible one. Chebyshev polynomials obey T_2n = 2 T_n^2 - 1, and take as many.

Source: Paterson and Stockmeyer, "On the number of nonscalar multiplications necessary to evaluate polynomials", SIAM
Journal on Computing 2(1), 1973. Where depth does not count, about sqrt(2 n) are enough. With the smallest depth it is
a few more, and most of all at n = 2^m - 1, which leaves no choice: 10 at n = 15, where n = 14 takes 7.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

_Cost = tuple[float, float]
_IMPOSSIBLE: _Cost = (math.inf, math.inf)


@dataclass(frozen=True)
class Evaluation:
    """The cost of one evaluation of a general polynomial of a degree.

    Attributes:
        degree: n.
        ciphertext_multiplications: products of two ciphertexts (non-scalar multiplications).
        plaintext_multiplications: products of a ciphertext and a coefficient.
        depth: ciphertext multiplications one after another, ceil(log2(n)).
        levels: multiplications of both kinds one after another, ceil(log2(n + 1)): what CKKS rescales for.
    """

    degree: int
    ciphertext_multiplications: int
    plaintext_multiplications: int
    depth: int
    levels: int


def log2_up(n: int) -> int:
    """ceil(log2(n)) for n >= 1."""
    return (n - 1).bit_length()


@functools.cache
def evaluation(degree: int) -> Evaluation:
    """The cheapest evaluation of smallest depth; a constant takes nothing."""
    if degree < 2:
        return Evaluation(degree, 0, degree, 0, degree)
    depth, levels = log2_up(degree), log2_up(degree + 1)
    best = _IMPOSSIBLE
    # Fewest are near sqrt(n / 2) baby steps; for 2^m - 1, where the depth leaves no choice, near 1.
    for babies in range(1, 2 * math.isqrt(degree) + 2):
        giants = [babies]
        while giants[-1] <= degree:
            products, scalars = _split(degree, babies, tuple(giants), depth, levels)
            best = min(best, (products + babies - 1 + len(giants) - 1, scalars))
            giants.append(2 * giants[-1])
    return Evaluation(degree, int(best[0]), int(best[1]), depth, levels)


@functools.cache
def _split(degree: int, babies: int, giants: tuple[int, ...], depth: int, levels: int) -> _Cost:
    """The fewest products beyond those for the powers, and scalar products, within a depth and a number of levels."""
    if degree == 0:
        return 0, 0
    best = _IMPOSSIBLE
    if degree <= babies and log2_up(degree) <= depth and log2_up(degree) + 1 <= levels:
        best = 0, degree
    for giant in giants:
        below = log2_up(giant)  # the depth of x^giant
        if giant > degree or below > depth or below >= levels:
            continue
        rest = _split(giant - 1, babies, giants, depth, levels)
        if giant == degree:
            quotient: _Cost = (0, 1)
        elif below < depth:
            products, scalars = _split(degree - giant, babies, giants, depth - 1, levels - 1)
            quotient = products + 1, scalars
        else:
            continue
        best = min(best, (quotient[0] + rest[0], quotient[1] + rest[1]))
    return best
