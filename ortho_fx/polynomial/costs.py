"""`polynomial_report`: the data that homomorphic encryption needs about a model with Hermite activations.

Schemes like CKKS can add and multiply, and sequential multiplications are expensive. For each activation the report
states the number of multiplications (`ortho_fx.polynomial.evaluation`), the observed range of inputs, and the
coefficients in two bases. For the model it states the depth of the longest path.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.polynomial import Chebyshev, HermiteE
from numpy.polynomial import Polynomial as Powers
from torch import Tensor, fx, nn

from ortho_fx.arguments import checked_model
from ortho_fx.batches import Batch, batches_of, call, why_empty
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.passes.search import find_occurrences
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.targets import choose_targets
from ortho_fx.polynomial.evaluation import Evaluation, evaluation, log2_up
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
from ortho_fx.tables import table
from ortho_fx.watch import watching

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


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
    """

    sites: tuple[PolynomialSite, ...]
    left: tuple[tuple[str, str], ...]
    degree: int | None
    ciphertext_multiplications: int
    plaintext_multiplications: int
    depth: int
    levels: int
    traced: bool

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
    seen = _observe(model, expansions, batches, limit)
    sites, left = [], {}
    for name, inputs in seen.items():
        try:
            sites.append(_site(name, expansions[name], inputs))
        except NotPolynomial as reason:
            left[name] = str(reason)
    left |= {name: "no batch reached it" for name in expansions if name not in seen}
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
    )


class _Inputs:
    """The inputs of one activation; `calls` is the largest number of calls in one batch."""

    def __init__(self) -> None:
        self.histogram, self.low, self.high = Histogram(), math.inf, -math.inf
        self.calls, self.batch, self._calls = 0, -1, 0

    def add(self, x: Tensor, batch: int) -> None:
        self._calls = self._calls + 1 if batch == self.batch else 1
        self.batch, self.calls = batch, max(self.calls, self._calls)
        self.histogram.add(x)
        if x.numel():
            low, high = (bound.item() for bound in torch.aminmax(x.detach()))
            # With the arguments in this order, min and max keep a NaN.
            self.low, self.high = min(low, self.low), max(high, self.high)


def _observe(
    model: nn.Module, expansions: Mapping[str, nn.Module], batches: Iterable[Batch], limit: int | None
) -> dict[str, _Inputs]:
    """The inputs of every expansion that the model calls, in the order of their first calls."""
    seen: dict[str, _Inputs] = {}
    batch = -1

    def see(name: str, x: Tensor, _: Tensor) -> None:
        seen.setdefault(name, _Inputs()).add(x, batch)

    with torch.no_grad(), watching(expansions, see):
        for batch, values in enumerate(batches_of(model, batches, limit)):  # noqa: B007 `see` reads it
            call(model, values)
    if not seen:
        why = why_empty(batches) if batch < 0 else "the model calls none of them"
        raise OrthoFxError(f"no batch reached an expansion: {why}")
    for name, inputs in seen.items():
        if not inputs.histogram.finite:
            raise OrthoFxError(f"the inputs of {name} are not finite")
    return seen


def _site(name: str, module: nn.Module, inputs: _Inputs) -> PolynomialSite:
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
    """The largest degree, depth and levels over all paths to a value of the graph."""

    degree: int = 1
    depth: int = 0
    levels: int = 0

    def after(self, degree: int, depth: int, levels: int) -> _Path:
        return _Path(self.degree * degree, self.depth + depth, self.levels + levels)


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
        path = _Path(*(max(map(operator.attrgetter(field), sources)) for field in ("degree", "depth", "levels")))
        module = modules[str(node.target)] if node.op == "call_module" else None
        arguments = (*node.args, *node.kwargs.values())
        values = [source for source in arguments if isinstance(source, fx.Node) and source in paths]
        if module is not None and module in sites:
            cost = sites[module].cost
            path = path.after(cost.degree, cost.depth, cost.levels)
        elif node.target in SCALINGS and values != [node.args[0]]:
            left[described(node, modules)] = "it divides by what depends on the input, or its weights do"
        elif type(module) in AFFINE_MODULES or node.target in SCALINGS:
            path = path.after(1, 0, 1)
        elif node.target in PRODUCTS and len(values) == 2:
            products += 1
            path = _Path(sum(paths[factor].degree for factor in values), path.depth + 1, path.levels + 1)
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
