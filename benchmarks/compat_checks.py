"""The checks of `compat.py check`: what ortho_fx promises, tried on the PyTorch that is installed.

A check is a function that gives its cases by name. A case is a call: it returns what it saw, and raises where that is
wrong. The cases that remain go on. Nothing but PyTorch, numpy and ortho_fx is needed.

- lowering: Inductor gets our own kernels for each basis, not the fallback;
- values, plain: compiled expansions in float32, forward and backward, are those of eager float64: with the lowering
  and without it;
- kernels: how many Inductor makes of an expansion alone, forward and backward, with the lowering and without it. The
  lowering must not take more;
- readme: the Python of README.md, in order;
- hook: `torch.compile(model, backend="ortho_fx")` trains as a model does that `rewrite_` has been over;
- transforms: those of torch.func, eager and compiled, are those of the formulas in float64;
- export: `torch.export`, strict and not, for a batch of any size, and its decompositions;
- ddp: a step of two processes is that of one;
- warnings: what ortho_fx warned of in all of these.
"""

from __future__ import annotations

import copy
import json
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import date, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compat import ROOT, Record, written
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vmap

from ortho_fx import ExpansionConfig, generated_code, rewrite_
from ortho_fx.activations import ExpansionActivation, make_activation
from ortho_fx.bases import BASES, Basis
from ortho_fx.operators import formulas, operator, support

Case = tuple[str, Callable[[], Any]]
SINGLE, DOUBLE = 1e-5, 1e-9
# The shape of an input for each, and the dimension of its channels: large enough for sums in two stages.
SHAPES = {"layer": ((4, 32, 14, 14), 1), "channel": ((256, 96), 1)}


class Wrong(Exception):
    """What a case saw is not what it should be."""


def check(out: Path | None = None) -> Record:
    """The record of the installed PyTorch; also written to a file after each check, for a process that does not end."""
    start = time.perf_counter()
    record: Record = {
        "release": torch.__version__.split("+")[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "build": build(),
        "seconds": 0,
        "rows": [[name, "all", False, "not reached: the process ended before"] for name in CHECKS],
    }
    noted: dict[str, str] = {}
    for name, cases in CHECKS.items():
        waiting = [row for row in record["rows"] if row[0] != name]
        rows = [[name, *row(name, case, call, noted)] for case, call in cases(noted)]
        done = [each for each in waiting if list(CHECKS).index(each[0]) < list(CHECKS).index(name)]
        record["rows"] = [*done, *rows, *waiting[len(done) :]]
        record["seconds"] = round(time.perf_counter() - start)
        if out is not None:
            out.write_text(written({record["release"]: record}))
    return record


def row(name: str, case: str, call: Callable[[], Any], noted: dict[str, str]) -> tuple[str, bool, Any]:
    """Case, whether it is right, and what was seen; warnings of ours are noted with the first case that met them."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            right, seen = True, call()
        except Wrong as wrong:
            right, seen = False, str(wrong)
        except Exception as error:
            text = re.sub(r"\s+", " ", str(error)).strip()
            right, seen = False, f"{type(error).__name__}: {text[:400]}"
    for warning in caught:
        if "ortho_fx" in str(warning.message):
            noted.setdefault(str(warning.message), case)
    outcome = "ok" if right else "FAILED"
    print(f"{time.perf_counter() - start:5.1f} s  {outcome}  {name}, {case}: {seen}", file=sys.stderr, flush=True)
    return case, right, seen


def cpu_name() -> str:
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def build() -> str:
    """What PyTorch was built for; everything here runs on the CPU."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def leaves(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [leaf for value in values for leaf in leaves(value)]


def off(actual: Any, expected: Any, allowed: float) -> float:
    """The largest relative error of tensors in nested tuples.

    Raises:
        Wrong: it is larger than allowed.
    """
    largest = 0.0
    for ours, exact in zip(leaves(actual), leaves(expected), strict=True):
        if ours.shape != exact.shape:
            raise Wrong(f"the shape is {tuple(ours.shape)}, not {tuple(exact.shape)}")
        error = float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30))
        if not error < allowed:
            raise Wrong(f"off by {error:.1e}, more than {allowed:.0e}")
        largest = max(largest, error)
    return float(f"{largest:.1e}")


# Expansions alone


