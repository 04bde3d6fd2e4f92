"""`SiteMonitor`: statistics of each expansion's inputs during a run, and how far its parameters have moved."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.models.weights.expansions import SiteInputs, write_expansions
from ortho_fx.modes import evaluating
from ortho_fx.numerics.moments import Array
from ortho_fx.sharded import whole
from ortho_fx.watch import watching

# For the histogram of a site's inputs: samples kept of each call, number of bins, share of samples outside the bins.
_SAMPLES, _BINS, _OUTLIERS = 16384, 100, 2e-4

# Numbers of an expansion that are recorded at each measurement.
_MOST_RECORDED = 4096

Held = dict[str, dict[str, Tensor]]


class SiteRow(TypedDict):
    """A measurement of one expansion.

    `mean`, `std` (of the population), `low` (smallest) and `high` (largest) are of its inputs; `output_rms` is the root
    mean square of its outputs. `drift` is ||theta - theta_0|| / ||theta_0|| over its learnable parameters; theta_0 are
    those at the run's start. `reach` is the largest |x - mean_0| / std_0, with the mean and the standard deviation of
    the first measurement.
    """

    step: int
    site: str
    mean: float
    std: float
    low: float
    high: float
    output_rms: float
    drift: float
    reach: float


class SiteMonitor:
    """Measures a model's expansions. It must be made before the first step, from which the drift counts.

    With sharded parameters (FSDP2) every process has to make it and to call `measure`, which communicate; other methods
    do not. Statistics are of the process' own batch.

    Args:
        model: a model, with or without expansions, bare or wrapped by DistributedDataParallel or torch.compile.

    Attributes:
        rows: every measurement so far, including those of `resume`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sites = expansions(model)
        self._start = self._now = self._parameters([])[0]
        self._step: int | None = None
        self._samples: dict[str, Array] = {}
        self.rows: list[Mapping[str, Any]] = []

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the earlier measurements of a resumed run, so that `reach` still counts from the run's start."""
        self.rows = list(rows)

    def measure(self, forward: Callable[[], object], step: int) -> list[SiteRow]:
        """Runs the model once and returns a row for each expansion that was called, in the model's order.

        The model runs without gradients, in eval mode and uncompiled, since compiled code would not call the hooks. The
        model and PyTorch's generators are unchanged afterwards.

        Args:
            forward: calls the model on the batch to measure with.
            step: number of steps done.
        """
        calls: dict[str, list[_Call]] = defaultdict(list)

        def see(name: str, x: Tensor, y: Tensor) -> None:
            calls[name].append(_Call(x, y))

        with probing(self._model), evaluating(self._model), watching(self._sites, see):
            forward()
        found = [call for seen in calls.values() for call in seen]
        self._now, values = self._parameters([tensor for call in found for tensor in (call.statistics, call.sample)])
        host = dict(zip(found, zip(values[::2], values[1::2], strict=True), strict=True))
        self._step, self._samples, rows = step, {}, []
        first = first_rows(self.rows)
        for name, seen in calls.items():
            if not seen:
                continue
            mean, std, low, high, rms = _merged([(call, host[call][0]) for call in seen])
            start = first.get(name, {"mean": mean, "std": std})
            row: SiteRow = {
                "step": step,
                "site": name,
                "mean": mean,
                "std": std,
                "low": low,
                "high": high,
                "output_rms": rms,
                "drift": self._drift(name),
                "reach": reach(low, high, start["mean"], start["std"]),
            }
            rows.append(row)
            self._samples[name] = np.concatenate([host[call][1].double().numpy() for call in seen])
        self.rows += rows
        return rows

    def coefficients(self, step: int) -> list[dict[str, Any]]:
        """The parameters of the expansions as of the last measurement, a row for each, to nine significant digits.

        A row has "step", "site" and "parameters", which maps names to nested lists. Expansions of more than 4,096
        numbers have none, so that the rows of a run stay small.
        """
        rows = []
        for name, site in self._sites.items():
            learned = {key: self._now[name][key] for key, _ in site.named_parameters()}
            if sum(value.numel() for value in learned.values()) <= _MOST_RECORDED:
                parameters = {key: _rounded(value.tolist()) for key, value in learned.items()}
                rows.append({"step": step, "site": name, "parameters": parameters})
        return rows

    def save_expansions(self, path: Path, step: int) -> None:
        """Writes the expansions as of the last measurement, which must be of `step`; without one, those of the start.

        `load_expansions` reads the file. A single process can call it, even with sharded parameters.

        Raises:
            OrthoFxError: a disk that cannot be written, or no safetensors.
        """
        assert self._step in (None, step), f"the last measurement is of step {self._step}, not of {step}"
        last = {row["site"]: row for row in self.rows if row["step"] == step}
        inputs = {name: _inputs(last[name], sample) for name, sample in self._samples.items()}
        write_expansions(path, step, self._sites, self._now, inputs)

    def _parameters(self, others: Sequence[Tensor]) -> tuple[Held, list[Tensor]]:
        """CPU copies of the expansions' parameters and buffers, unsharded, and of `others`, in one transfer."""
        with torch.no_grad():
            held = {
                name: {key: whole(value) for key, value in (*site.named_parameters(), *site.named_buffers())}
                for name, site in self._sites.items()
            }
            copies = iter(_to_host([*(v for values in held.values() for v in values.values()), *others]))
        return {name: {key: next(copies) for key in values} for name, values in held.items()}, list(copies)

    def _drift(self, name: str) -> float:
        learned = [key for key, _ in self._sites[name].named_parameters()]
        start, now = (
            torch.cat([values[name][key].double().flatten() for key in learned]) for values in (self._start, self._now)
        )
        return ratio((now - start).norm().item(), start.norm().item())


