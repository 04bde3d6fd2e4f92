"""The candidates that `ortho_fx.bench` measures: GELU, the floor, our expansions and peers, as calls to be timed."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx.activations.expansion import make_activation
from ortho_fx.bench.config import ROW, BenchConfig
from ortho_fx.config import ExpansionConfig
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.stock import TORCHORTHO, SquaredReLU, exchange_
from ortho_fx.rewriting.optimizer import param_groups
from ortho_fx.rewriting.rewrite import rewrite_

WIDTH = ROW // 4
_numbers = itertools.count()


@dataclass
class Candidate:
    """Something to time.

    Args:
        name, kind: as in `Measurement`.
        phases: the parts that are timed separately, by name and in order; each gets the result of the one before.
        device: the device that it runs on.
        compiled: whether torch.compile made it.
    """

    name: str
    kind: str
    phases: dict[str, Callable[[Any], Any]]
    device: str
    compiled: bool

    @property
    def device_type(self) -> str:
        return self.device.split(":")[0]


class Rational(nn.Module):
    r"""y(x) = P(x) / (1 + |b_1 x + ... + b_4 x^4|) with P of degree 5, in plain tensor operations.

    It is the "safe" Padé activation unit of rational networks and KAT. Its cost is similar to that of an expansion of
    degree 5, and a user could write it instead. All coefficients are learnable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor([0.0, 0.5, 0.4, 0.1, 0.01, 0.001]))
        self.denominator = nn.Parameter(torch.tensor([0.1, 0.2, 0.01, 0.01]))

    def forward(self, x: Tensor) -> Tensor:
        top = self.numerator[5]
        for k in range(4, -1, -1):
            top = top * x + self.numerator[k]
        bottom = self.denominator[3]
        for k in range(2, -1, -1):
            bottom = bottom * x + self.denominator[k]
        return top / (1 + (bottom * x).abs())


class _CopyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0] + grad


class Copy(nn.Module):
    """The lower bound for an activation that saves its input: forward copies it, backward adds input and gradient.

    It makes five passes over memory: read x, write y; read x, read the gradient of y, write that of x.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _CopyFunction.apply(x)


def make_candidates(config: BenchConfig, others: Mapping[str, nn.Module] | None = None) -> Iterator[Candidate]:
    """Every candidate of a config: first the reference, then the floor, then the expansions, then peers.

    `others` are further peers by name, for an activation alone or in an MLP.
    """
    if config.trains:
        yield from _training_steps(config)
        return
    torch.manual_seed(0)
    alone = config.what == "activation"
    dtype = getattr(torch, config.dtype)
    rows, width = config.elements // ROW, ROW if alone else WIDTH
    x = torch.randn(rows, width, device=config.device, dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, width, device=config.device, dtype=dtype)

    def candidate(name: str, kind: str, activation: nn.Module, compiled: bool = not config.eager) -> Candidate:
        module = activation if alone else nn.Sequential(nn.Linear(WIDTH, ROW), activation, nn.Linear(ROW, WIDTH))
        module.to(config.device, dtype)
        call = compile_alone(module, config) if compiled else module
        wanted = [x, *module.parameters()]

        def forward(_: None) -> Tensor:
            _begin_step(config)
            return call(x)

        def backward(y: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, wanted, grad, allow_unused=True)

        return Candidate(name, kind, {"forward": forward, "backward": backward}, config.device, compiled)

    yield candidate("gelu", "reference", nn.GELU())
    if alone:
        yield candidate("copy", "floor", Copy())
    else:
        yield candidate("no activation", "floor", nn.Identity())
    for expansion in config.expansions:
        channels = ROW if expansion.by_channel else None
        yield candidate(str(expansion), "expansion", make_activation(expansion, channels=channels))
    for name, module in (others or {}).items():
        yield candidate(name, "peer", module)
    if config.peers:
        yield candidate("rational 5/4", "peer", Rational())
        for title, degree, make in _torchortho():
            for compiled in (False,) if config.eager else (False, True):
                name = f"torchortho {title} {degree}{'' if compiled else ' eager'}"
                yield candidate(name, "peer", make(degree), compiled)


def _torchortho() -> Iterator[tuple[str, int, Callable[[int], nn.Module]]]:
    """Title, degree and constructor of torchortho's activations, if it is installed."""
    with contextlib.suppress(ImportError):
        package = importlib.import_module("torchortho")
        for name, degree in TORCHORTHO:
            yield name.removesuffix("Activation").lower(), degree, getattr(package, name)


