"""Imitates future releases of PyTorch, each in a process of its own: they lack a private name, or a part raises.

tests/ortho_fx/test_support.py starts it as a process. It imports PyTorch and its compiler once and forks for every case
that it reads. A case is a line of JSON: {"absent": path, "groups": titles} or {"raises": where}. The answer is a line
of JSON: the failure, or the largest relative errors of values and gradients, the reasons why bases are not lowered, the
warnings, and the results of the hook.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
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
            module = make_activation(ExpansionConfig(name, granularity=granularity), channels=24)
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

    # The caches must not return graphs that an earlier case compiled.
    torch.compiler.config.cache_key_tag = where

    lowerings = sys.modules[torch_private.load(torch_private.INDUCTOR).register_lowering.__module__]
    if where == "registration":
        lowerings.register_lowering = boom
        return
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


def _answer(case: dict[str, Any]) -> dict[str, Any]:
    groups = case.get("groups", [])
    os.environ["ORTHO_FX_ABSENT_NAMES"] = case.get("absent", "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import ortho_fx
        from ortho_fx.bases import BASES
        from ortho_fx.operators import support

        if "raises" in case:
            _break(case["raises"])
        # Compiling takes most of the time, and both granularities lose the same.
        dynamic = case.get("dynamic", False)
        granularities = ["layer"] if dynamic or "raises" in case else ["layer", "channel"]
        errors = [error for _ in range(2) for error in _errors(granularities, dynamic)]
        hook = _hook() if case.get("hook") else {}
        if case.get("checked"):
            model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
            ortho_fx.rewrite_(model, ortho_fx.ExpansionConfig("hermite")).check(torch.randn(64, 8))
    return {
        "groups": groups,
        "error": max(errors),
        "reasons": {name: support.reason(basis) for name, basis in BASES.items()},
        "warnings": [str(w.message) for w in caught if str(w.message).startswith("ortho_fx")],
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
