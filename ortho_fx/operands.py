"""Which tensors an expansion can be computed with; the others are an error that names its site.

Operators that mix the meta device with another one run on the meta device, whose result has no values: without a check
an output on the input's device would be uninitialised memory. Storage dtypes, such as float8, hold numbers and compute
with none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ortho_fx.errors import OperandError
from ortho_fx.sharded import is_distributed

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_operands(site: str, x: Tensor, operands: Mapping[str, Tensor]) -> None:
    """Compares devices, dtypes and distributions, which a trace does once and compiled code never.

    Raises:
        OperandError: the input and an operand lie on different devices, one has a dtype that nothing computes with,
            or an operand is quantized, or distributed over processes while the input is not.
    """
    if x.dtype not in COMPUTED:
        raise OperandError(f"{site} computes with float16, bfloat16, float32 and float64; its input is {x.dtype}")
    for name, operand in operands.items():
        if (
            operand.device != x.device
            or operand.dtype not in COMPUTED
            or is_distributed(operand)
            or _is_quantized(operand)
        ):
            raise OperandError(_problem(site, x, name, operand))


def _is_quantized(operand: Tensor) -> bool:
    """Whether torchao keeps it in fewer bits, in a subclass of tensors that only some operators take."""
    cls = type(operand)
    return cls is not Tensor and cls is not nn.Parameter and cls.__module__.startswith("torchao.")


def _problem(site: str, x: Tensor, name: str, operand: Tensor) -> str:
    if operand.is_meta:
        return (
            f"{site}: {name} is on the meta device, without values, and its input on {x.device}: load them, or call "
            "to_empty(device=...) and reset_parameters()"
        )
    if _is_quantized(operand):
        return (
            f"{site}: {name} is quantized ({type(operand).__name__}); an expansion has a few numbers, which torchao's "
            "filter or map of names has to leave as they are"
        )
    if operand.device != x.device:
        return f"{site}: {name} is on {operand.device} and its input on {x.device}"
    if operand.dtype not in COMPUTED:
        return f"{site} computes with float16, bfloat16, float32 and float64; {name} is {operand.dtype}"
    return (
        f"{site}: {name} is distributed over processes and its input is not. Under fully_shard, call the module that "
        'it wrapped, and where several of them share this expansion, rewrite with sharing="site" and granularity '
        '"layer"; under tensor parallelism, put ortho_fx.rewriting.parallel.ExpansionParallel() into the plan'
    )
