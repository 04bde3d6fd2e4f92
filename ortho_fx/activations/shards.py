"""Expansions of tensors of which each process holds a part: DTensors, and the local tensors of tensor parallelism.

An expansion is elementwise, so each process computes its part. The coefficients' gradient is a sum over all elements:
where the processes along a mesh dimension hold different elements, their gradients are summed over it; where they hold
the same, each has the whole sum already. With one expansion a channel, a process that holds some channels takes theirs.

A plain local tensor does not say what it is a part of. `ExpansionParallel` in the plan of `parallelize_module` says it.
Without that, neighbours that are DTensors in a forward pass are the sign: `parallel_neighbour` looks for it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from ortho_fx.activations.channels import ComputesParts, channel_dim_of
from ortho_fx.errors import OperandError
from ortho_fx.operands import check_operands
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.sharded import is_distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


class Shardable(ComputesParts, Protocol):
    """An expansion that may be told how its plain inputs are distributed."""

    input_layouts: tuple[Placement, ...] | None


def expand_shards(activation: Shardable, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """y(x) of a DTensor, or of a local tensor that is distributed as `activation.input_layouts` says.

    Raises:
        OperandError: parameters that are sharded, or no DTensors.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    layouts: tuple[Placement, ...] | None
    if isinstance(x, DTensor):
        plain = [name for name, operand in operands.items() if operand.requires_grad and not is_distributed(operand)]
        if plain:  # optimizers do not take them beside DTensors either
            raise OperandError(
                f"{activation.called} got mixed torch.Tensor and DTensor: its input is a DTensor and {plain[0]} is "
                "none. Put ortho_fx.rewriting.parallel.ExpansionParallel() for it into the plan of parallelize_module"
            )
        mesh = x.device_mesh
        # What else there is, such as sums that are still to be made, an elementwise function cannot take.
        layouts = tuple(p if type(p) in (Shard, Replicate) else Replicate() for p in x.placements)
        local, shape = x.redistribute(placements=layouts).to_local(), tuple(x.shape)
    else:
        mesh, layouts = _mesh_of(activation, operands), activation.input_layouts
        assert layouts is not None, "a plain input comes here where ExpansionParallel has set them"
        local, shape = x, _whole_shape(activation, x, mesh, layouts)
    parameters = {name: _local(activation.called, operand, name, mesh, layouts) for name, operand in operands.items()}
    check_operands(activation.called, local, parameters)
    dim = 1
    if activation.channels is not None:
        dim = channel_dim_of(activation, local, shape) % local.dim()
        start, length = _range(activation.channels, dim, local.dim(), mesh, layouts)
        if length != activation.channels:
            parameters = {name: _some(p, activation.channels, start, length) for name, p in parameters.items()}
    y = activation.expand(local, parameters, dim)
    if isinstance(x, DTensor):
        return DTensor.from_local(y, mesh, layouts, run_check=False, shape=x.shape, stride=x.stride())
    return y


