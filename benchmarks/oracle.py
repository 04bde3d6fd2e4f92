"""The oracle of the coverage benchmark: which activations a model runs, and where.

It knows nothing of the rewrite. `observe(model, inputs)` runs a model under a dispatch mode, in eval and in train. It
records every operator of the ReLU/GELU/SiLU family, every self-gated formula and every other gate, each with the module
that runs it and the lines. It finds formulas such as x * sigmoid(c x) or x * tanh(softplus(x)) by following the data: a
gate is self-gated if its output is multiplied by a pointwise function of the tensor from which it was computed.
It does not see a ReLU that is written as a clamp or a maximum, nor functions such as x + sin(x)^2.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from architectures import Inputs
from torch import Tensor, nn

import ortho_fx
from ortho_fx import torch_private

_DispatchMode: Any = torch_private.load(torch_private.TESTS).TorchDispatchMode
FAMILY = set(
    "relu gelu silu mish hardswish leaky_relu elu selu celu hardtanh rrelu _prelu_kernel threshold "
    "_transformer_encoder_layer_fwd _addmm_activation".split()
)
GATES = {"sigmoid", "tanh", "erf", "softplus", "hardsigmoid"}
TORCH, OURS = (str(Path(module.__file__).parent) for module in (torch, ortho_fx))


@dataclass(frozen=True)
class Place:
    """Where an operator is called.

    `module` is the innermost registered module that is running. `frames` are the lines outside of PyTorch from the
    operator up to that module's method, each as file, first line, last line and function.
    """

    operator: str
    module: str
    frames: tuple[tuple[str, int, int, str], ...]

    def __str__(self) -> str:
        shown = [f"{file}:{line} in {function}" for file, line, _, function in self.frames[:2]]
        return f"{self.operator} at {', from '.join(shown)}"


@dataclass
class Origin:
    """The origin of a tensor: an object that stands for the tensor of which it is a pointwise function, and the calls
    of `GATES` in between."""

    root: object
    gates: frozenset[int] = frozenset()


class Oracle(_DispatchMode):
    """Records the activations that run inside this context; `found` sorts them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.calls: list[Place] = []
        self.self_gated: set[int] = set()
        self.origins: dict[tuple, Origin | None] = {}
        self.kept: list[Tensor] = []  # tensors stay alive, so that no address is reused
        for tensor in (*model.parameters(), *model.buffers()):
            self.origins[_key(tensor)] = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1].rstrip("_") if func.namespace == "aten" else ""
        before = [self.origin(a) for a in args if isinstance(a, Tensor)] if torch.Tag.pointwise in func.tags else None
        shapes = [a.shape for a in args if isinstance(a, Tensor)]
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in (result if isinstance(result, tuple | list) else (result,)) if isinstance(t, Tensor)]
        self.kept += outputs
        if _is_view(func):
            for output in outputs:
                # A view of a constant is constant; a view of the same shape has the key of its base.
                if args and isinstance(args[0], Tensor) and self.origin(args[0]) is None:
                    self.origins[_key(output)] = None
            return result
        gates: frozenset[int] = frozenset()
        if name in FAMILY or name in GATES:
            place = self._place(name)
            if place is not None and args[0].is_floating_point():
                gates = frozenset({len(self.calls)})
                self.calls.append(place)
        for output in outputs:
            if before is None and name not in ("_to_copy", "clone", "native_dropout"):
                read = [self.origin(tensor) for tensor in tensors(args)]
                constant = bool(read) and not any(read)
                self.origins[_key(output)] = None if constant else Origin(object())
                continue
            if before is None:
                before, shapes = [self.origin(args[0])], [args[0].shape]
            sources = [o for o, shape in zip(before, shapes, strict=True) if o is not None]
            same = len({id(o.root) for o in sources}) == 1 and output.shape in shapes
            inherited = frozenset().union(*(o.gates for o in sources)) if same else frozenset()
            if same and self._is_product(name, args, sources):
                self.self_gated |= inherited
            origin = Origin(sources[0].root if same else object(), inherited | gates)
            self.origins[_key(output)] = origin if sources or gates else None
        return result

    def origin(self, tensor: Tensor) -> Origin | None:
        """The tensor's origin; None for a constant: a parameter, a buffer, or a tensor computed from these alone."""
        if tensor.dim() == 0 and _key(tensor) not in self.origins:
            return None
        return self.origins.setdefault(_key(tensor), Origin(object()))

    def _is_product(self, name: str, args: tuple, sources: list[Origin]) -> bool:
        if name == "pow":
            return isinstance(args[1], int | float) and args[1] == 2
        return name == "square" or (name in ("mul", "div") and len(sources) == 2)

    def _place(self, operator: str) -> Place | None:
        frame: FrameType | None = sys._getframe(2)
        frames, module = [], None
        while frame is not None and (not frames or module is None):
            code = frame.f_code
            if not code.co_filename.startswith((TORCH, "<")):
                if not frames and code.co_filename.startswith((OURS, str(Path(OURS).parent / "passes"))):
                    return None
                frames.append((Path(code.co_filename).name, *_lines(code, frame.f_lasti), code.co_name))
            if module is None and code.co_varnames[:1] == ("self",):
                owner = frame.f_locals.get("self")
                module = self.names.get(id(owner)) if isinstance(owner, nn.Module) else None
            frame = frame.f_back
        return Place(operator, module or "", tuple(frames))

    def found(self) -> tuple[Counter[Place], Counter[Place], Counter[Place]]:
        """Calls of the family, of self-gated formulas, and of all other gates, counted by place."""
        family, formulas, gates = Counter(), Counter(), Counter()
        for index, place in enumerate(self.calls):
            if place.operator in FAMILY:
                family[place] += 1
            else:
                (formulas if index in self.self_gated else gates)[place] += 1
        return family, formulas, gates


def _is_view(func) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _key(tensor: Tensor) -> tuple:
    try:
        return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
    except (RuntimeError, NotImplementedError):  # sparse
        return (id(tensor),)


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in a model's output, or among an operator's arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)


def _lines(code: CodeType, instruction: int) -> tuple[int, int]:
    positions = list(code.co_positions())[instruction // 2]
    return positions[0] or 0, positions[1] or positions[0] or 0


def observe(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What the oracle finds in eval and in train; "train_error" is an error of the model itself in train."""
    found = {}
    for mode in ("eval", "train"):
        model.train(mode == "train")
        torch.manual_seed(1)
        oracle = Oracle(model)
        try:
            with torch.no_grad(), oracle:
                model(**inputs)
        except Exception as error:
            if mode == "eval":
                raise
            found["train_error"] = f"{type(error).__name__}: {error}"
        found[mode] = oracle.found()
    model.eval()
    return found
