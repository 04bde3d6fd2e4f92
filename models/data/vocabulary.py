"""Text as tokens and back: what the tokens of a run mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.data.prepare import end_of_text, errors_of, read_tokenizer
from ortho_fx.models.data.text import STANDARD_LIBRARY
from ortho_fx.models.weights.bundle import run_settings
from ortho_fx.tensor_files import read_json

BYTES = "bytes"
_WAY_OUT = "say it by --tokenizer: bytes, or a tokenizer.json"


class Vocabulary(Protocol):
    """The meaning of token ids.

    Attributes:
        size: the number of ids, which begin at 0.
        end: the id that ends a document; None without one.
        file: the tokenizer.json; None where tokens are bytes.
    """

    size: int
    end: int | None
    file: Path | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Bytes:
    """The bytes of text in UTF-8; what is no UTF-8 is decoded to the replacement character."""

    size = 256
    end: int | None = None
    file: Path | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class TokenizerFile:
    """The tokens of a tokenizer.json, by the library tokenizers.

    Raises:
        OrthoFxError: a file that cannot be read, or no tokenizers.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise OrthoFxError(f"there is no tokenizer {path}: --tokenizer is bytes, or a tokenizer.json")
        self.file: Path | None = path
        self._tokenizer: Any = read_tokenizer(path)
        ids = self._tokenizer.get_vocab()
        self.size, self.end = max(ids.values(), default=-1) + 1, end_of_text(ids)

    def encode(self, text: str) -> list[int]:
        with errors_of(f"the tokenizer {self.file} cannot encode the prompt"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with errors_of(f"the tokenizer {self.file} cannot decode the tokens"):
            return self._tokenizer.decode(ids, skip_special_tokens=False)


def vocabulary_of(weights: Path, tokenizer: str | None = None) -> Vocabulary:
    """What the tokens of a run or a file of weights mean.

    Without a tokenizer it follows from the run's data: text is bytes, and the meta.json of prepared tokens names their
    tokenizer. Beside weights of others it is the tokenizer.json in their folder.

    Args:
        weights: the directory of a run, or weights in a file or folder.
        tokenizer: "bytes", or the path of a tokenizer.json (None: as above).

    Raises:
        OrthoFxError: a tokenizer that cannot be read, or none that is known.
    """
    if tokenizer is not None:
        return Bytes() if tokenizer == BYTES else TokenizerFile(Path(tokenizer))
    data = run_settings(weights).get("data")
    beside = (weights if weights.is_dir() else weights.parent) / "tokenizer.json"
    if not isinstance(data, str):
        if beside.is_file():
            return TokenizerFile(beside)
        raise OrthoFxError(f"{weights} does not tell what its tokens mean: {_WAY_OUT}")
    folder = Path(data)
    if data == STANDARD_LIBRARY or folder.is_file():
        return Bytes()
    if not folder.exists():
        raise OrthoFxError(f"{weights} was trained on {data}, which is not here and would tell its tokens: {_WAY_OUT}")
    if not (folder / "train.bin").exists():
        return Bytes()  # a folder of text
    meta = read_json(folder / "meta.json") if (folder / "meta.json").is_file() else {}
    if meta.get("tokenizer") == BYTES:
        return Bytes()
    if meta.get("tokenizer") == "tokenizer.json" and (folder / "tokenizer.json").is_file():
        return TokenizerFile(folder / "tokenizer.json")
    raise OrthoFxError(f"{weights} was trained on the tokens in {data}, which has no tokenizer: {_WAY_OUT}")
