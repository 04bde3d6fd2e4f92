"""`register_basis`: makes a user's basis work like ours.

It is checked once: its description, its derivatives against autograd in float64, and its formula on every kind of
operand. Then its operators, their lowering and its activation class are made, and its name is added to `BASES`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import keyword
import marshal
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ortho_fx.activations import expansion as activations
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.bases import BASES, Basis
from ortho_fx.errors import OrthoFxError
from ortho_fx.operators import decomposition, formulas, parts, registration, support

# The command line and comparisons use these names for a model without expansions.
_NO_BASES = ("none", "gelu")
# Arguments of operators, and attributes of expansions, live and frozen.
_NOT_PARAMETERS = ("x", "grad", "channel_dim", "prepared", "bounds", "config", "channels", "form")
# The allowed error of derivatives against autograd, in units of max(1, largest derivative).
_OFF = 1e-8


def register_basis(basis: Basis) -> type[ExpansionActivation]:
    """Registers a basis under its name, for `ExpansionConfig`, the command line, and everything that takes a basis.

    The basis gets operators, which compile to fused kernels like ours, and a module class. Its derivatives are compared
    with autograd in float64, for x of shape (16, 3), to within 1e-8. A process that loads a model or a checkpoint with
    the basis has to register it first.

    Args:
        basis: an instance of your own subclass of `ortho_fx.bases.basis.Basis`, which describes the methods to write
            and those with a default.

    Returns:
        Its module class, `<title>Activation`. If another basis has that title, the name of the basis takes its place:
        "my_chebyshev" gives `MyChebyshevActivation`.

    Raises:
        OrthoFxError: a name that is taken, a name or a title that is no identifier, wrong degrees or parameters, a
            formula that fails or cannot be compiled, or derivatives or a slope that are not those of the formula.
            Nothing is registered then.
    """
    _check_description(basis)
    for degree in sorted({basis.degrees[0], basis.default_degree, basis.degrees[:6][-1]}):
        for tied in (False, True)[: 1 + basis.tieable]:
            _check_formula(basis, degree, tied)
    registration.register(basis)
    support.add_from_outside(basis, _digest(basis))
    BASES[basis.name] = basis
    return activations.add_class(basis)


def _check_description(basis: Basis) -> None:
    if not isinstance(basis, Basis):
        raise OrthoFxError(f"register_basis takes an ortho_fx.bases.Basis; got {type(basis).__name__}")
    name = basis.name
    if name in BASES:
        raise OrthoFxError(f"basis {name!r} is registered already; known are {', '.join(BASES)}")
    if not _is_identifier(name) or name != name.lower() or name in _NO_BASES:
        raise OrthoFxError(
            f"the name of a basis must be an identifier in lower case, not {' or '.join(_NO_BASES)}; got {name!r}"
        )
    if any(registration.is_defined(operator) for operator in (name, f"{name}_backward")):
        raise OrthoFxError(f"basis {name!r} would have an operator of a name that is taken")
    if not _is_identifier(basis.title) or hasattr(activations, activations.class_name(basis)):
        raise OrthoFxError(
            f"the title of basis {name!r} must be an identifier that gives its class a free name; got {basis.title!r}"
        )
    degrees = basis.degrees
    if not isinstance(degrees, range) or not degrees or degrees.step != 1 or basis.default_degree not in degrees:
        raise OrthoFxError(
            f"the degrees of basis {name!r} must be a range with step 1 that holds its default degree; "
            f"got {degrees} and {basis.default_degree}"
        )
    taken = set(_NOT_PARAMETERS)
    for parameter in basis.parameters:
        if not _is_identifier(parameter.name) or parameter.name in taken or _is_attribute(parameter.name):
            raise OrthoFxError(
                f"basis {name!r} cannot have a parameter {parameter.name!r}: the name is taken or no identifier"
            )
        if parameter.size(degrees[0]) < 1:
            raise OrthoFxError(f"{parameter.name} of basis {name!r} has no number at degree {degrees[0]}")
        taken.add(parameter.name)
    if not basis.learnable:
        raise OrthoFxError(f"basis {name!r} has no parameter that learns")


def _is_identifier(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def _is_attribute(name: str) -> bool:
    return hasattr(nn.Module(), name) or hasattr(ExpansionActivation, name)


def _check_formula(basis: Basis, degree: int, tied: bool) -> None:
    """Raises an `OrthoFxError` unless the formula runs and its derivatives agree with autograd's."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, grad = numbers(16, 3), numbers(16, 3)
    sizes = [parameter.size(degree, tied) for parameter in basis.parameters]
    for shape in ((), (3,)):
        parameters = [numbers(size, *shape) for size in sizes]
        where = f"basis {basis.name!r}, degree {degree}" + ", tied" * tied + ", one expansion a channel" * bool(shape)
        with _naming(where):
            y = formulas.forward_formula(basis)(x, *parameters, channel_dim=1)
            if y.shape != x.shape or y.dtype != x.dtype:
                raise OrthoFxError(
                    f"its value must be like its input, {tuple(x.shape)} {x.dtype}; got {tuple(y.shape)} {y.dtype}"
                )
            expected = _by_autograd(basis, grad, x, *parameters)
            prepared = basis.prepare(torch.float64, *parameters)
            numbers_of = [p if not shape else p.unsqueeze(-1) for p in prepared[: len(parameters)]]
            count = len(basis.derivatives(grad.T, x.T, *numbers_of)[1])
            if count != (terms := parts.count_terms(basis, parameters)):
                raise OrthoFxError(f"its derivatives have {count} terms for {terms} learnable numbers")
            _compare_gradients(basis, formulas.backward_formula(basis)(grad, x, *parameters, channel_dim=1), expected)
        with _naming(where, "its slope raises"):
            if basis.has_slope:
                _compare_slope(basis, grad, x, *parameters)
        with _naming(
            where, "its formula cannot be compiled, since formulas are written in + - * and ortho_fx.bases.formula"
        ):
            whole_forward, whole_backward = decomposition.decompositions(
                basis,
                functools.partial(decomposition.forward, basis),
                functools.partial(decomposition.backward, basis),
                basis.prepare_for_kernels,
            )
            if not (off := _deviation(whole_forward(x, *parameters, channel_dim=1), y)) < _OFF:
                raise OrthoFxError(f"its value in a kernel is off by {off:.2g} from that on tensors")
            _compare_gradients(basis, whole_backward(grad, x, *parameters, channel_dim=1), expected)


