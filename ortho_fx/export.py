"""`export_onnx` and `export_program`: write files that run without ortho_fx, and check them against the model.

`torch.export` traces the model in eval mode. Each expansion is one operator of ours in that graph, and
`run_decompositions` replaces it by its formula in plain tensor operations. A .pt2 file holds this graph; an ONNX file
holds its translation. Each file is written under a temporary name, read back, and compared with the model. Only then
does it get its final name.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ortho_fx import trees
from ortho_fx.arguments import checked_model
from ortho_fx.bases import BASES
from ortho_fx.batches import Batch, call
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file
from ortho_fx.modes import evaluating, keeping_buffers
from ortho_fx.operators import by_position, operator
from ortho_fx.operators.formulas import forward_formula

_LGAMMA = (torch.ops.aten.lgamma.default, torch.ops.prims.lgamma.default)
# These loggers report operators that the model does not use, and optimisations that they did not make.
_TALKATIVE = ("torch.onnx", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Export:
    """An exported file, and the difference between its outputs and those of the model.

    Attributes:
        path: the file. ONNX stores weights of more than 1.5 GB in a second file, named `path` with ".data" added.
        size: bytes of the file, or of both.
        inputs: name, shape and dtype of each input tensor ("tokens (batch, 128) int64").
        difference: the largest absolute difference between an output of the file and of the model.
        relative_difference: the same, in units of the largest absolute value of that output.
        checked_in: the runtime that ran the file for this comparison ("onnxruntime 1.20.0").
    """

    path: Path
    size: int
    inputs: tuple[str, ...]
    difference: float
    relative_difference: float
    checked_in: str

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.size / 1e6:.2f} MB, takes {', '.join(self.inputs)}\n"
            f"largest difference from the model in {self.checked_in}: {self.difference:.2g}, "
            f"{self.relative_difference:.2g} of the largest output"
        )


def export_onnx(
    model: nn.Module,
    example_inputs: Batch,
    path: str | Path,
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-4,
) -> Export:
    """Writes a model, rewritten or not, as an ONNX file of standard operators, and checks it in onnxruntime.

    The file computes what the model computes in eval mode; the model is not changed. If training is finished, call
    `freeze_` first: the file becomes smaller and faster.

    Args:
        model: a model in float32 or float64.
        example_inputs: a tensor, a tuple of positional arguments or a map of keyword arguments. The file takes inputs
            of these shapes and dtypes.
        path: the file, ending in .onnx. An earlier file is replaced only after the check has passed.
        dynamic_batch: whether dimension 0 of every input is a batch of any size. The example inputs then need at least
            two members, and the file is also checked with one member more.
        tolerance: the largest allowed difference from the model's output, in units of its largest absolute value.

    Returns:
        The file, its inputs, and its difference from the model.

    Raises:
        OrthoFxError: another ending, half precision, a model that `torch.export` or ONNX cannot express, outputs that
            are not finite or off by more than the tolerance, a disk that cannot be written, or a library that is
            missing.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> report = rewrite_(model, ExpansionConfig("fourier", 5))
        >>> export_onnx(model, torch.randn(2, 8), "model.onnx", dynamic_batch=True).inputs  # doctest: +SKIP
        ('input (batch, 8) float32',)
    """
    checked_model(model)
    path, onnxruntime = _checked_path(path, ".onnx"), _onnxruntime()
    half = next((name for name, value in model.state_dict().items() if value.dtype.itemsize == 2), None)
    if half is not None:
        raise OrthoFxError(f"ONNX files are for float32 and float64, and {half} is half precision: call model.float()")
    with evaluating(checked_model(model)), keeping_buffers(model):
        program = _program(model, example_inputs, dynamic_batch)
        _fold_lgamma(program)
        with _quiet(), _naming(model, "an ONNX model"):
            translated = torch.onnx.export(program, dynamo=True, verbose=False)
        assert translated is not None
        _register_constants(translated.model.graph)
        foreign = sorted({node.domain for node in translated.model.graph.all_nodes()} - {""})
        if foreign:
            raise OrthoFxError(f"{type(model).__name__} needs operators that are not ONNX' own: {', '.join(foreign)}")
        with atomic_file(path) as temporary:
            translated.save(temporary)
            run = _session(onnxruntime, temporary)
            difference = _check(model, example_inputs, run, dynamic_batch, tolerance)
        inputs = _described(program, example_inputs, dynamic_batch)
    return Export(path, _size(path), inputs, *difference, f"onnxruntime {onnxruntime.__version__}")


def export_program(
    model: nn.Module,
    example_inputs: Batch,
    path: str | Path,
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-4,
) -> Export:
    """Writes a model, rewritten or not, as a .pt2 file, which `torch.export.load` reads without ortho_fx.

    The program holds only PyTorch's own operators. Its `module()` has the parameters of the model, with their names. It
    computes what the model computes in eval mode; the model is not changed.

    Args:
        model, example_inputs, dynamic_batch, tolerance: as for `export_onnx`; any dtype.
        path: the file, ending in .pt2. An earlier file is replaced only after the check has passed.

    Returns:
        The file, its inputs, and its difference from the model.

    Raises:
        OrthoFxError: another ending, a model that `torch.export` cannot express, outputs that are not finite or off
            by more than the tolerance, or a disk that cannot be written.
    """
    path = _checked_path(path, ".pt2")
    with evaluating(checked_model(model)), keeping_buffers(model):
        program = _program(model, example_inputs, dynamic_batch)
        with atomic_file(path) as temporary, _quiet():
            with _writer(temporary) as file:
                torch.export.save(program, file)
            module = torch.export.load(temporary).module()
            difference = _check(model, example_inputs, lambda batch: call(module, batch), dynamic_batch, tolerance)
        inputs = _described(program, example_inputs, dynamic_batch)
    return Export(path, _size(path), inputs, *difference, f"torch.export {torch.__version__}")


class _Kept(io.FileIO):
    """A file that keeps its first error: PyTorch's writer in C++ ends the process when a write fails."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        data = memoryview(content)
        place = 0
        while self.error is None and place < len(data):
            try:
                place += super().write(data[place:]) or 0  # a full disk may take a part
            except OSError as error:
                self.error = error
        return len(data)


