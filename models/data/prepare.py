"""Makes files of tokens from text: train.bin and val.bin as nanoGPT reads them, meta.json and tokenizer.json.

Text is read, encoded and written in pieces, so that memory does not grow with the corpus. Pieces are cut before the end
of a line, since no word of GPT-2's splitting of text crosses such a cut.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import reason
from ortho_fx.models.data.text import FEWEST_FILES_TO_SPLIT, text_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# Names of this token in other tokenizers.
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_FILES = ("train.bin", "val.bin", "tokenizer.json", "meta.json")
_PIECE = 2**18
_PIECES_AT_ONCE = 16
# BPE counts pairs in words. Beyond this many bytes its result hardly changes, but its memory still grows.
_LEARN_FROM = 2**30
_IDS = 2**32

Encode = Callable[[Sequence[str]], list[NDArray[np.int64]]]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote: for each split, the number of tokens and of bytes of text."""

    out: Path
    train_tokens: int
    validation_tokens: int
    train_bytes: int
    validation_bytes: int
    vocabulary: int
    dtype: str

    @property
    def bytes_per_token(self) -> float:
        """Of the validation split: a loss in nats per token, divided by it, is in nats per byte."""
        return self.validation_bytes / self.validation_tokens

    def __str__(self) -> str:
        rows = (
            ("training", self.train_tokens, self.train_bytes),
            ("validation", self.validation_tokens, self.validation_bytes),
        )
        lines = [f"{split:10}  {tokens:>15,} tokens of {size:>15,} bytes" for split, tokens, size in rows]
        lines.append(
            f"vocabulary  {self.vocabulary:>15,} as {self.dtype}, {self.bytes_per_token:.3f} bytes a validation token"
        )
        return "\n".join([*lines, f"written to {self.out}"])


@dataclass(frozen=True)
class _Part:
    """A document, or the part of a file that belongs to one split: bytes from `start` to before `stop`."""

    path: Path
    start: int
    stop: int


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    vocabulary: int = 4096,
    validation_share: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
) -> Prepared:
    """Writes a text's tokens to `out`/train.bin and val.bin, for `TokenFiles` or nanoGPT to read.

    Files are raw little-endian uint16, or uint32 if the vocabulary is above 65,536. The validation split is whole
    files; if there are fewer than ten, it is the end of each. If the tokenizer has an end-of-text token, one follows
    each document, and its name inside a document becomes that token.
    meta.json has "vocabulary", "dtype", "tokenizer" ("bytes" or "tokenizer.json"), "end_of_text" (its id or null),
    "train_tokens", "validation_tokens" and "bytes_per_token" (of the validation).

    Args:
        source: a text file, a folder of text files, or "standard-library".
        out: folder of the files; made if it is missing.
        tokenizer: "bytes"; "bpe", a byte-level BPE like GPT-2's, trained on the training split; or the path of a
            tokenizer.json. All but "bytes" need text in UTF-8.
        vocabulary: number of token ids of "bpe", 257 or more; a small text gives fewer.
        validation_share: share of the files for validation; of fewer than ten files, the share of each file's bytes.
        seed: chooses the files for validation.
        overwrite: replace files of an earlier preparation.

    Raises:
        OrthoFxError: a source without text, text that is not UTF-8, files that exist already, a value out of range, a
            tokenizer that cannot be read, the library tokenizers is needed and missing, or a full disk. The files that
            `out` held before are then untouched.
    """
    out = Path(out)
    if not 0 < validation_share < 1:
        raise OrthoFxError(f"validation_share must be between 0 and 1; got {validation_share}")
    if tokenizer == "bpe" and not 257 <= vocabulary <= _IDS:
        raise OrthoFxError(
            f"vocabulary of bpe must be 257 or more, 256 bytes and the end of text, and {_IDS} at most; "
            f"got {vocabulary}"
        )
    if seed < 0:
        raise OrthoFxError(f"seed must be 0 or more; got {seed}")
    there = [name for name in _FILES if (out / name).exists()]
    if there and not overwrite:
        raise OrthoFxError(f"{out} holds {', '.join(there)} already: pass --overwrite to replace what is there")
    if out.exists() and not out.is_dir():
        raise OrthoFxError(f"out must be a folder; {out} is a file")
    # If `out` is the folder of the text, a second preparation must not read the files of the first.
    files = [f for f in text_files(source) if f.name not in _FILES or f.parent.resolve() != out.resolve()]
    try:
        parts = _split(files, validation_share, seed)
        out.mkdir(parents=True, exist_ok=True)
        return _write(out, parts, tokenizer, vocabulary, seed)
    except OSError as error:
        at = f"{error.filename}: " if error.filename else ""
        raise OrthoFxError(f"cannot prepare {out}: {at}{error.strerror}") from None
    finally:
        for name in _FILES:
            _partial(out / name).unlink(missing_ok=True)


