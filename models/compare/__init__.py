"""Trains several activations alike and compares the results."""

from ortho_fx.models.compare.runs import compare

__all__ = ["compare"]