class _Call:
    """The inputs and outputs of one call of an expansion: five numbers on the device, and a sample of the inputs."""

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self.count = inputs.numel()
        flat = inputs.detach().reshape(-1)
        self.sample = flat[:: _stride(self.count)].float()
        # Reductions of half precision tensors would round their results to half precision.
        wide = flat if flat.dtype == torch.float64 else flat.float()
        low, high = torch.aminmax(wide)
        mean = wide.mean()
        # Norms are an order of magnitude faster than torch.var on a CPU.
        variance, square = (
            torch.linalg.vector_norm(values, dtype=wide.dtype).square() / self.count
            for values in (wide - mean, outputs.detach())
        )
        self.statistics = torch.stack([mean, variance, low, high, square])


def expansions(model: nn.Module) -> dict[str, ExpansionActivation]:
    """The expansions of a model by the names that they have in the bare model, without wrappers."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ExpansionActivation)}
    return {plain_name(model, name): module for name, module in found.items()}


def plain_name(model: nn.Module, name: str) -> str:
    """The name that a module has in the bare model, without wrappers."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        name = name.removeprefix("module.")
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def first_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The first measurement of each site."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        found.setdefault(row["site"], row)
    return found


def reach(low: float, high: float, mean: float, std: float) -> float:
    """The largest |x - mean| / std of numbers from `low` to `high`."""
    return ratio(max(high - mean, mean - low), std)


def ratio(value: float, unit: float) -> float:
    """value / unit; if the unit is 0, 0 for a value of 0 and infinity for others."""
    if unit:
        return value / unit
    return value if value == 0 or math.isnan(value) else math.inf


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Runs of the model in the block leave no trace: no gradients, no change of generators, nothing compiled."""
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    # Compiled code does not call hooks that were added after compilation. Importing the compiler takes a second, so
    # this is skipped if nothing has imported it.
    compiled = "torch._dynamo" in sys.modules
    eager: Any = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with torch.no_grad(), torch.random.fork_rng(list(cuda)), eager:
        yield


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU, in one transfer from each device; half precision becomes float32."""
    copies: list[Tensor] = [torch.empty(0)] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([torch.empty(0, device=device), *(tensors[place].flatten() for place in places)]).cpu()
        parts = flat.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            # A clone, so that a small part does not keep the whole transfer in memory.
            copies[place] = part.reshape(tensors[place].shape).clone()
    return copies


def _stride(count: int) -> int:
    """A stride that takes about `_SAMPLES` of `count` numbers; coprime to the count, so that it takes every channel."""
    stride = max(count // _SAMPLES, 1)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def _merged(calls: Sequence[tuple[_Call, Tensor]]) -> tuple[float, float, float, float, float]:
    """Mean, standard deviation, low and high of the inputs, and root mean square of the outputs, over all calls."""
    count = np.array([call.count for call, _ in calls], dtype=np.float64)
    mean, variance, low, high, square = np.stack([values.double().numpy() for _, values in calls], axis=1)
    weight = count / count.sum()
    middle = float(weight @ mean)
    spread = float(weight @ (variance + (mean - middle) ** 2))
    return middle, math.sqrt(spread), float(low.min()), float(high.max()), math.sqrt(weight @ square)


def _rounded(values: Any) -> Any:
    """Numbers in nested lists as JSON has them: nine digits tell any two numbers in float32 apart, and NaN is null."""
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.9g}") if math.isfinite(values) else None


def _inputs(row: Mapping[str, Any], sample: Array) -> SiteInputs:
    finite = sample[np.isfinite(sample)]
    moments = (row["mean"], row["std"], row["low"], row["high"])
    low, high = np.quantile(finite, [_OUTLIERS, 1 - _OUTLIERS]).tolist() if len(finite) else (0.0, 0.0)
    if not low < high:
        return SiteInputs(*moments)
    counts, _ = np.histogram(finite, _BINS, (low, high))
    return SiteInputs(*moments, tuple(counts.tolist()), (low, high), len(finite))
