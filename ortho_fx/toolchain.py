"""Finds the tools that `torch.compile` needs besides PyTorch: a C++ compiler for a CPU, Triton for a GPU."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator

from ortho_fx import torch_private
from ortho_fx.errors import OrthoFxError


class NoCompiler(OrthoFxError):
    """No C++ compiler works here."""


def cpp_compiler() -> str:
    """The version line of the C++ compiler that Inductor would call.

    Raises:
        NoCompiler: no C++ compiler can be called.
    """
    tried = []
    for command in _candidates():
        try:
            called = [*shlex.split(command), "--version"]
            done = subprocess.run(called, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        except (OSError, ValueError, IndexError, subprocess.SubprocessError):
            tried.append(command)
        else:
            return next(iter(done.stdout.splitlines()), command)
    raise NoCompiler(
        f"no C++ compiler works here (tried {', '.join(map(repr, tried))}), and torch.compile needs one on a CPU: "
        "install g++ or clang++, or name one by the environment variable CXX; eager mode works without one"
    )


def require_cpp_compiler(otherwise: str) -> None:
    """Raises `NoCompiler` if no C++ compiler works; the message ends with `otherwise`, another way for the user."""
    try:
        cpp_compiler()
    except NoCompiler as error:
        raise NoCompiler(f"{error}; or {otherwise}") from None


def _candidates() -> Iterator[str]:
    try:
        names = torch_private.load(torch_private.TOOLCHAIN).config.cpp.cxx
    except (torch_private.MissingNames, AttributeError):
        names = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    # None means a compiler that PyTorch installs itself if it is asked to.
    return (name for name in ([names] if isinstance(names, str) else names) if name is not None)


def triton() -> str | None:
    """The version of Triton; None if it is not installed."""
    for name in ("triton", "pytorch-triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