def _training_steps(config: BenchConfig) -> Iterator[Candidate]:
    """A training step with GELU in its exact form, one with each expansion, and one with each stock activation."""
    model, inputs, targets = trained_model(config)

    def step(name: str, kind: str, changed: nn.Module) -> Candidate:
        return training_step(name, kind, changed, inputs, targets, config)

    yield step("gelu", "reference", exchanged(model, nn.GELU()))
    for expansion in config.expansions:
        rewritten = copy.deepcopy(model)
        rewrite_(rewritten, expansion, example_inputs=inputs)
        yield step(str(expansion), "expansion", rewritten)
    if config.peers:
        for name, activation in STOCK.items():
            yield step(name, "peer", exchanged(model, activation))


# What training steps have besides. On a CPU the tanh form of GELU takes several times the exact one's time.
STOCK = {"gelu, tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU(), "squared relu": SquaredReLU()}


def exchanged(model: nn.Module, activation: nn.Module) -> nn.Module:
    """A copy of the model, with a copy of the activation in the place of each of its own, modules and functions."""
    changed = copy.deepcopy(model)
    exchange_(changed, lambda: copy.deepcopy(activation))
    return changed


def trained_model(config: BenchConfig) -> tuple[nn.Module, Tensor, Tensor]:
    """The model of a training step with GELU, its inputs and targets; always the same numbers."""
    torch.manual_seed(0)
    model, inputs, targets = _gpt2(config) if config.what == "gpt2" else _convnext(config)
    return model.to(config.device), inputs, targets


def _gpt2(config: BenchConfig) -> tuple[nn.Module, Tensor, Tensor]:
    preset = gpt2.PRESETS[config.size]
    batch = config.batch_size or (16 if config.size == "tiny" else 8)
    tokens = torch.randint(preset.vocabulary, (batch, preset.context + 1), device=config.device)
    return gpt2.GPT2(preset), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _convnext(config: BenchConfig) -> tuple[nn.Module, Tensor, Tensor]:
    preset = convnext.PRESETS[config.size]
    batch, side = config.batch_size or 64, 32 if config.size == "tiny" else 224
    images = torch.randn(batch, preset.channels, side, side, device=config.device)
    return convnext.ConvNeXt(preset), images, torch.randint(preset.classes, (batch,), device=config.device)


def training_step(
    name: str, kind: str, model: nn.Module, inputs: Tensor, targets: Tensor, config: BenchConfig
) -> Candidate:
    """A step that trains the model with AdamW."""
    dtype = getattr(torch, config.dtype)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(config.device_type, dtype, enabled=dtype != torch.float32):
            logits = model(inputs)
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())

    loss = loss_of if config.eager else compile_alone(loss_of, config)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4, weight_decay=0.1), fused=True)

    def step(_: None) -> None:
        _begin_step(config)
        loss(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Candidate(name, kind, {"step": step}, config.device, not config.eager)


def compilation_subject(expansion: ExpansionConfig | None, config: BenchConfig, blocks: int) -> Callable[[], None]:
    """A function that runs forward and backward of a compiled stack of MLP blocks, which has not run yet."""
    width, dtype = 64, getattr(torch, config.dtype)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = 4 * width if expansion is not None and expansion.by_channel else None
            self.norm = nn.LayerNorm(width)
            self.expand = nn.Linear(width, 4 * width)
            self.act = nn.GELU() if expansion is None else make_activation(expansion, channels=channels)
            self.project = nn.Linear(4 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.project(self.act(self.expand(self.norm(x))))

    model = nn.Sequential(*(Block() for _ in range(blocks))).to(config.device, dtype)
    x = torch.randn(256, width, device=config.device, dtype=dtype)
    call = compile_alone(model, config)

    def run() -> None:
        call(x).sum().backward()
        if config.device_type == "cuda":
            torch.cuda.synchronize(config.device)

    return run


def compile_alone(call: Callable[..., Tensor], config: BenchConfig) -> Callable[..., Tensor]:
    """`call` compiled by torch.compile in the mode of the config, separate from other compiled code of this process."""

    def run(*arguments: Tensor) -> Tensor:
        return call(*arguments)

    # Dynamo caches compiled code by code object, up to a limit. So each candidate gets its own code object.
    code = run.__code__.replace(co_name=f"candidate_{next(_numbers)}")
    alone = types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    return torch.compile(alone, dynamic=False, mode=None if config.mode == "default" else config.mode)


def _begin_step(config: BenchConfig) -> None:
    if config.mode != "default":
        torch.compiler.cudagraph_mark_step_begin()
