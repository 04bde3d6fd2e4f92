"""Training: the loop, its optimization, processes, checkpoints and log."""

from ortho_fx.models.training.loop import Result, train

__all__ = ["Result", "train"]
