"""Activation modules with learnable coefficients: drop-in replacements for nn.GELU and similar modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from ortho_fx import torch_private
from ortho_fx.activations import nested, originals, shards, torchortho
from ortho_fx.activations.channels import channel_dim_of
from ortho_fx.bases import (
    BASES,
    CHEBYSHEV,
    FOURIER,
    GELU_SERIES,
    HERMITE,
    PIECEWISE_POWER,
    RELU_SQUARED_SERIES,
    SAFE_RATIONAL,
    SILU_SERIES,
    TROPICAL,
    TROPICAL_RATIONAL,
    Basis,
    basis_named,
)
from ortho_fx.config import ExpansionConfig, SiteConfig
from ortho_fx.errors import OperandError, OrthoFxError
from ortho_fx.numerics.fit import FittedExpansion, check_exact, fit_expansion
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.numerics.initialisation import initial_parameters
from ortho_fx.numerics.moments import Values
from ortho_fx.operands import check_operands
from ortho_fx.operators import expand
from ortho_fx.passes.vocabulary.expansions import LearnableExpansion
from ortho_fx.sharded import clamped, is_distributed, whole

_Forward = TypeVar("_Forward", bound=Callable[..., Tensor])


def traced_with_one_input(forward: _Forward) -> _Forward:
    """A forward that takes its input under any name, and whose graph in `torch.fx` has one placeholder, x."""

    def of_one_input(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x)

    # fx reads the arguments of the function at the end of the chain of __wrapped__, and calls the first. Others read
    # the signature.
    told: Any = forward
    told.__signature__, told.__wrapped__ = inspect.signature(forward), of_one_input
    return forward


class ExpansionActivation(LearnableExpansion):
    """The base class of learnable activations: an elementwise function y(x), learned as an expansion in a basis.

    The subclasses state the formula of y, one for each basis.

    Shape: input `(*)` of any floating dtype, output `(*)` of the same dtype. The parameters are those of the basis, of
    shape (size,), or (size, groups) if `granularity` asks for one expansion per channel or group.

    Rounding: half-precision inputs are computed in float32 and the result is rounded once, by at most 4e-3 of it in
    bfloat16 and 5e-4 in float16. In float16 a result beyond +-65504 becomes +-65504. A gradient that large becomes inf,
    which gradient scalers look for. Nothing else saturates unless `clamp=` is set. The subclasses state the errors of
    float32, in value and gradient, on [-10, 10] and in units of max(1, |exact|), as measured by benchmarks/accuracy.py.

    Args:
        degree, init, granularity, clamp, tied, gated: as in `ExpansionConfig`.
        channels: number of channels, for granularity "channel" or "group:N".
        channel_dim: the dimension of the channels. When omitted, it is dimension 1 or -1, whichever has `channels`
            elements. If both have, it is 1 for inputs of four or more dimensions, and -1 for others.
        reference: the function that init="fit" fits, and at which init="exact" starts: any elementwise function that
            autograd differentiates.
        device, dtype: of the parameters, as in `torch.nn` modules.
        inplace: has no effect: the output is always a new tensor. Libraries pass it to every activation.

    Raises:
        OrthoFxError: a wrong setting at construction; at the call, an input that is not floating point or has
            another number of channels.
        OperandError: at the call, parameters on another device than the input, of a storage dtype such as float8, or
            sharded while the input is not; under tensor parallelism, a plan without `ExpansionParallel`.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.
    """

    basis: ClassVar[Basis]
    bounds: Tensor | None
    channels: int | None = None
    channel_dim: int | None = None

    def __init__(
        self,
        degree: int | None = None,
        init: str = "stable",
        *,
        granularity: str = "layer",
        clamp: float | None = None,
        tied: bool = False,
        gated: bool = False,
        channels: int | None = None,
        channel_dim: int | None = None,
        reference: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.config = ExpansionConfig(self.basis.name, degree, init, granularity, clamp, tied, gated)
        if init in ("fit", "exact") and reference is None:
            raise OrthoFxError(f"init {init!r} needs the function to fit: pass reference=, or let rewrite_ find it")
        # In a tuple, so that a module does not become a submodule: its parameters are not the expansion's.
        self._reference = (reference,)
        groups = self.config.groups(channels)
        if groups is not None:
            self.channels = channels
        if channel_dim is not None:
            self.channel_dim = channel_dim
        assert self.config.degree is not None
        for parameter in self.basis.parameters:
            size = parameter.size(self.config.degree, tied)
            values = torch.empty(size if groups is None else (size, groups), device=device, dtype=dtype)
            if parameter.learnable:
                self.register_parameter(parameter.name, nn.Parameter(values))
            else:
                self.register_buffer(parameter.name, values)
        self.register_buffer("bounds", None if clamp is None else torch.empty(2, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def reference(self) -> Callable[[Tensor], Tensor] | None:
        """The function that the expansion replaces or fits; None if it is unknown."""
        return self._reference[0]

    def reset_parameters(self, inputs: Histogram | None = None) -> None:
        """Sets every parameter to its initial value, chosen by `config.init`.

        Args:
            inputs: the distribution of inputs for which the expansion is initialised; N(0, 1) when omitted.
        """
        self.set_parameters(self.initial_values(inputs)[0])

    def initial_values(self, inputs: Histogram | None = None) -> tuple[Values, FittedExpansion | None]:
        """The values that `reset_parameters` sets, by name, and the fit that gave them, if init is "fit" or "exact".

        Raises:
            OrthoFxError: init "exact", and no expansion of this basis and degree is the replaced function.
        """
        mean, std = (0.0, 1.0) if inputs is None else (inputs.mean, inputs.std)
        fitted = None
        if self.config.init in ("fit", "exact"):
            assert self.reference is not None
            fitted = _fit(self.reference, self.config, None if self.config.init == "exact" else inputs)
            values = dict(fitted.parameters)
            if self.config.init == "exact":
                check_exact(fitted)
        else:
            values = dict(initial_parameters(self.config))
            if inputs is not None:
                if self.config.gated:
                    values = self.basis.affine(values, 1 / std, 0.0)
                values = self.basis.rescale(values, mean, std)
        if self.config.clamp is not None:
            values["bounds"] = mean + np.array([-1.0, 1.0]) * self.config.clamp * std
        return values, fitted

    def site_config(self) -> SiteConfig:
        return SiteConfig(self.config, self.channels, self.channel_dim)

    def set_parameters(self, values: Values) -> None:
        """Copies these values (arrays by name) into the parameters and buffers, the same for every group.

        Raises:
            OrthoFxError: a parametrization that cannot be inverted, or a parameter that is computed from others.
        """
        try:
            originals.write(self, values)
        except OrthoFxError as error:
            raise OrthoFxError(f"{self.called}: {error}") from None

    def distinct_values(self) -> tuple[list[Values], list[int]]:
        """The distinct parameter sets of the groups, in float64, and how many groups have each set.

        Raises:
            OrthoFxError: parameters on the meta device.
        """
        tensors = {parameter.name: whole(getattr(self, parameter.name)) for parameter in self.basis.parameters}
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise OrthoFxError(f"{self.called}: {name} is on the meta device, without values")
        stored = {name: tensor.to("cpu", torch.float64).numpy() for name, tensor in tensors.items()}
        columns = np.concatenate([value.reshape(len(value), -1) for value in stored.values()])
        distinct, counts = np.unique(columns, axis=1, return_counts=True)
        ends = np.cumsum([len(value) for value in stored.values()])[:-1]
        sets: list[Values] = [dict(zip(stored, np.split(column, ends), strict=True)) for column in distinct.T]
        return sets, [int(count) for count in counts]

    @traced_with_one_input
    def forward(self, x: Tensor | None = None, inplace: bool = False, **named: Tensor) -> Tensor:
        """y(x). Callers of the replaced function may pass the input under any name.

        They may also pass `inplace`; it has no effect.
        """
        operands = {parameter.name: getattr(self, parameter.name) for parameter in self.basis.parameters}
        # torch.fx.symbolic_trace passes Proxies, which know neither dtype nor shape.
        if isinstance(x, fx.Proxy) or any(isinstance(operand, fx.Proxy) for operand in operands.values()):
            assert x is not None
            return self.expand(x, operands, 1 if self.channels is None else channel_dim_of(self, x))
        x = one_input(self, x, named)
        if not x.is_floating_point():
            raise OrthoFxError(f"{type(self).__name__} takes a floating-point tensor; got {x.dtype}")
        if self.input_layouts is not None or is_distributed(x):
            return shards.expand_shards(self, x, operands)
        check_operands(self.called, x, operands if self.bounds is None else {**operands, "bounds": self.bounds})
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled():
            neighbour = self._parallel_neighbour()
            if neighbour:
                raise OperandError(shards.undeclared(self.called, neighbour))
        if x.is_nested:
            return nested.expand_parts(self, x, operands)
        return self.expand(x, operands, 1 if self.channels is None else channel_dim_of(self, x))

    def expand(self, x: Tensor, operands: Mapping[str, Tensor], dim: int) -> Tensor:
        """y(x) with these parameters, by name, and the channels in this dimension."""
        return expand(self.basis, clamped(x, self.bounds), *operands.values(), channel_dim=dim)

    @torch_private.constant_in_a_trace
    def _parallel_neighbour(self) -> str:
        return shards.parallel_neighbour(self)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            state_dict = torchortho.converted(self.basis.name, state_dict, prefix, self.config.tied)
        except OrthoFxError as error:
            error_msgs.append(str(error))
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_scripting(self)

    def extra_repr(self) -> str:
        shown = f"degree={self.config.degree}, init={self.config.init!r}"
        if self.channels is not None:
            shown += f", granularity={self.config.granularity!r}, channels={self.channels}"
        if self.config.clamp is not None:
            shown += f", clamp={self.config.clamp:g}"
        if self.config.tied:
            shown += ", tied=True"
        if self.config.gated:
            shown += ", gated=True"
        return shown


def one_input(module: nn.Module, x: Tensor | None, named: Mapping[str, Tensor]) -> Tensor:
    """The input of a call that may have passed it under any name.

    Raises:
        OrthoFxError: no input, or more than one.
    """
    if x is None and len(named) == 1:
        (x,), named = named.values(), {}
    if x is not None and not named:
        if not isinstance(x, Tensor):
            raise OrthoFxError(f"{type(module).__name__} takes a tensor; got {type(x).__name__}")
        if x.layout not in (torch.strided, torch.jagged):
            raise OrthoFxError(f"{type(module).__name__} takes a dense tensor; got one of layout {x.layout}")
        return x
    given = ", ".join([*(["one tensor"] if x is not None else []), *(f"{name}=" for name in named)]) or "none"
    raise OrthoFxError(f"{type(module).__name__} takes one tensor; got {given}")


def refuse_scripting(module: nn.Module) -> NoReturn:
    # TorchScript would compile the source of the surrounding model, which still calls the old activations.
    raise OrthoFxError(
        f"TorchScript cannot compile {type(module).__name__}: use torch.export.export(model, ...) or torch.jit.trace"
    )


# A histogram with fewer filled bins per coefficient, as after a global pooling, is worse than its mean and deviation.
_NODES_A_COEFFICIENT = 4


def _fit(reference: Callable[[Tensor], Tensor], config: ExpansionConfig, inputs: Histogram | None) -> FittedExpansion:
    if inputs is not None:
        few = np.count_nonzero(inputs.counts) < _NODES_A_COEFFICIENT * config.size
        if few and inputs.finite and not inputs.constant:
            return fit_expansion(reference, config, mean=inputs.mean, std=inputs.std)
        return fit_expansion(reference, config, weight="measured", samples=inputs)
    try:
        return _standard_fit(reference, config)
    except TypeError:  # the function cannot be hashed for the cache
        return fit_expansion(reference, config)


def activation_at(
    result: FittedExpansion,
    *,
    channels: int | None = None,
    channel_dim: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ExpansionActivation:
    """A module whose parameters start at a fit, for any weight and interval of the fit."""
    start = replace(result.config, init="stable")
    activation = make_activation(start, channels=channels, channel_dim=channel_dim, device=device, dtype=dtype)
    activation.config = result.config
    activation._reference = (result.function,)
    bounds = {} if result.bounds is None else {"bounds": np.array(result.bounds)}
    activation.set_parameters({**result.parameters, **bounds})
    return activation


# A model has many sites, but few activation functions and configs, and the fit depends on these alone.
_standard_fit = functools.lru_cache(maxsize=64)(fit_expansion)


class HermiteActivation(ExpansionActivation):
    r"""y(x) = \sum_{k=0}^n a_k He_k(x) / k!, with learnable `coefficients` a_0 .. a_n.

    He_k are the probabilists' Hermite polynomials. Degrees 1 to 32; 3 by default. `coefficients` has the shape
    (n + 1,), or (n + 1, groups). Inputs, dtypes and errors are those of `ExpansionActivation`.

    Rounding in float32, started for N(0, 1): at most 5e-6 at degree 3, 7e-6 at degree 8, and 5e-5 at degrees 16 and 32;
    the three-term recurrence is stable where a sum of powers of x is not. Far outside of the range for which the
    coefficients are made, terms cancel. Started for N(0, 0.2^2), where x = 10 is 50 deviations from the mean, the error
    is 5e-5 at degree 8, 7e-4 at degree 16, and 0.2 in the gradient at degree 32. A clamp prevents this.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.

    Examples:
        >>> activation = HermiteActivation(degree=3)
        >>> activation(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    basis = HERMITE


class FourierActivation(ExpansionActivation):
    r"""y(x) = a_0 + \sum_{k=1}^n a_k cos(w_k x - p_k) / k!, with everything learnable.

    Parameters: `constant` a_0 of shape (1,); `coefficients` a_k, `frequencies` w_k (radians per unit of x, starting
    from 0.35 k) and `phases` p_k (radians, starting from pi / 2), each of shape (n,). Degrees 1 to 64; 5 by default.
    Inputs, dtypes, groups and errors are those of `ExpansionActivation`.

    With `tied=True` the frequencies are w_k = k w, and `frequencies`, of shape (1,), holds only w.

    Rounding in float32: at most 5e-7 in value and, started for N(0, 0.2^2), 2e-6 in the gradient. The function is
    bounded.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.
    """

    basis = FOURIER


class TropicalActivation(ExpansionActivation):
    r"""y(x) = \max_{k=0}^n (s_k x + b_k), convex and piecewise linear, with learnable `offsets` b_0 .. b_n.

    The `slopes` s_0 .. s_n are a buffer: fixed, saved with the model. Slopes and offsets have the shape (n + 1,).
    Degrees 1 to 64; 5 by default. Inputs, dtypes, groups and errors are those of `ExpansionActivation`.

    Rounding in float32: at most 3e-7 in value at degree 5, and 2e-6 at degree 64. At an input within rounding of a
    knot, the gradient can be that of the neighbouring piece. Its error is then the difference of two slopes; elsewhere
    it is exact. The function grows linearly.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247. Their scale * max_k (k x + b_k) is the case
    s_k = scale * k, with the scale multiplied into the offsets.
    """

    basis = TROPICAL


class TropicalRationalActivation(ExpansionActivation):
    r"""y(x) = \max_k (s_k x + b_k) - \max_k (t_k x + c_k), k = 0 .. n, piecewise linear, with everything learnable.

    Parameters: `slopes` s, `offsets` b, `denominator_slopes` t and `denominator_offsets` c, each of shape (n + 1,); in
    tropical arithmetic a difference is a quotient. Degrees 1 to 64; 6 by default. Inputs, dtypes, groups and errors are
    those of `ExpansionActivation`.

    Rounding in float32: at most 2e-6 in value at degree 6, and 3e-6 at degree 64; the gradient is as exact as that of
    `TropicalActivation`.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.
    """

    basis = TROPICAL_RATIONAL


class ChebyshevActivation(ExpansionActivation):
    r"""y(x) = \sum_{k=0}^n a_k T_k(s (x - c)), with learnable `coefficients` a_0 .. a_n.

    T_k are the Chebyshev polynomials of the first kind. `centre` c and `scale` s, of shape (1,), are buffers: fixed,
    saved with the model. They start at 0 and 1/4, so all T_k are within [-1, 1] for inputs up to 4. Degrees 1 to 32; 3
    by default. Inputs, dtypes, groups and errors are those of `ExpansionActivation`.

    T_n grows like (2 s (x - c))^n / 2 outside. In float32 T_32 overflows from about 32 deviations on, and the output is
    then not finite, even where its coefficient is 0. A clamp prevents this.
    """

    basis = CHEBYSHEV


class SafeRationalActivation(ExpansionActivation):
    r"""y(x) = (\sum_{k=0}^n a_k x^k) / (1 + (\sum_{k=0}^{n//2} b_k x^k)^2), with everything learnable.

    Parameters: `numerator` a of shape (n + 1,) and `denominator` b of shape (n // 2 + 1,). Degrees 2 to 16; 5 by
    default, a rational of degrees 5 / 4. The denominator is at least 1 for any parameters: there is no pole, and all
    derivatives exist. The function grows like |x| at most at an odd degree, and is bounded at an even one, unless the
    last b is zero. In float32 the powers of x overflow, and give NaN, from |x| = 1e7 at degree 5. Inputs, dtypes,
    groups and errors are those of `ExpansionActivation`.

    Source: the Pade activation units of Molina et al., arXiv 1907.06732, have 1 + |Q(x)| as their denominator; it has
    kinks, and no second derivative there.
    """

    basis = SAFE_RATIONAL


class PiecewisePowerActivation(ExpansionActivation):
    r"""y(x) = c + \sum_{k=1}^n r_k (x - t)^k for x > t, and c + \sum_{k=1}^n l_k (x - t)^k elsewhere; all learnable.

    Parameters: `constant` c and `knot` t of shape (1,), `right` r and `left` l of shape (n,). Degrees 1 to 8; 2 by
    default, at which ReLU^2, LeakyReLU^2 and ASQU are points of the family: `init="exact"` starts there. Of xIELU one
    side is. Inputs, dtypes, groups and errors are those of `ExpansionActivation`.

    Source: ReLU^2 is that of Primer, arXiv 2109.08668.
    """

    basis = PIECEWISE_POWER


class GELUSeriesActivation(ExpansionActivation):
    r"""y(x) = w GELU(s x + t) + \sum_{k=0}^n a_k He_k(x) / k!, with learnable `coefficients` a_0 .. a_n.

    `gelu_weight` w, `scale` s and `shift` t, of shape (1,), are buffers: fixed, saved with the model. With init "exact"
    they are 1, 1 and 0, and the coefficients are zero: y is GELU. Degrees 1 to 32; 3 by default. Inputs, dtypes, groups
    and errors are those of `ExpansionActivation`.
    """

    basis = GELU_SERIES


class SiLUSeriesActivation(ExpansionActivation):
    r"""y(x) = w SiLU(s x + t) + \sum_{k=0}^n a_k He_k(x) / k!; `silu_weight` is w.

    The rest is as `GELUSeriesActivation`.
    """

    basis = SILU_SERIES


class ReLUSquaredSeriesActivation(ExpansionActivation):
    r"""y(x) = w relu(s x + t)^2 + \sum_{k=0}^n a_k He_k(x) / k!; `relu_squared_weight` is w.

    The rest is as `GELUSeriesActivation`.
    """

    basis = RELU_SQUARED_SERIES


CLASSES: dict[str, type[ExpansionActivation]] = {
    cls.basis.name: cls
    for cls in (
        HermiteActivation,
        FourierActivation,
        TropicalActivation,
        TropicalRationalActivation,
        ChebyshevActivation,
        SafeRationalActivation,
        PiecewisePowerActivation,
        GELUSeriesActivation,
        SiLUSeriesActivation,
        ReLUSquaredSeriesActivation,
    )
}
assert CLASSES.keys() == BASES.keys()


class RegisteredActivation(ExpansionActivation):
    """The base class of activations for registered bases; it pickles them by the name of their basis."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self) is not CLASSES.get(self.basis.name):  # a subclass, which pickle finds by name
            return reduced
        assert isinstance(reduced, tuple)
        return _of_registered_basis, (self.basis.name,), *reduced[2:]


def _of_registered_basis(name: str) -> ExpansionActivation:
    """An activation without state, for pickle to fill.

    Raises:
        OrthoFxError: this process has not registered the basis.
    """
    basis_named(name)
    return CLASSES[name].__new__(CLASSES[name])


def add_class(basis: Basis) -> type[ExpansionActivation]:
    """Makes the module class of a registered basis, in this module under the name that `class_name` gives."""
    text = f"{inspect.cleandoc(type(basis).__doc__ or basis.title)}\n\nThe activation of basis {basis.name!r}."
    members = {"basis": basis, "__doc__": text, "__module__": __name__}
    cls = type(class_name(basis), (RegisteredActivation,), members)
    CLASSES[basis.name] = cls
    globals()[cls.__name__] = cls
    return cls


def class_name(basis: Basis) -> str:
    """`<title>Activation`, or with the basis' own name in the place of a title that another basis has."""
    taken = any(other.title == basis.title for name, other in BASES.items() if name != basis.name)
    title = basis.name.title().replace("_", "") if taken else basis.title
    return f"{title}Activation"


def make_activation(
    config: ExpansionConfig,
    *,
    channels: int | None = None,
    channel_dim: int | None = None,
    reference: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ExpansionActivation:
    """The activation module for a config; the other arguments are those of `ExpansionActivation`."""
    basis_named(config.basis)
    return CLASSES[config.basis](
        config.degree,
        config.init,
        granularity=config.granularity,
        clamp=config.clamp,
        tied=config.tied,
        gated=config.gated,
        channels=channels,
        channel_dim=channel_dim,
        reference=reference,
        device=device,
        dtype=dtype,
    )
