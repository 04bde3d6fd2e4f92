"""All private names of PyTorch that this repository uses, in one place.

PyTorch changes such names without notice. So no other file of this repository imports one, tests and benchmarks
included; a test checks their imports and attribute chains. Each name belongs to a group. The group states what is lost
on a release that lacks one of its names. `load(GROUP)` returns the objects of a group, or raises `MissingNames`.
`available(GROUP)` returns None instead, and warns the user once; the caller then continues without these names.

    INDUCTOR = PrivateNames("...", without="...", names=(PrivateName("torch._inductor.ir.Pointwise", "..."), ...))
    inductor = load(INDUCTOR)
    inductor.Pointwise.create(...)

All names below exist in every release of `TESTED`, unless `releases` says otherwise. A name may exist and still behave
differently. So on a release that is not in `TESTED`, `ortho_fx.operators.support` first compiles a small expansion and
compares it. To try a release without some names, list them in the environment variable ORTHO_FX_ABSENT_NAMES, separated
by commas.

Public interfaces replace private ones where they exist: `torch.library` for operators, shapes and batching rules,
`torch.compiler.reset` and `torch.compiler.config.cache_key_tag`, the entry point `torch_dynamo_backends`, a thread for
code that must not be traced, and `torch.optim.swa_utils` for moving averages.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from ortho_fx.errors import OrthoFxError

_Function = TypeVar("_Function", bound=Callable[..., Any])

OLDEST = (2, 11)
TESTED = ((2, 11), (2, 12), (2, 13), (2, 14), (2, 15))


@dataclass(frozen=True)
class PrivateName:
    """One private name: its path, its use, and the releases that have it.

    In a loaded group its attribute is the last part of the path, or `alias`.
    """

    path: str
    use: str
    releases: tuple[tuple[int, int], ...] = TESTED
    alias: str = ""

    @property
    def name(self) -> str:
        return self.alias or self.path.rsplit(".", 1)[1]


@dataclass(frozen=True)
class PrivateNames:
    """A group of names that are used together, with a title, and `without`: what is lost if one of them is missing."""

    title: str
    without: str
    names: tuple[PrivateName, ...]


class MissingNames(OrthoFxError):
    """This release of PyTorch lacks private names that ortho_fx uses."""

    def __init__(self, group: PrivateNames, paths: list[str]) -> None:
        self.paths = paths
        super().__init__(f"PyTorch {torch.__version__} has no {', '.join(paths)}, which {group.title} needs")


def release() -> tuple[int, int]:
    """Major and minor number of the installed PyTorch."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def is_tested() -> bool:
    """Whether the installed PyTorch is a final build of a release in `TESTED`."""
    return release() in TESTED and re.search(r"\d(a|b|rc|\.?dev)\d", torch.__version__.split("+")[0]) is None


def require_release() -> None:
    """Raises an ImportError if the installed PyTorch is older than the oldest supported release."""
    if release() < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"ortho_fx needs PyTorch {oldest} or newer, and {torch.__version__} is installed")


def resolve(path: str) -> Any:
    """The object at a dotted path.

    Raises:
        AttributeError: there is no such object.
    """
    if path in os.environ.get("ORTHO_FX_ABSENT_NAMES", "").split(","):
        raise AttributeError(path)
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            value = getattr(value, part)
        return value
    raise AttributeError(path)


def load(group: PrivateNames) -> Any:
    """The objects of a group, by their names.

    Raises:
        MissingNames: this release lacks a name that it should have.
    """
    values, missing = {}, []
    for entry in group.names:
        try:
            values[entry.name] = resolve(entry.path)
        except AttributeError:
            # A name that the newest tested release does not need may be missing in later releases too.
            if (release() if release() in TESTED else TESTED[-1]) in entry.releases:
                missing.append(entry.path)
    if missing:
        raise MissingNames(group, missing)
    return SimpleNamespace(**values)


