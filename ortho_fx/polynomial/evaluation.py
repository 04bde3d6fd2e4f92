"""The cost of a polynomial of one variable, where multiplications of two variable values are expensive.

The scheme is that of Paterson and Stockmeyer, with baby steps and giant steps. First the powers x^2 .. x^k and x^2k,
x^4k, x^8k ... are computed. Then p = q x^g + r splits off the coefficients from a giant step (or the last baby step) g
on, until all degrees are at most k. A search over all k and all splits finds the fewest multiplications at the smallest
possible depth. Chebyshev polynomials obey T_2n = 2 T_n^2 - 1, and cost the same.

Source: Paterson and Stockmeyer, "On the number of nonscalar multiplications necessary to evaluate polynomials", SIAM
Journal on Computing 2(1), 1973. If depth does not matter, about sqrt(2 n) multiplications are enough. The smallest
depth needs a few more, and the most at n = 2^m - 1, which leaves no choice: n = 15 takes 10, and n = 14 takes 7.
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
        depth: sequential ciphertext multiplications, ceil(log2(n)).
        levels: sequential multiplications of both kinds, ceil(log2(n + 1)); CKKS rescales for each.
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
    """The cheapest evaluation with the smallest depth; a constant costs nothing."""
    if degree < 2:
        return Evaluation(degree, 0, degree, 0, degree)
    depth, levels = log2_up(degree), log2_up(degree + 1)
    best = _IMPOSSIBLE
    # The best number of baby steps is near sqrt(n / 2). For n = 2^m - 1 the depth leaves no choice, and it is near 1.
    for babies in range(1, 2 * math.isqrt(degree) + 2):
        giants = [babies]
        while giants[-1] <= degree:
            products, scalars = _split(degree, babies, tuple(giants), depth, levels)
            best = min(best, (products + babies - 1 + len(giants) - 1, scalars))
            giants.append(2 * giants[-1])
    return Evaluation(degree, int(best[0]), int(best[1]), depth, levels)


@functools.cache
def _split(degree: int, babies: int, giants: tuple[int, ...], depth: int, levels: int) -> _Cost:
    """The fewest products (besides those for powers) and scalar products within a depth and a number of levels."""
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
