"""How much a training step computes, and how much of it a GPU could: model FLOPs utilisation.

    MFU = samples a second x FLOPs of a sample / peak FLOPs of the GPUs

as in Chowdhery et al., "PaLM", 2022, appendix B: FLOPs that the model needs, and not those of recomputing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ortho_fx import trees

# Dense FLOPs a second by the vendors' data sheets, for half precision that accumulates in float32, for float32 on
# tensor cores (TF32) and for float32 without; the first pattern that a device's name has is taken.
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    (r"GB200", 2500e12, 1250e12, 80e12),
    (r"B200", 2250e12, 1125e12, 75e12),
    (r"H200 NVL", 835.5e12, 417.5e12, 60e12),
    (r"H200|GH200", 989.4e12, 494.7e12, 66.9e12),
    (r"H100 PCIe", 756e12, 378e12, 51.2e12),
    (r"H100 NVL", 835.5e12, 417.5e12, 60e12),
    (r"H100", 989.4e12, 494.7e12, 66.9e12),
    (r"A100", 312e12, 156e12, 19.5e12),
    (r"A40", 149.7e12, 74.8e12, 37.4e12),
    (r"A30", 165e12, 82e12, 10.3e12),
    (r"A10G", 70e12, 35e12, 31.2e12),
    (r"A10", 125e12, 62.5e12, 31.2e12),
    (r"L40S", 362e12, 183e12, 91.6e12),
    (r"L40", 181e12, 90.5e12, 90.5e12),
    (r"L4", 121e12, 60e12, 30.3e12),
    (r"RTX 4090$", 165.2e12, 82.6e12, 82.6e12),
    (r"RTX 3090$", 71e12, 35.6e12, 35.6e12),
    (r"V100", 125e12, 15.7e12, 15.7e12),
    (r"T4", 65e12, 8.1e12, 8.1e12),
)
# Without bfloat16 in their tensor cores.
_NO_BFLOAT16 = r"V100|T4"


def training_flops(model: nn.Module, inputs: Tensor) -> float:
    """FLOPs of forward and backward pass for one sample: of matrix products, convolutions and attention.

    Counted on the meta device, which holds no numbers: the model is left alone, and nothing of its size is allocated.
    A causal attention counts in full, as is usual. What works element by element counts nothing, as the expansions do.

    Args:
        model: the model before it is sharded, called with one tensor; its parameters that need gradients get them.
        inputs: a batch, for its shape and dtype.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    state = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    batch = torch.empty_like(inputs, device="meta")
    # The other kernels of attention compute its scores a second time in the backward pass.
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with (
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
    ):
        outputs = [leaf for leaf in trees.leaves(functional_call(model, state, (batch,))) if leaf.requires_grad]
        if outputs:
            torch.autograd.backward([leaf.sum() for leaf in outputs])
    return counter.get_total_flops() / len(inputs)


def _convolution_backward(
    gradient: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *others: Any, **_: Any
) -> int:
    """FLOPs of a convolution's gradients from the shapes of what it gets: each takes as many as the convolution.

    PyTorch's own formula takes no notice of groups in the weight's gradient: for a depthwise convolution it counts as
    often too many as there are channels.
    """
    transposed, wanted = others[4], others[-1]
    places = inputs[2:] if transposed else gradient[2:]
    return 2 * inputs[0] * math.prod(places) * math.prod(weight) * sum(wanted[:2])


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Dense FLOPs a second that a device's maker states for matrix products of a dtype; None where we know none.

    float32 is that of TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a part of a GPU
        return None
    for pattern, half, tensor_float, single in _PEAKS:
        if re.search(rf"\b(?:{pattern})(?![A-Za-z0-9])", name):
            if dtype == torch.float32:
                return single if torch.get_float32_matmul_precision() == "highest" else tensor_float
            missing = dtype == torch.bfloat16 and re.search(_NO_BFLOAT16, name)
            return half if dtype in (torch.float16, torch.bfloat16) and not missing else None
    return None
