"""What installed packages add: bases and activations that their entry points register."""

from __future__ import annotations

from ortho_fx.cli.completion import PLUGINS
from ortho_fx.errors import OrthoFxError


def load_plugins() -> None:
    """Imports the modules that installed packages name in our entry points: they register bases and activations."""
    import importlib.metadata  # here, since it takes a while

    for group in PLUGINS:
        for entry in importlib.metadata.entry_points(group=group):
            try:
                entry.load()
            except Exception as error:
                raise OrthoFxError(f"the entry point {entry.name} = {entry.value} of {group}: {error}") from error
