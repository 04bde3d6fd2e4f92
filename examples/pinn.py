"""A physics-informed network whose loss holds exact second derivatives of learnable activations.

    python examples/pinn.py poisson | helmholtz | burgers [--steps 300] [--seeds 3] [--processes 1] [--out runs/pinn]
    python examples/pinn.py forms [--out runs/pinn]

`poisson` is u'' = f on [0, 1] with the solution sin(pi x) + 0.3 sin(5 pi x). `helmholtz` is u'' + k^2 u = f there with
k = 20 and the solution sin(12 pi x) + 0.5 sin(2 pi x). `burgers` is u_t + u u_x = nu u_xx with nu = 0.1 / pi, started
from -sin(pi x) on [-1, 1]; its exact solution is Cole and Hopf's integral, by Gauss-Hermite quadrature. All meet their
boundary conditions by construction, so that the loss is the equation's residual alone.

A residual can be written in three forms, which give the same numbers:

- `torch.autograd.grad(..., create_graph=True)` on points that need a gradient. It is the fastest without a compiler,
  and the form that trains here.
- `torch.func.grad` of `grad`, of the sum over the points, which do not see each other. `torch.compile(fullgraph=True)`
  takes it whole on every release.
- `torch.func.jvp` of `jvp`, and `vmap` of `hessian`.

`forms` tries each of them on the PyTorch that is installed, eager and compiled, and compares values and gradients.

Every network has float64, the same points, Adam with a cosine schedule, and then L-BFGS. Tropical expansions are left
out: they are piecewise linear, u_xx is zero wherever it exists, and the highest derivative would teach them nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jvp, vmap

from ortho_fx import ExpansionConfig, calibrate_, param_groups, rewrite_
from ortho_fx.plots import line_styles, load_pyplot

WIDTH, LEARNING_RATE, SECOND_ORDER_STEPS, VISCOSITY, WAVENUMBER = 32, 5e-3, 300, 0.1 / math.pi, 20.0
Function = Callable[[Tensor], Tensor]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@dataclass(frozen=True)
class Siren:
    """Sines as in a SIREN: sin(w0 (W x + b)) with the start of Sitzmann et al., arXiv 2006.09661, section 3.2.

    w0 is multiplied into W and b, so that the network is one of plain sines.
    """

    w0: float


@dataclass(frozen=True)
class Deep:
    """An expansion in a network with this number of hidden layers."""

    config: ExpansionConfig
    hidden: int


Activation = ExpansionConfig | type[Sine] | Siren | Deep | None
# None leaves the tanh that the network is written with.
ACTIVATIONS: dict[str, Activation] = {
    "tanh": None,
    "sine": Sine,
    "siren 30": Siren(30.0),
    "siren 6": Siren(6.0),
    "hermite 3": ExpansionConfig("hermite", 3),
    "hermite 5": ExpansionConfig("hermite", 5),
    "hermite 5, 4 layers": Deep(ExpansionConfig("hermite", 5, "depth:4"), 4),
    "chebyshev 5": ExpansionConfig("chebyshev", 5),
    "fourier 1": ExpansionConfig("fourier", 1),
    "fourier 5": ExpansionConfig("fourier", 5),
    "gelu_series 3": ExpansionConfig("gelu_series", 3),
}


def make_network(activation: Activation, example: Tensor) -> nn.Module:
    """An MLP with hidden layers of 32; its activations are replaced, and calibrated to the points of the loss."""
    hidden = activation.hidden if isinstance(activation, Deep) else 2
    sizes = [example.shape[1], *[WIDTH] * hidden, 1]
    linears = [nn.Linear(a, b, dtype=example.dtype) for a, b in itertools.pairwise(sizes)]
    for linear in linears:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    nn.init.normal_(linears[0].bias)
    if isinstance(activation, Siren):
        start_siren(linears, activation.w0)
    sines = activation is Sine or isinstance(activation, Siren)
    layers: list[nn.Module] = [linears[0]]
    for linear in linears[1:]:
        layers += [Sine() if sines else nn.Tanh(), linear]
    network = nn.Sequential(*layers)
    config = activation.config if isinstance(activation, Deep) else activation
    if isinstance(config, ExpansionConfig):
        rewrite_(network, config, targets=["tanh"])
        calibrate_(network, [example])
    return network


def start_siren(linears: Sequence[nn.Linear], w0: float) -> None:
    """U(-1 / n, 1 / n) in the first layer, and U(-sqrt(6 / n) / w0, sqrt(6 / n) / w0) in the others; times w0."""
    for number, linear in enumerate(linears):
        n = linear.in_features
        bound = w0 / n if number == 0 else math.sqrt(6 / n)
        if number == len(linears) - 1:  # no sine follows
            bound /= w0
        nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.uniform_(linear.bias, -w0 / math.sqrt(n), w0 / math.sqrt(n))
    nn.init.zeros_(linears[-1].bias)


@dataclass(frozen=True)
class Problem:
    """A differential equation on points (n, d).

    Attributes:
        title: the equation.
        points: where the loss evaluates the equation.
        test: where the solution is compared with the exact one.
        scaled: the points scaled to [-1, 1], as the network gets them.
        solution: (network, points) -> u (n,), which meets the boundary conditions.
        equation: (u, the first derivatives of u, the second derivative along x, points) -> the residual (n,).
        exact: points -> u (n,).
    """

    title: str
    points: Tensor
    test: Tensor
    scaled: Function
    solution: Callable[[Function | nn.Module, Tensor], Tensor]
    equation: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    exact: Function

    def residual(self, u: Function, points: Tensor) -> Tensor:
        """The form of `torch.func.grad`."""
        slopes = gradient(u)
        u_xx = gradient(lambda points: slopes(points)[:, 0])(points)[:, 0]
        return self.equation(u(points), slopes(points), u_xx, points)


def gradient(u: Function) -> Function:
    """points (n, d) -> the first derivatives of u (n, d); u at a point must depend on that point alone."""
    return grad(lambda points: u(points).sum())


# The forms of a residual: (problem, u, points) -> (n,).


def by_autograd(problem: Problem, u: Function, points: Tensor) -> Tensor:
    points = points.detach().requires_grad_()
    value = u(points)
    (slopes,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(slopes[:, 0].sum(), points, create_graph=True)
    return problem.equation(value, slopes, second[:, 0], points)


def by_grad(problem: Problem, u: Function, points: Tensor) -> Tensor:
    return problem.residual(u, points)


def by_jvp(problem: Problem, u: Function, points: Tensor) -> Tensor:
    def along(direction: int) -> Function:
        ones = torch.zeros_like(points)
        ones[:, direction] = 1.0
        return lambda points: jvp(u, (points,), (ones,))[1]

    directions = range(points.shape[1])
    ones = torch.zeros_like(points)
    ones[:, 0] = 1.0
    u_xx = jvp(along(0), (points,), (ones,))[1]
    return problem.equation(u(points), torch.stack([along(d)(points) for d in directions], 1), u_xx, points)


def by_hessian(problem: Problem, u: Function, points: Tensor) -> Tensor:
    def one(point: Tensor) -> Tensor:
        return u(point[None])[0]

    u_xx = vmap(hessian(one))(points)[:, 0, 0]
    return problem.equation(u(points), vmap(grad(one))(points), u_xx, points)


FORMS = {
    "autograd, create_graph": by_autograd,
    "grad of grad": by_grad,
    "jvp of jvp": by_jvp,
    "vmap of hessian": by_hessian,
}


def poisson() -> Problem:
    def equation(u: Tensor, slopes: Tensor, u_xx: Tensor, x: Tensor) -> Tensor:
        wanted = torch.sin(math.pi * x) + 0.3 * 25 * torch.sin(5 * math.pi * x)
        return u_xx / math.pi**2 + wanted[:, 0]

    return Problem(
        title="u'' = f",
        points=torch.linspace(0, 1, 129, dtype=torch.float64)[:, None],
        test=torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None],
        scaled=lambda x: 2 * x - 1,
        solution=lambda network, x: (x * (1 - x) * network(2 * x - 1))[:, 0],
        equation=equation,
        exact=lambda x: (torch.sin(math.pi * x) + 0.3 * torch.sin(5 * math.pi * x))[:, 0],
    )


def helmholtz() -> Problem:
    waves = ((1.0, 12 * math.pi), (0.5, 2 * math.pi))

    def equation(u: Tensor, slopes: Tensor, u_xx: Tensor, x: Tensor) -> Tensor:
        wanted = sum(a * (WAVENUMBER**2 - w**2) * torch.sin(w * x[:, 0]) for a, w in waves)
        return (u_xx + WAVENUMBER**2 * u - wanted) / waves[0][1] ** 2

    return Problem(
        title="u'' + k² u = f",
        points=torch.linspace(0, 1, 257, dtype=torch.float64)[:, None],
        test=torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None],
        scaled=lambda x: 2 * x - 1,
        solution=lambda network, x: (x * (1 - x) * network(2 * x - 1))[:, 0],
        equation=equation,
        exact=lambda x: sum((a * torch.sin(w * x[:, 0]) for a, w in waves), torch.zeros_like(x[:, 0])),
    )


def burgers() -> Problem:
    def scaled(points: Tensor) -> Tensor:
        return torch.stack([points[:, 0], 2 * points[:, 1] - 1], 1)

    def solution(network: nn.Module, points: Tensor) -> Tensor:
        x, t = points.unbind(1)
        return -torch.sin(math.pi * x) + t * (1 - x * x) * network(scaled(points))[:, 0]

    def equation(u: Tensor, slopes: Tensor, u_xx: Tensor, points: Tensor) -> Tensor:
        u_x, u_t = slopes.unbind(1)
        return u_t + u * u_x - VISCOSITY * u_xx

    x, t = (torch.linspace(*bounds, dtype=torch.float64) for bounds in ((-1, 1, 41), (0, 1, 16)))
    test_x, test_t = (torch.linspace(*bounds, dtype=torch.float64) for bounds in ((-1, 1, 201), (0, 1, 41)))
    return Problem(
        title="Burgers, nu = 0.1 / pi",
        points=torch.cartesian_prod(x, t),
        test=torch.cartesian_prod(test_x, test_t),
        scaled=scaled,
        solution=solution,
        equation=equation,
        exact=exact_burgers,
    )


def exact_burgers(points: Tensor) -> Tensor:
    """Cole and Hopf's solution: a quotient of two Gaussian integrals over y = x - sqrt(4 nu t) z."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite.hermgauss(100))
    x, t = points.double().unbind(1)
    y = x[:, None] - (4 * VISCOSITY * t[:, None]).sqrt() * nodes
    density = weights * torch.exp(-torch.cos(math.pi * y) / (2 * math.pi * VISCOSITY))
    return -((density * torch.sin(math.pi * y)).sum(1) / density.sum(1)).to(points.dtype)


