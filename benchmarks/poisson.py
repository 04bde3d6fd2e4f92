r"""A problem for `ortho-fx compare`: a physics-informed network, which solves Poisson's equation on the unit square.

    ortho-fx compare benchmarks/poisson.py:Poisson --steps 1500 --batch-size 256 --lr 0.005 --min-lr 0 \
      --weight-decay 0 --compile --reference tanh --tune 3 --jobs 2 --seeds 5 --no-equal-steps --out runs/poisson \
      --activations tanh sine gelu fourier:1 fourier:2 fourier:5 fourier:5:tied hermite:3

The equation is u_xx + u_yy = f, with u = 0 on the boundary. f is that of the known solution

    u(x, y) = sin(pi x) sin(pi y) + sin(3 pi x) sin(2 pi y) / 2

The network n is an MLP with two hidden layers, times a factor that is 0 on the boundary:

    n(x, y) = 16 x (1 - x) y (1 - y) MLP(2 x - 1, 2 y - 1)

Training minimises the mean square of n_xx + n_yy - f at random points, which holds second derivatives of the
activations. The validation is the relative error of n on a grid, sqrt(sum (n - u)^2 / sum u^2).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import pi

import torch
from torch import Tensor, nn

WIDTH, GRID = 64, 32


class Network(nn.Module):
    """(points, 2) to (points,)."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(2, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, points: Tensor) -> Tensor:
        return 16 * (points * (1 - points)).prod(-1) * self.layers(2 * points - 1).squeeze(-1)


class Poisson:
    """The model, its points and its loss."""

    def model(self) -> nn.Module:
        return Network()

    def batches(self, seed: int | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random points and f there; those of the grid and u there for the validation."""
        if seed is None:
            side = torch.linspace(0, 1, GRID + 2)[1:-1]
            points = torch.cartesian_prod(side, side)
            yield points, solution(points)
            return
        generator = torch.Generator().manual_seed(seed)
        while True:
            points = torch.rand(size, 2, generator=generator)
            yield points, right_side(points)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        points, targets = batch
        if not model.training:
            return ((model(points) - targets).square().sum() / targets.square().sum()).sqrt()
        return (laplacian(model, points) - targets).square().mean()


def solution(points: Tensor) -> Tensor:
    x, y = points.unbind(-1)
    return (pi * x).sin() * (pi * y).sin() + (3 * pi * x).sin() * (2 * pi * y).sin() / 2


def right_side(points: Tensor) -> Tensor:
    x, y = points.unbind(-1)
    first, second = (pi * x).sin() * (pi * y).sin(), (3 * pi * x).sin() * (2 * pi * y).sin() / 2
    return -(pi**2) * (2 * first + 13 * second)


def laplacian(model: nn.Module, points: Tensor) -> Tensor:
    """The sum of the second derivatives along both axes, forward over forward."""
    total = torch.zeros(len(points))
    for axis in torch.eye(2):
        direction = axis.expand_as(points)

        def slope(at: Tensor, direction: Tensor = direction) -> Tensor:
            return torch.func.jvp(model, (at,), (direction,))[1]

        total = total + torch.func.jvp(slope, (points,), (direction,))[1]
    return total
