"""A physics-informed network whose loss holds exact second derivatives of learnable activations, eager and compiled.

    python examples/pinn.py poisson | burgers [--steps 2000] [--seeds 3] [--eager] [--out runs/pinn]

`poisson` is u'' = f on [0, 1] with the solution sin(pi x) + 0.3 sin(5 pi x). `burgers` is u_t + u u_x = nu u_xx with
nu = 0.1 / pi, started from -sin(pi x) on [-1, 1]; its exact solution is Cole and Hopf's integral, by Gauss-Hermite
quadrature. Both meet their boundary conditions by construction, so that the loss is the equation's residual alone.

The derivatives are nested `torch.func.grad`s of the sum over the points, which do not see each other: that is the
formulation that `torch.compile(fullgraph=True)` takes whole. It takes neither `torch.autograd.grad(create_graph=True)`
through a compiled forward nor, in PyTorch 2.13, `torch.func.jvp` of `jvp`, with tanh as little as with expansions.

Every network has the same weights at the start, points, optimizer and steps. Tropical expansions are left out: they
are piecewise linear, u_xx is zero wherever it exists, and the equation's highest derivative would teach them nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.func import grad

from ortho_fx import ExpansionConfig, calibrate_, param_groups, rewrite_
from ortho_fx.plots import line_styles

matplotlib.use("agg")

WIDTH, LEARNING_RATE, VISCOSITY = 32, 5e-3, 0.1 / math.pi
Function = Callable[[Tensor], Tensor]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


# None leaves the tanh that the network is written with.
ACTIVATIONS: dict[str, ExpansionConfig | type[Sine] | None] = {
    "tanh": None,
    "sine": Sine,
    "hermite 5": ExpansionConfig("hermite", 5),
    "fourier 5": ExpansionConfig("fourier", 5),
}


def make_network(activation: ExpansionConfig | type[Sine] | None, example: Tensor) -> nn.Module:
    """An MLP with two hidden layers; its activations are replaced and calibrated to the points of the loss."""
    linears = [nn.Linear(example.shape[1], WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    for linear in linears:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    nn.init.normal_(linears[0].bias)
    hidden = Sine if activation is Sine else nn.Tanh
    network = nn.Sequential(linears[0], hidden(), linears[1], hidden(), linears[2])
    if isinstance(activation, ExpansionConfig):
        rewrite_(network, activation, targets=["tanh"])
        calibrate_(network, [example])
    return network


@dataclass(frozen=True)
class Problem:
    """A differential equation on points (n, d).

    Attributes:
        points: where the loss evaluates the equation.
        test: where the solution is compared with the exact one.
        scaled: the points scaled to [-1, 1], as the network gets them.
        solution: (network, points) -> u (n,), which meets the boundary conditions.
        residual: (u, points) -> the equation's residual (n,).
        exact: points -> u (n,).
    """

    points: Tensor
    test: Tensor
    scaled: Function
    solution: Callable[[nn.Module, Tensor], Tensor]
    residual: Callable[[Function, Tensor], Tensor]
    exact: Function


def gradient(u: Function) -> Function:
    """points (n, d) -> the first derivatives of u (n, d); u at a point must depend on that point alone."""
    return grad(lambda points: u(points).sum())


def poisson() -> Problem:
    def residual(u: Function, x: Tensor) -> Tensor:
        slope = gradient(u)
        curvature = gradient(lambda points: slope(points)[:, 0])(x)[:, 0]
        wanted = torch.sin(math.pi * x) + 0.3 * 25 * torch.sin(5 * math.pi * x)
        return curvature / math.pi**2 + wanted[:, 0]

    return Problem(
        points=torch.linspace(0, 1, 129)[:, None],
        test=torch.linspace(0, 1, 1001)[:, None],
        scaled=lambda x: 2 * x - 1,
        solution=lambda network, x: (x * (1 - x) * network(2 * x - 1))[:, 0],
        residual=residual,
        exact=lambda x: (torch.sin(math.pi * x) + 0.3 * torch.sin(5 * math.pi * x))[:, 0],
    )


def burgers() -> Problem:
    def scaled(points: Tensor) -> Tensor:
        return torch.stack([points[:, 0], 2 * points[:, 1] - 1], 1)

    def solution(network: nn.Module, points: Tensor) -> Tensor:
        x, t = points.unbind(1)
        return -torch.sin(math.pi * x) + t * (1 - x * x) * network(scaled(points))[:, 0]

    def residual(u: Function, points: Tensor) -> Tensor:
        slopes = gradient(u)
        u_x, u_t = slopes(points).unbind(1)
        u_xx = gradient(lambda points: slopes(points)[:, 0])(points)[:, 0]
        return u_t + u(points) * u_x - VISCOSITY * u_xx

    return Problem(
        points=torch.cartesian_prod(torch.linspace(-1, 1, 41), torch.linspace(0, 1, 16)),
        test=torch.cartesian_prod(torch.linspace(-1, 1, 201), torch.linspace(0, 1, 41)),
        scaled=scaled,
        solution=solution,
        residual=residual,
        exact=exact_burgers,
    )


def exact_burgers(points: Tensor) -> Tensor:
    """Cole and Hopf's solution: a quotient of two Gaussian integrals over y = x - sqrt(4 nu t) z."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite.hermgauss(100))
    x, t = points.double().unbind(1)
    y = x[:, None] - (4 * VISCOSITY * t[:, None]).sqrt() * nodes
    density = weights * torch.exp(-torch.cos(math.pi * y) / (2 * math.pi * VISCOSITY))
    return -((density * torch.sin(math.pi * y)).sum(1) / density.sum(1)).to(points.dtype)


