"""Runs a model's graph on polynomials instead of numbers, with a rule for each operation.

The terms of a polynomial are stored in the batch dimension. So PyTorch's own linear operations apply, in float64 and
without bias; the bias is added to the constant term only. Operations that would mix samples are refused, and so is
everything that is not affine, a sum, a product or a Hermite expansion.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import HermiteE
from torch import Tensor, fx, nn

from ortho_fx import trees
from ortho_fx.activations.channels import channel_dim_of
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.moments import Array
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.polynomial.monomials import Dense

# A placeholder for the number of samples in the shape of a value.
BATCH = object()


class NotPolynomial(Exception):
    """The reason why the result of an operation is no polynomial."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Expansion) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> tuple[fx.Graph, Mapping[str, nn.Module]]:
    """The graph of a model, in which PyTorch's modules and ours are single nodes, and the modules by name.

    Raises:
        OrthoFxError: a model that torch.fx cannot trace.
    """
    tracer = _Tracer()
    # fx always traces into its root. A wrapper keeps a root that must stay a single node.
    root = nn.Sequential(model) if tracer.is_leaf_module(model, "") else model
    try:
        graph = tracer.trace(root)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise OrthoFxError(f"{type(model).__name__} cannot be traced by torch.fx: {reason}") from None
    return graph, dict(root.named_modules(remove_duplicate=False))


