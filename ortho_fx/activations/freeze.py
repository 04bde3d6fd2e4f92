"""`freeze_`: replaces trained expansions by the cheapest equal form, with folded constants.

The `fold` method of a basis chooses the form; `ortho_fx.bases.folded` lists the forms. All folding happens in float64.
With one expansion per channel or group, each keeps the terms that it needs, padded to the length of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, fx, nn

from ortho_fx.activations import nested, shards
from ortho_fx.activations.channels import channel_dim_of
from ortho_fx.activations.expansion import ExpansionActivation, one_input, refuse_scripting
from ortho_fx.arguments import checked_model
from ortho_fx.bases import basis_named
from ortho_fx.bases.folded import FORMS
from ortho_fx.config import SiteConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.moments import Array, Bounds
from ortho_fx.operands import check_operands
from ortho_fx.passes.modules.exchange import move_hooks
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.sharded import clamped, is_distributed, whole
from ortho_fx.tables import table

# The form of a basis that folds into no other: its own formula, with constant parameters.
_FORMULA = "formula"


@dataclass(frozen=True)
class FreezeReport:
    """What `freeze_` did; `print(report)` is a table.

    Attributes:
        names: the qualified names of the expansions that were frozen, a shared one under its first.
        functions: what each is now, in the same order: "hermite 3, form='polynomial', terms=4".
    """

    names: tuple[str, ...]
    functions: tuple[str, ...]

    def __str__(self) -> str:
        if not self.names:
            return "nothing to freeze: every expansion is frozen"
        return table([("name", "function"), *zip(self.names, self.functions, strict=True)])


def freeze_(model: nn.Module) -> FreezeReport:
    """Replaces the expansions of a model by equal fixed functions that cost less, in place.

    The forms are those of `FrozenExpansion`. Shared expansions stay shared. Frozen expansions have no parameters, so
    freeze after training, for inference. A second call changes nothing.

    Args:
        model: a model with expansions, from `rewrite_` or the compile backend.

    Raises:
        OrthoFxError: a model without expansions, a model that is itself an expansion, an expansion that is still
            annealed, or parameters without values or with values that are not finite. The model is then unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> report = rewrite_(model, ExpansionConfig(basis="hermite", degree=3))
        >>> print(freeze_(model))
        name  function
        1     hermite 3, form='polynomial', terms=4
        >>> model[1]
        FrozenExpansion(hermite 3, form='polynomial', terms=4)
    """
    modules = dict(checked_model(model).named_modules())
    if isinstance(model, ExpansionActivation):
        raise OrthoFxError(f"the model itself is the {type(model).__name__}, and nothing holds it: freeze what does")
    if not any(isinstance(module, Expansion) for module in modules.values()):
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to freeze: call rewrite_ first")
    names, functions, frozen = [], [], {}
    for name, module in modules.items():
        if isinstance(module, ExpansionActivation):
            try:
                frozen[module] = FrozenExpansion(module)
            except OrthoFxError as error:
                raise OrthoFxError(f"{name}: {error}") from None
            names.append(name)
            functions.append(frozen[module].extra_repr())
            move_hooks(module, frozen[module])
    for owner in modules.values():
        for key, child in owner._modules.items():
            if isinstance(child, ExpansionActivation):
                owner._modules[key] = frozen[child]
    return FreezeReport(tuple(names), tuple(functions))


class FrozenExpansion(Expansion):
    """A fixed function that equals an expansion, in the cheapest form; `freeze_` makes it.

    Each form has constants of shape (terms,), or (terms, channels) with one expansion per channel or group:
    - "polynomial": sum of c_k x^k, k = 0 .. terms - 1; `monomial_coefficients`.
    - "recurrence": sum of a_k He_k(x) / k!; `hermite_coefficients`, which are a_k 8^k / k!.
    - "waves": a_0 + sum of A_k cos(w_k x - p_k); `constant`, `amplitudes`, `frequencies`, `phases`.
    - "harmonics": a_0 + sum of A_k cos(k w x) + B_k sin(k w x); `constant`, `cosine_amplitudes`, `sine_amplitudes`,
      and w as `frequencies`.
    - "maximum": max over k of (s_k x + b_k); `slopes`, `offsets`.
    - "difference": one maximum minus another; in addition `denominator_slopes` and `denominator_offsets`.
    - "formula": the formula of the basis, with its parameters; for a basis that has none of these forms.

    The constants are buffers with the device and dtype of the parameters. Half-precision parameters give float32
    buffers, which stay float32 when the model is cast to half precision. A state dict loads if form and sizes agree.

    Shape: input `(*)` of any floating dtype, output `(*)` of the same dtype. The arithmetic is that of the expansion:
    float32 inside for half precision, and results within +-65504 in float16. Derivatives of every order come from
    autograd. In eager mode autograd saves intermediate results, while an expansion saves only its input.

    Rounding: the first-order bound on the error of Horner's rule is at most 4 times that of the recurrence, on the
    whole line or within the clamp. The dropped waves add less than the rounding of the others to value, slope and
    second derivative. At an input within rounding of a knot, the gradient can be that of the neighbouring piece.

    Args:
        expansion: the expansion to freeze; it is not changed.

    Raises:
        OrthoFxError: an expansion that is still annealed, or parameters without values or with values that are not
            finite; at the call, the errors of an expansion, and a trace by torch.fx.
    """

    bounds: Tensor | None

    def __init__(self, expansion: ExpansionActivation) -> None:
        super().__init__()
        if type(expansion).forward is not ExpansionActivation.forward:
            raise OrthoFxError("it is still annealed: call finish() of its Annealing before freeze_")
        self._succeed(expansion)
        first = getattr(expansion, expansion.basis.parameters[0].name)
        dtype = _at_least_float32(first.dtype)
        values, interval = _finite_values(expansion)
        self.form, constants = expansion.basis.fold(values, interval, dtype) or (_FORMULA, values)
        for name, value in constants.items():
            if self.channels is None:
                value = value[:, 0]
            else:
                value = value.repeat(self.channels // value.shape[1], axis=1)
            self.register_buffer(name, torch.from_numpy(value).to(first.device, dtype))
        if self.channels is not None and expansion.input_layouts is not None:
            # Each process takes the constants of its channels; one for all of them fits every part.
            shards.replicate_(self, first.device_mesh)
            self.input_layouts = expansion.input_layouts
        self._constants = tuple(constants)
        bounds = expansion.bounds
        self.register_buffer("bounds", None if bounds is None else whole(bounds).to(dtype, copy=True))

    def forward(self, x: Tensor | None = None, inplace: bool = False, **named: Tensor) -> Tensor:
        """As that of the expansion."""
        if isinstance(x, fx.Proxy):
            raise OrthoFxError("torch.fx cannot trace a FrozenExpansion: trace before freeze_, or use torch.export")
        x = one_input(self, x, named)
        if not x.is_floating_point():
            raise OrthoFxError(f"{type(self).__name__} takes a floating-point tensor; got {x.dtype}")
        constants = {name: getattr(self, name) for name in self._constants}
        if self.input_layouts is not None or is_distributed(x):
            return shards.expand_shards(self, x, constants)
        check_operands(self.called, x, constants if self.bounds is None else {**constants, "bounds": self.bounds})
        if x.is_nested:
            return nested.expand_parts(self, x, constants)
        return self.expand(x, constants, 1 if self.channels is None else channel_dim_of(self, x))

    def site_config(self) -> SiteConfig:
        sizes = tuple((name, tuple(getattr(self, name).shape)) for name in self._constants)
        return SiteConfig(self.config, self.channels, self.channel_dim, self.form, sizes)

    def _succeed(self, expansion: ExpansionActivation) -> None:
        self.config, self.channels, self.channel_dim = expansion.config, expansion.channels, expansion.channel_dim
        self.site = expansion.site
        if hasattr(expansion, "_replaced"):  # the activation that the expansion had replaced
            self._replaced = expansion._replaced
        self.train(expansion.training)

    @classmethod
    def like(cls, expansion: ExpansionActivation, site: SiteConfig) -> FrozenExpansion:
        """The frozen expansion that a description names, in the place of an expansion; its constants are NaN.

        Raises:
            OrthoFxError: an unknown form, or no constants.
        """
        if site.form is None or not (site.form == _FORMULA or site.form in FORMS) or not site.sizes:
            raise OrthoFxError(f"{expansion.called}: no frozen form {site.form!r} with constants {dict(site.sizes)}")
        frozen = cls.__new__(cls)
        Expansion.__init__(frozen)
        frozen._succeed(expansion)
        frozen.config, frozen.form, frozen._constants = site.expansion, site.form, tuple(name for name, _ in site.sizes)
        first = getattr(expansion, expansion.basis.parameters[0].name)
        dtype, bounds = _at_least_float32(first.dtype), expansion.bounds
        for name, shape in site.sizes:
            frozen.register_buffer(name, torch.full(shape, torch.nan, device=first.device, dtype=dtype))
        frozen.register_buffer("bounds", None if bounds is None else torch.full_like(bounds, torch.nan, dtype=dtype))
        return frozen

    def expand(self, x: Tensor, operands: Mapping[str, Tensor], dim: int) -> Tensor:
        """The function of x with these constants, by name, and the channels in this dimension."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        constants = [constant.to(dtype) for constant in operands.values()]
        evaluate: Callable[..., Tensor]
        if self.form == _FORMULA:
            basis = basis_named(self.config.basis)
            constants = list(basis.prepare(dtype, *constants)[: len(constants)])
            evaluate = basis.evaluate
        else:
            evaluate = FORMS[self.form]
        if self.channels is not None:
            behind = (1,) * (x.dim() - 1 - dim % x.dim())
            constants = [constant.reshape(*constant.shape, *behind) for constant in constants]
        y = evaluate(clamped(x, self.bounds).to(dtype), *constants)
        if x.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            y = y.clamp(-largest, largest)
        return y.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenExpansion:
        def moved(constant: Tensor) -> Tensor:
            result = fn(constant)
            return result if _at_least_float32(result.dtype) == result.dtype else constant.to(result.device)

        return super()._apply(moved, recurse)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_scripting(self)

    def extra_repr(self) -> str:
        counted = [name for name in self._constants if name.endswith(("coefficients", "offsets")) or name in _COUNTED]
        counted = counted or list(self._constants[:1])
        terms = " - ".join(str(len(getattr(self, name))) for name in counted)
        shown = f"{self.config}, form={self.form!r}, terms={terms}"
        return shown if self.channels is None else f"{shown}, channels={self.channels}"


# The constants whose length is a form's number of terms, in addition to coefficients and offsets.
_COUNTED = ("amplitudes", "cosine_amplitudes")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _finite_values(expansion: ExpansionActivation) -> tuple[dict[str, Array], Bounds | None]:
    """The parameters in float64, each of shape (size, groups), and the clamp's interval; None without a clamp."""
    names = [parameter.name for parameter in expansion.basis.parameters]
    values = {}
    for name in names if expansion.bounds is None else (*names, "bounds"):
        tensor = whole(getattr(expansion, name))
        if tensor.is_meta:
            raise OrthoFxError(f"{name} is on the meta device, and has no values to freeze")
        if not tensor.isfinite().all():
            raise OrthoFxError(f"{name} has values that are not finite")
        values[name] = tensor.to("cpu", torch.float64).numpy().reshape(len(tensor), -1)
    if expansion.bounds is None:
        return values, None
    # Half-precision inputs are clamped to the bounds as their dtype rounds them.
    low, high = (float(bound) for bound in values.pop("bounds")[:, 0])
    margin = torch.finfo(torch.bfloat16).eps
    return values, (low - margin * abs(low), high + margin * abs(high))