def replicate_(module: nn.Module, mesh: DeviceMesh) -> None:
    """Makes the buffers of a module DTensors that each process has whole."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    for name, constant in list(module.named_buffers(recurse=False)):
        module.register_buffer(name, distribute_tensor(constant, mesh, [Replicate()], src_data_rank=None))


def _mesh_of(activation: Shardable, operands: Mapping[str, Tensor]) -> DeviceMesh:
    for operand in operands.values():
        if is_distributed(operand):
            return operand.device_mesh  # type: ignore[attr-defined]
    raise OperandError(
        f"{activation.called}: ExpansionParallel made its parameters DTensors, and they are none any more: call "
        "parallelize_module after what replaced them"
    )


def _local(site: str, operand: Tensor, name: str, mesh: DeviceMesh, layouts: tuple[Placement, ...]) -> Tensor:
    """A parameter as a plain tensor, whose gradient is summed over the processes that hold different elements.

    A parameter on the input's own mesh gets what PyTorch's operators give it: a gradient that says that its sum is
    still to be made. The optimizer makes it, or `fully_shard` with the data-parallel dimensions of such a mesh, which
    sums over them in any case and would count a finished sum once for each process.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    summed = [Partial() if layout.is_shard() else Replicate() for layout in layouts]
    if isinstance(operand, DTensor):
        if not all(placement.is_replicate() for placement in operand.placements):
            raise OperandError(f"{site}: {name} is sharded at this call: call the module that fully_shard wrapped")
        if operand.device_mesh == mesh:
            return operand.to_local(grad_placements=summed)
        operand = operand.to_local(grad_placements=operand.placements)
    replicated = DTensor.from_local(operand, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.to_local(grad_placements=summed)


def _whole_shape(activation: Shardable, x: Tensor, mesh: DeviceMesh, layouts: tuple[Placement, ...]) -> tuple[int, ...]:
    """The shape of what a local tensor is a part of, as far as the channels go."""
    shape = list(x.shape)
    if activation.channels is not None:
        for layout in layouts:
            dim = getattr(layout, "dim", None)
            if dim is not None and -x.dim() <= dim < x.dim():
                _, length = _range(activation.channels, dim % x.dim(), x.dim(), mesh, layouts)
                if x.shape[dim] == length:
                    shape[dim] = activation.channels
    return tuple(shape)


def _range(channels: int, dim: int, dims: int, mesh: DeviceMesh, layouts: tuple[Placement, ...]) -> tuple[int, int]:
    """The first and the number of the channels that this process holds, in chunks as `torch.chunk` makes them."""
    start, length = 0, channels
    for mesh_dim, layout in enumerate(layouts):
        sharded = getattr(layout, "dim", None)
        if layout.is_shard() and sharded is not None and sharded % dims == dim:
            chunk = -(-length // mesh.size(mesh_dim))
            first = min(chunk * mesh.get_local_rank(mesh_dim), length)
            start, length = start + first, min(chunk, length - first)
    return start, length


def _some(parameter: Tensor, channels: int, start: int, length: int) -> Tensor:
    """The parameters of a range of channels, one set for each."""
    if parameter.dim() < 2:
        return parameter
    if parameter.shape[1] != channels:
        parameter = parameter.repeat_interleave(channels // parameter.shape[1], dim=1)
    return parameter.narrow(1, start, length).contiguous()


# The modules that hold each expansion, as they were found.
_OWNERS: WeakKeyDictionary[nn.Module, list[ref[nn.Module]]] = WeakKeyDictionary()


def undeclared(site: str, neighbour: str) -> str:
    """What is wrong with a plain input beside such a neighbour."""
    return (
        f"{site}: its neighbour {neighbour} is parallel over processes, so its input may be a part of a tensor, and "
        "the gradient of its coefficients would miss the others. Put ortho_fx.rewriting.parallel.ExpansionParallel() "
        "for it into the plan of parallelize_module, or ExpansionParallel(input_layouts=Replicate()) where every "
        "process has the whole input"
    )


def parallel_neighbour(expansion: nn.Module) -> str:
    """A parameter beside an expansion that is a DTensor, by its name from their owner; empty where there is none."""
    from torch.distributed import get_world_size

    if get_world_size() == 1:
        return ""
    if expansion not in _OWNERS:
        _find_owners(expansion)
    for known in _OWNERS[expansion]:
        owner = known()
        if owner is None:
            continue
        for name, module, wrapped in _around(owner):
            for key, parameter in module._parameters.items():
                if parameter is not None and is_distributed(parameter) and _is_tensor_parallel(parameter, wrapped):
                    return f"{name}.{key}" if name else key
    return ""


def _find_owners(expansion: nn.Module) -> None:
    """One look at everything that lives; it finds the owners of all expansions."""
    _OWNERS[expansion] = []
    for found in gc.get_objects():
        if issubclass(type(found), nn.Module) and not issubclass(type(found), Expansion):
            for child in vars(found).get("_modules", {}).values():
                if isinstance(child, Expansion):
                    owners = _OWNERS.setdefault(child, [])
                    if all(known() is not found for known in owners):
                        owners.append(ref(found))


def _around(owner: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """The owner, its children and theirs, with the name from the owner and whether `fully_shard` wraps them."""
    yield "", owner, False
    for key, child in owner._modules.items():
        if child is not None and not isinstance(child, Expansion):
            wrapped = _is_wrapped(child)
            yield key, child, wrapped
            for inner, grandchild in child._modules.items():
                if grandchild is not None:
                    yield f"{key}.{inner}", grandchild, wrapped or _is_wrapped(grandchild)


def _is_wrapped(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _is_tensor_parallel(parameter: Tensor, wrapped: bool) -> bool:
    """Whether a DTensor is one for another reason than `fully_shard`, which shards what it wraps in one dimension."""
    return not wrapped or sum(not p.is_replicate() for p in parameter.placements) > 1  # type: ignore[attr-defined]