def available(group: PrivateNames) -> Any | None:
    """Like `load`, but if a name is missing, warns the user and returns None."""
    try:
        return load(group)
    except MissingNames as missing:
        report_loss(str(missing), group)
        return None


_reported: set[str] = set()


def report_loss(reason: str, group: PrivateNames) -> None:
    """Warns once for each group: why it is not used, what is lost, and which releases are tested."""
    if group.title in _reported:
        return
    _reported.add(group.title)
    tested = ", ".join(f"{major}.{minor}" for major, minor in TESTED)
    warnings.warn(
        f"ortho_fx: {reason}. Without that, {group.without}. ortho_fx is tested with PyTorch {tested}; "
        "`ortho-fx doctor` shows what works here",
        stacklevel=2,
    )


def constant_in_a_trace(function: _Function) -> _Function:
    """Has Dynamo call a method while it traces, and take what it returns for constant.

    As `torch.compiler.assume_constant_result`, whose import takes Dynamo's with it. Seen in every release of `TESTED`;
    one that does not know the mark traces the method, or breaks the graph there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_called_by_fully_shard() -> bool:
    """Whether the caller of the caller is `fully_shard`, which collects the parameters that it is to shard.

    The function that does so was seen in 2.15. Where it has another name, PyTorch's own error comes instead of ours.
    """
    return sys._getframe(2).f_code.co_name == "_get_managed_states"


AUTOGRAD = PrivateNames(
    "the autograd of its operators",
    without="torch.func transforms of expansions no longer nest and have no forward mode; everything else works",
    names=(
        PrivateName("torch._C._AutoDispatchBelowAutograd", "runs an operator below autograd, inside a transform"),
        PrivateName("torch._C._after_autograd_keyset", "the dispatch keys that are left below autograd"),
        PrivateName("torch._C._functorch.TransformType", "its kind"),
        PrivateName("torch._C._functorch.peek_interpreter_stack", "the transform that is going on"),
        PrivateName("torch._functorch.utils.enable_single_level_autograd_function", "records one level of transforms"),
        PrivateName("torch.autograd.forward_ad._set_fwd_grad_enabled", "forward mode inside of a rule for it"),
        PrivateName("torch.autograd.function._SingleLevelFunction", "an autograd function that asks no transform"),
    ),
)

SHAPES = PrivateNames(
    "the choice of loops for symbolic sizes",
    without="short rows of symbolic size are not joined, so that their loops are slower",
    names=(
        PrivateName("torch.fx.experimental.symbolic_shapes.guard_or_false", "asks about a size without a new guard"),
    ),
)

FAKE_TENSORS = PrivateNames(
    "the shapes of expansions in a trace",
    without="they are found by tracing the formulas, which takes longer",
    names=(PrivateName("torch._decomp.meta_table", "shapes of operators that also have a decomposition"),),
)

TABLE_OF_TRACE = PrivateName(
    "torch.fx.experimental.proxy_tensor.CURRENT_DECOMPOSITION_TABLE",
    "the decompositions of the trace that is going on: a dict in 2.11, bound anew for each trace; a context variable "
    "in 2.12; since then an attribute of the trace's mode",
    releases=((2, 11), (2, 12)),
)

INDUCTOR = PrivateNames(
    "the fused lowering",
    without="expansions compile through plain tensor operations: right, as fast for one expansion a layer of usual "
    "degree, and up to 2.3 times slower for one a channel or a high degree",
    names=(
        PrivateName(
            "torch._functorch.partitioners.pointwise_ops", "operators that the backward pass may compute again"
        ),
        PrivateName(
            "torch._inductor.codegen.common.pointwise_overrides_data",
            "whether a CPU's kernel can multiply and add at once",
        ),
        PrivateName("torch._inductor.compile_fx.fx_codegen_and_compile", "wrapped: a failed graph is compiled plainly"),
        PrivateName("torch._inductor.config", "how many loops a C++ kernel may hold"),
        PrivateName("torch._inductor.decomposition.decompositions", "marked, to know a trace that is for Inductor"),
        PrivateName("torch._inductor.decomposition.fast_random_decomps", "a copy of that table, made anew"),
        PrivateName("torch._inductor.dependencies.index_vars_no_squeeze", "loop variables, those of length 1 too"),
        PrivateName("torch._inductor.ir.ComputedBuffer", "a buffer whose loops are kept as they are"),
        PrivateName("torch._inductor.ir.ConcatKernel", "partial sums side by side"),
        PrivateName("torch._inductor.ir.FixedLayout", "strides of the input gradient"),
        PrivateName("torch._inductor.ir.Pointwise", "an elementwise kernel"),
        PrivateName("torch._inductor.ir.Reduction", "a sum"),
        PrivateName("torch._inductor.ir.ReinterpretView", "the input gradient in the shape of the input"),
        PrivateName("torch._inductor.ir.TensorBox", "what a lowering returns"),
        PrivateName("torch._inductor.loop_body.LoopBody", "the loops of such a buffer"),
        PrivateName("torch._inductor.lowering.register_lowering", "registers a lowering"),
        PrivateName("torch._inductor.runtime.hints.ReductionHint", "whether neighbours are summed up"),
        PrivateName("torch._inductor.virtualized.ops", "operations of a kernel"),
        PrivateName("torch.fx.experimental.proxy_tensor.get_proxy_mode", "the trace that is going on"),
        PrivateName("torch.fx.experimental.proxy_tensor.make_fx", "traces the plain operations of one node"),
        TABLE_OF_TRACE,
    ),
)

HOOK = PrivateNames(
    'backend="ortho_fx"',
    without='torch.compile(model, backend="ortho_fx") compiles models that ortho_fx.rewrite_ has been over, and '
    "replaces no activation itself",
    names=(
        PrivateName("torch._C._dynamo.eval_frame.reset_code", "drops compiled code of a method that was rewritten"),
        PrivateName("torch._TorchCompileInductorWrapper", "Inductor with a mode and options"),
        PrivateName("torch._dynamo.exc.ShortenTraceback", "an error that Dynamo hands on as it is"),
        PrivateName("torch._dynamo.exc.TensorifyScalarRestartAnalysis", "has Dynamo trace a frame again"),
        PrivateName("torch._dynamo.external_utils", "the frames in which Dynamo calls PyTorch's own modules"),
        PrivateName("torch._dynamo.symbolic_convert.InstructionTranslator", "the variables of the compiled frame"),
        PrivateName("torch._inductor.config", "the options that Inductor knows"),
    ),
)

INDUCTOR_BACKEND = PrivateNames(
    'backend="ortho_fx" on a release whose frames cannot be read',
    without="compile with torch.compile(model)",
    names=(PrivateName("torch._dynamo.lookup_backend", "Inductor as a backend; documented in spite of its name"),),
)

TREES = PrivateNames(
    "the walk through nested inputs and outputs",
    without="tensors are found in dicts, lists and tuples only, not in classes that are registered with PyTorch",
    names=(PrivateName("torch.utils._pytree.tree_map", "the leaves of nested containers"),),
)

TOOLCHAIN = PrivateNames(
    "the name of the C++ compiler",
    without="CXX in the environment is taken for it, or the system's usual one",
    names=(PrivateName("torch._inductor.config", "which compilers Inductor tries"),),
)

TOOLS = PrivateNames(
    "reading of generated code, in `ortho-fx bench`, benchmarks and tests",
    without="what reads generated code raises this error; models are not concerned",
    names=(
        PrivateName("torch._inductor.graph.GraphLowering", "the code of a graph, as it is generated"),
        PrivateName("torch._inductor.utils.fresh_cache", "an empty cache of compiled code"),
    ),
)

TESTS = PrivateNames(
    "the tests of compiled models, and the benchmark of activations that architectures call",
    without="these tests and this benchmark do not run",
    names=(
        PrivateName("torch._dynamo.config", "compiled autograd, sizes that depend on data", alias="dynamo"),
        PrivateName("torch._dynamo.lookup_backend", "Inductor, with its graphs counted"),
        PrivateName("torch._dynamo.mark_dynamic", "a size that a user declares to be symbolic; documented"),
        PrivateName("torch._dynamo.utils.counters", "hits of the caches"),
        PrivateName("torch._functorch.config", "has backward graphs compiled at once", alias="functorch"),
        PrivateName("torch._inductor.compile_fx.compile_fx", "Inductor without Dynamo"),
        PrivateName("torch._inductor.config", "templates of matrix products, and frozen weights", alias="inductor"),
        PrivateName("torch._inductor.graph.GraphLowering", "generated code that is not built"),
        PrivateName("torch.utils._python_dispatch.TorchDispatchMode", "sees every operator that runs"),
    ),
)

GPU_CODE = PrivateNames(
    "generating code for a GPU on a machine without one, in tests/h100.py",
    without="these tests do not run",
    names=(
        PrivateName("torch._dynamo.device_interface.CudaInterface", "replaced: the GPU's properties"),
        PrivateName("torch._inductor.codegen.triton_utils.AttrsDescriptorWrapper", "replaced: Triton may be absent"),
        PrivateName(
            "torch._inductor.fx_passes.joint_graph.UniformValueConstantFolder._deduce_value",
            "replaced: constants are computed on the CPU",
        ),
        PrivateName("torch._inductor.runtime.hints.DeviceProperties", "remembers a GPU's properties"),
        PrivateName("torch._inductor.scheduler.has_triton", "replaced: Triton may be absent"),
        PrivateName("torch._inductor.utils.TritonAttrsDescriptorVersion", "the version of Triton's format"),
        PrivateName("torch._inductor.utils.get_triton_attrs_descriptor_version", "replaced by that version"),
        PrivateName("torch._from_functional_tensor", "the tensor inside a functional one"),
        PrivateName("torch._subclasses.fake_tensor._DISPATCH_META_HANDLERS", "replaced: devices that C++ sees"),
        PrivateName("torch._subclasses.fake_tensor.FakeTensor", "changed: the device of a tensor"),
        PrivateName("torch._subclasses.fake_tensor.FakeTensorMode", "tensors on a GPU that is not there"),
        PrivateName("torch._subclasses.functional_tensor.FunctionalTensor", "changed: the device of a tensor"),
        PrivateName("torch._subclasses.functional_tensor.FunctionalTensorMode", "changed: the device of a new tensor"),
        PrivateName("torch.Tensor._make_wrapper_subclass", "replaced: the device of a new tensor"),
        PrivateName("torch.cuda._exchange_device", "replaced: the GPU at hand"),
        PrivateName("torch.cuda._maybe_exchange_device", "replaced: the GPU at hand"),
        PrivateName("torch.utils._triton.triton_hash_with_backend", "replaced: Triton may be absent"),
    ),
)

MACHINE_CODE = PrivateNames(
    "compiling for a GPU on a machine without one, in tests/machine_code.py",
    without="these tests and benchmarks/h100_code.py do not run",
    names=(
        PrivateName("torch._inductor.codecache.PyCodeCache", "loads generated code"),
        PrivateName("torch._inductor.runtime.triton_helpers", "changed: no driver is asked for"),
        PrivateName("torch._inductor.runtime.triton_heuristics.StaticTritonCompileResult", "changed: nothing is run"),
    ),
)

# GROUPS are used by an installation, REPOSITORY_GROUPS only by tests and benchmarks.
GROUPS = (AUTOGRAD, SHAPES, FAKE_TENSORS, INDUCTOR, HOOK, INDUCTOR_BACKEND, TREES, TOOLCHAIN, TOOLS)
REPOSITORY_GROUPS = (TESTS, GPU_CODE, MACHINE_CODE)

require_release()
