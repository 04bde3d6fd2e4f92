"""Stock activations: the functions that a user could pick instead of an expansion, and how a model gets them.

`exchange_` puts one in the place of every activation of a model, wherever `rewrite_` would put an expansion.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.activations.polynorm import PolyNormActivation
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.rewriting.rewrite import rewrite_
from ortho_fx.watch import watching

# Starts besides the function itself.
STARTS = ("calibrated", "rescaled")


class SquaredReLU(nn.Module):
    """y(x) = max(x, 0)^2, elementwise.

    Source: So et al., "Primer", arXiv 2109.08668.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class SquaredLeakyReLU(nn.Module):
    """y(x) = l(x)^2 with l(x) = x for x > 0 and slope x otherwise, elementwise.

    Args:
        slope: of l below zero.
    """

    def __init__(self, slope: float = 0.5) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope).square()

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


class XIELU(nn.Module):
    r"""y(x) = a_p x^2 + b x for x > 0, and a_n (e^x - 1 - x) + b x otherwise, elementwise, with learnable a_p and a_n.

    a_p = softplus(positive) stays above 0, and a_n = b + softplus(negative) above b = 0.5. Both start at 0.8. The slope
    at 0 is b from both sides.

    Shape: `(*)` of any floating dtype; output `(*)`. `positive` and `negative` have shape `(1,)`.

    Source: Huang, "Deriving activation functions using integration", arXiv 2411.13010.
    """

    slope = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Parameter(torch.tensor([math.log(math.expm1(0.8))]))
        self.negative = nn.Parameter(torch.tensor([math.log(math.expm1(0.8 - self.slope))]))

    def forward(self, x: Tensor) -> Tensor:
        above, below = F.softplus(self.positive), self.slope + F.softplus(self.negative)
        # Both branches are computed for every x, so the exponential must not overflow.
        low = x.clamp(max=0)
        return (torch.where(x > 0, above * x.square(), below * (torch.expm1(low) - low)) + self.slope * x).to(x.dtype)


