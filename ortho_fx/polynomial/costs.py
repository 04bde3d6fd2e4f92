"""`polynomial_report`: what homomorphic encryption has to know of a model with Hermite activations, site by site.

Schemes like CKKS add and multiply, and pay for multiplications one after another. The report says of each activation
how many it takes (`ortho_fx.polynomial.evaluation`), over which range of inputs it was seen, and its coefficients in
two bases, and of the model how deep the longest path through it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from numpy.polynomial import Chebyshev, HermiteE
from numpy.polynomial import Polynomial as Powers
from torch import Tensor, fx, nn

from ortho_fx.arguments import checked_model
from ortho_fx.batches import Batch, call
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


@dataclass(frozen=True)
class PolynomialSite:
    """One Hermite activation, as a polynomial of its input.

    Attributes:
        name: qualified name.
        calls: how often one call of the model calls it.
        cost: what one evaluation takes; its degree is that without leading coefficients that are zero.
        low, high: the range of the inputs that were seen, over which the Chebyshev basis is stated.
        mean, std: mean and standard deviation (of the population) of these inputs.
        samples: how many there were.
        monomial: c_0 .. c_n with y = sum_k c_k x^k, a list for each group of channels (one where all share).
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


@dataclass(frozen=True)
class PolynomialReport:
    """What `polynomial_report` found; `print(report)` is a table.

    Attributes:
        sites: the Hermite activations, in the order in which the model called them.
        left: name and reason of all that is not polynomial.
        degree: of the whole model in its input, along the path of the highest; None where something is left.
        ciphertext_multiplications: of all calls of all sites together, and of products in the model.
        plaintext_multiplications: of the sites; those of linear layers depend on how ciphertexts are packed.
        depth: ciphertext multiplications one after another along the longest path.
        levels: the same with plaintext multiplications, one for each layer with weights: what CKKS rescales for.
        traced: whether `torch.fx` traced the model. Where it did not, depth and levels are those of all sites one after
            another, in calling order, and levels hold no layers.
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
        return {**asdict(self), "left": [{"name": name, "reason": reason} for name, reason in self.left]}

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


def polynomial_report(model: nn.Module, batches: Iterable[Batch]) -> PolynomialReport:
    """Degrees, multiplications, depth, ranges and coefficients of a model's Hermite activations.

    A polynomial of degree n is evaluated with baby steps and giant steps at depth ceil(log2(n)), and ceil(log2(n + 1))
    levels with its coefficients. The model is run without gradients, in the mode (train or eval) that it is in; depth
    and levels are those of eval mode, where batch normalisation is affine.

    Args:
        model: a model with Hermite activations.
        batches: a tensor, a tuple of positional arguments or a map of keyword arguments for each call of the model.

    Raises:
        OrthoFxError: a model without expansions, no batch, or inputs of a site that are not finite.

    Source: Paterson and Stockmeyer, SIAM Journal on Computing 2(1), 1973.
    """
    expansions = {
        name: module for name, module in checked_model(model).named_modules() if isinstance(module, Expansion)
    }
    if not expansions:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to report on: call rewrite_ first")
    seen = _observe(model, expansions, batches)
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
    """What came into one activation; calls are the most of one batch."""

    def __init__(self) -> None:
        self.histogram, self.low, self.high = Histogram(), math.inf, -math.inf
        self.calls, self.batch, self._calls = 0, -1, 0

    def add(self, x: Tensor, batch: int) -> None:
        self._calls = self._calls + 1 if batch == self.batch else 1
        self.batch, self.calls = batch, max(self.calls, self._calls)
        self.histogram.add(x)
        if x.numel():
            low, high = (bound.item() for bound in torch.aminmax(x.detach()))
            # In this order NaN is kept.
            self.low, self.high = min(low, self.low), max(high, self.high)


def _observe(model: nn.Module, expansions: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, _Inputs]:
    """The inputs of every expansion that the model calls, in the order of their first calls."""
    seen: dict[str, _Inputs] = {}
    batch = -1

    def see(name: str, x: Tensor, _: Tensor) -> None:
        seen.setdefault(name, _Inputs()).add(x, batch)

    with torch.no_grad(), watching(expansions, see):
        for batch, values in enumerate(batches):  # noqa: B007 `see` reads it
            call(model, values)
    if not seen:
        raise OrthoFxError("no batch reached an expansion: batches is empty, or the model calls none of them")
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
    """Of a value in the graph, over all paths to it."""

    degree: int = 1
    depth: int = 0
    levels: int = 0

    def after(self, degree: int, depth: int, levels: int) -> _Path:
        return _Path(self.degree * degree, self.depth + depth, self.levels + levels)


@dataclass(frozen=True)
class _Walk:
    """The longest path to the output, products and powers outside of activations, and what is not polynomial."""

    longest: _Path
    products: int
    left: dict[str, str]


def _walk(model: nn.Module, sites: Mapping[nn.Module, PolynomialSite]) -> _Walk | None:
    """The model's graph from its inputs to its output; None where torch.fx does not see all sites in it."""
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
        # What no input reaches is known beforehand, in plain text.
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
