"""The Trainer of transformers for models with expansions: a mixin of its class, and a callback."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.arguments import is_integer, is_number
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.modules.undecayed import learned_parameters
from ortho_fx.passes.vocabulary.sites import plain_name
from ortho_fx.recording import Recorder
from ortho_fx.rewriting.calibration import Calibration, calibrate_
from ortho_fx.sharded import whole


class ExpansionCallback(transformers.TrainerCallback):
    """Calibrates the expansions before training, logs how they move, and refuses an optimizer that spoils them.

    A callback sees the optimizer when it is made, so it cannot group the parameters: `ExpansionTrainerMixin` does.

    Args:
        calibrate_batches: on how many of the first training batches of each process `calibrate_` measures, before the
            first step; 0 keeps the values. A resumed run does not calibrate.
        log: whether the entries of the log with a loss get "expansions/<site>/change" for each site: by how much the
            parameter that moved most has moved since `train` began. Reports of callbacks before this one lack it.
        record: every how many steps `recorder` keeps the parameters, for `recorder.plot(file)`; 0 records nothing. A
            resumed run records from there on.

    Attributes:
        recorder: an `ortho_fx.Recorder` of the model; None before training, and without `record`.

    Raises:
        OrthoFxError: at the beginning of training, an optimizer that decays expansions or does not have them; or
            `calibrate_batches` or `record` that is no integer, zero or more.
    """

    def __init__(self, calibrate_batches: int = 0, log: bool = True, record: int = 0) -> None:
        for name, number in (("calibrate_batches", calibrate_batches), ("record", record)):
            if not is_integer(number) or number < 0:
                raise OrthoFxError(f"{name} must be an integer, zero or more; got {number!r}")
        self.record = record
        self.recorder: Recorder | None = None
        self.calibrate_batches, self.adds_to_log = calibrate_batches, log
        self.calibration: Calibration | None = None
        self._starts: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **keywords: Any
    ) -> None:
        _check_optimizer(model, optimizer)
        if self.calibrate_batches and state.global_step == 0:
            self.calibration = _calibrate(model, keywords["train_dataloader"], self.calibrate_batches)
        self._starts = _values(model)
        if self.record:
            self.recorder = Recorder(model, self.record, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if self.recorder is not None:
            self.recorder.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **keywords: Any) -> None:
        if self.adds_to_log and logs is not None and "loss" in logs:
            changes = self.changes(model)
            logs.update(changes)
            state.log_history[-1].update(changes)

    def changes(self, model: nn.Module) -> dict[str, float]:
        """The entries of the log; of sharded parameters every process has to call it."""
        return {
            f"expansions/{name}/change": float((value - self._starts[name]).abs().max())
            for name, value in _values(model).items()
            if name in self._starts
        }


class ExpansionTrainerMixin:
    """Trains expansions as they need it: `class OurTrainer(ExpansionTrainerMixin, Trainer)`.

    The optimizer that the Trainer makes does not decay expansions, whatever their shape.

    Args:
        expansion_lr: the learning rate of the expansions, which the schedule scales as every other;
            `args.learning_rate` when omitted.
        calibrate_batches: as in `ExpansionCallback`.
        log_expansions: as `log` of `ExpansionCallback`; here every report has it.
        record_expansions: as `record` of `ExpansionCallback`; `recorder` has it.

    Raises:
        OrthoFxError: a wrong argument; when the optimizer is made, a model without trainable expansions that is given
            `expansion_lr`, or an optimizer without them.
    """

    expansion_lr: float | None = None

    def __init__(
        self,
        *args: Any,
        expansion_lr: float | None = None,
        calibrate_batches: int = 0,
        log_expansions: bool = True,
        record_expansions: int = 0,
        **keywords: Any,
    ) -> None:
        if expansion_lr is not None:
            if not is_number(expansion_lr) or expansion_lr < 0:
                raise OrthoFxError(f"expansion_lr must be a number, zero or more; got {expansion_lr!r}")
            self.expansion_lr = expansion_lr
        self._expansions = ExpansionCallback(calibrate_batches, log=False, record=record_expansions)
        self._log_expansions = log_expansions
        super().__init__(*args, **keywords)
        self.add_callback(self._expansions)  # type: ignore[attr-defined]

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the expansions; None before training, and without `record_expansions`."""
        return self._expansions.recorder

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        ours = learned_parameters(model)
        names = {name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in ours}
        return [name for name in super().get_decay_parameter_names(model) if name not in names]  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **keywords: Any) -> Any:
        given = self.optimizer is not None  # type: ignore[attr-defined]
        optimizer = super().create_optimizer(*args, **keywords)  # type: ignore[misc]
        if not given:
            model = args[0] if args else keywords.get("model")
            _regroup(optimizer, self.model if model is None else model, self.expansion_lr)  # type: ignore[attr-defined]
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        if self._log_expansions and "loss" in logs:
            logs = {**logs, **self._expansions.changes(self.model)}  # type: ignore[attr-defined]
        super().log(logs, *args, **keywords)  # type: ignore[misc]