def described(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """The description of a node in messages."""
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    called = getattr(node.target, "__name__", None) or str(node.target)
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    owner = next(reversed(list(stack.values())), ("",))[0]
    return f"{called} in {owner}" if owner else called


def hermite_coefficients(module: nn.Module) -> Array:
    """The coefficients a_0 .. a_n of He_k(x) / k! in a polynomial activation: float64, of shape (size, groups).

    Leading coefficients that are zero are left out.

    Raises:
        NotPolynomial: any other module, a clamp, or coefficients that have no value or are not finite.
    """
    columns = [np.asarray(series.coef, dtype=np.float64) for series in _series(module)]
    values: Array = np.zeros((max(map(len, columns)), len(columns)))
    for column, coefficients in zip(values.T, columns, strict=True):
        column[: len(coefficients)] = coefficients * factorials(len(coefficients))
    return values[: int(np.flatnonzero(values.any(axis=1)).max(initial=0)) + 1]


def _series(module: nn.Module) -> list[HermiteE]:
    """The polynomial of an activation, for each group.

    Raises:
        NotPolynomial: as `hermite_coefficients`.
    """
    if not isinstance(module, ExpansionActivation):
        raise NotPolynomial("it is frozen: take the polynomial before freeze_")
    basis = module.basis
    if not basis.is_polynomial:
        raise NotPolynomial(f"a {basis.title} expansion is not a polynomial")
    if type(module).forward is not ExpansionActivation.forward:
        raise NotPolynomial("its forward is not that of its expansion; an annealing has to be finished before")
    if module.bounds is not None:
        raise NotPolynomial("its input is clamped, and a clamp is not a polynomial: set its bounds to None")
    stored = {parameter.name: getattr(module, parameter.name).detach() for parameter in basis.parameters}
    for name, tensor in stored.items():
        if tensor.is_meta:
            raise NotPolynomial(f"its {name} are on the meta device")
    values = {name: tensor.to("cpu", torch.float64).numpy() for name, tensor in stored.items()}
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise NotPolynomial(f"its {name} are not finite")
    columns = {name: value.reshape(len(value), -1) for name, value in values.items()}
    groups = next(iter(columns.values())).shape[1]
    each = (basis.series({name: value[:, group] for name, value in columns.items()}) for group in range(groups))
    return [series.convert(kind=HermiteE) for series in each if series is not None]


def factorials(count: int) -> Array:
    """The first `count` of 0!, 1!, 2!, ..."""
    return np.array([float(math.factorial(k)) for k in range(count)])


def _expansion(module: ExpansionActivation, x: Dense) -> Dense:
    """sum_k a_k P_k(x) with P_k = (x P_{k-1} - P_{k-2}) / k."""
    a = torch.from_numpy(hermite_coefficients(module))
    if module.channels is not None:
        dim = channel_dim_of(module, x.coefficients) % x.coefficients.dim()
        if dim == 0:
            raise NotPolynomial("its channels are in the dimension of the batch")
        a = a.repeat_interleave(module.channels // a.shape[1], 1)
        a = a.reshape(len(a), -1, *(1,) * (x.coefficients.dim() - 1 - dim))
    if len(a) == 1:
        return Dense(x.monomials, 0, torch.zeros(1, *x.shape, dtype=torch.float64)).plus_constant(a[0])
    before, last, total = None, x, x.with_coefficients(x.coefficients * a[1]).plus_constant(a[0])
    for k in range(2, len(a)):
        product = x * last
        following = product.plus_constant(-1.0) if before is None else product + -before
        before, last = last, following.with_coefficients(following.coefficients / k)
        total = total + last.with_coefficients(last.coefficients * a[k])
    return total


def _constant(value: Any, like: Dense) -> Any:
    """A number or a tensor of the model, in a form that broadcasts to the shape of a value.

    Raises:
        NotPolynomial: a tensor that differs between samples, or no number.
    """
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64)
        if value.dim() == like.coefficients.dim() and value.shape[0] == 1:
            return value[0]
        if value.dim() >= like.coefficients.dim():
            raise NotPolynomial(f"a constant of shape {tuple(value.shape)} differs from sample to sample")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise NotPolynomial(f"{value!r} is no number")
    return value


def _pair(a: Any, b: Any) -> bool:
    """Whether both are polynomials; then they must have the same number of dimensions."""
    if not (isinstance(a, Dense) and isinstance(b, Dense)):
        return False
    if len(a.shape) != len(b.shape):
        raise NotPolynomial("its arguments differ in their number of dimensions, which mixes the samples of a batch")
    return True


def _add(a: Any, b: Any, *, alpha: float = 1) -> Dense:
    if isinstance(b, Dense):
        b = _multiply(b, alpha) if alpha != 1 else b
        if _pair(a, b):
            return a + b
        return b.plus_constant(_constant(a, b))
    constant = _constant(b, a)
    return a.plus_constant(constant if alpha == 1 else constant * alpha)


def _subtract(a: Any, b: Any, *, alpha: float = 1) -> Dense:
    return _add(a, b, alpha=-alpha)


def _multiply(a: Any, b: Any) -> Dense:
    if _pair(a, b):
        return a * b
    value, constant = (a, b) if isinstance(a, Dense) else (b, a)
    return value.with_coefficients(value.coefficients * _constant(constant, value))


def _divide(a: Any, b: Any) -> Dense:
    if isinstance(b, Dense):
        raise NotPolynomial("it divides by what depends on the input")
    return a.with_coefficients(a.coefficients / _constant(b, a))


def _power(a: Any, exponent: Any) -> Dense:
    if isinstance(exponent, float) and exponent.is_integer():
        exponent = int(exponent)
    if not isinstance(a, Dense) or isinstance(exponent, bool) or not isinstance(exponent, int) or exponent < 1:
        raise NotPolynomial("only powers with a positive integer as their exponent are polynomials")
    # Repeated squaring, from the highest bit down.
    result = a
    for bit in bin(exponent)[3:]:
        result = result * result
        if bit == "1":
            result = result * a
    return result


def _linear(x: Dense, weight: Any, bias: Any = None) -> Dense:
    if isinstance(weight, Dense) or isinstance(bias, Dense):
        raise NotPolynomial("its weights depend on the input")
    y = x.with_coefficients(F.linear(x.coefficients, weight.detach().to("cpu", torch.float64)))
    return y if bias is None else y.plus_constant(_constant(bias, y))


def _convolution(module: Any, x: Dense) -> Dense:
    weight = module.weight.detach().to("cpu", torch.float64)
    y = x.with_coefficients(module._conv_forward(x.coefficients, weight, None))
    if module.bias is None:
        return y
    return y.plus_constant(_constant(module.bias, y).reshape(-1, *(1,) * (len(y.shape) - 1)))


def _batch_norm(module: Any, x: Dense) -> Dense:
    if module.training or module.running_var is None:
        raise NotPolynomial("it divides by the deviation of the batch: call model.eval(), with running statistics")
    mean, variance = (t.to("cpu", torch.float64) for t in (module.running_mean, module.running_var))
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().to("cpu", torch.float64)
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().to("cpu", torch.float64)
    behind = (-1, *(1,) * (len(x.shape) - 1))
    return x.with_coefficients(x.coefficients * scale.reshape(behind)).plus_constant(shift.reshape(behind))


def _dropout(module: Any, x: Dense) -> Dense:
    if module.training and module.p > 0:
        raise NotPolynomial("it drops at random: call model.eval()")
    return x


def _pool(module: nn.Module, x: Dense) -> Dense:
    return x.with_coefficients(module(x.coefficients))


def _inner(x: Dense, *dims: Any) -> None:
    """Raises `NotPolynomial` for the dimension that holds the samples."""
    if any(not isinstance(dim, int) or dim % x.coefficients.dim() == 0 for dim in dims):
        raise NotPolynomial("it mixes the samples of a batch")


def _flatten(x: Dense, start_dim: int = 0, end_dim: int = -1) -> Dense:
    _inner(x, start_dim)
    return x.with_coefficients(x.coefficients.flatten(start_dim, end_dim))


def _reshape(x: Dense, *shape: Any) -> Dense:
    first, *sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if any(not isinstance(size, int) for size in sizes) or not (
        first is BATCH or (first == -1 and math.prod(sizes) == x.shape.numel())
    ):
        raise NotPolynomial("only shapes that keep the samples of a batch first and apart are known")
    return x.with_coefficients(x.coefficients.reshape(len(x.coefficients), *sizes))


def _permute(x: Dense, *dims: Any) -> Dense:
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    _inner(x, *dims[1:])
    return x.with_coefficients(x.coefficients.permute(dims))


def _transpose(x: Dense, dim0: int, dim1: int) -> Dense:
    _inner(x, dim0, dim1)
    return x.with_coefficients(x.coefficients.transpose(dim0, dim1))


def _squeeze(x: Dense, dim: Any = None) -> Dense:
    _inner(x, dim)
    return x.with_coefficients(x.coefficients.squeeze(dim))


def _reduction(method: str) -> Callable[..., Dense]:
    def reduce(x: Dense, dim: Any = None, keepdim: bool = False) -> Dense:
        _inner(x, *(dim if isinstance(dim, tuple | list) else (dim,)))
        return x.with_coefficients(getattr(x.coefficients, method)(dim, keepdim=keepdim))

    return reduce


def _pieces(method: str) -> Callable[..., tuple[Dense, ...]]:
    def cut(x: Dense, pieces: Any, dim: int = 0) -> tuple[Dense, ...]:
        _inner(x, dim)
        return tuple(x.with_coefficients(part) for part in getattr(x.coefficients, method)(pieces, dim))

    return cut


def _concatenate(values: Any, dim: int = 0) -> Dense:
    _inner(values[0], dim)
    degree = max(value.degree for value in values)
    parts = [value.raised(degree).coefficients for value in values]
    return Dense(values[0].monomials, degree, torch.cat(parts, dim))


def _item(x: Any, index: Any) -> Any:
    if not isinstance(x, Dense):
        return x[index]
    if not isinstance(index, tuple) or index[0] not in (slice(None), Ellipsis):
        raise NotPolynomial("it chooses among the samples of a batch")
    if index[0] is Ellipsis and len(index) > len(x.shape) + 1:
        raise NotPolynomial("it chooses among the samples of a batch")
    return x.with_coefficients(x.coefficients[index])


def _same(x: Dense, *arguments: Any, **keywords: Any) -> Dense:
    return x


def _function_dropout(x: Dense, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dense:
    if training and p > 0:
        raise NotPolynomial("it drops at random: call model.eval() before")
    return x


def _shape(x: Any, dim: int | None = None) -> Any:
    shape = (BATCH, *x.shape)
    return shape if dim is None else shape[dim]


def _attribute(x: Any, name: str) -> Any:
    if isinstance(x, Dense) and name != "shape":
        raise NotPolynomial("of an input's attributes only its shape is known")
    return _shape(x) if isinstance(x, Dense) else getattr(x, name)


# Layers with weights, by exact class, because a subclass may compute something else.
AFFINE_MODULES: dict[type[nn.Module], Callable[[Any, Dense], Dense]] = {
    nn.Linear: lambda module, x: _linear(x, module.weight, module.bias),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _batch_norm),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _pool),
}
# Modules without multiplications.
PASSING_MODULES: dict[type[nn.Module], Callable[[Any, Dense], Dense]] = {
    nn.Identity: lambda module, x: x,
    nn.Flatten: lambda module, x: _flatten(x, module.start_dim, module.end_dim),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), _dropout),
}
PRODUCTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "multiply", "mul_"), _multiply),
}
POWERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((operator.pow, torch.pow, "pow"), _power),
    **dict.fromkeys((torch.square, "square"), lambda x: _power(x, 2)),
}
SCALINGS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((operator.truediv, torch.div, torch.true_divide, "div", "true_divide"), _divide),
    **dict.fromkeys((torch.mean, "mean"), _reduction("mean")),
}
PASSING: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"), _subtract),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), operator.neg),
    **dict.fromkeys((torch.sum, "sum"), _reduction("sum")),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.reshape, "reshape", "view"), _reshape),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, "transpose"), _transpose),
    **dict.fromkeys((torch.squeeze, "squeeze"), _squeeze),
    **dict.fromkeys((torch.chunk, "chunk"), _pieces("chunk")),
    **dict.fromkeys((torch.split, "split"), _pieces("split")),
    **dict.fromkeys((torch.cat, torch.concat), _concatenate),
    **dict.fromkeys(("contiguous", "clone", "detach", torch.clone), _same),
    F.dropout: _function_dropout,
    operator.getitem: _item,
    getattr: _attribute,
    "size": _shape,
}
OPERATIONS = {**PRODUCTS, **POWERS, **SCALINGS, **PASSING}
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, "add_", "sub_", "mul_")