class Compiled:
    """An expansion that is compiled by itself: what it computed, the operators of its graphs, and their kernels."""

    def __init__(self, basis: Basis, granularity: str, lowered: bool) -> None:
        self.basis, self.operators = basis, list[str]()
        self.grad, *self.tensors = tensors_of(basis, granularity, *SHAPES[granularity])
        self.inputs = [tensor.clone().requires_grad_() for tensor in self.tensors]
        torch.compiler.reset()
        with nullcontext() if lowered else support.without_lowering(), generated_code.generated_code() as codes:
            call = torch.compile(operator(basis), options={"post_grad_custom_post_pass": self._note})
            self.output = call(*self.inputs, SHAPES[granularity][1])
            self.output.backward(self.grad)
        counts = generated_code.count_kernels(codes)
        self.kernels = [counts["forward"], counts["backward"]]

    def _note(self, graph: torch.fx.Graph) -> None:
        self.operators += [str(node.target) for node in graph.nodes if node.op == "call_function"]

    @property
    def ours(self) -> list[str]:
        """The operators that our own lowering took."""
        return [name for name in self.operators if name.startswith("ortho_fx_inductor.")]

    def error(self) -> float:
        """The relative error of output and gradients beside eager float64."""
        exact = [tensor.double().requires_grad_() for tensor in self.tensors]
        y = operator(self.basis)(*exact)
        y.backward(self.grad.double())
        learned = [True, *(parameter.learnable for parameter in self.basis.parameters)]
        sides = [
            [output.detach(), *(t.grad for t, ours in zip(inputs, learned, strict=True) if ours)]
            for output, inputs in ((self.output, self.inputs), (y, exact))
        ]
        return off(*sides, SINGLE)


def tensors_of(basis: Basis, granularity: str, shape: Sequence[int], dim: int) -> list[Tensor]:
    """The output's gradient, an input, and parameters that differ from channel to channel."""
    channels = None if granularity == "layer" else shape[dim]
    activation = make_activation(ExpansionConfig(basis.name, granularity=granularity), channels=channels)
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = [torch.randn(*shape, generator=generator) for _ in range(2)]
    for parameter in basis.parameters:
        value = getattr(activation, parameter.name).detach()
        tensors.append(value + 0.1 * torch.randn(value.shape, generator=generator))
    return tensors


compiled = cache(Compiled)


def each_expansion(call: Callable[[Basis, str], Any]) -> Iterator[Case]:
    for basis in BASES.values():
        for granularity in SHAPES:
            yield f"{basis.name} a {granularity}", partial(call, basis, granularity)


def lowering(noted: object) -> Iterator[Case]:
    def used(basis: Basis, granularity: str) -> str:
        found = compiled(basis, granularity, True).ours
        reason = support.reason(basis)
        if reason is not None:
            raise Wrong(reason)
        if found != [f"ortho_fx_inductor.{name}.default" for name in (basis.name, f"{basis.name}_backward")]:
            raise Wrong(f"our own kernels took {', '.join(found) or 'no operator'}")
        return "used"

    yield from each_expansion(used)


def values(noted: object) -> Iterator[Case]:
    yield from each_expansion(lambda basis, granularity: compiled(basis, granularity, True).error())


def plain(noted: object) -> Iterator[Case]:
    def right(basis: Basis, granularity: str) -> float:
        graphs = compiled(basis, granularity, False)
        if graphs.ours:
            raise Wrong(f"our own kernels took {', '.join(graphs.ours)}")
        return graphs.error()

    yield from each_expansion(right)


def kernels(noted: object) -> Iterator[Case]:
    def counted(basis: Basis, granularity: str) -> dict[str, list[int]]:
        with_it, without = (compiled(basis, granularity, lowered).kernels for lowered in (True, False))
        if min(with_it) < 1 or any(ours > theirs for ours, theirs in zip(with_it, without, strict=True)):
            raise Wrong(f"forward and backward with the lowering {with_it}, without it {without}")
        return {"lowering": with_it, "plain": without}

    yield from each_expansion(counted)


# Models


