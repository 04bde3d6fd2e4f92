"""`polynomial_report`: the data that homomorphic encryption needs about a model with Hermite activations.

Schemes like CKKS can add and multiply, and sequential multiplications are expensive. For each activation the report
states the number of multiplications (`ortho_fx.polynomial.evaluation`), the observed range of inputs, and the
coefficients in two bases. For the model it states the depth of the longest path.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from numpy.polynomial import Chebyshev, HermiteE
from numpy.polynomial import Polynomial as Powers
from torch import fx, nn

from ortho_fx.arguments import checked_model
from ortho_fx.batches import Batch
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.search import find_occurrences
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.targets import choose_targets
from ortho_fx.polynomial.encryption import (
    OpenFHEParameters,
    TenSEALParameters,
    openfhe_levels,
    openfhe_parameters,
    tenseal_parameters,
)
from ortho_fx.polynomial.evaluation import evaluation, log2_up
from ortho_fx.polynomial.graph import (
    AFFINE_MODULES,
    OPERATIONS,
    PASSING_MODULES,
    POWERS,
    PRODUCTS,
    SCALINGS,
    NotPolynomial,
    described,
    factorials,
    hermite_coefficients,
    trace,
)
from ortho_fx.polynomial.observation import Inputs, observe
from ortho_fx.polynomial.sites import PolynomialSite
from ortho_fx.tables import table

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


@dataclass(frozen=True)
class PolynomialReport:
    """The result of `polynomial_report`; `print(report)` shows a table.

    Attributes:
        sites: the Hermite activations, in the order in which the model called them.
        left: name and reason of everything that is not polynomial.
        degree: the degree of the whole model in its input; None if something is left.
        ciphertext_multiplications: the total of all calls of all sites, and of products in the model.
        plaintext_multiplications: the total of the sites; that of linear layers depends on the packing of ciphertexts.
        depth: sequential ciphertext multiplications along the longest path.
        levels: sequential multiplications of both kinds along the longest path, with one for each layer with weights;
            CKKS rescales for each.
        traced: whether `torch.fx` traced the model. If not, depth and levels are the sums over all sites in calling
            order, and levels do not include layers.
        openfhe_levels: the same as levels, with OpenFHE's evaluation of polynomials, which takes more at some degrees.
        largest_output: the largest absolute value of the model's output; None if that is not a tensor of real numbers.
    """

    sites: tuple[PolynomialSite, ...]
    left: tuple[tuple[str, str], ...]
    degree: int | None
    ciphertext_multiplications: int
    plaintext_multiplications: int
    depth: int
    levels: int
    traced: bool
    openfhe_levels: int
    largest_output: float | None

    def to_openfhe(self, *, scale_bits: int = 50, margin: float = 0.1, extra_levels: int = 0) -> OpenFHEParameters:
        """The CKKS parameters and coefficients with which OpenFHE evaluates the network, at 128-bit security.

        Args:
            scale_bits: log2 of the scale, from 30 to 59. A larger one is more exact and takes a larger ring.
            margin: each range is widened at both ends by this share of its width, for inputs that were not seen.
            extra_levels: levels that the network does not take itself, such as those of masks.

        Raises:
            OrthoFxError: something is not polynomial, levels are not known, the outputs do not fit, an argument is out
                of its range, or the largest ring, 2^17, has not enough levels.
        """
        self._check_levels()
        return openfhe_parameters(
            self.sites,
            self.openfhe_levels,
            self.largest_output,
            scale_bits=scale_bits,
            margin=margin,
            extra_levels=extra_levels,
        )

    def to_tenseal(self, *, scale_bits: int = 40, margin: float = 0.1, extra_levels: int = 0) -> TenSEALParameters:
        """The same for TenSEAL. Its library is SEAL, whose largest polynomial modulus degree is 2^15."""
        self._check_levels()
        return tenseal_parameters(
            self.sites,
            self.levels,
            self.largest_output,
            scale_bits=scale_bits,
            margin=margin,
            extra_levels=extra_levels,
        )

    def _check_levels(self) -> None:
        """Raises an error if the levels of the network are not known, or it has none."""
        if self.left:
            name, reason = self.left[0]
            raise OrthoFxError(f"the network cannot be encrypted, for {name} is not polynomial: {reason}")
        if not self.traced:
            raise OrthoFxError(
                "the levels of the network are not known, since torch.fx cannot trace it: write its forward without "
                "branches that depend on values"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        sites = [{**asdict(site), "openfhe": site.openfhe} for site in self.sites]
        return {
            **asdict(self),
            "sites": sites,
            "left": [{"name": name, "reason": reason} for name, reason in self.left],
        }

    def __str__(self) -> str:
        header = ("name", "degree", "calls", "ct mul", "pt mul", "depth", "levels", "min", "max", "mean", "std")
        rows = [
            (
                site.name,
                *(str(n) for n in (site.cost.degree, site.calls, site.cost.ciphertext_multiplications)),
                *(str(n) for n in (site.cost.plaintext_multiplications, site.cost.depth, site.cost.levels)),
                *(f"{value:.4g}" for value in (site.low, site.high, site.mean, site.std)),
            )
            for site in self.sites
        ]
        lines = [table([header, *rows], "lr")]
        for site in self.sites:
            if len(site.monomial) > 1:
                lines.append(f"{site.name}: {len(site.monomial)} groups of coefficients, in to_dict()")
                continue
            for basis, values in (("x^k", site.monomial[0]), ("T_k", site.chebyshev[0])):
                lines.append(f"{site.name} {basis}: " + " ".join(f"{value:.6g}" for value in values))
        lines += [f"not polynomial: {name}: {reason}" for name, reason in self.left]
        path = "along the longest path" if self.traced else "of the sites in calling order (torch.fx cannot trace it)"
        degree = "" if self.degree is None else f"degree {self.degree}, "
        lines.append(
            f"{degree}{self.ciphertext_multiplications} ciphertext and {self.plaintext_multiplications} plaintext "
            f"multiplications in activations and products; depth {self.depth} and {self.levels} levels {path}"
        )
        return "\n".join(lines)


def polynomial_report(
    model: nn.Module, batches: Iterable[Batch] | DataLoader[Any], *, limit: int | None = None
) -> PolynomialReport:
    """Reports degrees, multiplications, depth, ranges and coefficients of a model's Hermite activations.

    A polynomial of degree n is evaluated with baby steps and giant steps, at depth ceil(log2(n)) and with
    ceil(log2(n + 1)) levels. The model runs without gradients, in its current mode (train or eval). Depth and levels
    are those of eval mode, where batch normalisation is affine.

    Args:
        model: a model with Hermite activations.
        batches: a DataLoader, or an iterable with a tensor, a tuple of positional arguments or a map of keyword
            arguments for each call of the model. Of a DataLoader's items the model gets its inputs, as in `calibrate_`.
        limit: the most batches that are used; all of them when omitted.

    Returns:
        The costs of each activation and of the whole model.

    Raises:
        OrthoFxError: a model without expansions, no batch, a batch that the model cannot be called with, or inputs of a
            site that are not finite.

    Source: Paterson and Stockmeyer, SIAM Journal on Computing 2(1), 1973.
    """
    expansions = {
        name: module for name, module in checked_model(model).named_modules() if isinstance(module, Expansion)
    }
    if not expansions:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to report on: call rewrite_ first")
    seen = observe(model, expansions, batches, limit)
    sites, left = [], {}
    for name, inputs in seen.inputs.items():
        try:
            sites.append(_site(name, expansions[name], inputs))
        except NotPolynomial as reason:
            left[name] = str(reason)
    left |= {name: "no batch reached it" for name in expansions if name not in seen.inputs}
    walk = _walk(model, {expansions[site.name]: site for site in sites})
    if walk is not None:
        left = {**walk.left, **left}
    else:
        for occurrence in find_occurrences(model, choose_targets(None)):
            left[occurrence.site.name] = f"{occurrence.site.function} is not a polynomial"
    return PolynomialReport(
        sites=tuple(sites),
        left=tuple(left.items()),
        degree=None if walk is None or left else walk.longest.degree,
        ciphertext_multiplications=(walk.products if walk else 0)
        + sum(site.calls * site.cost.ciphertext_multiplications for site in sites),
        plaintext_multiplications=sum(site.calls * site.cost.plaintext_multiplications for site in sites),
        depth=walk.longest.depth if walk else sum(site.calls * site.cost.depth for site in sites),
        levels=walk.longest.levels if walk else sum(site.calls * site.cost.levels for site in sites),
        traced=walk is not None,
        openfhe_levels=walk.longest.openfhe
        if walk
        else sum(site.calls * openfhe_levels(site.cost.degree) for site in sites),
        largest_output=seen.largest_output,
    )


def _site(name: str, module: nn.Module, inputs: Inputs) -> PolynomialSite:
    coefficients = hermite_coefficients(module)
    if not inputs.low < inputs.high:
        raise NotPolynomial(f"its inputs are constant ({inputs.low:g}): they have no range")
    series = [HermiteE(column / factorials(len(column))) for column in coefficients.T]
    domain = [inputs.low, inputs.high]
    return PolynomialSite(
        name=name,
        calls=inputs.calls,
        cost=evaluation(len(coefficients) - 1),
        low=inputs.low,
        high=inputs.high,
        mean=inputs.histogram.mean,
        std=inputs.histogram.std,
        samples=inputs.histogram.samples,
        monomial=tuple(tuple(one.convert(kind=Powers).coef.tolist()) for one in series),
        chebyshev=tuple(tuple(one.convert(kind=Chebyshev, domain=domain).coef.tolist()) for one in series),
    )


@dataclass(frozen=True)
class _Path:
    """The largest degree, depth, levels and levels in OpenFHE over all paths to a value of the graph."""

    degree: int = 1
    depth: int = 0
    levels: int = 0
    openfhe: int = 0

    def after(self, degree: int, depth: int, levels: int, openfhe: int | None = None) -> _Path:
        openfhe = levels if openfhe is None else openfhe
        return _Path(self.degree * degree, self.depth + depth, self.levels + levels, self.openfhe + openfhe)


_FIELDS = tuple(field.name for field in fields(_Path))


@dataclass(frozen=True)
class _Walk:
    """The longest path to the output, the number of products outside of activations, and what is not polynomial."""

    longest: _Path
    products: int
    left: dict[str, str]


def _walk(model: nn.Module, sites: Mapping[nn.Module, PolynomialSite]) -> _Walk | None:
    """Walks the model's graph from inputs to output; None if torch.fx does not see all sites."""
    try:
        graph, modules = trace(model)
    except OrthoFxError:
        return None
    called = {modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    if not called.issuperset(sites):
        return None
    paths: dict[fx.Node, _Path] = {}
    products, left = 0, {}
    for node in graph.nodes:
        # A value that depends on no input is known in advance, as plaintext, and costs nothing.
        sources = [paths[source] for source in node.all_input_nodes if source in paths]
        if node.op == "placeholder" and not node.args:  # an argument with a default is a setting
            paths[node] = _Path()
        if not sources:
            continue
        path = _Path(*(max(map(operator.attrgetter(field), sources)) for field in _FIELDS))
        module = modules[str(node.target)] if node.op == "call_module" else None
        arguments = (*node.args, *node.kwargs.values())
        values = [source for source in arguments if isinstance(source, fx.Node) and source in paths]
        if module is not None and module in sites:
            cost = sites[module].cost
            path = path.after(cost.degree, cost.depth, cost.levels, openfhe_levels(cost.degree))
        elif node.target in SCALINGS and values != [node.args[0]]:
            left[described(node, modules)] = "it divides by what depends on the input, or its weights do"
        elif type(module) in AFFINE_MODULES or node.target in SCALINGS:
            path = path.after(1, 0, 1)
        elif node.target in PRODUCTS and len(values) == 2:
            products += 1
            path = replace(path.after(1, 1, 1), degree=sum(paths[factor].degree for factor in values))
        elif node.target in PRODUCTS:
            path = path.after(1, 0, 1)
        elif node.target in POWERS:
            power = node.args[1] if len(node.args) > 1 else 2
            if not isinstance(power, int) or power < 1:
                left[described(node, modules)] = "only powers with a positive integer as exponent are polynomials"
            else:
                products += power.bit_length() - 1 + power.bit_count() - 1
                path = path.after(power, log2_up(power), log2_up(power))
        elif not (node.op == "output" or type(module) in PASSING_MODULES or node.target in OPERATIONS):
            if not isinstance(module, Expansion):
                name, what = (node.target, type(module).__name__) if module else (described(node, modules), "it")
                left[str(name)] = f"{what} is neither affine, nor a sum, a product or a Hermite activation"
        paths[node] = path
        if node.op == "output":
            return _Walk(path, products, left)
    return _Walk(_Path(0), 0, left)
