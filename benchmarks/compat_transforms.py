"""The check of torch.func's transforms: eager and compiled results agree with those of the formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from compat_case import DOUBLE, Case, inputs, leaves, off
from compat_expansions import tensors_of
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap

from ortho_fx.bases import BASES, Basis
from ortho_fx.operators import formulas, operator


def in_a_loop(function: Callable[..., Any], in_dims: object) -> Callable[..., Any]:
    """Computes the same as `vmap` over the last argument, but in a loop."""

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
        # This one takes the whole batch: PyTorch itself does not compile the jvp of a matrix-vector product.
        "jvp": lambda parameters, batch: jvp(partial(function, parameters), (batch,), (batch.cos(),)),
        "hessian": lambda parameters, batch: hessian(loss, 1)(parameters, batch[0]),
        "jacrev": lambda parameters, batch: jacrev(function, (0, 1))(parameters, batch[0]),
    }


def transforms() -> Iterator[Case]:
    weights, batch = (inputs(4, 6, seed=3), inputs(6, 4, seed=4)), inputs(3, 4)

    def network_of(basis: Basis, expand: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """A function of learnable parameters and an input, and these parameters.

        It has two layers: the first with an expansion for each channel, the second with one for all.
        """
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
        """The results of all transforms in one graph, which saves time; None if one does not compile."""
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
        # Inductor takes a minute for each basis. For the other bases it is enough that they trace.
        backend = "inductor" if basis.name == "hermite" else "aot_eager"
        for kind, call in (("eager", eager), (backend, partial(in_a_graph, backend))):
            for name in transformed(lambda: None):
                yield f"{name} of {basis.name}, {kind}", partial(call, name, basis)