def _regroup(optimizer: Any, model: nn.Module, lr: float | None) -> None:
    """Gives the expansions in each group of an optimizer a group of their own, where decay or rate ask for it."""
    ours = learned_parameters(model)
    _refuse_pieces(model, optimizer, lr)
    groups = []
    found = False
    for group in optimizer.param_groups:
        own = [one for one in group["params"] if id(one) in ours]
        found |= bool(own)
        if not own or (lr is None and not group.get("weight_decay")):
            groups.append(group)
            continue
        others = [one for one in group["params"] if id(one) not in ours]
        if others:
            groups.append({**group, "params": others})
        decay = {"weight_decay": 0.0} if "weight_decay" in group else {}
        groups.append({**group, **decay, "params": own} | ({} if lr is None else {"lr": lr}))
    if lr is not None and not found:
        raise OrthoFxError(
            f"expansion_lr is {lr:g}, and {type(optimizer).__name__} has no parameters of expansions: call rewrite_ "
            "before the trainer is made, and choose an optimizer with parameter groups"
        )
    optimizer.param_groups[:] = groups


def _refuse_pieces(model: nn.Module, optimizer: Any, lr: float | None = None) -> None:
    pieces = {id(one) for name, one in model.named_parameters() if name.endswith("_flat_param")}
    if not pieces or not any(isinstance(module, ExpansionActivation) for module in model.modules()):
        return
    for group in optimizer.param_groups:
        if (lr is not None or group.get("weight_decay")) and not pieces.isdisjoint(map(id, group["params"])):
            raise OrthoFxError(
                "FullyShardedDataParallel keeps weights and expansions in one parameter, which has one rate and one "
                "decay: set fsdp_config use_orig_params to true, or fsdp_version to 2"
            )


def _check_optimizer(model: nn.Module, optimizer: Any) -> None:
    learned = learned_parameters(model)
    ours = {id(one) for one in model.parameters() if id(one) in learned and one.requires_grad}
    groups = getattr(optimizer, "param_groups", None)
    if groups:
        _refuse_pieces(model, optimizer)
    if not ours or not groups:
        return
    held = {id(one) for group in groups for one in group["params"]}
    decayed = {id(one) for group in groups if group.get("weight_decay") for one in group["params"]}
    parameters = {id(one) for one in model.parameters()}
    advice = (
        "use ExpansionTrainerMixin, or pass optimizers=(torch.optim.AdamW(ortho_fx.param_groups(model, ...)), None)"
    )
    if ours & decayed:
        raise OrthoFxError(f"the optimizer decays {len(ours & decayed)} parameters of expansions: {advice}")
    if held & parameters and not ours <= held:
        raise OrthoFxError(f"the optimizer lacks {len(ours - held)} parameters of expansions: {advice}")


def _calibrate(model: nn.Module, loader: Any, number: int) -> Calibration:
    # The loader of accelerate would count these batches as trained on. The random state is that of a run without them.
    with torch.random.fork_rng():
        return calibrate_(model, getattr(loader, "base_dataloader", loader), limit=number)


def _values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of each expansion that learns, in one vector."""
    return {
        plain_name(name): torch.cat([whole(one).float().cpu().flatten() for one in module.parameters()])
        for name, module in model.named_modules()
        if isinstance(module, ExpansionActivation)
    }
