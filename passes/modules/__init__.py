"""Finds and replaces activations that are child modules, or functions kept as attributes."""
