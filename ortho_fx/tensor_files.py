"""Reads files of tensors, ours and those of other libraries.

The safetensors files that ortho_fx writes have a digest in their metadata: the SHA-256 of the other metadata and of
the name, dtype, shape and bytes of every tensor. A file that has one is compared with it when its tensors are read.
Files of others, and of earlier releases, have none.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import reason

_PICKLED = (".bin", ".pth", ".pt")
# Names of weight files in a folder, the likeliest first; an index lists the files of weights in parts.
_IN_A_FOLDER = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# Keys under which other libraries store the state dict in a file that holds more.
_WRAPPINGS = ("model", "state_dict")


_DIGEST = "ortho_fx.sha256"

# Chooses from the names in a file those of the tensors to read.
Only = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class TensorFile:
    """The content of a file of tensors: the tensors by name, and the metadata, which only safetensors files have."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Puts the path before the text of an `OrthoFxError` about the file's content."""
    try:
        yield
    except OrthoFxError as error:
        raise OrthoFxError(f"{path}: {error}") from None


def safetensors_library() -> Any:
    """The safetensors package.

    Raises:
        OrthoFxError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise OrthoFxError("weights are safetensors files: pip install safetensors") from None
    return safetensors


def with_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a safetensors file with these tensors, contiguous and on the CPU, and with its digest."""
    return {**metadata, _DIGEST: _digest(tensors, tensors.__getitem__, metadata)}


def _digest(names: Iterable[str], tensor_of: Callable[[str], Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(names):
        tensor = tensor_of(name)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_metadata(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file, before its tensors are read, which compares the digest.

    Raises:
        OrthoFxError: no file, or one that is not safetensors.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def read_safetensors(path: Path, only: Only = iter) -> TensorFile:
    """The content of a safetensors file, or of these tensors in it; the tensors are copies.

    Raises:
        OrthoFxError: no file, one that is not safetensors, or one that has another content than its digest says.
    """
    with _opened(path) as file:
        # Copies, since the tensors are mapped into memory: they would change with the file.
        tensors = {name: file.get_tensor(name).clone() for name in only(file.keys())}
        metadata = dict(file.metadata() or {})
        expected = metadata.pop(_DIGEST, None)

        def tensor_of(name: str) -> Tensor:
            return tensors[name] if name in tensors else file.get_tensor(name)

        if expected is not None and _digest(file.keys(), tensor_of, metadata) != expected:
            raise OrthoFxError(
                f"{path} is damaged: its content has changed since it was written; bring it back from a copy (if you "
                f"changed it yourself, remove {_DIGEST} from its metadata)"
            )
        return TensorFile(tensors, metadata)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _check_exists(path)
    safetensors = safetensors_library()
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise OrthoFxError(f"{path} is not a readable safetensors file: {reason(error)}") from None


def read_tensors(path: Path, only: Only = iter) -> TensorFile:
    """The state dict in a .safetensors, .bin, .pth or .pt file, with its metadata; `only` chooses from safetensors.

    Raises:
        OrthoFxError: no file, another ending, or a file that cannot be read, holds more than plain values, or holds no
            state dict.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path, only)
    if path.suffix not in _PICKLED:
        raise OrthoFxError(f"weights are files in .safetensors, {', '.join(_PICKLED)}; got {path}")
    _check_exists(path)
    _check_plain(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # PyTorch's own text advises loading without weights_only, which runs whatever code the file holds.
        raise OrthoFxError(f"{path} is not readable: it is damaged, or holds more than tensors") from None
    except Exception as error:  # a file that is no pickle can make the reader raise any exception
        raise OrthoFxError(f"{path} is not readable: {reason(error)}") from None
    for name in _WRAPPINGS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping):
        raise OrthoFxError(f"{path} holds a {type(state).__name__}, not a state dict")
    other = next((name for name, tensor in state.items() if not isinstance(tensor, Tensor)), None)
    if other is not None:
        raise OrthoFxError(f"{path} holds no state dict: {other} is a {type(state[other]).__name__}, not a tensor")
    return TensorFile(state)


def _check_plain(path: Path) -> None:
    """Refuses an archive that unpacks to more than its own size; PyTorch stores tensors without compression."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return  # the older format, a pickle, or damaged: torch.load says which
    if size > (there := path.stat().st_size):
        raise OrthoFxError(f"{path} is not readable: it has {there} bytes, and unpacks to {size}")


def files_of(path: Path) -> list[Path]:
    """The files with the weights of a path: the path itself, or files in the folder.

    Raises:
        OrthoFxError: a folder without weights, or an index that is damaged or names files elsewhere.
    """
    if not path.is_dir():
        return [path]
    found = next((path / name for name in _IN_A_FOLDER if (path / name).is_file()), None)
    if found is None and (path / "run.json").is_file():
        saved = any((path / "checkpoints").glob("step-*/state.json"))
        advice = "go on with --resume" if saved else "this one has saved no checkpoint yet, so start it again"
        raise OrthoFxError(f"{path} has no model.safetensors: a run writes it at its end; {advice}")
    if found is None:
        raise OrthoFxError(f"{path} holds no weights: none of {', '.join(_IN_A_FOLDER)}")
    if found.suffix != ".json":
        return [found]
    names = read_json(found).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise OrthoFxError(f"{found} must map names to files beside it, under weight_map")
    return [path / name for name in sorted(set(names.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OrthoFxError: no such file, or none with a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OrthoFxError(f"cannot read {path}: {reason(error)}") from None
    if not isinstance(values, dict):
        raise OrthoFxError(f"{path} must hold a JSON object; it holds a {type(values).__name__}")
    return values


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise OrthoFxError(f"there is no file {path}")