def _by_autograd(basis: Basis, grad: Tensor, x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The gradients of x and of every learnable parameter."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [tensor.clone().requires_grad_() for tensor in (x, *parameters)]
        y = formulas.forward_formula(basis)(*inputs, channel_dim=1)
        learned = [p for p, described in zip(inputs[1:], basis.parameters, strict=True) if described.learnable]
        wanted = [inputs[0], *learned]
        found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def _compare_slope(basis: Basis, grad: Tensor, x: Tensor, *parameters: Tensor) -> None:
    """Raises an `OrthoFxError` unless `slope` gives the derivative of the formula, itself with the right gradients."""
    formula = formulas.forward_formula(basis)
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [tensor.clone().requires_grad_() for tensor in (x, *parameters)]
        y = formula(*inputs, channel_dim=1)
        (expected,) = torch.autograd.grad(y, inputs[0], torch.ones_like(y), create_graph=True)
        actual = formula(inputs[0], *basis.slope(*inputs[1:]), channel_dim=1)
        of_expected, of_actual = (
            torch.autograd.grad(slope, inputs, grad, allow_unused=True, materialize_grads=True)
            for slope in (expected, actual)
        )
    for one, other in zip((actual, *of_actual), (expected, *of_expected), strict=True):
        if not (off := _deviation(one.detach(), other.detach())) < _OFF:
            raise OrthoFxError(
                f"its slope, or a gradient of it, is off by {off:.2g} from the derivative of the formula, in float64; "
                "slope = Basis.slope in the class leaves it out"
            )


def _compare_gradients(basis: Basis, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raises an `OrthoFxError` that names the first gradient that differs from autograd's."""
    names = ("x", *basis.learnable)
    if len(actual) != len(names):
        raise OrthoFxError(f"it collects {len(actual) - 1} gradients for {len(names) - 1} learnable parameters")
    for name, one, other in zip(names, actual, expected, strict=True):
        if one.shape != other.shape:
            raise OrthoFxError(f"the gradient of {name} has shape {tuple(one.shape)}, and {name} {tuple(other.shape)}")
        if not (off := _deviation(one, other)) < _OFF:
            raise OrthoFxError(f"the gradient of {name} is off by {off:.2g} from autograd's of the formula, in float64")


def _deviation(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / max(1.0, float(expected.abs().max())))


@contextlib.contextmanager
def _naming(where: str, what: str = "its formula raises") -> Iterator[None]:
    try:
        yield
    except OrthoFxError as error:
        raise OrthoFxError(f"{where}: {error}") from None
    except Exception as error:
        message = next(iter(str(error).splitlines()), "")
        raise OrthoFxError(f"{where}: {what}: {type(error).__name__}: {message}") from error


def _digest(basis: Basis) -> str:
    """A digest of everything that decides the compiled code of its operators, for the keys of PyTorch's disk caches."""
    digest = hashlib.sha256(repr(vars(basis)).encode())
    for cls in type(basis).__mro__[: type(basis).__mro__.index(Basis)]:
        for member in vars(cls).values():
            if hasattr(member, "__code__"):
                digest.update(marshal.dumps(member.__code__, 2))  # later versions depend on reference counts
        with contextlib.suppress(TypeError, OSError):  # a class from an interactive session has no file
            digest.update(Path(inspect.getfile(cls)).read_bytes())
    return digest.hexdigest()[:16]