def _write(
    out: Path, parts: tuple[list[_Part], list[_Part]], tokenizer: str | Path, vocabulary: int, seed: int
) -> Prepared:
    made: dict[str, Any] = {"vocabulary": 256, "tokenizer": "bytes", "end_of_text": None}
    encode: Encode | None = None
    if tokenizer != "bytes":
        model = _train_bpe(parts[0], vocabulary, seed) if tokenizer == "bpe" else read_tokenizer(Path(tokenizer))
        ids = model.get_vocab()
        end = end_of_text(ids)
        if not ids:
            raise OrthoFxError(f"{tokenizer} has an empty vocabulary, so it makes no tokens")
        made = {"vocabulary": max(ids.values()) + 1, "tokenizer": "tokenizer.json", "end_of_text": end}
        with _new(out / "tokenizer.json") as file:
            file.write(model.to_str(pretty=True).encode())

        def encode(texts: Sequence[str]) -> list[NDArray[np.int64]]:
            with errors_of(f"the tokenizer {tokenizer} cannot encode the text"):
                encodings = model.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    dtype = "uint16" if made["vocabulary"] <= 65536 else "uint32"
    train_tokens, validation_tokens = (
        _write_tokens(out / name, split, encode, made["end_of_text"], np.dtype(dtype).newbyteorder("<"))
        for name, split in zip(_FILES, parts, strict=False)
    )
    for split_name, count in (("training", train_tokens), ("validation", validation_tokens)):
        if not count:
            raise OrthoFxError(f"the tokenizer {tokenizer} leaves no token of the {split_name} text")
    train_bytes, validation_bytes = (sum(part.stop - part.start for part in split) for split in parts)
    sizes = (train_tokens, validation_tokens, train_bytes, validation_bytes)
    report = Prepared(out, *sizes, made["vocabulary"], dtype)
    made |= {"dtype": dtype, "train_tokens": train_tokens, "validation_tokens": validation_tokens}
    made["bytes_per_token"] = report.bytes_per_token
    with _new(out / "meta.json") as file:
        file.write((json.dumps(made, indent=1) + "\n").encode())
    written = [name for name in _FILES if _partial(out / name).exists()]
    for name in written:
        with _partial(out / name).open("rb") as file:
            os.fsync(file.fileno())
    # The training tokens last: tokens without their meta.json would be taken for those of another vocabulary.
    for name in reversed(_FILES):
        if name in written:
            _partial(out / name).replace(out / name)
        else:
            (out / name).unlink(missing_ok=True)  # the tokenizer of an earlier preparation
    return report


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _new(path: Path) -> BinaryIO:
    """The unfinished file of a path, made anew: a link that stands in its place is removed and not followed."""
    _partial(path).unlink(missing_ok=True)
    return _partial(path).open("xb")


def _split(files: Sequence[Path], share: float, seed: int) -> tuple[list[_Part], list[_Part]]:
    """Parts for training and for validation, in the order of the files."""
    sizes = [path.stat().st_size for path in files]
    parts: tuple[list[_Part], list[_Part]] = [], []
    if len(files) < FEWEST_FILES_TO_SPLIT:
        for path, size in zip(files, sizes, strict=True):
            cut = _cut_of_file(path, int(size * (1 - share)))
            parts[0].append(_Part(path, 0, cut))
            parts[1].append(_Part(path, cut, size))
    else:
        count = min(max(1, round(share * len(files))), len(files) - 1)
        held = set(np.random.default_rng(seed).permutation(len(files))[:count].tolist())
        for number, (path, size) in enumerate(zip(files, sizes, strict=True)):
            parts[number in held].append(_Part(path, 0, size))
    for name, split in zip(("training", "validation"), parts, strict=True):
        split[:] = [part for part in split if part.stop > part.start]
        if not split:
            raise OrthoFxError(
                f"{name} must have some of the text, and with validation_share {share:g} it has none of "
                f"{sum(sizes)} bytes in {len(files)} files"
            )
    return parts


def _cut_of_file(path: Path, near: int) -> int:
    """The first start of a line at or after byte `near`; without one within a piece's length, that of a character."""
    with path.open("rb") as file:
        file.seek(near)
        following = file.read(_PIECE)
    line = following.find(b"\n") + 1
    if line == 0 or near + line == path.stat().st_size:
        line = next((at for at, byte in enumerate(following) if not _continues(byte)), 0)
    return near + line


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return byte & 0b1100_0000 == 0b1000_0000