@contextmanager
def _writer(path: Path) -> Iterator[_Kept]:
    """A file for PyTorch's writer; its error is raised at the end of the block."""
    with _Kept(path, "wb") as file:
        yield file
        if file.error is not None:
            raise file.error


def _program(model: nn.Module, batch: Batch, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """The graph of the model in PyTorch's own operators."""
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (_positional(batch), {})
    shapes: Any = None
    if dynamic_batch:
        small = [value.shape for value in _tensors(batch) if not value.dim() or value.shape[0] < 2]
        if small:
            raise OrthoFxError(
                f"a dynamic batch needs example inputs of two members or more; got shape {tuple(small[0])}"
            )
        dim = torch.export.Dim("batch")
        shapes = trees.mapped(lambda value: {0: dim} if isinstance(value, Tensor) else None, kwargs or args)
    with _quiet(), _naming(model, "a graph of torch.export"):
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes).run_decompositions(_formulas())
    for node in program.graph.nodes:
        assert not str(node.target).startswith("ortho_fx")
        # Every node holds file paths of this machine; they would take more space than a small model's weights.
        node.meta.pop("stack_trace", None)
    return program


def _formulas() -> dict[Any, Callable[..., Any]]:
    """The decompositions of our operators only. Others, such as attention, stay whole for the runtime to optimise."""
    return {operator(basis): by_position(forward_formula(basis), 1 + len(basis.parameters)) for basis in BASES.values()}


def _positional(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _fold_lgamma(program: torch.export.ExportedProgram) -> None:
    """Replaces each lgamma of constants by its value: ONNX has no lgamma, and tied frequencies need that of 2, 3 ..."""
    graph = program.graph

    def value(node: fx.Node) -> Any:
        if not callable(node.target):
            return None  # an input has no constant value
        inputs = {source: value(source) for source in node.all_input_nodes}
        if any(result is None for result in inputs.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), inputs.__getitem__)
        return node.target(*args, **kwargs)

    for node in [node for node in graph.nodes if node.target in _LGAMMA]:
        numbers = value(node)
        if numbers is None:
            continue
        with graph.inserting_before(node):
            parts = [
                graph.call_function(torch.ops.aten.full.default, ([1], number), {"dtype": numbers.dtype})
                for number in numbers.flatten().tolist()
            ]
            joined = graph.call_function(torch.ops.aten.cat.default, (parts,))
            shaped = graph.call_function(torch.ops.aten.view.default, (joined, list(numbers.shape)))
        joined.meta["val"] = node.meta["val"].flatten()
        for part, fake in zip(parts, joined.meta["val"].split(1), strict=True):
            part.meta["val"] = fake
        shaped.meta = copy.copy(node.meta)
        node.replace_all_uses_with(shaped)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _register_constants(graph: Any) -> None:
    """Registers constants that nodes read and the file would otherwise lack.

    If a value is clamped twice, onnxscript (0.7) makes two Clip nodes, but one entry for their four bounds.
    """
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            if graph.initializers.get(value.name) is not value:
                graph.register_initializer(value)


