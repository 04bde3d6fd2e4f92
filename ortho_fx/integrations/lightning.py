"""Lightning: a callback that calibrates, watches and describes the expansions of a `LightningModule`."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.batches import Batch
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.vocabulary.expansions import CONFIG_KEY
from ortho_fx.recording import Recorder
from ortho_fx.rewriting.calibration import Calibration, calibrate_
from ortho_fx.rewriting.sources import expansion_config
from ortho_fx.sharded import whole

# The library has two names, and a trainer of either takes a callback of the other.
_NAME = "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"
try:
    Callback: Any = importlib.import_module(_NAME).Callback
except ImportError as error:
    raise OrthoFxError(f"Lightning is not installed: pip install lightning; {error}") from None


def first_of(batch: Any) -> Any:
    """The input in a batch of (input, target) pairs; any other batch as it is."""
    return batch[0] if isinstance(batch, tuple | list) else batch


class Expansions(Callback):
    """Calibrates the expansions of a module, refuses optimizers that miss them, and logs how far they have moved.

    The module rewrites itself, in its `__init__` or in `configure_model`, so that `load_from_checkpoint` makes the same
    expansions again. Checkpoints have `expansion_config(module)` under the key "ortho_fx".

    Args:
        calibrate: on how many batches of the training data to run the module before its first step, for
            `ortho_fx.calibrate_`; 0 leaves the expansions as they are. A run that goes on from a checkpoint is not
            calibrated again.
        inputs: what of a batch the module is called with: a tensor, a tuple of positional arguments or a map of keyword
            arguments. By default the first of a pair.
        log: whether to log, after each epoch, "expansions/<site>": |p - p0| / |p0| for the parameters p of a site, all
            in one vector, and p0, their values at the first step.
        record: every how many steps `recorder` keeps the parameters, for `recorder.plot(file)`; 0 records nothing.

    Raises:
        OrthoFxError: when the training starts, a module without expansions, or an optimizer that misses some.

    Attributes:
        calibration: what was measured; None before.
        recorder: an `ortho_fx.Recorder` of the module, also over a resumption; None before, and without `record`.
    """

    def __init__(
        self, calibrate: int = 0, *, inputs: Callable[[Any], Batch] = first_of, log: bool = True, record: int = 0
    ) -> None:
        super().__init__()
        self.batches, self.inputs, self.logs = calibrate, inputs, log
        self.calibration: Calibration | None = None
        self._starts: dict[str, Tensor] = {}
        self.record = record
        self.recorder: Recorder | None = None
        self._recorded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not _learnable(pl_module):
            raise OrthoFxError(
                f"{type(pl_module).__name__} holds no expansion: call rewrite_ in its __init__ or in configure_model"
            )
        _check_optimizers(pl_module, trainer.optimizers)
        if self._starts.keys() != _learnable(pl_module).keys():  # otherwise the run goes on
            if self.batches and trainer.ckpt_path is None:
                self._calibrate(trainer, pl_module)
            self._starts = {name: _values(module) for name, module in _learnable(pl_module).items()}
        if self.record:
            self.recorder = Recorder(pl_module, self.record, trainer.global_step)
            if self._recorded is not None:
                self.recorder.load_state_dict(self._recorded)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        if self.recorder is not None:
            self.recorder.step(trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.logs:
            pl_module.log_dict({f"expansions/{name}": change for name, change in self.changes(pl_module).items()})

    def changes(self, module: nn.Module) -> dict[str, float]:
        """How far the parameters of each site have moved since the first step, relative to their start."""
        moved = {name: (_values(one), self._starts[name]) for name, one in _learnable(module).items()}
        return {name: float((now - start).norm() / start.norm()) for name, (now, start) in moved.items()}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = expansion_config(pl_module)

    def state_dict(self) -> dict[str, Any]:
        recorded = {} if self.recorder is None else {"recorded": self.recorder.state_dict()}
        return {"starts": dict(self._starts), **recorded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._starts = dict(state_dict["starts"])
        self._recorded = state_dict.get("recorded")

    def _calibrate(self, trainer: Any, module: Any) -> None:
        def batches() -> Iterator[Batch]:
            for batch in islice(iter(trainer.train_dataloader), self.batches):
                converted = trainer.precision_plugin.convert_input(batch)
                yield self.inputs(trainer.strategy.batch_to_device(converted, dataloader_idx=0))

        # The training sees the batches and draws the numbers that it would without a calibration.
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            self.calibration = calibrate_(module, batches())


def _learnable(module: nn.Module) -> dict[str, ExpansionActivation]:
    return {name: one for name, one in module.named_modules() if isinstance(one, ExpansionActivation)}


def _values(module: ExpansionActivation) -> Tensor:
    return torch.cat(
        [whole(parameter).detach().flatten().to("cpu", torch.float64) for parameter in module.parameters()]
    )


def _check_optimizers(module: nn.Module, optimizers: list[Any]) -> None:
    """Refuses optimizers that miss expansions, and warns of those that decay them."""
    known = [one for one in optimizers if isinstance(one, Optimizer)]
    if not known or len(known) < len(optimizers):
        return  # of a strategy whose optimizers do not show their parameters
    decays = {
        id(parameter): group.get("weight_decay", 0)
        for optimizer in known
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    learned = [
        (name, parameter)
        for name, one in _learnable(module).items()
        for parameter in one.parameters()
        if parameter.requires_grad
    ]
    missed = dict.fromkeys(name for name, parameter in learned if id(parameter) not in decays)
    if missed:
        raise OrthoFxError(
            f"the optimizer misses the expansions at {', '.join(missed)}, which would not learn: call rewrite_ before "
            "configure_optimizers, and make the optimizer from ortho_fx.param_groups(self, ...)"
        )
    decayed = dict.fromkeys(name for name, parameter in learned if decays[id(parameter)])
    if decayed:
        warnings.warn(
            f"ortho_fx: the optimizer decays the expansions at {', '.join(decayed)}, which pulls them towards the zero "
            "function: make it from ortho_fx.param_groups(self, ...)",
            stacklevel=2,
        )
