"""Imitates future releases of PyTorch, each in a process of its own: they lack a private name, or a part raises.

tests/ortho_fx/operators/conftest.py starts it as a process. It imports PyTorch and its compiler once and forks for
every case that it reads; the fork imports ortho_fx. A case is a line of JSON, and so is the answer:
{"failed": the failure}, or for

    {"absent": path, ...} or {"raises": where}   the largest relative error of values and gradients, the reasons why
                                                 bases are not lowered, the warnings, and the results of the hook
    {"release": version, "path": folder}         the reason why Hermite expansions are not lowered, and the warnings
    {"command": arguments, "absent": path}       what the command line returns and prints
    {"degrees": degrees, "package": folder}      a small model compiled for each degree: hits of the cache, and numbers
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _errors(granularities: Sequence[str], dynamic: bool) -> list[float]:
    """Relative errors of every basis, compiled in one graph, compared with the formulas in float64."""
    from ortho_fx.activations.expansion import make_activation
    from ortho_fx.bases import BASES
    from ortho_fx.config import ExpansionConfig
    from ortho_fx.operators import formulas, operator

    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[str, list[Tensor]]] = []
    for name, basis in BASES.items():
        for granularity in granularities:
            # Of a low degree: formulas are unrolled, and g++ takes most of the time.
            module = make_activation(ExpansionConfig(name, 2, granularity=granularity), channels=24)
            parameters = [getattr(module, parameter.name).detach() for parameter in basis.parameters]
            noisy = [p + 0.1 * torch.randn(p.shape, generator=generator) for p in parameters]
            cases.append((name, [torch.randn(32, 24, generator=generator), *noisy]))
    inputs = [[tensor.clone().requires_grad_() for tensor in tensors] for _, tensors in cases]

    def run(inputs: list[list[Tensor]]) -> list[Tensor]:
        return [operator(BASES[name])(*tensors, 1) for (name, _), tensors in zip(cases, inputs, strict=True)]

    outputs = torch.compile(run, dynamic=dynamic)(inputs)
    sum(output.square().sum() for output in outputs).backward()
    errors = []
    for (name, tensors), output, learned in zip(cases, outputs, inputs, strict=True):
        basis, exact = BASES[name], [tensor.double() for tensor in tensors]
        y = formulas.forward_formula(basis)(*exact, channel_dim=1)
        gradients = formulas.backward_formula(basis)(2 * y, *exact, channel_dim=1)
        of = [learned[0], *(t for t, p in zip(learned[1:], basis.parameters, strict=True) if p.learnable)]
        pairs = [(output.detach(), y), *((t.grad, g) for t, g in zip(of, gradients, strict=True))]
        errors += [float((got.double() - want).norm() / want.norm()) for got, want in pairs]
    return errors


def _hook() -> dict[str, str]:
    """The results of the hook for a plain model and for a rewritten one."""
    import ortho_fx

    done = {}
    for what in ("plain", "rewritten"):
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        if what == "rewritten":
            ortho_fx.rewrite_(model, ortho_fx.ExpansionConfig("hermite"))
        x = torch.randn(4, 8)
        try:
            y = torch.compile(model, backend="ortho_fx")(x)
            done[what] = f"off by {float((y - model(x)).abs().max()):.0e}, {type(model[1]).__name__}"
        except Exception as error:
            done[what] = f"{type(error).__name__}: {error}"
    return done


def _break(where: str) -> None:
    """Makes the lowering raise: at its registration, in `lower` of a forward or backward, or in code generation."""
    from ortho_fx import torch_private

    def boom(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    lowerings = sys.modules[torch_private.load(torch_private.INDUCTOR).register_lowering.__module__]
    if where == "registration":
        lowerings.register_lowering = boom
        return
    # The caches must not return graphs that an earlier case compiled.
    torch.compiler.config.cache_key_tag = where
    from ortho_fx.operators import lowering, support

    support.load_lowering()

    if where == "code generation":
        graph, state = torch_private.load(torch_private.TOOLS).GraphLowering, {"calls": 0}
        generate = graph.codegen

        def first_fails(*arguments: Any, **settings: Any) -> Any:
            state["calls"] += 1
            return boom() if state["calls"] == 1 else generate(*arguments, **settings)

        graph.codegen = first_fails
        return
    for twin in lowering.PLAIN_TWINS:
        if str(twin).endswith("_backward.default") == (where == "lower of a backward"):
            lowerings.lowerings[twin] = boom


@contextlib.contextmanager
def _our_warnings() -> Iterator[list[str]]:
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if str(w.message).startswith("ortho_fx")]


def _step(release: str, path: str) -> dict[str, Any]:
    """One step of an expansion on a release of that version; processes that it starts import from the path first."""
    torch.__version__ = type(torch.__version__)(release)
    os.environ["PYTHONPATH"] = os.pathsep.join([path, *filter(None, [os.environ.get("PYTHONPATH")])])
    with _our_warnings() as texts:
        from ortho_fx import HermiteActivation
        from ortho_fx.bases import BASES
        from ortho_fx.operators import support

        activation, x = HermiteActivation(3), torch.randn(8, 16)
        results = []
        for call in (activation, torch.compile(activation)):
            y = call(x.requires_grad_())
            results.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *activation.parameters()])])
        torch.testing.assert_close(*results)
    return {"reason": support.reason(BASES["hermite"]), "warnings": texts}


def _from_caches(degrees: Sequence[int], package: str) -> dict[str, Any]:
    """A small model compiled for each degree, by the ortho_fx in the folder `package`, or the usual one.

    The results have, for each degree, the number of cache hits, the values, the gradients and the eager model's values.
    """
    sys.path[:0] = [package] if package else []
    import ortho_fx
    from ortho_fx import torch_private

    counters = torch_private.load(torch_private.TESTS).counters
    results = []
    for degree in degrees:
        torch.compiler.reset()
        counters.clear()
        model, x = nn.Sequential(nn.GELU()), torch.linspace(-2, 2, 32).reshape(4, 8)
        y = torch.compile(model, backend="ortho_fx", options={"degree": degree})(x)
        y.sum().backward()
        hits = counters["aot_autograd"]["autograd_cache_hit"]
        results.append([hits, y.tolist(), model[0].coefficients.grad.tolist(), model(x).tolist()])
    return {"file": ortho_fx.__file__, "results": results}


def _command(arguments: list[str]) -> dict[str, Any]:
    """The command line, with what it writes to the standard output and to the standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        from ortho_fx import cli

        code = cli.main(arguments)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def _answer(case: dict[str, Any]) -> dict[str, Any]:
    os.environ["ORTHO_FX_ABSENT_NAMES"] = case.get("absent", "")
    if "release" in case:
        return _step(case["release"], case["path"])
    if "degrees" in case:
        return _from_caches(case["degrees"], case["package"])
    if "command" in case:
        return _command(case["command"])
    with _our_warnings() as texts:
        import ortho_fx
        from ortho_fx.bases import BASES
        from ortho_fx.operators import support

        if "raises" in case:
            _break(case["raises"])
        # Both granularities lose the same, and a graph that the caches must not return takes long to compile.
        dynamic = case.get("dynamic", False)
        cached = case.get("raises") in (None, "registration")
        granularities = ["layer", "channel"] if cached and not dynamic else ["layer"]
        errors = [error for _ in range(2) for error in _errors(granularities, dynamic)]
        hook = _hook() if case.get("hook") else {}
        if case.get("checked"):
            model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
            ortho_fx.rewrite_(model, ortho_fx.ExpansionConfig("hermite")).check(torch.randn(64, 8))
    return {
        "error": max(errors),
        "reasons": {name: support.reason(basis) for name, basis in BASES.items()},
        "warnings": texts,
        "hook": hook,
    }


def main() -> None:
    torch.compile(lambda t: t.sin())(torch.ones(2))  # imports the compiler and precompiles its headers
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                answer = _answer(json.loads(line))
            except BaseException as error:
                answer = {"failed": f"{type(error).__name__}: {error}"}
            with os.fdopen(writer, "w") as out:
                out.write(json.dumps(answer))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as text:
            answer = text.read()
        os.waitpid(child, 0)
        print(answer or json.dumps({"failed": "the process ended"}), flush=True)


if __name__ == "__main__":
    main()