def _session(onnxruntime: Any, path: Path) -> Callable[[Batch], list[Tensor]]:
    """A function that runs an ONNX file on a batch."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise OrthoFxError(f"onnxruntime cannot load the model: {_first_line(error)}") from error

    def run(batch: Batch) -> list[Tensor]:
        values = (value.detach().cpu().numpy() for value in _tensors(batch))
        names = (taken.name for taken in session.get_inputs())
        try:
            return [torch.from_numpy(output) for output in session.run(None, dict(zip(names, values, strict=True)))]
        except Exception as error:
            raise OrthoFxError(f"onnxruntime cannot run the model: {_first_line(error)}") from error

    return run


def _check(
    model: nn.Module, batch: Batch, run: Callable[[Batch], Any], dynamic_batch: bool, tolerance: float
) -> tuple[float, float]:
    """The largest absolute and relative difference between the outputs of the model and of its file."""
    batches = [batch]
    if dynamic_batch:
        batches.append(trees.mapped(lambda v: torch.cat([v, v[:1]]) if isinstance(v, Tensor) else v, batch))
    largest = relative = 0.0
    for batch in batches:
        with torch.no_grad():
            # Copies, because some models write to their inputs.
            expected, actual = (_tensors(f(copy.deepcopy(batch))) for f in (lambda b: call(model, b), run))
        if [value.shape for value in expected] != [value.shape for value in actual]:
            shapes = [", ".join(str(tuple(value.shape)) for value in values) for values in (expected, actual)]
            raise OrthoFxError(
                f"the exported {type(model).__name__} returns {shapes[1]} where the model does {shapes[0]}"
            )
        for ours, theirs in zip(expected, actual, strict=True):
            if not ours.isfinite().all():
                raise OrthoFxError(f"the outputs of {type(model).__name__} for the example inputs are not finite")
            if not ours.numel():
                continue
            ours, theirs = ours.cpu().double(), theirs.cpu().double()
            difference = float((ours - theirs).abs().max())
            difference = math.inf if math.isnan(difference) else difference
            largest = max(largest, difference)
            if difference:
                scale = float(ours.abs().max())
                relative = max(relative, difference / scale if scale else math.inf)
    if relative > tolerance:
        raise OrthoFxError(
            f"the exported {type(model).__name__} is off by {relative:.2g} of the largest output; "
            f"allowed is {tolerance:g}"
        )
    return largest, relative


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in trees.leaves(values) if isinstance(leaf, Tensor)]


def _described(program: torch.export.ExportedProgram, batch: Batch, dynamic_batch: bool) -> tuple[str, ...]:
    """The name, shape and dtype of each input tensor, as text."""
    leaves = trees.leaves(dict(batch) if isinstance(batch, Mapping) else _positional(batch))
    described = []
    for name, value in zip(program.graph_signature.user_inputs, leaves, strict=True):
        if isinstance(value, Tensor):
            sizes = [str(size) for size in value.shape]
            if dynamic_batch:
                sizes[0] = "batch"
            described.append(f"{name} ({', '.join(sizes)}) {str(value.dtype).removeprefix('torch.')}")
    return tuple(described)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, path.with_name(path.name + ".data")) if file.exists())


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _naming(model: nn.Module, what: str) -> Iterator[None]:
    """Turns an exporter's error into one line. Its reason is at the end of a chain of errors."""
    try:
        yield
    except OrthoFxError:
        raise
    except ModuleNotFoundError as error:
        raise OrthoFxError(f"ONNX files need {error.name}: pip install onnx onnxscript onnxruntime") from None
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise OrthoFxError(f"{type(model).__name__} cannot be made into {what}: {_first_line(first)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _checked_path(path: str | Path, ending: str) -> Path:
    path = Path(path)
    if path.suffix != ending:
        raise OrthoFxError(f"the file must end in {ending}; got {path}")
    return path


def _onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, for torch.onnx
    except ImportError:
        raise OrthoFxError("ONNX files need libraries: pip install onnx onnxscript onnxruntime") from None
    return onnxruntime
