"""`ExpansionParallel`: expansions in a plan of tensor or sequence parallelism.

    parallelize_module(
        mlp, mesh, {"up": ColwiseParallel(), "act": ExpansionParallel(), "down": RowwiseParallel()}
    )

Each process computes the expansion of its part of the elements, so that the gradient of the coefficients is the sum
over the processes. With one expansion a channel, each process takes those of its channels.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.activations.freeze import FrozenExpansion
from ortho_fx.activations.shards import replicate_
from ortho_fx.errors import OrthoFxError


class ExpansionParallel(ParallelStyle):
    """The entry for an expansion in a plan of `parallelize_module`.

    The parameters become DTensors, of which every process has the whole. A plain input counts as this process' part of
    a tensor, and the output is plain as well. A DTensor input says itself how it is distributed, and the output is
    distributed in the same way.

    Args:
        input_layouts: how a plain input is distributed. `Shard(-1)`, the output of `ColwiseParallel`, when omitted;
            `Shard(1)` inside of sequence parallelism; `Replicate()` where every process has the whole input.

    Raises:
        OrthoFxError: a layout of another kind, or a module that is no expansion with parameters.

    Examples:
        >>> style = ExpansionParallel(input_layouts=Shard(1))
        >>> style
        ExpansionParallel(input_layouts=Shard(dim=1))
    """

    def __init__(self, *, input_layouts: Placement = Shard(-1)) -> None:  # noqa: B008  -- it never changes
        super().__init__()
        if type(input_layouts) not in (Shard, Replicate):
            raise OrthoFxError(f"input_layouts must be Shard(dim) or Replicate(); got {input_layouts!r}")
        self.input_layouts = input_layouts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, ExpansionActivation | FrozenExpansion):
            raise OrthoFxError(f"ExpansionParallel is for expansions; got {type(module).__name__}: call rewrite_ first")
        for inner in module.modules():  # a parametrization keeps the original parameters
            for name, parameter in inner.named_parameters(recurse=False):
                replicated = distribute_tensor(
                    parameter.detach(), device_mesh, [Replicate()], src_data_rank=self.src_data_rank
                )
                inner.register_parameter(name, nn.Parameter(replicated, requires_grad=parameter.requires_grad))
        if isinstance(module, FrozenExpansion):
            replicate_(module, device_mesh)
        module.input_layouts = (self.input_layouts,)
        return module

    def __repr__(self) -> str:
        return f"{type(self).__name__}(input_layouts={self.input_layouts!r})"
