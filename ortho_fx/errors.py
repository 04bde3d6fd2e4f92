"""The one error class: whatever a user can get wrong raises it, with what came and what is allowed."""

from __future__ import annotations


class OrthoFxError(ValueError):
    """Raised for every mistake that a user of ortho_fx can make; the message is one line."""