class Network(nn.Module):
    """One activation is a module, the other a call in the source."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.act(self.up(x))))


def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rewritten(config: ExpansionConfig) -> Network:
    model = network()
    rewrite_(model, config, example_inputs=inputs(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def readme(noted: object) -> Iterator[Case]:
    namespace: dict[str, Any] = {"__name__": "readme"}

    def block(number: int, text: str) -> str:
        # Classes are rewritten by their source, which a file has.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"block{number}.py"
            file.write_text(text)
            exec(compile(text, str(file), "exec"), namespace)
        return "ran"

    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    for number, text in enumerate(blocks, start=1):
        yield f"block {number}", partial(block, number, text)


def hook(noted: object) -> Iterator[Case]:
    def steps(model: Network, call: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Outputs of three steps and the parameters after them. The optimizer comes after the first call."""
        results, optimizer = [], None
        for step, size in enumerate(sizes):
            y = call(inputs(size, 4, seed=step))
            optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
            results.append(y.detach())
        return [*results, *(parameter.detach() for parameter in model.parameters())]

    def trains(basis: str, dynamic: bool) -> float:
        torch.compiler.reset()
        sizes = (8, 12, 5) if dynamic else (8, 8, 8)
        ours, reference = network(), network()
        rewrite_(reference, ExpansionConfig(basis))
        call = torch.compile(ours, backend="ortho_fx", options={"basis": basis}, dynamic=dynamic)
        results = steps(ours, call, sizes)
        if sum(isinstance(module, ExpansionActivation) for module in ours.modules()) != 2:
            raise Wrong("not all activations are replaced")
        return off(results, steps(reference, reference, sizes), DOUBLE)

    for basis in BASES:
        yield f"{basis}, one batch size", partial(trains, basis, False)
    for basis in ("hermite", "fourier"):
        yield f"{basis}, several batch sizes", partial(trains, basis, True)


def export(noted: object) -> Iterator[Case]:
    def exports(basis: str, granularity: str, strict: bool) -> float:
        torch.compiler.reset()
        model, x = rewritten(ExpansionConfig(basis, granularity=granularity)), inputs(5, 4, seed=2)
        shapes = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(model, (inputs(3, 4),), dynamic_shapes=shapes, strict=strict)
        decomposed = exported.run_decompositions()
        for program, has_ours in ((exported, True), (decomposed, False)):
            if any("ortho_fx" in str(node.target) for node in program.graph.nodes) is not has_ours:
                raise Wrong(f"operators of ortho_fx are {'missing' if has_ours else 'left after the decompositions'}")
        return max(off(program.module()(x), model(x), DOUBLE) for program in (exported, decomposed))

    for basis in BASES:
        for granularity in SHAPES:
            for strict in (True, False):
                case = f"{basis} a {granularity}, {'strict' if strict else 'not strict'}"
                yield case, partial(exports, basis, granularity, strict)


# Transforms


def in_a_loop(function: Callable[..., Any], in_dims: object) -> Callable[..., Any]:
    """What `vmap` computes over its last argument."""

    def each(*arguments: Any) -> list[Tensor]:
        *shared, batch = arguments
        return [torch.stack(tensors) for tensors in zip(*(leaves(function(*shared, x)) for x in batch), strict=True)]

    return each


def transformed(function: Callable[..., Any], vmap: Callable[..., Any] = vmap) -> dict[str, Callable[..., Any]]:
    """The transforms of a function of parameters and an input, each as a function of parameters and a batch."""

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return function(parameters, x).square().sum()

    return {
        "grad": lambda parameters, batch: grad(loss, (0, 1))(parameters, batch[0]),
        "vmap": lambda parameters, batch: vmap(function, (None, 0))(parameters, batch),
        "vmap of grad": lambda parameters, batch: vmap(grad(loss), (None, 0))(parameters, batch),
        # Of a batch: PyTorch itself does not compile the jvp of a product of a matrix with a vector.
        "jvp": lambda parameters, batch: jvp(partial(function, parameters), (batch,), (batch.cos(),)),
        "hessian": lambda parameters, batch: hessian(loss, 1)(parameters, batch[0]),
        "jacrev": lambda parameters, batch: jacrev(function, (0, 1))(parameters, batch[0]),
    }