class Sine(nn.Module):
    """y(x) = sin(x), elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Normalised(nn.Module):
    r"""y = s f((x - m) / d) / g: a function made for inputs of mean m and standard deviation d.

    g^2 = E[f(z)^2] for z of N(0, 1). So y has the mean square s^2 for inputs N(m, d^2). At first m = 0 and d = s = 1,
    which only rescales f. `calibrate` sets m and d as measured, and s = d, or s = 1 for the gate of a product.

    Args:
        function: f, elementwise.
        gated: whether the output is a factor of a product.
    """

    shift: Tensor
    width: Tensor
    gain: Tensor

    def __init__(self, function: nn.Module, gated: bool = False) -> None:
        super().__init__()
        self.function, self.gated = function, gated
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("width", torch.ones(()))
        self.register_buffer("gain", torch.tensor(1 / root_mean_square(function)))

    def calibrate(self, mean: float, std: float) -> None:
        """Sets m, d and s for inputs of this mean and standard deviation."""
        self.shift.fill_(mean)
        self.width.fill_(std)
        if not self.gated:
            self.gain.mul_(std)

    def forward(self, x: Tensor) -> Tensor:
        return (self.gain * self.function((x - self.shift) / self.width)).to(x.dtype)


def root_mean_square(function: nn.Module) -> float:
    """sqrt(E[f(z)^2]) for z of N(0, 1), by the trapezoidal rule on [-12, 12]."""
    z = torch.linspace(-12, 12, 48_001)
    with torch.no_grad():
        squares = function(z).double().square()
    density = torch.exp(-z.double().square() / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(torch.trapezoid(squares * density, z.double()).item())


_PLAIN: Mapping[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "relu_squared": SquaredReLU,
    "leaky_relu_squared": SquaredLeakyReLU,
    "silu": nn.SiLU,
    "sine": Sine,
    "tanh": nn.Tanh,
    "prelu": nn.PReLU,
    "xielu": XIELU,
}
# torchortho's classes, with the degree that they have without one, and by the name after "torchortho:". Only their
# signature is used. Version 0.1.2 has no granularity other than one expansion per module.
TORCHORTHO = (("HermiteActivation", 3), ("FourierActivation", 5), ("TropicalActivation", 5))
_TORCHORTHO = {title.removesuffix("Activation").lower(): (title, degree) for title, degree in TORCHORTHO}
NAMES = (*_PLAIN, "polynorm", *(f"torchortho:{name}" for name in _TORCHORTHO))
_DEGREE = re.compile("[1-9][0-9]?")


@dataclass(frozen=True)
class Stock:
    """A stock activation: its name, its degree if it has one, and how it starts.

    Args:
        name: one of `NAMES`.
        degree: of polynorm or of one of torchortho's.
        start: None for the function itself, "rescaled" for f(x) / sqrt(E[f(z)^2]), or "calibrated" for
            d f((x - m) / d) / sqrt(E[f(z)^2]) with the mean m and the standard deviation d of the measured inputs.

    Raises:
        OrthoFxError: an unknown name or start, or a degree or start that this activation does not have.
    """

    name: str
    degree: int | None = None
    start: str | None = None

    @classmethod
    def parse(cls, text: str) -> Stock:
        """The activation that "NAME[:DEGREE][:START]" names.

        Raises:
            OrthoFxError: another text.
        """
        name = max((one for one in NAMES if text == one or text.startswith(f"{one}:")), key=len, default=None)
        if name is None:
            raise OrthoFxError(f"a stock activation is one of {', '.join(NAMES)}; got {text!r}")
        rest = text.removeprefix(name).removeprefix(":")
        parts = rest.split(":") if rest else []
        start = parts.pop() if parts and parts[-1] in STARTS else None
        if len(parts) > 1 or not all(_DEGREE.fullmatch(part) for part in parts):
            more = f"{name} may have a colon and one of {', '.join(STARTS)} behind it"
            raise OrthoFxError(f"{more}, and what has a degree that before; got {text!r}")
        return cls(name, int(parts[0]) if parts else None, start)

    def __post_init__(self) -> None:
        torchortho = _TORCHORTHO.get(self.name.removeprefix("torchortho:"))
        default = 3 if self.name == "polynorm" else torchortho and torchortho[1]
        if self.degree is None:
            object.__setattr__(self, "degree", default)
        elif default is None:
            raise OrthoFxError(f"{self.name} has no degree; got {self.degree}")
        if self.name == "polynorm":
            if self.start is not None:
                raise OrthoFxError(f"polynorm normalises its own inputs, so it is not {self.start}")
            PolyNormActivation(self.degree or 3)  # which checks the degree

    def __str__(self) -> str:
        return ":".join([self.name, *([] if self.degree is None else [str(self.degree)]), *filter(None, [self.start])])

    def make(self, gated: bool = False) -> nn.Module:
        """A new module; `gated` as for `Normalised`.

        Raises:
            OrthoFxError: torchortho is not installed, or does not make this degree.
        """
        if self.name == "polynorm":
            assert self.degree is not None
            return PolyNormActivation(self.degree)
        if self.name in _PLAIN:
            function = _PLAIN[self.name]()
        else:
            name = _TORCHORTHO[self.name.removeprefix("torchortho:")][0]
            try:
                function = getattr(importlib.import_module("torchortho"), name)(self.degree)
            except ImportError:
                raise OrthoFxError(f"{self} needs torchortho: pip install torchortho") from None
            except Exception as error:  # of a library that is not ours
                raise OrthoFxError(f"torchortho makes no {self}: {type(error).__name__}: {error}") from None
        return function if self.start is None else Normalised(function, gated)


def exchange_(model: nn.Module, make: Callable[[], nn.Module]) -> list[str]:
    """Puts a new module in the place of each activation of a model, modules and functions, and returns their names.

    It replaces what `rewrite_` replaces by default. An activation that stands in several places stays one.

    Raises:
        OrthoFxError: a model without an activation that `rewrite_` replaces.
    """
    rewrite_(model, ExpansionConfig("hermite"))
    places = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ExpansionActivation)
    ]
    made: dict[ExpansionActivation, nn.Module] = {}
    for name, expansion in places:
        if expansion not in made:
            made[expansion] = make()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made[expansion])
    return [name for name, _ in places]


def calibrate_stock_(model: nn.Module, inputs: Tensor) -> None:
    """Runs the model on a batch, and sets every `Normalised` activation for the inputs that it gets there.

    Raises:
        OrthoFxError: inputs of one that are not finite or constant, or that it never gets.
    """
    sites = {name: module for name, module in model.named_modules() if isinstance(module, Normalised)}
    seen = {name: Histogram() for name in sites}
    with torch.no_grad(), watching(sites, lambda name, x, _: seen[name].add(x)):
        model(inputs)
    for name, module in sites.items():
        if not seen[name].samples or not seen[name].finite or seen[name].constant:
            raise OrthoFxError(f"{name} cannot be calibrated: its inputs are none, constant or not finite")
        module.calibrate(seen[name].mean, seen[name].std)