def _pieces(part: _Part) -> Iterator[tuple[int, bytes]]:
    """Each piece of a part, with its place in the file."""
    place, left = part.start, b""
    with part.path.open("rb") as file:
        file.seek(place)
        while len(left) + place < part.stop:
            block = left + file.read(min(_PIECE, part.stop - place - len(left)))
            if len(block) == len(left):
                raise OrthoFxError(f"{part.path} changed while it was read: it ends at byte {place + len(block)}")
            cut = len(block) if place + len(block) == part.stop else _cut(block)
            yield place, block[:cut]
            place, left = place + cut, block[cut:]


def _cut(block: bytes) -> int:
    """A place to cut: before the last line end that follows a visible character; else before the last character."""
    at = len(block)
    while (at := block.rfind(b"\n", 0, at)) > 0:
        cut = at - (block[at - 1] == ord("\r"))
        if cut > 0 and block[cut - 1] > ord(" "):
            return cut
    starts = (at for at in range(len(block) - 1, 0, -1) if not _continues(block[at]))
    return next(starts, len(block))


def _texts(parts: Sequence[_Part]) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and whether each is the last of its part."""
    for part in parts:
        for place, piece in _pieces(part):
            try:
                yield piece.decode(), place + len(piece) == part.stop
            except UnicodeDecodeError as error:
                raise OrthoFxError(
                    f"{part.path} is not UTF-8 at byte {place + error.start}; the tokenizer 'bytes' takes any text"
                ) from None


def _write_tokens(
    path: Path, parts: Sequence[_Part], encode: Encode | None, end: int | None, dtype: np.dtype[Any]
) -> int:
    """Writes the tokens of a split and returns their number."""
    count = 0
    with _new(path) as file:
        for ids in _bytes(parts) if encode is None else _encoded(parts, encode, end):
            file.write(ids.astype(dtype).tobytes())
            count += len(ids)
    return count


def _bytes(parts: Sequence[_Part]) -> Iterator[NDArray[Any]]:
    for part in parts:
        for _, piece in _pieces(part):
            yield np.frombuffer(piece, dtype=np.uint8)


def _encoded(parts: Sequence[_Part], encode: Encode, end: int | None) -> Iterator[NDArray[Any]]:
    texts = _texts(parts)
    while together := list(itertools.islice(texts, _PIECES_AT_ONCE)):
        for ids, (_, last) in zip(encode([text for text, _ in together]), together, strict=True):
            yield ids
            if last and end is not None:
                yield np.array([end])


def _train_bpe(parts: Sequence[_Part], vocabulary: int, seed: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting into words, trained on the text, or on random pieces of a large text."""
    tokenizers = _import_tokenizers()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    size = sum(part.stop - part.start for part in parts)
    trainer = tokenizers.trainers.BpeTrainer(
        # Each merge needs a byte of text at least; the trainer reserves memory for all that it is asked for.
        vocab_size=min(vocabulary, 257 + size),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = _LEARN_FROM / size
    chosen = np.random.default_rng(seed)
    # The text itself may mark ends of documents; the marks are not words to learn.
    texts = (words for text, _ in _texts(parts) if chosen.random() < share for words in text.split(END_OF_TEXT))
    model.train_from_iterator(texts, trainer)
    return model


def end_of_text(ids: Mapping[str, int]) -> int | None:
    """The id of the token that ends a document, in a vocabulary of names; None without one."""
    return next((ids[name] for name in _ENDS_OF_TEXT if name in ids), None)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json.

    Raises:
        OrthoFxError: no such file, another one, or no library tokenizers.
    """
    if not path.is_file():
        raise OrthoFxError(f"tokenizer must be bytes, bpe or the path of a tokenizer.json; got {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise OrthoFxError(f"cannot read the tokenizer {path}: {reason(error)}") from None
    tokenizers = _import_tokenizers()
    with errors_of(f"{path} is not a tokenizer.json"):
        model = tokenizers.Tokenizer.from_str(text)
    # A tokenizer.json may ask for texts of one length, which would cut pieces off or fill them up.
    model.no_truncation()
    model.no_padding()
    return model


@contextlib.contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Makes an error of the library tokenizers one line; it raises plain exceptions, and panics, which print more."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as printed:
            os.dup2(printed.fileno(), 2)
            yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is no Exception
        raise OrthoFxError(f"{what}: {reason(error)}") from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _import_tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise OrthoFxError("tokens other than bytes need tokenizers: pip install tokenizers") from None
    return tokenizers
