"""Decides whether Inductor lowers an operator to our own kernels, and handles the fallback.

The lowering depends on private parts of PyTorch. It is used on every release in `torch_private.TESTED`. On any other
release a small compile in a separate process compares it once with the plain decomposition, for each basis and kind of
device. The verdict is stored in PyTorch's cache folder. The plain decomposition replaces the lowering for the rest of
the process if the verdict is bad, if a private name is missing, or if the lowering raises while it is registered or
while a graph is compiled. The plain decomposition is correct, but sometimes slower; one warning says so.

ORTHO_FX_LOWERING=0 in the environment selects the plain decomposition everywhere, without a warning.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ortho_fx import torch_private
from ortho_fx.bases import BASES, OURS, Basis
from ortho_fx.operators import decomposition as plain
from ortho_fx.operators import parts

_CHECK_SECONDS = 300

# Why the operators of a basis are not lowered to our own kernels, by the basis' name.
_reasons: dict[str, str] = {}
# The replacement of each operator in a graph for Inductor, by the operator's name; filled by the lowering.
LOWERED: dict[str, Callable[..., Any]] = {}
# The plain decomposition of each operator, by the operator's name.
_PLAIN: dict[str, Callable[..., Any]] = {}
# Digests of the formulas of users' bases, by the basis' name.
_digests: dict[str, str] = {}
# The bases and kinds of device for which the decision has been made.
_met: set[tuple[str, str]] = set()
# The module `lowering` after its import, and whether the import was tried.
_lowering: Any = None
_tried = False


def reason(basis: Basis) -> str | None:
    """Why the operators of a basis are not lowered to our own kernels in this process; None if they are."""
    return _reasons.get(basis.name)


def add(basis: Basis) -> None:
    """Adds the plain decompositions of a basis' operators."""
    names = basis.name, f"{basis.name}_backward"
    functions = plain.decompositions(
        basis, partial(plain.forward, basis), partial(plain.backward, basis), basis.prepare_for_kernels
    )
    _PLAIN.update(zip(names, functions, strict=True))


def add_from_outside(basis: Basis, digest: str) -> None:
    """Adds a user's basis: its plain decompositions, and its lowering if ours have been registered already.

    Args:
        basis: the basis; its operators have been registered.
        digest: a digest of everything that decides their compiled code.
    """
    add(basis)
    _digests[basis.name] = digest
    if _lowering is not None:
        try:
            in_a_thread(lambda: _lowering.register(basis, LOWERED))
        except Exception as error:
            fall_back(basis, _failed(error))
    elif _tried:  # the lowering failed, and a warning has said so
        _use_plain(basis, next(iter(_reasons.values())))


def meet_inductor(basis: Basis, device_type: str) -> None:
    """Decides how an operator is compiled, when the first graph with it is traced under Dynamo.

    Such a graph may be for Inductor. The decision is not made at import time, because it imports Inductor, which takes
    a second or more. It is made before AOTAutograd looks into its cache, because the decision is part of the key.
    """
    if "torch._dynamo" not in sys.modules:
        return
    if (basis.name, device_type) not in _met:
        _met.add((basis.name, device_type))
        decide(basis, device_type)
    _tag_caches()


def decide(basis: Basis, device_type: str, *, check: bool = False) -> None:
    """Loads the lowering, and checks it on an untested release, or if `check` is set."""
    if os.environ.get("ORTHO_FX_LOWERING") == "0":
        _use_plain(basis, "ORTHO_FX_LOWERING=0")
        return
    load_lowering()
    if reason(basis) is None and "ORTHO_FX_CHECKING" not in os.environ:
        verdict = _verdict(basis, device_type, check or not torch_private.is_tested())
        if verdict is not None:
            fall_back(basis, verdict)


def load_lowering() -> None:
    """Imports the lowering and registers every basis with it, once; a failure is a warning."""
    global _lowering, _tried
    if _tried:
        return
    _tried = True
    try:
        # In another thread, where no mode of the current trace is active.
        _lowering = in_a_thread(_installed)
    except Exception as error:
        for each in BASES.values():
            fall_back(each, str(error) if isinstance(error, torch_private.MissingNames) else _failed(error))


def _installed() -> Any:
    # Imported here, because it imports Inductor, which is slow.
    from ortho_fx.operators import lowering

    lowering.install(LOWERED, lose)
    return lowering


def _failed(error: Exception) -> str:
    (line, *_) = str(error).strip().splitlines() or [""]
    return f"on PyTorch {torch.__version__} the fused lowering raised {type(error).__name__}: {line}"


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Calls a function in a new thread, where no trace, mode or autocast is active; returns its result or raises."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def fall_back(basis: Basis, why: str) -> None:
    """Uses the plain decomposition for a basis from now on, with a warning."""
    _use_plain(basis, why)
    torch_private.report_loss(why, torch_private.INDUCTOR)


def _use_plain(basis: Basis, why: str) -> None:
    _reasons.setdefault(basis.name, why)
    _tag_caches()


