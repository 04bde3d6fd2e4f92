"""`save_expansions`: a file with the expansions of a model and nothing else, a few kilobytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import distributed, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file
from ortho_fx.passes.vocabulary.expansions import CONFIG_KEY
from ortho_fx.passes.vocabulary.sites import plain_name
from ortho_fx.rewriting.sources import expansion_config, unwrapped
from ortho_fx.sharded import is_distributed, whole
from ortho_fx.tensor_files import safetensors_library, with_digest


@dataclass(frozen=True)
class ExpansionsFile:
    """A file that `save_expansions` wrote; `print(file)` is a line.

    Attributes:
        path: the file.
        expansions: how many expansions it holds.
        numbers: how many numbers they have.
        bytes: its size.
    """

    path: Path
    expansions: int
    numbers: int
    bytes: int

    def __str__(self) -> str:
        number = f"{self.expansions} expansion{'s' * (self.expansions != 1)}"
        return f"{self.path}: {number}, {self.numbers} numbers, {self.bytes / 1024:.1f} KB"


def save_expansions(model: nn.Module, path: str | Path) -> ExpansionsFile:
    """Writes the configuration and the values of a model's expansions, live or frozen, to a safetensors file.

    `rewrite_like_(model, path)` makes and fills the same expansions in a model like this one. Of sharded parameters
    every process has to call it; the first one writes.

    Args:
        model: a model with expansions; wrappers leave no trace in the file.
        path: the file, ending in .safetensors; an earlier one is replaced as a whole or stays.

    Raises:
        OrthoFxError: a model without expansions, parameters without values, another ending, no safetensors package, or
            a disk that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise OrthoFxError(f"expansions are saved as safetensors files: {path} must end in .safetensors")
    config = expansion_config(model)
    if not config["sites"]:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to save: call rewrite_ first")
    tensors, sharded = {}, False
    for prefix, module in unwrapped(model).named_modules():
        name = plain_name(prefix)
        if name in config["sites"]:
            for key, tensor in module.state_dict().items():
                if tensor.is_meta:
                    raise OrthoFxError(f"{name}.{key} is on the meta device, and has no values to save")
                sharded |= is_distributed(tensor)
                tensors[f"{name}.{key}"] = whole(tensor).to("cpu").contiguous()
    library = safetensors_library()
    metadata = with_digest(tensors, {"format": "pt", CONFIG_KEY: json.dumps(config)})
    content = library.torch.save(tensors, metadata)
    if not sharded or distributed.get_rank() == 0:
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return ExpansionsFile(path, len(config["sites"]), numbers, len(content))
