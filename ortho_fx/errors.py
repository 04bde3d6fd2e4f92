"""The error classes: whatever a user can get wrong raises one, with what came and what is allowed."""

from __future__ import annotations


class OrthoFxError(ValueError):
    """Raised for every mistake that a user of ortho_fx can make; the message is one line."""


class OperandError(OrthoFxError, RuntimeError):
    """Raised at a call for tensors that cannot be computed with together: other devices, dtypes or distributions.

    It is a RuntimeError too, as what PyTorch's own operators raise then.
    """
