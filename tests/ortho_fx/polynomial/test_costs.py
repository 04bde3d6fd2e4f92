import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, find_sites, rewrite_
from ortho_fx.activations.expansion import make_activation
from ortho_fx.polynomial.costs import polynomial_report
from ortho_fx.polynomial.evaluation import evaluation


def batches(*shape, count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


class Counter:
    """A number that counts multiplications, as an encryption scheme would: its value, depth and level."""

    products = scalars = 0

    def __init__(self, value, depth=0, level=0):
        self.value, self.depth, self.level = value, depth, level

    def __mul__(self, other):
        if isinstance(other, Counter):
            Counter.products += 1
            depth = 1 + max(self.depth, other.depth)
            return Counter(self.value * other.value, depth, 1 + max(self.level, other.level))
        Counter.scalars += 1
        return Counter(self.value * other, self.depth, self.level + 1)

    def __add__(self, other):
        if isinstance(other, Counter):
            levels = max(self.depth, other.depth), max(self.level, other.level)
            return Counter(self.value + other.value, *levels)
        return Counter(self.value + other, self.depth, self.level)


@pytest.mark.parametrize(
    ("degree", "evaluate"),
    [
        (2, lambda x, c: (x * x) * c[2] + x * c[1] + c[0]),
        (3, lambda x, c: (x * c[3] + c[2]) * (x * x) + x * c[1] + c[0]),
        (4, lambda x, c: ((square := x * x) * c[4] + x * c[3] + c[2]) * square + x * c[1] + c[0]),
        (8, lambda x, c: _eight(x, c)),
    ],
)
def test_costs_are_reached_by_evaluating(degree, evaluate):
    coefficients = np.random.default_rng(degree).standard_normal(degree + 1).tolist()
    Counter.products = Counter.scalars = 0
    result = evaluate(Counter(0.7), coefficients)
    assert result.value == pytest.approx(np.polynomial.Polynomial(coefficients)(0.7))
    cost = evaluation(degree)
    assert (Counter.products, result.depth, result.level) == (cost.ciphertext_multiplications, cost.depth, cost.levels)


def _eight(x, c):
    # Baby steps up to x^4, which is also the giant step: 3 products for the powers, and 1 with the giant step.
    two = x * x
    three, four = two * x, two * two
    high = four * c[8] + three * c[7] + two * c[6] + x * c[5] + c[4]
    return high * four + three * c[3] + two * c[2] + x * c[1] + c[0]


def test_depth_is_the_smallest_possible_and_products_are_few():
    for degree in range(1, 65):
        cost = evaluation(degree)
        assert cost.depth == math.ceil(math.log2(degree))
        assert cost.levels == math.ceil(math.log2(degree + 1))
        assert math.sqrt(degree) - 1 <= cost.ciphertext_multiplications <= degree - 1
        assert cost.plaintext_multiplications <= degree
    # Degrees other than 2^m - 1, with the results of a full search over baby steps.
    few = [evaluation(degree).ciphertext_multiplications for degree in (0, 1, 5, 6, 10, 16, 20, 32)]
    assert few == [0, 0, 3, 4, 5, 7, 8, 11]
    assert evaluation(31).ciphertext_multiplications == 19


def test_sites_have_their_ranges_and_coefficients_in_both_bases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), HermiteActivation(3), nn.Linear(6, 6), HermiteActivation(5)).double()
    with torch.no_grad():
        model[3].coefficients[-1] = 0
    data = [batch.double() for batch in batches(64, 4)]
    report = polynomial_report(model, data)
    first, second = report.sites
    x = model[0](torch.cat(data)).detach()
    assert (first.name, first.calls, first.samples) == ("1", 1, x.numel())
    assert (first.low, first.high) == (x.min().item(), x.max().item())
    assert (first.mean, first.std) == pytest.approx((x.mean().item(), x.std(correction=0).item()))
    assert second.cost == evaluation(4)
    for site, module in ((first, model[1]), (second, model[3])):
        points = torch.linspace(site.low, site.high, 50, dtype=torch.float64)
        exact = module(points).detach().numpy()
        powers, series = (
            np.polynomial.Polynomial(site.monomial[0]),
            np.polynomial.Chebyshev(site.chebyshev[0], domain=[site.low, site.high]),
        )
        np.testing.assert_allclose(powers(points.numpy()), exact, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(series(points.numpy()), exact, rtol=1e-12, atol=1e-12)
        assert len(site.monomial[0]) == len(site.chebyshev[0]) == site.cost.degree + 1
    assert report.left == ()
    assert report.degree == 12
    # Two linear layers and 2 + 3 levels.
    assert (report.depth, report.levels, report.traced) == (2 + 2, 2 + 2 + 3, True)
    assert (report.ciphertext_multiplications, report.plaintext_multiplications) == (2 + 2, 2 + 3)


class Branches(nn.Module):
    """A short and a long path, a product, a power and a scale."""

    def __init__(self):
        super().__init__()
        self.short, self.long = nn.Linear(3, 3), nn.Linear(3, 3)
        self.act, self.other = HermiteActivation(3), HermiteActivation(2)

    def forward(self, x, scale=0.5):
        y = self.act(self.act(self.long(x)))
        return (self.other(self.short(x)) * y) ** 3 * scale + x


def test_the_longest_path_of_a_graph_counts_shared_sites_each_time():
    report = polynomial_report(Branches(), batches(5, 3))
    assert [(site.name, site.calls) for site in report.sites] == [("act", 2), ("other", 1)]
    assert report.degree == (9 + 2) * 3
    assert report.depth == 2 + 2 + 1 + 2
    assert report.levels == 1 + 2 + 2 + 1 + 2 + 1
    assert report.ciphertext_multiplications == 2 * 2 + 1 + 1 + 2


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.gate = HermiteActivation(3), HermiteActivation(2), nn.ReLU()

    def forward(self, x):
        y = self.first(x)
        return self.second(y) + self.gate(x) if x.sum() > -1e9 else x


def test_without_a_graph_sites_are_summed_in_calling_order():
    report = polynomial_report(Untraceable(), batches(5, 3))
    assert not report.traced
    assert [site.name for site in report.sites] == ["first", "second"]
    assert (report.degree, report.depth, report.levels) == (None, 3, 4)
    assert report.left == (("gate", "relu is not a polynomial"),)
    assert "of the sites in calling order (torch.fx cannot trace it)" in str(report)


def test_sites_inside_what_the_graph_keeps_whole_are_summed():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rewrite_(layer, ExpansionConfig("hermite", 3))
    report = polynomial_report(nn.Sequential(layer), batches(2, 3, 8))
    assert (report.traced, report.depth) == (False, 2)


def test_what_is_not_polynomial_is_listed_with_its_reason():
    model = nn.Sequential(
        nn.Linear(4, 4), HermiteActivation(2), nn.GELU(), nn.LayerNorm(4), HermiteActivation(clamp=3.0),
        make_activation(ExpansionConfig("fourier")), nn.Softmax(-1),
    )  # fmt: skip
    model.unused = HermiteActivation()
    model.forward = lambda x: [x := layer(x) for name, layer in model.named_children() if name != "unused"][-1]
    report = polynomial_report(model, batches(5, 4))
    assert [site.name for site in report.sites] == ["1"]
    left = dict(report.left)
    assert left["unused"] == "no batch reached it"
    assert left["4"] == "its input is clamped, and a clamp is not a polynomial: set its bounds to None"
    assert left["5"] == "a Fourier expansion is not a polynomial"
    for name, kind in (("2", "GELU"), ("3", "LayerNorm"), ("6", "Softmax")):
        assert left[name] == f"{kind} is neither affine, nor a sum, a product or a Hermite activation"
    assert report.degree is None


class Quotients(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.linear = HermiteActivation(2), nn.Linear(3, 3)

    def forward(self, x):
        y = self.act(x) / 2
        return nn.functional.linear(1 / y, self.linear.weight) + y / y + y**0.5 + nn.functional.linear(x, y)


def test_quotients_and_roots_are_not_polynomial():
    report = polynomial_report(Quotients(), batches(3, 3))
    divides = "it divides by what depends on the input, or its weights do"
    assert report.left == (
        ("truediv", divides),
        ("pow", "only powers with a positive integer as exponent are polynomials"),
        ("linear", divides),
    )


def test_the_table_and_the_plain_values():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU())
    data = batches(64, 4)
    configs = {"1": ExpansionConfig("hermite", 2), "3": ExpansionConfig("hermite", granularity="channel")}
    rewrite_(model, configs, example_inputs=data[0])
    assert find_sites(model) == []
    report = polynomial_report(model, data)
    lines = str(report).splitlines()
    assert lines[0].split() == "name degree calls ct mul pt mul depth levels min max mean std".split()
    assert lines[1].split()[:7] == ["1", "2", "1", "1", "1", "1", "2"]
    assert lines[3].startswith("1 x^k: ")
    assert lines[4].startswith("1 T_k: ")
    assert lines[5] == "3: 6 groups of coefficients, in to_dict()"
    assert lines[6] == (
        "degree 6, 3 ciphertext and 3 plaintext multiplications in activations and products; "
        "depth 3 and 6 levels along the longest path"
    )
    values = json.loads(json.dumps(report.to_dict()))
    assert len(values["sites"][1]["monomial"]) == 6
    assert values["sites"][0]["cost"]["depth"] == 1
    # OpenFHE counts half of the first coefficient of a Chebyshev series.
    site = report.sites[0]
    first, *others = values["sites"][0]["openfhe"][0]
    halved = np.polynomial.Chebyshev([first / 2, *others], domain=[site.low, site.high])
    points = np.linspace(site.low, site.high, 9)
    np.testing.assert_allclose(halved(points), np.polynomial.Polynomial(site.monomial[0])(points), atol=1e-12)


def test_errors_name_what_is_missing():
    with pytest.raises(OrthoFxError, match="Sequential holds no expansion to report on: call rewrite_ first"):
        polynomial_report(nn.Sequential(nn.ReLU()), batches(2, 2))
    model = nn.Sequential(HermiteActivation())
    with pytest.raises(OrthoFxError, match="no batch reached an expansion"):
        polynomial_report(model, [])
    with pytest.raises(OrthoFxError, match="the inputs of 0 are not finite"):
        polynomial_report(model, [torch.tensor([1.0, math.nan])])
    report = polynomial_report(model, [torch.ones(3)])
    assert report.left == (("0", "its inputs are constant (1): they have no range"),)
