"""The only error class for mistakes of the user; a message states the value and what is allowed."""

from __future__ import annotations


class OrthoFxError(ValueError):
    """A mistake of the user; a `ValueError` whose message is one line."""
