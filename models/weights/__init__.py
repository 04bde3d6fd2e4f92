"""Weights in files: ours with their description, and those of other libraries."""

from ortho_fx.models.weights.bundle import load_model, save_weights
from ortho_fx.models.weights.layouts import load_pretrained

__all__ = ["load_model", "load_pretrained", "save_weights"]
