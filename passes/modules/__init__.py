"""Activations that are child modules, or functions kept as attributes: exchanged."""