def apply_module(module: nn.Module, *arguments: Any) -> Any:
    """The result of a module for polynomials.

    Raises:
        NotPolynomial: the result is no polynomial.
    """
    if isinstance(module, Expansion):
        _series(module)
        assert isinstance(module, ExpansionActivation)
        return _expansion(module, arguments[0])
    handler = {**AFFINE_MODULES, **PASSING_MODULES}.get(type(module))
    if handler is None:
        raise NotPolynomial("it is neither affine nor a Hermite activation")
    return handler(module, *arguments)


def run_node(node: fx.Node, modules: Mapping[str, nn.Module], arguments: tuple[Any, ...], keywords: Any) -> Any:
    """The result of a graph node for these arguments.

    Raises:
        NotPolynomial: the result is no polynomial.
    """
    if node.op == "call_module":
        return apply_module(modules[str(node.target)], *arguments)
    if not any(isinstance(argument, Dense) for argument in trees.leaves((arguments, keywords))):
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        assert callable(node.target)
        return node.target(*arguments, **keywords)
    handler = OPERATIONS.get(node.target)
    if handler is None:
        raise NotPolynomial("it is neither affine, nor a sum, a product or a Hermite activation")
    if node.target in _IN_PLACE and any(user is not node for user in node.all_input_nodes[0].users):
        raise NotPolynomial("it changes in place what is read elsewhere")
    try:
        inspect.signature(handler).bind(*arguments, **keywords)
    except TypeError:
        raise NotPolynomial(f"it is not known with the arguments {node.args[1:]} {dict(node.kwargs)}") from None
    return handler(*arguments, **keywords)
