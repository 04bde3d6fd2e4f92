"""The error classes for mistakes of the user; a message states the value and what is allowed."""

from __future__ import annotations


class OrthoFxError(ValueError):
    """A mistake of the user; a `ValueError` whose message is one line."""


class OperandError(OrthoFxError, RuntimeError):
    """Raised at a call for tensors that cannot be computed with together: other devices, dtypes or distributions.

    It is a RuntimeError too, as what PyTorch's own operators raise then.
    """


class StateDictError(OrthoFxError, RuntimeError):
    """A state dict that does not fit the model; a RuntimeError as well, which `load_state_dict` raises."""


class Terminated(SystemExit):
    """SIGTERM ended a run, of which `kept` says what is left. The exit code is 143, as after any SIGTERM."""

    def __init__(self, kept: str = "") -> None:
        super().__init__(143)
        self.kept = kept