PROBLEMS = {"poisson": poisson, "helmholtz": helmholtz, "burgers": burgers}
Loss = Callable[[nn.Module, Tensor], Tensor]


def make_loss(problem: Problem, form: Callable[[Problem, Function, Tensor], Tensor] = by_autograd) -> Loss:
    def loss(network: nn.Module, points: Tensor) -> Tensor:
        return form(problem, lambda at: problem.solution(network, at), points).square().mean()

    return loss


def train(problem: Problem, network: nn.Module, loss: Loss, steps: int) -> Tensor:
    """Trains by Adam with a cosine schedule, then by L-BFGS; returns u at the test points."""
    optimizer = torch.optim.Adam(param_groups(network, lr=LEARNING_RATE))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network, problem.points).backward()
        optimizer.step()
        schedule.step()
    second = torch.optim.LBFGS(
        network.parameters(),
        max_iter=min(steps, SECOND_ORDER_STEPS),
        history_size=50,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        second.zero_grad()
        value = loss(network, problem.points)
        value.backward()
        return value

    second.step(closure)
    with torch.no_grad():
        return problem.solution(network, problem.test)


def draw(problem: Problem, solutions: dict[str, Tensor], path: Path) -> None:
    """Draws the exact solution and the first seed's errors, at all x or, for burgers, at the last t."""
    pyplot = load_pyplot()
    at = slice(None) if problem.test.shape[1] == 1 else problem.test[:, 1] == 1
    x, exact = problem.test[at, 0], problem.exact(problem.test[at])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    left.plot(x, exact, color="0.8", lw=5, label="exact")
    for (label, solution), line in zip(solutions.items(), line_styles(solutions), strict=True):
        style = {**line, "lw": 1.3, "label": label}
        left.plot(x, solution[at], **style)
        right.semilogy(x, (solution[at] - exact).abs().clamp(min=1e-9), **style)
    left.set_title(problem.title, fontsize=10)
    right.set_title("absolute error, seed 0", fontsize=10)
    left.set_ylabel("u" if problem.test.shape[1] == 1 else "u at t = 1")
    right.set_ylabel("|u - exact|")
    for axis in (left, right):
        axis.set_xlabel("x")
        axis.grid(alpha=0.2)
        axis.margins(x=0)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def least_polynomial_errors(problem: Problem) -> dict[int, float]:
    """The least relative L2 error at the last t, by degree, of a network that is a polynomial in x.

    A network with n layers of Hermite or Chebyshev expansions of degree d is one of degree d^n, however it is trained.
    """
    at = problem.test[problem.test[:, -1] == problem.test[:, -1].max()] if problem.test.shape[1] == 2 else problem.test
    constant = [problem.solution(lambda x, c=c: torch.full_like(x[:, :1], c), at).numpy() for c in (0.0, 1.0)]
    exact, columns = (
        problem.exact(at).numpy(),
        np.polynomial.chebyshev.chebvander(problem.scaled(at)[:, 0].numpy(), 125),
    )
    found = {}
    for degree in (3**2, 5**2, 5**3):
        matrix = (constant[1] - constant[0])[:, None] * columns[:, : degree + 1]
        best = constant[0] + matrix @ np.linalg.lstsq(matrix, exact - constant[0], rcond=None)[0]
        found[degree] = float(np.linalg.norm(best - exact) / np.linalg.norm(exact))
    return found


def train_one(name: str, label: str, seed: int, steps: int) -> tuple[Tensor, float]:
    """The solution at the test points, and the seconds of processor time that it took."""
    torch.set_num_threads(1)
    problem, start = PROBLEMS[name](), time.process_time()
    torch.manual_seed(seed)
    network = make_network(ACTIVATIONS[label], problem.scaled(problem.points))
    return train(problem, network, make_loss(problem), steps), time.process_time() - start


def in_processes(tasks: Sequence[tuple[str, str, int, int]], processes: int) -> Iterator[tuple[Tensor, float]]:
    """The results of `train_one`, in the order of the tasks."""
    if processes == 1:
        yield from itertools.starmap(train_one, tasks)
        return
    with ProcessPoolExecutor(processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(train_one, *zip(*tasks, strict=True))


def run(name: str, steps: int, seeds: int, labels: Sequence[str], processes: int, out: Path) -> dict[str, Any]:
    problem = PROBLEMS[name]()
    exact = problem.exact(problem.test)
    rows: dict[str, dict[str, Any]] = {}
    solutions: dict[str, Tensor] = {}
    print(f"{name}: {steps} steps of Adam, then L-BFGS")
    print(f"{'activation':20} {'relative L2 error: median':>26}  lowest to highest")
    tasks = [(name, label, seed, steps) for label in labels for seed in range(seeds)]
    results = in_processes(tasks, processes)
    for label in labels:
        found, seconds = zip(*itertools.islice(results, seeds), strict=True)
        errors = [((solution - exact).norm() / exact.norm()).item() for solution in found]
        solutions[label] = found[0]
        rows[label] = {
            "errors": errors,
            "median": statistics.median(errors),
            "cpu_seconds_a_run": round(statistics.fmean(seconds), 1),
        }
        print(f"{label:20} {rows[label]['median']:26.1e}  {min(errors):.1e} to {max(errors):.1e}", flush=True)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    draw(problem, solutions, out / "pictures" / f"pinn_{name}.png")
    return {
        "steps": steps,
        "second_order_steps": min(steps, SECOND_ORDER_STEPS),
        "least_polynomial_errors": least_polynomial_errors(problem),
        "activations": rows,
    }


COMPARED = ("tanh", "fourier 5")


def try_forms() -> dict[str, Any]:
    """Each form of u'' = f on this release: milliseconds without a compiler, and whether it compiles as a whole."""
    problem, found = poisson(), {}
    for label in COMPARED:
        torch.manual_seed(0)
        network = make_network(ACTIVATIONS[label], problem.scaled(problem.points))
        expected = with_gradients(make_loss(problem), network, problem.points)
        found[label] = {}
        for name, form in FORMS.items():
            loss = make_loss(problem, form)
            agrees(with_gradients(loss, network, problem.points), expected)
            row: dict[str, Any] = {"eager_ms": milliseconds(loss, network, problem.points), "compiles": True}
            torch.compiler.reset()
            try:
                # It takes the graph of forward and backward as Inductor would, and generates no code.
                compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
                agrees(with_gradients(compiled, network, problem.points), expected)
            except Exception as error:  # what a release raises here is what is to be recorded
                row["compiles"] = False
                row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            found[label][name] = row
            told = row.get("error", "compiles")
            print(f"{label:11} {name:24} {row['eager_ms']:7.2f} ms without a compiler; {told}", flush=True)
    return found


def with_gradients(loss: Loss, network: nn.Module, points: Tensor) -> list[Tensor]:
    network.zero_grad()
    value = loss(network, points)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


def agrees(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def milliseconds(loss: Loss, network: nn.Module, points: Tensor) -> float:
    """The least processor time of a loss with its gradients: other load on the machine only adds to it."""
    times = []
    for _ in range(80):
        start = time.thread_time()
        with_gradients(loss, network, points)
        times.append(1000 * (time.thread_time() - start))
    return min(times)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*PROBLEMS, "forms"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=list(ACTIVATIONS), choices=ACTIVATIONS, metavar="NAME", help="these alone"
    )
    parser.add_argument("--processes", type=int, default=1, help="networks that train at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/pinn"), help="folder of results/ and pictures/")
    parsed = parser.parse_args(arguments)
    about = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
    }
    if parsed.what == "forms":
        key, result = f"forms {torch.__version__.split('+')[0]}", {"forms": try_forms()}
    else:
        key, result = (
            parsed.what,
            run(parsed.what, parsed.steps, parsed.seeds, parsed.only, parsed.processes, parsed.out),
        )
    path = parsed.out / "results" / "pinn.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[key] = {**about, **result}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
