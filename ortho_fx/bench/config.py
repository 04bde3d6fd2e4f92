"""`BenchConfig`: the settings of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ortho_fx.bench.allocation import buffers_are_reused
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.memory import require_memory
from ortho_fx.models import convnext, gpt2
from ortho_fx.toolchain import require_cpp_compiler

ROW = 3072  # GPT-2's: four times its width of 768
DTYPES = ("float32", "bfloat16", "float16")
TRAINED: dict[str, Mapping[str, Any]] = {"gpt2": gpt2.PRESETS, "convnext": convnext.PRESETS}
SUBJECTS = ("activation", "mlp", *TRAINED)
MODES = ("default", "reduce-overhead", "max-autotune")
DEFAULT_EXPANSIONS = (
    ExpansionConfig("hermite", 3),
    ExpansionConfig("hermite", 8),
    ExpansionConfig("hermite", 16),
    ExpansionConfig("tropical", 5),
    ExpansionConfig("tropical_rational", 6),
    ExpansionConfig("fourier", 5),
)


@dataclass(frozen=True)
class BenchConfig:
    """The settings of a benchmark: what is measured, and how.

    Args:
        what: "activation" (alone), "mlp" (Linear 768 -> 3072, activation, Linear 3072 -> 768), "gpt2" or "convnext" (a
            training step of the model: forward, backward, AdamW).
        expansions: the expansions that are compared with GELU.
        device: "cpu" or "cuda", with or without an index.
        dtype: of inputs, parameters and gradients; in a training step, that of autocast.
        elements: size of the activation's input, rounded down to rows of 3072; gpt2 and convnext ignore it.
        size: preset of gpt2 or convnext.
        batch_size: sequences or images per training step (default: by model and preset).
        threads: CPU threads (default: all that PyTorch uses).
        rounds: how often each candidate is measured (default: 20 times, and training steps 10 times).
        eager: measure without torch.compile.
        fresh: allocate new memory for outputs at each call (see `ortho_fx.bench.measure`).
        mode: the mode of torch.compile, on CUDA.
        peers: also measure a rational function, and torchortho if it is installed; in a training step instead the tanh
            form of GELU, SiLU and squared ReLU.
        compile_time: measure how long a model of twelve blocks takes to compile (`compile_seconds`).

    Raises:
        OrthoFxError: a setting that is unknown, out of range or not available on this machine.
    """

    what: str = "activation"
    expansions: tuple[ExpansionConfig, ...] = DEFAULT_EXPANSIONS
    device: str = "cpu"
    dtype: str = "float32"
    elements: int = 4096 * ROW
    size: str = "tiny"
    batch_size: int | None = None
    threads: int | None = None
    rounds: int | None = None
    eager: bool = False
    fresh: bool = False
    mode: str = "default"
    peers: bool = True
    compile_time: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("what", SUBJECTS), ("dtype", DTYPES), ("mode", MODES)):
            if getattr(self, name) not in allowed:
                raise OrthoFxError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        presets = list(TRAINED[self.what] if self.trains else ("tiny",))
        if self.size not in presets:
            raise OrthoFxError(f"size of {self.what} must be one of {', '.join(presets)}; got {self.size!r}")
        for name, least in (("elements", ROW), ("batch_size", 1), ("threads", 1), ("rounds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OrthoFxError(f"{name} must be {least} or more; got {value}")
        if self.rounds is None:
            object.__setattr__(self, "rounds", 10 if self.trains else 20)
        if not self.expansions:
            raise OrthoFxError("there is no expansion to measure")
        # Input, output, and the gradients of both.
        require_memory(4 * self.tensor_bytes, f"elements is {self.elements}")
        if self.device_type not in ("cpu", "cuda"):
            raise OrthoFxError(f"device must be cpu or cuda; got {self.device!r}")
        try:
            torch.empty(0, device=self.device)
        except Exception:  # PyTorch raises errors of many kinds for devices that it knows by name alone
            raise OrthoFxError(f"device {self.device!r} is not available on this machine") from None
        if self.mode != "default" and (self.device_type == "cpu" or self.what == "activation" or self.eager):
            raise OrthoFxError(f"mode {self.mode!r} is for compiled mlp, gpt2 and convnext on cuda")
        if self.compile_time and self.eager:
            raise OrthoFxError("compile_time does not go with eager")
        if self.device_type == "cpu" and not self.eager:
            require_cpp_compiler("measure eager mode: --eager")
        if self.fresh and self.device_type != "cpu":
            raise OrthoFxError("fresh is about malloc on a cpu: PyTorch's allocator for cuda reuses its buffers")
        if self.fresh and buffers_are_reused():
            raise OrthoFxError("fresh allocations need a new process: this one already reuses its buffers")

    @property
    def trains(self) -> bool:
        """Whether a round is a training step."""
        return self.what in TRAINED

    @property
    def device_type(self) -> str:
        return self.device.split(":")[0]

    @property
    def tensor_bytes(self) -> int:
        """Size of the activation's input."""
        return self.elements // ROW * ROW * getattr(torch, self.dtype).itemsize
