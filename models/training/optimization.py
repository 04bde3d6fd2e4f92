"""The optimizer step of a run: losses of the micro-batches, gradients over all processes, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ortho_fx.models.custom import Loss
from ortho_fx.models.data.sources import Batch
from ortho_fx.models.recipe import DTYPES, TrainConfig, task_of
from ortho_fx.models.training.processes import Processes, synchronise
from ortho_fx.rewriting.optimizer import param_groups


@dataclass(frozen=True)
class Step:
    """The result of a step: loss over the global batch, norm of the gradient before clipping, and learning rate.

    `finite` is False if the step was skipped because its loss or gradient is not finite.
    """

    loss: float
    gradient_norm: float
    lr: float
    finite: bool


class Optimization:
    """Takes the steps of a run.

    Gradients of weights and of expansions are clipped separately. The coefficient of He_8 / 8! has a gradient in the
    hundreds at an outlier; clipped together, it would scale down the gradients of the weights.

    Args:
        model: the model on its device; the result of `processes.share` is trained.
        loss: the mean loss of a batch (None: the cross entropy of the model's logits).
    """

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes, loss: Loss | None = None) -> None:
        assert config.steps is not None
        assert config.lr is not None
        self.config, self.processes, self.loss = config, processes, loss
        self.steps, self.lr = config.steps, config.lr
        backend = "inductor" if config.expansion is None else "ortho_fx"
        block = task_of(config.model).block
        sharded = processes.count > 1 and config.parallel == "fsdp"
        if config.compile and sharded:
            # FSDP2 gathers parameters block by block, so only single blocks can be compiled.
            for module in model.modules():
                if isinstance(module, block):
                    module.compile(backend=backend)
        self.shared = processes.share(model, block, config.parallel)
        whole = config.compile and not sharded
        self.losses = torch.compile(self._losses, backend=backend) if whole else self._losses
        groups = param_groups(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            expansion_lr=config.expansion_lr,
            expansion_decay=config.expansion_decay,
        )
        self.rates = [group["lr"] for group in groups]
        named = {group["name"]: group["params"] for group in groups}
        weights = [*named.get("decay", []), *named.get("no_decay", [])]
        self.clipped = [own for own in (weights, named.get("expansions", [])) if own]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=True)

    def step(self, step: int, parts: Sequence[Batch]) -> Step:
        """Takes step number `step` (the first is 0) on this process' micro-batches."""
        config = self.config
        scale = learning_rate_scale(step, self.steps, config.warmup, config.min_lr)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        # Dropout depends on seed, step and rank alone, so a checkpoint needs no state of generators.
        torch.manual_seed(int(np.random.SeedSequence((config.seed, step, self.processes.rank)).generate_state(1)[0]))
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.processes.device)
        for number, (inputs, targets) in enumerate(parts, 1):
            synchronise(self.shared, number == len(parts))
            loss = self.losses(inputs, targets) / len(parts)
            loss.backward()
            total += loss.detach()
        loss_value = (self.processes.total(total) / self.processes.count).item()
        norms = [nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]) for own in self.clipped]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        norm = torch.stack(norms).norm().item()
        finite = math.isfinite(loss_value) and math.isfinite(norm)
        if finite:
            for own, own_norm in zip(self.clipped, norms, strict=True):
                nn.utils.clip_grads_with_norm_(own, config.clip, own_norm)
            self.optimizer.step()
        return Step(loss_value, norm, self.lr * scale, finite)

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """For a batch in eval mode: sum of the losses in nats, number of right answers, number of targets."""
        with torch.no_grad():
            return self.losses(inputs, targets)

    def logits(self, inputs: Tensor) -> Tensor:
        """The output of the uncompiled model in the run's precision."""
        device, dtype = self.processes.device.type, self.config.dtype
        with torch.autocast(device, DTYPES[dtype], enabled=dtype != "float32"):
            return self.shared(inputs)

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.loss is not None:
            device, dtype = self.processes.device.type, self.config.dtype
            with torch.autocast(device, DTYPES[dtype], enabled=dtype != "float32"):
                loss = self.loss(self.shared, (inputs, targets)).float()
            # A validation counts rows, and knows no right answers.
            rows = loss.new_tensor(float(len(inputs)))
            return loss if self.shared.training else torch.stack([loss * rows, torch.zeros_like(rows), rows])
        logits = self.logits(inputs).flatten(0, -2)
        if self.shared.training:
            targets = targets if targets.is_floating_point() else targets.flatten()
            return F.cross_entropy(logits.float(), targets, label_smoothing=self.config.label_smoothing)
        targets = targets.flatten()
        # Filler in the last batch has the target -100: cross_entropy ignores it, and no answer equals it.
        return torch.stack(
            [
                F.cross_entropy(logits.float(), targets, reduction="sum"),
                (logits.argmax(-1) == targets).sum().float(),
                (targets >= 0).sum().float(),
            ]
        )


def learning_rate_scale(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Linear from 1 / warmup to 1, then a cosine from 1 to `floor` at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * progress))