PROBLEMS = {"poisson": poisson, "burgers": burgers}


def make_loss(problem: Problem) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(network: nn.Module, points: Tensor) -> Tensor:
        return problem.residual(lambda at: problem.solution(network, at), points).square().mean()

    return loss


def train(problem: Problem, network: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], steps: int) -> Tensor:
    """Trains by Adam with a cosine schedule; returns u at the test points."""
    optimizer = torch.optim.Adam(param_groups(network, lr=LEARNING_RATE))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network, problem.points).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return problem.solution(network, problem.test)


def milliseconds(network: nn.Module, points: Tensor, losses: list[Callable[..., Tensor]]) -> list[float]:
    """Median times of loss and gradients, measured in turns so that other load on the machine affects all alike."""
    times: list[list[float]] = [[] for _ in losses]
    for _ in range(25):
        for own, loss in zip(times, losses, strict=True):
            start = time.perf_counter()
            network.zero_grad()
            loss(network, points).backward()
            own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def draw(problem: Problem, name: str, solutions: dict[str, Tensor], path: Path) -> None:
    """Draws the exact solution and the first seed's errors, at all x or, for burgers, at the last t."""
    at = slice(None) if problem.test.shape[1] == 1 else problem.test[:, 1] == 1
    x, exact = problem.test[at, 0], problem.exact(problem.test[at])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
    left.plot(x, exact, color="0.8", lw=5, label="exact")
    for (label, solution), line in zip(solutions.items(), line_styles(solutions), strict=True):
        style = {**line, "lw": 1.3, "label": label}
        left.plot(x, solution[at], **style)
        right.semilogy(x, (solution[at] - exact).abs().clamp(min=1e-7), **style)
    left.set_title(name, fontsize=10)
    right.set_title("absolute error", fontsize=10)
    left.set_ylabel("u" if problem.test.shape[1] == 1 else "u at t = 1")
    for axis in (left, right):
        axis.set_xlabel("x")
        axis.grid(alpha=0.2)
        axis.margins(x=0)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def run(name: str, steps: int, seeds: int, out: Path, eager: bool = False) -> dict[str, dict[str, object]]:
    problem = PROBLEMS[name]()
    exact = problem.exact(problem.test)
    rows: dict[str, dict[str, object]] = {}
    solutions: dict[str, Tensor] = {}
    heads = f"{'ms eager':>9}" if eager else f"{'ms eager':>9} {'compiled':>9}"
    print(f"{name}: {steps} steps\n{'activation':11} {'relative L2 error':>21} {heads} {'ratio':>6}")
    for label, activation in ACTIVATIONS.items():
        torch.compiler.reset()
        loss = make_loss(problem)
        losses = {"eager": loss} if eager else {"eager": loss, "compiled": torch.compile(loss, fullgraph=True)}
        errors = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            network = make_network(activation, problem.scaled(problem.points))
            solution = train(problem, network, [*losses.values()][-1], steps)
            solutions.setdefault(label, solution)
            errors.append(((solution - exact).norm() / exact.norm()).item())
        times = milliseconds(network, problem.points, [*losses.values()])
        mean, std = statistics.mean(errors), statistics.stdev(errors) if seeds > 1 else 0.0
        milliseconds_of = {f"{kind}_ms": value for kind, value in zip(losses, times, strict=True)}
        rows[label] = {"errors": errors, "mean": mean, "std": std, **milliseconds_of}
        printed = "".join(f" {value:9.2f}" for value in times)
        print(f"{label:11} {mean:10.2e} ± {std:.2e}{printed} {times[0] / times[-1]:6.1f}", flush=True)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    draw(problem, name, solutions, out / "pictures" / f"pinn_{name}.png")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--out", type=Path, default=Path("runs/pinn"), help="folder of results/ and pictures/")
    parsed = parser.parse_args(arguments)
    rows = run(parsed.problem, parsed.steps, parsed.seeds, parsed.out, parsed.eager)
    path = parsed.out / "results" / "pinn.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[parsed.problem] = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "steps": parsed.steps,
        "activations": rows,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