def _tag_caches() -> None:
    """Puts everything that decides the compiled code into the keys of PyTorch's caches.

    AOTAutograd's cache on disk is keyed by the operators' names, not by their decompositions. Without a tag, a new
    version of the formulas would get the code that was compiled from the old ones. The setting belongs to a thread, so
    every trace checks it.
    """
    outside = "".join(f" {name}={digest}" for name, digest in sorted(_digests.items()))
    tag = f"[ortho_fx {formulas_digest()} {' '.join(sorted(_reasons))}{outside}]"
    others = re.sub(r"\[ortho_fx .*?\]", "", torch.compiler.config.cache_key_tag)
    if torch.compiler.config.cache_key_tag != others + tag:
        torch.compiler.config.cache_key_tag = others + tag


def lose(basis: Basis, error: Exception) -> None:
    """As `fall_back`, for a lowering that failed; on an untested release, also for later processes."""
    fall_back(basis, _failed(error))
    if basis in OURS and not torch_private.is_tested() and not isinstance(error, OSError | MemoryError):
        for name, device_type in _met:
            if name == basis.name:
                _keep_verdict(basis, device_type, _reasons[basis.name])


def _verdict(basis: Basis, device_type: str, check: bool) -> str | None:
    """What is known to be wrong with the lowering of a basis; None if it works or nothing is known.

    With `check`, an unknown verdict is determined once per installation. `ortho_fx.operators.check` runs in a separate
    process, because it may hang or crash. That process does not know users' bases. Their kernels are made like ours, so
    they get the verdict of our first basis.
    """
    basis = basis if basis in OURS else OURS[0]
    kept = _kept_verdicts(device_type)
    if basis.name in kept or not check:
        return kept.get(basis.name)
    command = [sys.executable, "-m", "ortho_fx.operators.check", basis.name, device_type]
    environment = {**os.environ, "ORTHO_FX_CHECKING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CHECK_SECONDS
        )
        verdict = json.loads(done.stdout.splitlines()[-1])["wrong"]
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError) as error:
        # Not stored: the next process may succeed.
        return f"the check of the fused lowering on PyTorch {torch.__version__} did not end well: {error}"
    _keep_verdict(basis, device_type, verdict)
    return verdict


def _verdict_file(device_type: str) -> Path:
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    key = hashlib.sha256(f"{torch.__version__} {formulas_digest()} {device_type}".encode()).hexdigest()[:16]
    return Path(folder) / "ortho_fx" / f"lowering-{key}.json"


def _kept_verdicts(device_type: str) -> dict[str, str | None]:
    try:
        return json.loads(_verdict_file(device_type).read_text())
    except (OSError, ValueError):
        return {}


def _keep_verdict(basis: Basis, device_type: str, verdict: str | None) -> None:
    file = _verdict_file(device_type)
    text = json.dumps({**_kept_verdicts(device_type), basis.name: verdict})
    # If the folder cannot be written, every process has to check for itself.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as partial_file:
            partial_file.write(text)
        Path(partial_file.name).replace(file)


def forget_verdicts(device_type: str) -> None:
    """Deletes the stored verdicts, so that the next process checks again."""
    _verdict_file(device_type).unlink(missing_ok=True)


@contextlib.contextmanager
def without_lowering() -> Iterator[None]:
    """Inside the block, everything compiles as on a release without the lowering; for measurements."""
    reasons = dict(_reasons)
    for basis in BASES.values():
        _use_plain(basis, "measured without the lowering")
    try:
        yield
    finally:
        _reasons.clear()
        _reasons.update(reasons)
        _tag_caches()


def decomposition(basis: Basis, name: str) -> Callable[..., Any] | None:
    """The replacement of an operator in the current trace; None for its formula."""
    if basis.name in _reasons:
        return None if _is_for_another() else _PLAIN[name]
    return LOWERED[name] if _is_for_inductor() else None


def _is_for_inductor() -> bool:
    return _lowering is not None and _lowering.is_tracing()


def _is_for_another() -> bool:
    """Whether the trace is known not to be for Inductor."""
    return _lowering is not None and not _lowering.is_tracing()


def kept_for_backward(basis: Basis, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The prepared parameters that a graph for Inductor saves for the backward; empty if preparing computes nothing.

    The forward must use them too: since PyTorch 2.14 a node that only the forward needs is not merged with an equal
    node that the backward depends on (`partition_key` in torch/_functorch/partitioners.py).
    """
    if not _is_for_inductor():
        return ()
    prepare = _lowering.prepare_of(basis) if basis.name not in _reasons else basis.prepare_for_kernels
    prepared = prepare(parts.compute_dtype(x.dtype), *parameters)
    return () if all(a is b for a, b in zip(prepared, parameters, strict=False)) else prepared


@cache
def formulas_digest() -> str:
    """A digest of everything that decides the compiled code of our operators."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *(here.parent / "bases").glob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


for _basis in BASES.values():
    add(_basis)
