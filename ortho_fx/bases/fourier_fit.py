"""The fit of a Fourier expansion.

At fixed frequencies the problem is linear (cosine and sine pairs). The frequencies start as multiples of the best of
several fundamentals, and are improved by Gauss-Newton steps. With tied frequencies only the fundamental is improved.
"""

from __future__ import annotations

import math

import numpy as np

from ortho_fx.numerics.least_squares import ROUNDING, Problem, Separable, cost_of
from ortho_fx.numerics.moments import Array

# Beyond this degree 1/k! is almost zero in float32, and so is the wave.
_MOST_WAVES = 32


def fit_waves(problem: Problem, degree: int, tied: bool) -> dict[str, Array]:
    """The parameters of the Fourier expansion that is closest to a function at weighted nodes."""
    z, waves = problem.z, min(degree, _MOST_WAVES)
    multiples = np.arange(1.0, waves + 1)

    def columns(frequencies: Array) -> Array:
        angles = np.outer(z, frequencies)
        cosine, sine = np.cos(angles), np.sin(angles)
        inside = problem.inside[:, None]
        values = np.concatenate([np.ones((len(z), 1)), cosine, sine], axis=1)
        slopes = np.concatenate(
            [np.zeros((len(z), 1)), -frequencies * sine * inside, frequencies * cosine * inside], axis=1
        )
        return problem.weighted(values, slopes)

    def jacobian(frequencies: Array, linear: Array) -> Array:
        # d/dw (c cos wz + s sin wz), and d/dw of its derivative in z.
        angles = np.outer(z, frequencies)
        cosine, sine = np.cos(angles), np.sin(angles)
        c, s = linear[1 : waves + 1], linear[waves + 1 :]
        turned = s * cosine - c * sine
        along = z[:, None] * turned
        slopes = turned - z[:, None] * frequencies * (c * cosine + s * sine)
        return problem.weighted(along, slopes * problem.inside[:, None])

    heavy = problem.weight > 1e-6 * problem.weight.max()
    reach = float(np.abs(z[heavy]).max())
    ridge = np.concatenate([[0.0], np.full(2 * waves, ROUNDING)])
    separable = Separable(columns, jacobian, problem.target, ridge)
    fundamentals = math.pi / reach / np.geomspace(0.7, 5.0, 12)
    starts = [multiples * fundamental for fundamental in fundamentals]
    if tied:
        separable = Separable(
            lambda fundamental: columns(multiples * fundamental),
            lambda fundamental, linear: jacobian(multiples * fundamental, linear) @ multiples[:, None],
            problem.target,
            ridge,
        )
        starts = [np.array([fundamental]) for fundamental in fundamentals]
    scanned = sorted((separable.at(start) for start in starts), key=cost_of)
    # So many steps take about a tenth of a second at any degree.
    steps = int(np.clip(2.5e7 / (len(problem.target) * (3 * waves + 1) ** 2), 2, 60))
    best = min((solution.improved(steps) for solution in scanned[:2]), key=cost_of)
    c, s = best.linear[1 : waves + 1], best.linear[waves + 1 :]
    amplitudes = np.hypot(c, s)
    # The largest waves get the largest 1/k!, so that the coefficients stay within the range of float32.
    order = np.arange(waves) if tied else np.argsort(-amplitudes, kind="stable")
    factorials = np.array([math.factorial(k + 1) for k in range(degree)], dtype=float)
    coefficients, phases = np.zeros(degree), np.zeros(degree)
    coefficients[:waves] = amplitudes[order]
    phases[:waves] = np.arctan2(s, c)[order]
    frequencies = best.nonlinear
    if not tied:
        frequencies = np.concatenate([frequencies[order], np.arange(waves + 1.0, degree + 1)])
    negative = frequencies < 0
    return {
        "constant": best.linear[:1],
        "coefficients": coefficients * factorials,
        "frequencies": np.abs(frequencies),
        "phases": np.where(negative, -phases, phases),
    }
