"""`compile_support`: how `torch.compile` compiles expansions on this machine; `ortho-fx doctor` prints it."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ortho_fx import toolchain, torch_private
from ortho_fx.bases import BASES
from ortho_fx.operators import support
from ortho_fx.version import __version__


@dataclass(frozen=True, repr=False)
class CompileSupport:
    """Which bases compile to ortho_fx's own kernels on this machine; `print(support)` shows all of it.

    Attributes:
        ortho_fx: version of ortho_fx.
        torch: version of PyTorch.
        tested: whether ortho_fx was tested with this release of PyTorch.
        python: version of Python.
        fallbacks: for each kind of device ("cpu", "cuda"), the bases that compile to plain tensor operations, each with
            the reason. All other bases are lowered to fused kernels.
        lost: what ortho_fx cannot do on this release, each with the reason.
        cpp_compiler: version of the C++ compiler, or None.
        compiler_problem: why there is no C++ compiler, or None.
        triton: version of Triton, or None.
        gpu: name of the GPU, or None.
    """

    ortho_fx: str
    torch: str
    tested: bool
    python: str
    fallbacks: Mapping[str, Mapping[str, str]]
    lost: Mapping[str, str] = field(default_factory=dict)
    cpp_compiler: str | None = None
    compiler_problem: str | None = None
    triton: str | None = None
    gpu: str | None = None

    def __str__(self) -> str:
        releases = ", ".join(f"{major}.{minor}" for major, minor in torch_private.TESTED)
        lines = [
            f"ortho_fx {self.ortho_fx}, PyTorch {self.torch}, Python {self.python}",
            f"tested with PyTorch {releases}: this release is {'one of them' if self.tested else 'none of them'}",
            f"C++ compiler: {self.cpp_compiler or self.compiler_problem}",
            f"Triton: {self.triton or 'none, which a GPU needs'}",
            f"GPU: {self.gpu or 'none'}",
        ]
        for device, reasons in self.fallbacks.items():
            fused = [name for name in BASES if name not in reasons]
            lines.append(f"fused on {device}: {', '.join(fused) or 'nothing'}")
            lines += [f"plain operations on {device}: {name}: {why}" for name, why in reasons.items()]
        lines += [f"without {title}: {why}" for title, why in self.lost.items()]
        return "\n".join(lines)

    __repr__ = __str__


def compile_support(*, check: bool = False) -> CompileSupport:
    """Finds out how `torch.compile` compiles expansions on this machine.

    On a release of PyTorch that ortho_fx was not tested with, small expansions are compiled and compared once per
    installation. This takes some ten seconds for each basis.

    Args:
        check: compile and compare now, on every release, even if an earlier result exists. The new result is stored.

    Returns:
        The bases without fused kernels on each kind of device, with the reasons. Problems raise no error.

    Examples:
        >>> print(ortho_fx.compile_support())  # doctest: +SKIP
        ortho_fx 0.1.0, PyTorch 2.15.0+cu132, Python 3.11.7
        ...
        fused on cpu: hermite, fourier, tropical, ...
    """

    fallbacks: dict[str, dict[str, str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the result holds the same reasons
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
            if check:
                support.forget_verdicts(device)
            for basis in BASES.values():
                support.decide(basis, device, check=check)
            reasons = {name: support.reason(basis) for name, basis in BASES.items()}
            fallbacks[device] = {name: why for name, why in reasons.items() if why is not None}
    compiler = problem = None
    try:
        compiler = toolchain.cpp_compiler()
    except toolchain.NoCompiler as error:
        problem = str(error)
    return CompileSupport(
        __version__,
        torch.__version__,
        torch_private.is_tested(),
        platform.python_version(),
        fallbacks,
        _lost(),
        compiler,
        problem,
        toolchain.triton(),
        torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def _lost() -> dict[str, str]:
    lost = {}
    for group in torch_private.GROUPS:
        try:
            torch_private.load(group)
        except torch_private.MissingNames as missing:
            lost[group.title] = f"{missing}; {group.without}"
    return lost
