"""The optimizer step of a run: losses of the micro-batches, gradients over all processes, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.custom import Loss
from ortho_fx.models.data.sources import Batch
from ortho_fx.models.recipe import DTYPES, TrainConfig, task_of
from ortho_fx.models.training.processes import Processes, synchronise
from ortho_fx.rewriting.optimizer import param_groups

# The group of `param_groups` with what expansions learn.
EXPANSIONS = "expansions"


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
        learned = [parameter for group in groups if group["name"] == EXPANSIONS for parameter in group["params"]]
        weights = [parameter for group in groups if group["name"] != EXPANSIONS for parameter in group["params"]]
        self.clipped = [own for own in (weights, learned) if own]
        self.optimizers = _optimizers(model, groups, config)
        self.rates = [group["lr"] for group in self.groups]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers; loading a state makes new ones."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, step: int, parts: Sequence[Batch]) -> Step:
        """Takes step number `step` (the first is 0) on this process' micro-batches."""
        config = self.config
        scale = learning_rate_scale(step, self.steps, config.warmup, config.min_lr)
        floor = config.min_lr if config.expansion_min_lr is None else config.expansion_min_lr
        of_expansions = learning_rate_scale(step, self.steps, config.warmup, floor)
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * (of_expansions if group["name"] == EXPANSIONS else scale)
        # Dropout depends on seed, step and rank alone, so a checkpoint needs no state of generators.
        torch.manual_seed(int(np.random.SeedSequence((config.seed, step, self.processes.rank)).generate_state(1)[0]))
        self.zero_grad()
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
            for optimizer in self.optimizers:
                optimizer.step()
        return Step(loss_value, norm, self.lr * scale, finite)

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

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


def _optimizers(
    model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig
) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers of a run. Expansions learn by AdamW, whatever the rest does, and so does what Muon is not for."""
    betas = (0.9, config.beta2)
    if config.optimizer == "adamw":
        return (torch.optim.AdamW(groups, betas=betas, fused=True),)
    expansions = [group for group in groups if group["name"] == EXPANSIONS]
    rest = [group for group in groups if group["name"] != EXPANSIONS]
    if config.optimizer == "adam":
        first: torch.optim.Optimizer = torch.optim.Adam(rest, betas=betas, fused=True)
        second = expansions
    else:
        hidden = hidden_matrices(model)
        own = [p for group in rest if group["name"] == "decay" for p in group["params"] if id(p) in hidden]
        if not own:
            raise OrthoFxError(f"muon is for matrices of hidden linear layers, and {config.model} has none: use adamw")
        # Its steps are scaled to the size of AdamW's, so that one learning rate is for all.
        assert config.lr is not None
        group = {"name": "hidden", "params": own, "lr": config.lr, "weight_decay": config.weight_decay}
        first = torch.optim.Muon([group], adjust_lr_fn="match_rms_adamw")
        others = [{**group, "params": [p for p in group["params"] if id(p) not in hidden]} for group in rest]
        second = [group for group in (*others, *expansions) if group["params"]]
    return (first, torch.optim.AdamW(second, betas=betas, fused=True)) if second else (first,)


def hidden_matrices(model: nn.Module) -> set[int]:
    """The ids of the weights that Muon is for: of every `nn.Linear` but the last, and of none that an embedding shares.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {id(weight) for weight in linear[:-1]} - embeddings - {id(weight) for weight in linear[-1:]}


def learning_rate_scale(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Linear from 1 / warmup to 1, then a cosine from 1 to `floor` at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * progress))
