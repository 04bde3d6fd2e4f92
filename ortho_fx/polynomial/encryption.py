"""CKKS parameters and coefficients with which OpenFHE and TenSEAL evaluate a polynomial network.

CKKS computes on vectors of numbers, modulo a product of primes. Each level is one prime of about `scale_bits` bits. A
product rescales, and this removes one prime. So the modulus has one prime for each level, and a larger one that holds
the result. The keys have special primes besides. The larger the modulus, the larger the ring has to be for 128-bit
security.

The facts about both libraries are measured: the tests evaluate polynomials of every degree under encryption, and
compare the levels, the ring dimension and the convention of coefficients with those of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from numpy.polynomial import Chebyshev
from torch import nn

from ortho_fx.arguments import checked_model, is_integer, is_number
from ortho_fx.batches import Batch
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.polynomial.observation import observe
from ortho_fx.polynomial.sites import PolynomialSite
from ortho_fx.tables import table

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

# The largest log2 of the modulus, with the special primes, for each ring dimension: 128-bit security against classical
# computers, with ternary secrets. Up to 2^15 it is table 1 of Albrecht et al., "Homomorphic Encryption Standard", 2018,
# and what SEAL allows. The last two are what OpenFHE allows.
SECURE_BITS = {
    2**10: 27, 2**11: 54, 2**12: 109, 2**13: 218, 2**14: 438, 2**15: 881, 2**16: 1747, 2**17: 3523,
}  # fmt: skip
# The largest ring dimension of SEAL.
_SEAL_RING = 2**15
# The first modulus and SEAL's special prime, in bits: the largest that both libraries take.
_FIRST_BITS = 60
# With fewer bits OpenFHE runs out of primes for a large ring.
_LEAST_SCALE = 30
# OpenFHE's FLEXIBLEAUTOEXT has one more modulus than levels, of this many bits, and special primes of 60 bits.
_EXTRA_BITS, _SPECIAL_BITS = 20, 60
# The special primes have at least this many bits more than each digit of the modulus.
_DIGIT_BITS = 5
# The degrees up to which OpenFHE's EvalPoly takes 1, 2, 3, ... levels. Coefficients of He_k / k! end before degree 171.
_OPENFHE_DEGREES = (1, 2, 5, 13, 27, 59, 119, 247)
# The highest degree that is evaluated in powers of x: their rounding errors grow with the degree.
_POWERS = 5
_EVAL_POLY, _EVAL_SERIES, _POLYVAL = "EvalPoly", "EvalChebyshevSeries", "polyval"


def openfhe_levels(degree: int) -> int:
    """The levels that OpenFHE takes for a polynomial: those of `EvalPoly`, or from degree 6 of `EvalChebyshevSeries`.

    The series takes one more, which maps the range to [-1, 1].
    """
    levels = next(level for level, highest in enumerate(_OPENFHE_DEGREES, 1) if degree <= highest)
    return levels if degree <= _POWERS else levels + 1


@dataclass(frozen=True)
class EncryptedSite:
    """One activation as a library evaluates it.

    Attributes:
        name: qualified name.
        low, high: the range for which it is made; OpenFHE's series is exact in it and useless outside of it.
        method: the library's function: "EvalPoly", "EvalChebyshevSeries" or "polyval".
        levels: the levels that it takes.
        coefficients: the argument of that function, for each group of channels. `EvalPoly` and `polyval` take
            c_0 .. c_n with y = sum_k c_k x^k. `EvalChebyshevSeries(x, c, low, high)` counts half of the first one:
            y = c_0 / 2 + sum_{k > 0} c_k T_k((2 x - low - high) / (high - low)).
    """

    name: str
    low: float
    high: float
    method: str
    levels: int
    coefficients: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class EncryptionParameters:
    """What both libraries need.

    Attributes:
        levels: the multiplicative depth: sequential multiplications of both kinds along the longest path.
        scale_bits: log2 of the scale.
        ring_dimension: the smallest with 128-bit security; in SEAL, the polynomial modulus degree.
        modulus_bits: log2 of the modulus with the special primes; at most `SECURE_BITS` of the ring dimension.
        sites: the activations, in the order in which the model calls them.
    """

    levels: int
    scale_bits: int
    ring_dimension: int
    modulus_bits: int
    sites: tuple[EncryptedSite, ...]

    @property
    def slots(self) -> int:
        """The numbers in one ciphertext."""
        return self.ring_dimension // 2

    def check(self, model: nn.Module, batches: Iterable[Batch] | DataLoader[Any], *, limit: int | None = None) -> None:
        """Checks in the clear that inputs stay in the ranges. Do so before a long evaluation.

        Args:
            model: the model of the report.
            batches: the inputs that will be encrypted, as in `polynomial_report`.
            limit: the most batches that are used; all of them when omitted.

        Raises:
            OrthoFxError: an activation gets inputs outside of its range; the message names each and by how much.
        """
        named = dict(checked_model(model).named_modules())
        for site in self.sites:
            if not isinstance(named.get(site.name), Expansion):
                raise OrthoFxError(f"{type(model).__name__} has no expansion {site.name!r}: take the report's model")
        seen = observe(model, {site.name: named[site.name] for site in self.sites}, batches, limit).inputs
        outside = [
            f"the inputs of {site.name} are in [{inputs.low:.4g}, {inputs.high:.4g}] and leave its range "
            f"[{site.low:.4g}, {site.high:.4g}] by {max(site.low - inputs.low, inputs.high - site.high):.3g}"
            for site in self.sites
            if (inputs := seen.get(site.name)) and not (site.low <= inputs.low and inputs.high <= site.high)
        ]
        if outside:
            raise OrthoFxError("; ".join(outside) + ": make the report with such inputs, or take a larger margin=")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "slots": self.slots}

    def _lines(self, title: str, modulus: str) -> str:
        rows = [("name", "method", "levels", "low", "high", "coefficients")]
        for site in self.sites:
            first, *others = site.coefficients
            shown = f"{len(others) + 1} groups, in to_dict()" if others else " ".join(f"{c:.6g}" for c in first)
            rows.append((site.name, site.method, str(site.levels), f"{site.low:.4g}", f"{site.high:.4g}", shown))
        return (
            f"{title}: {self.levels} levels, scale 2^{self.scale_bits}, {modulus}\n"
            f"ring dimension {self.ring_dimension} with {self.slots} slots: modulus of {self.modulus_bits} bits, "
            f"{SECURE_BITS[self.ring_dimension]} are 128-bit secure\n{table(rows, 'lrrrrl')}"
        )


@dataclass(frozen=True)
class OpenFHEParameters(EncryptionParameters):
    """The result of `PolynomialReport.to_openfhe`; `print` shows it.

    `context()` makes the CryptoContext. By hand, `CCParamsCKKSRNS` takes `levels` as multiplicative depth, `scale_bits`
    as scaling modulus size, `first_modulus_bits` as first modulus size, `ring_dimension`, and at most `slots` as batch
    size, with FLEXIBLEAUTOEXT and hybrid key switching.
    """

    first_modulus_bits: int

    def __str__(self) -> str:
        return self._lines("OpenFHE", f"first modulus of {self.first_modulus_bits} bits")

    def context(self, batch_size: int | None = None) -> Any:
        """A CryptoContext with these parameters; keys are not made yet.

        OpenFHE itself refuses a ring dimension that is too small for 128-bit security.

        Args:
            batch_size: the numbers in a ciphertext, a power of two; `slots` when omitted. Rotations are cyclic in them.

        Raises:
            OrthoFxError: OpenFHE cannot be imported.
        """
        try:
            import openfhe
        except ImportError as error:
            raise OrthoFxError(
                f"OpenFHE cannot be imported ({error}): pip install openfhe. Its wheels are for Linux: "
                "those of 1.6 take Python 3.10 with the libraries of Ubuntu 22.04, or Python 3.12 with those of 24.04"
            ) from None
        parameters = openfhe.CCParamsCKKSRNS()
        parameters.SetSecurityLevel(openfhe.SecurityLevel.HEStd_128_classic)
        parameters.SetRingDim(self.ring_dimension)
        parameters.SetMultiplicativeDepth(self.levels)
        parameters.SetScalingModSize(self.scale_bits)
        parameters.SetFirstModSize(self.first_modulus_bits)
        parameters.SetScalingTechnique(openfhe.ScalingTechnique.FLEXIBLEAUTOEXT)
        parameters.SetKeySwitchTechnique(openfhe.KeySwitchTechnique.HYBRID)
        parameters.SetBatchSize(batch_size or self.slots)
        context = openfhe.GenCryptoContext(parameters)
        features = openfhe.PKESchemeFeature
        for feature in (features.PKE, features.KEYSWITCH, features.LEVELEDSHE, features.ADVANCEDSHE):
            context.Enable(feature)
        return context


@dataclass(frozen=True)
class TenSEALParameters(EncryptionParameters):
    """The result of `PolynomialReport.to_tenseal`; `print` shows it.

    `context()` makes the context. By hand, `tenseal.context` takes `ring_dimension` as poly_modulus_degree, and
    `coeff_mod_bit_sizes`; its `global_scale` is 2 ** `scale_bits`.
    """

    coeff_mod_bit_sizes: tuple[int, ...]

    def __str__(self) -> str:
        return self._lines("TenSEAL", f"coeff_mod_bit_sizes {list(self.coeff_mod_bit_sizes)}")

    def context(self, threads: int | None = None) -> Any:
        """A TenSEAL context with these parameters, with new keys, also those for matrix products.

        Args:
            threads: the threads of TenSEAL; its own default when omitted.

        Raises:
            OrthoFxError: TenSEAL cannot be imported.
        """
        try:
            import tenseal
        except ImportError as error:
            raise OrthoFxError(f"TenSEAL cannot be imported ({error}): pip install tenseal") from None
        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=self.ring_dimension,
            coeff_mod_bit_sizes=list(self.coeff_mod_bit_sizes),
            **({} if threads is None else {"n_threads": threads}),
        )
        context.global_scale = 2**self.scale_bits
        context.generate_galois_keys()
        return context


def openfhe_parameters(
    sites: Iterable[PolynomialSite],
    levels: int,
    largest_output: float | None,
    *,
    scale_bits: int,
    margin: float,
    extra_levels: int,
) -> OpenFHEParameters:
    """`PolynomialReport.to_openfhe`, for a network of these sites that takes these levels in OpenFHE."""
    _check_arguments(largest_output, scale_bits, margin, extra_levels)
    levels += extra_levels
    bits, ring = _ring(levels, scale_bits, _openfhe_bits, max(SECURE_BITS), "OpenFHE")
    encrypted = tuple(_openfhe_site(site, margin) for site in sites)
    return OpenFHEParameters(levels, scale_bits, ring, bits, encrypted, _FIRST_BITS)


def tenseal_parameters(
    sites: Iterable[PolynomialSite],
    levels: int,
    largest_output: float | None,
    *,
    scale_bits: int,
    margin: float,
    extra_levels: int,
) -> TenSEALParameters:
    """`PolynomialReport.to_tenseal`, for a network of these sites that takes these levels."""
    _check_arguments(largest_output, scale_bits, margin, extra_levels)
    levels += extra_levels
    bits, ring = _ring(levels, scale_bits, _seal_bits, _SEAL_RING, "SEAL")
    encrypted = tuple(
        EncryptedSite(site.name, *_widened(site, margin), _POLYVAL, site.cost.levels, site.monomial) for site in sites
    )
    sizes = (_FIRST_BITS, *[scale_bits] * levels, _FIRST_BITS)
    return TenSEALParameters(levels, scale_bits, ring, bits, encrypted, sizes)


def _check_arguments(largest_output: float | None, scale_bits: int, margin: float, extra_levels: int) -> None:
    if not is_integer(scale_bits) or not _LEAST_SCALE <= scale_bits < _FIRST_BITS:
        raise OrthoFxError(
            f"scale_bits must be an integer from {_LEAST_SCALE} to {_FIRST_BITS - 1}; got {scale_bits!r}"
        )
    if not is_number(margin) or margin < 0:
        raise OrthoFxError(f"margin must be a number, zero or more; got {margin!r}")
    if not is_integer(extra_levels) or extra_levels < 0:
        raise OrthoFxError(f"extra_levels must be an integer, zero or more; got {extra_levels!r}")
    # The last modulus holds twice the largest output that was seen, and a sign.
    held = 2.0 ** (_FIRST_BITS - scale_bits - 2)
    if largest_output is not None and not largest_output <= held:
        raise OrthoFxError(
            f"the outputs reach {largest_output:.4g}, and at scale 2^{scale_bits} a first modulus of {_FIRST_BITS} "
            f"bits is safe up to {held:g}: take a smaller scale_bits=, or scale the last layer"
        )


def _ring(
    levels: int, scale_bits: int, bits_of: Callable[[int, int], int], largest: int, library: str
) -> tuple[int, int]:
    """The bits of the modulus and the smallest secure ring dimension."""
    bits = bits_of(levels, scale_bits)
    for ring, secure in SECURE_BITS.items():
        if bits <= secure and ring <= largest:
            return bits, ring
    most = max(n for n in range(levels) if n == 0 or bits_of(n, scale_bits) <= SECURE_BITS[largest])
    raise OrthoFxError(
        f"the network takes {levels} levels, and {library}'s largest ring dimension, {largest}, allows {most} of "
        f"{scale_bits} bits at 128-bit security: take lower degrees, fewer layers or a smaller "
        "scale_bits=, or bootstrap in between"
    )


def _seal_bits(levels: int, scale_bits: int) -> int:
    return _FIRST_BITS + levels * scale_bits + _FIRST_BITS


def _openfhe_bits(levels: int, scale_bits: int) -> int:
    """The bits that OpenFHE counts: those of all moduli and of the special primes.

    Hybrid key switching cuts the moduli into one to three digits; the special primes are larger than each digit.
    """
    sizes = [_FIRST_BITS, *[scale_bits] * levels, _EXTRA_BITS]
    digits = 3 if levels > 3 else 2 if levels else 1
    size = math.ceil(len(sizes) / digits)
    digit = max(sum(sizes[start : start + size]) for start in range(0, len(sizes), size)) + _DIGIT_BITS
    return sum(sizes) + _SPECIAL_BITS * math.ceil(digit / _SPECIAL_BITS)


def _widened(site: PolynomialSite, margin: float) -> tuple[float, float]:
    extra = margin * (site.high - site.low)
    return site.low - extra, site.high + extra


def _openfhe_site(site: PolynomialSite, margin: float) -> EncryptedSite:
    low, high = _widened(site, margin)
    levels = openfhe_levels(site.cost.degree)
    if site.cost.degree <= _POWERS:
        return EncryptedSite(site.name, low, high, _EVAL_POLY, levels, site.monomial)
    series = [Chebyshev(one, domain=[site.low, site.high]).convert(domain=[low, high]) for one in site.chebyshev]
    coefficients = tuple((2 * first, *others) for first, *others in (one.coef.tolist() for one in series))
    return EncryptedSite(site.name, low, high, _EVAL_SERIES, levels, coefficients)
