"""Several activations trained alike, and what came of it."""

from ortho_fx.models.compare.runs import compare

__all__ = ["compare"]
