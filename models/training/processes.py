"""The processes of a training run: a single one, or a process group of torchrun.

A step is defined on the global batch. Processes and micro-batches split its rows into equal parts, and gradients are
averaged over the parts. So any number of processes takes the same step, up to rounding.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import reason

# What a launcher sets for each process.
_NUMBERS = ("RANK", "WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process among `count`; the process of `rank` 0 writes files and prints."""

    rank: int
    count: int
    device: torch.device

    def rows(self, size: int, accumulate: int) -> list[slice]:
        """The rows of a global batch of `size` that are this process' micro-batches.

        Raises:
            OrthoFxError: `size` is not a multiple of the number of parts.
        """
        parts = self.count * accumulate
        if size % parts:
            raise OrthoFxError(
                f"batch_size must divide into {self.count} process{'es' if self.count > 1 else ''} of {accumulate} "
                f"micro-batch{'es' if accumulate > 1 else ''} each; got {size}"
            )
        part = size // parts
        starts = [(micro * self.count + self.rank) * part for micro in range(accumulate)]
        return [slice(start, start + part) for start in starts]

    def share(self, model: nn.Module, block: type[nn.Module], parallel: str) -> nn.Module:
        """The model that the processes train: itself, wrapped by DDP, or sharded in place by FSDP2, block by block."""
        if self.count == 1:
            return model
        if parallel == "ddp":
            devices = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        for module in model.modules():
            if isinstance(module, block):
                fully_shard(module)
        fully_shard(model)
        return model

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Waits until every process has called it."""
        if self.count > 1:
            dist.barrier()


def launched() -> bool:
    """Whether a launcher such as torchrun started this process among others, as its environment says.

    Raises:
        OrthoFxError: the environment says so only in part.
    """
    given = {name: os.environ[name] for name in _NUMBERS if os.environ.get(name)}
    if not given and not dist.is_torchelastic_launched():
        return False
    missing = [name for name in (*_NUMBERS, *_ADDRESS) if not os.environ.get(name)]
    if missing:
        names = ", ".join(given) or "TORCHELASTIC_RUN_ID"
        raise OrthoFxError(
            f"the environment has {names}, and not {', '.join(missing)}: start several processes with torchrun, or "
            f"unset {names} for a single one"
        )
    for name in (*_NUMBERS, "MASTER_PORT"):
        if not os.environ[name].isascii() or not os.environ[name].isdecimal():
            raise OrthoFxError(f"{name} in the environment must be a whole number; got {os.environ[name]!r}")
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise OrthoFxError(
            f"RANK in the environment must be below WORLD_SIZE, {given['WORLD_SIZE']}; got {given['RANK']}"
        )
    return True


def peer_lost(error: RuntimeError, processes: Processes) -> bool:
    """Whether an error says that another process of the run does not answer any more."""
    return processes.count > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error))


@contextlib.contextmanager
def join(device: str) -> Iterator[Processes]:
    """Joins the processes that torchrun started, and leaves them at the end; without torchrun, a single process.

    Args:
        device: "cpu" or "cuda"; under torchrun each process takes the GPU of its local rank.

    Raises:
        OrthoFxError: an environment that torchrun has not set whole, processes that do not find each other, or one
            that is gone while the others wait for it.
    """
    if not launched() and not dist.is_initialized():
        yield Processes(0, 1, torch.device(device))
        return
    owned = not dist.is_initialized()
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if owned:
        try:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise OrthoFxError(f"the processes of this run do not find each other: {reason(error)}") from None
    processes = Processes(dist.get_rank(), dist.get_world_size(), chosen)
    try:
        yield processes
    except RuntimeError as error:
        if not peer_lost(error, processes):
            raise
        raise OrthoFxError(f"process {processes.rank} has lost another process of the run") from None
    finally:
        if owned:
            dist.destroy_process_group()


def synchronise(model: nn.Module, wanted: bool) -> None:
    """Sets whether the next backward pass averages gradients over the processes; only the last micro-batch needs it."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
