"""Whether Inductor lowers an operator by our own kernels, and what happens where it cannot.

The lowering leans on private parts of PyTorch. On a release in `torch_private.TESTED` it is used. On any other a small
compile in a process of its own compares it once with the plain decomposition, each basis and kind of device by itself;
the verdict is kept in PyTorch's cache folder. Where the verdict is bad, a private name is missing, or the lowering
raises while it is registered or while a graph is compiled, the plain decomposition takes over for the rest of the
process: it is right, sometimes slower, and one warning says so.

ORTHO_FX_LOWERING=0 in the environment chooses the plain decomposition everywhere, without a warning.
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

# Why operators of a basis are not lowered by our own kernels, by the basis' name.
_reasons: dict[str, str] = {}
# What stands for each operator in a graph for Inductor, by the operator's name: the lowering fills it.
LOWERED: dict[str, Callable[..., Any]] = {}
# What stands for each operator in any other graph.
_PLAIN: dict[str, Callable[..., Any]] = {}
# Digests of the formulas of bases from outside, by the basis' name.
_digests: dict[str, str] = {}
# Bases and kinds of device for which the decision has been made.
_met: set[tuple[str, str]] = set()
# The module `lowering`, when it has been imported, and whether that was tried.
_lowering: Any = None
_tried = False


def reason(basis: Basis) -> str | None:
    """Why operators of a basis are not lowered by our own kernels in this process; None where they are."""
    return _reasons.get(basis.name)


def add(basis: Basis) -> None:
    """Takes a basis in: how its operators are decomposed."""
    names = basis.name, f"{basis.name}_backward"
    functions = plain.decompositions(basis, partial(plain.forward, basis), partial(plain.backward, basis))
    _PLAIN.update(zip(names, functions, strict=True))


def add_from_outside(basis: Basis, digest: str) -> None:
    """The same for a basis that is not ours; its lowering too, if ours have been registered already.

    Args:
        basis: its operators have been registered.
        digest: of all that decides what code they are compiled to.
    """
    add(basis)
    _digests[basis.name] = digest
    if _lowering is not None:
        try:
            in_a_thread(lambda: _lowering.register(basis, LOWERED))
        except Exception as error:
            fall_back(basis, _failed(error))
    elif _tried:  # and it failed: a warning has said so
        _use_plain(basis, next(iter(_reasons.values())))


def meet_inductor(basis: Basis, device_type: str) -> None:
    """Decides how an operator is compiled, when a first graph with it is traced under Dynamo.

    Inductor may be what the graph is for. Not at import, which would take Inductor's own import with it, a second and
    more; and before AOTAutograd looks into its cache, since the decision is a part of the key.
    """
    if "torch._dynamo" not in sys.modules:
        return
    if (basis.name, device_type) not in _met:
        _met.add((basis.name, device_type))
        decide(basis, device_type)
    _tag_caches()


def decide(basis: Basis, device_type: str, *, check: bool = False) -> None:
    """Loads the lowering, and checks it on a release that it was not tested on, or where `check` asks for it."""
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
        # Where no mode of the trace that is going on sees it.
        _lowering = in_a_thread(_installed)
    except Exception as error:
        for each in BASES.values():
            fall_back(each, str(error) if isinstance(error, torch_private.MissingNames) else _failed(error))


def _installed() -> Any:
    # Imported here, since it takes Inductor's own import with it.
    from ortho_fx.operators import lowering

    lowering.install(LOWERED, lose)
    return lowering


def _failed(error: Exception) -> str:
    (line, *_) = str(error).strip().splitlines() or [""]
    return f"on PyTorch {torch.__version__} the fused lowering raised {type(error).__name__}: {line}"


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Calls a function where no trace, mode or autocast of this thread is active; returns or raises what it does."""
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
    """The plain decomposition for a basis from now on, with a warning."""
    _use_plain(basis, why)
    torch_private.report_loss(why, torch_private.INDUCTOR)


def _use_plain(basis: Basis, why: str) -> None:
    _reasons.setdefault(basis.name, why)
    _tag_caches()


def _tag_caches() -> None:
    """Puts what decides about compiled code into the keys of PyTorch's caches.

    AOTAutograd's cache on disk is keyed by the operators' names, not by what they decompose to: without a tag, another
    version of these formulas would be answered with code compiled from the old ones. The setting belongs to a thread,
    so that each trace looks whether it is there.
    """
    outside = "".join(f" {name}={digest}" for name, digest in sorted(_digests.items()))
    tag = f"[ortho_fx {formulas_digest()} {' '.join(sorted(_reasons))}{outside}]"
    others = re.sub(r"\[ortho_fx .*?\]", "", torch.compiler.config.cache_key_tag)
    if torch.compiler.config.cache_key_tag != others + tag:
        torch.compiler.config.cache_key_tag = others + tag


def lose(basis: Basis, error: Exception) -> None:
    """As `fall_back`, for a lowering that failed; on a release that it was not tested on, for processes to come too."""
    fall_back(basis, _failed(error))
    if basis in OURS and not torch_private.is_tested() and not isinstance(error, OSError | MemoryError):
        for name, device_type in _met:
            if name == basis.name:
                _keep_verdict(basis, device_type, _reasons[basis.name])


def _verdict(basis: Basis, device_type: str, check: bool) -> str | None:
    """What is known to be wrong with the lowering of a basis; None where it works.

    Where nothing is known, `check` has it found out once for an installation, by `ortho_fx.operators.check` in a
    process of its own: it may hang or crash. That process does not know a basis from outside, whose kernels are made as
    ours are: what is known of the first of ours holds for it.
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
        # This says nothing about other processes.
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
    # Without a folder to write to, every process finds out by itself.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as partial_file:
            partial_file.write(text)
        Path(partial_file.name).replace(file)


def forget_verdicts(device_type: str) -> None:
    """Has the next process find out again."""
    _verdict_file(device_type).unlink(missing_ok=True)


@contextlib.contextmanager
def without_lowering() -> Iterator[None]:
    """Everything that is compiled meanwhile is compiled as on a release without the lowering; for measurements."""
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
    """What stands for an operator in the trace that is going on; None for its formula."""
    if basis.name in _reasons:
        return None if _is_for_another() else _PLAIN[name]
    return LOWERED[name] if _is_for_inductor() else None


def _is_for_inductor() -> bool:
    return _lowering is not None and _lowering.is_tracing()


def _is_for_another() -> bool:
    """Whether the trace is known not to be for Inductor."""
    return _lowering is not None and not _lowering.is_tracing()


def kept_for_backward(basis: Basis, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """What a graph for Inductor keeps for the backward: the prepared parameters, where preparing them takes kernels.

    The forward has to use them too: from PyTorch 2.14 on a node that only the forward needs is not merged with an equal
    one that the backward depends on (`partition_key` in torch/_functorch/partitioners.py).
    """
    if not _is_for_inductor():
        return ()
    prepared = basis.prepare(parts.compute_dtype(x.dtype), *parameters)
    return () if all(a is b for a, b in zip(prepared, parameters, strict=False)) else prepared


@cache
def formulas_digest() -> str:
    """A digest of all that decides what code an operator is compiled to."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *(here.parent / "bases").glob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


for _basis in BASES.values():
    add(_basis)