def transforms(noted: object) -> Iterator[Case]:
    weights, batch = (inputs(4, 6, seed=3), inputs(6, 4, seed=4)), inputs(3, 4)

    def network_of(basis: Basis, expand: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """Two layers, an expansion a channel and one for all, as a function of what they learn; and that."""
        all_values = [tensors_of(basis, "channel", (1, 6), 1)[2:], tensors_of(basis, "layer", (1, 4), 1)[2:]]

        def call(parameters: Sequence[Sequence[Tensor]], x: Tensor) -> Tensor:
            for weight, values, learned in zip(weights, all_values, parameters, strict=True):
                left = iter(learned)
                full = [
                    next(left) if p.learnable else v.double() for p, v in zip(basis.parameters, values, strict=True)
                ]
                x = expand(x @ weight, *full, channel_dim=-1)
            return x

        learned = tuple(
            tuple(value.double() for p, value in zip(basis.parameters, values, strict=True) if p.learnable)
            for values in all_values
        )
        return call, learned

    def ours_of(basis: Basis) -> tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]:
        function, parameters = network_of(basis, lambda x, *rest, channel_dim: operator(basis)(x, *rest, channel_dim))
        return transformed(function), parameters

    def error(name: str, basis: Basis, results: Any) -> float:
        function, parameters = network_of(basis, formulas.forward_formula(basis))
        return off(results, transformed(function, in_a_loop)[name](parameters, batch), DOUBLE)

    def eager(name: str, basis: Basis) -> float:
        functions, parameters = ours_of(basis)
        return error(name, basis, functions[name](parameters, batch))

    @cache
    def together(basis_name: str, backend: str) -> dict[str, Any] | None:
        """All of them as one graph, which takes less time; None where one does not compile."""
        functions, parameters = ours_of(BASES[basis_name])
        torch.compiler.reset()

        def call(parameters: Any, batch: Tensor) -> dict[str, Any]:
            return {name: function(parameters, batch) for name, function in functions.items()}

        try:
            return torch.compile(call, backend=backend, fullgraph=True)(parameters, batch)
        except Exception:
            return None

    def in_a_graph(backend: str, name: str, basis: Basis) -> float:
        results = together(basis.name, backend)
        if results is not None:
            return error(name, basis, results[name])
        functions, parameters = ours_of(basis)
        torch.compiler.reset()
        return error(name, basis, torch.compile(functions[name], backend=backend, fullgraph=True)(parameters, batch))

    for basis in BASES.values():
        # Inductor takes a minute for a basis. The others show that they trace.
        backend = "inductor" if basis.name == "hermite" else "aot_eager"
        for kind, call in (("eager", eager), (backend, partial(in_a_graph, backend))):
            for name in transformed(lambda: None):
                yield f"{name} of {basis.name}, {kind}", partial(call, name, basis)


# Processes


def ddp(noted: object) -> Iterator[Case]:
    def step(configs: Sequence[ExpansionConfig]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(one_of_two, (folder, configs), nprocs=2)
            seen = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
        for text in {text for each in seen for text in each["warnings"]}:
            warnings.warn(text, stacklevel=2)
        return max(each["off"] for each in seen)

    configs = ExpansionConfig("hermite"), ExpansionConfig("fourier", granularity="channel")
    yield "hermite a layer, fourier a channel", partial(step, configs)


def one_of_two(rank: int, folder: str, configs: Sequence[ExpansionConfig]) -> None:
    """Half a batch through a compiled model in float32, beside the whole one through an eager model in float64."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=300)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    exact, x = nn.Sequential(*(rewritten(config) for config in configs)), inputs(6, 4)
    model = copy.deepcopy(exact).float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(model))
        for network, call, batch in ((exact, exact, x), (model, wrapped, x.float().chunk(2)[rank])):
            optimizer = torch.optim.SGD(network.parameters(), 0.1)
            call(batch).square().mean().backward()
            optimizer.step()
    states = ([[p.detach(), p.grad] for p in network.parameters()] for network in (model, exact))
    texts = [str(warning.message) for warning in caught if "ortho_fx" in str(warning.message)]
    result = {"off": off(*states, SINGLE), "warnings": texts}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    # A process that leaves takes its connections along, and gloo's threads in the other one may still be using them.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def warned(noted: dict[str, str]) -> Iterator[Case]:
    def none() -> str:
        return "none"

    def text(message: str) -> None:
        raise Wrong(message)

    for message, case in dict(noted).items():
        yield case, partial(text, message)
    if not noted:
        yield "all", none


CHECKS: dict[str, Callable[[dict[str, str]], Iterator[Case]]] = {
    "lowering": lowering,
    "values": values,
    "plain": plain,
    "kernels": kernels,
    "readme": readme,
    "hook": hook,
    "transforms": transforms,
    "export": export,
    "ddp": ddp,
    "warnings": warned,
}
