"""Is there room on the disk for the next checkpoint?"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.trees import leaves

# Each value is an archive of its own, with an entry in the index.
_OVERHEAD = 2048


def require_space(directory: Path, needed: int) -> None:
    """Raises an OrthoFxError unless the disk of a directory has `needed` bytes free for the next checkpoint."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise OrthoFxError(f"cannot write to {directory}: {error.strerror}") from None
    if free < needed:
        raise OrthoFxError(
            f"the next checkpoint needs {_amount(needed)}, and the disk of {directory} has {_amount(free)} free: "
            "remove something there, or choose another --out"
        )


def size_of(state: Mapping[str, Any]) -> int:
    """Bytes that a checkpoint of this state takes, of all processes together."""
    # A sharded tensor has the number of elements of the whole.
    return sum(
        _OVERHEAD + (value.numel() * value.element_size() if isinstance(value, Tensor) else 0)
        for value in leaves(dict(state))
    )


def size_to_come(model: nn.Module, averaged: bool) -> int:
    """Bytes of the first checkpoint of a run: weights, the two moments of AdamW, and the average if there is one."""
    copies = 4 if averaged else 3
    return sum(_OVERHEAD * copies + tensor.numel() * tensor.element_size() * copies for tensor in model.parameters())


def _amount(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
