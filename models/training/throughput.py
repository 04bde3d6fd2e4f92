"""FLOPs of a training step and peak FLOPs of a GPU, for the model FLOPs utilisation:

    MFU = samples a second x FLOPs of a sample / peak FLOPs of the GPUs

as in Chowdhery et al., "PaLM", 2022, appendix B: only FLOPs that the model needs count, recomputation does not.
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

# Dense FLOPs a second by the vendors' data sheets: half precision accumulated in float32, float32 on tensor cores
# (TF32), and float32 without them. The first pattern that matches a device's name counts.
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
# GPUs whose tensor cores have no bfloat16.
_NO_BFLOAT16 = r"V100|T4"


def training_flops(model: nn.Module, inputs: Tensor) -> float:
    """FLOPs of forward and backward pass for one sample: of matrix products, convolutions and attention.

    They are counted on the meta device: the model is untouched, and no memory of its size is allocated. Causal
    attention counts in full, as is usual. Elementwise operations, and so the expansions, count nothing.

    Args:
        model: the model before it is sharded, called with one tensor. `requires_grad` decides which gradients count.
        inputs: a batch, for its shape and dtype.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    state = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    batch = torch.empty_like(inputs, device="meta")
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with (
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
        # Other kernels of attention compute its scores again in the backward pass, which is recomputation.
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
    """FLOPs of a convolution's gradients, from the shapes of the arguments; each takes as many as the convolution.

    PyTorch's own formula ignores groups in the weight's gradient. For a depthwise convolution its count is too high by
    a factor of the number of channels.
    """
    transposed, wanted = others[4], others[-1]
    places = inputs[2:] if transposed else gradient[2:]
    return 2 * inputs[0] * math.prod(places) * math.prod(weight) * sum(wanted[:2])


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Dense FLOPs a second for matrix products of a dtype, as the vendor states them; None for an unknown device.

    For float32 they are those of TF32 if `torch.set_float32_matmul_precision` allows it.
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
