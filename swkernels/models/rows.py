"""The values of packed weights, as their modules compute with them.

Each kind is told by what its module holds, so no optional library is imported before one of its
modules is met.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from .structure import base_of


def packed_values(
    module: nn.Module, weight: object, expert: int | None = None
) -> torch.Tensor | None:
    """Return a dequantized copy [rows, columns] of a packed weight in float32, or None.

    Known are what ``swkernels.quant`` writes (layers and stacks of experts) and the 4-bit and
    8-bit layers of bitsandbytes.

    Args:
        module: the linear layer, through adapters, or the module of the experts.
        weight: its weight as it is stored.
        expert: which one of a stack of experts.
    """
    if getattr(weight, "is_expert_stack", False):
        return weight.expert(expert).packed.dequantize(torch.float32)
    base, _ = base_of(module)
    packed = getattr(base, "packed", None)
    if packed is not None:
        return packed.dequantize(torch.float32)
    stored = getattr(base, "weight", None)
    if getattr(stored, "quant_state", None) is not None:
        return _four_bit(stored)
    scales = getattr(getattr(base, "state", None), "SCB", None)
    scales = getattr(stored, "SCB", None) if scales is None else scales
    if scales is not None:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(stored.data, scales).float()
    return None


def _four_bit(stored: nn.Parameter) -> torch.Tensor:
    from bitsandbytes import functional

    data, state = stored.data, stored.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # its first forward on a CPU rearranges it
        back = functional._convert_weight_packed_for_cpu_inverse
        state = deepcopy(state)
        # Back would quantize the scales once more, or leave them as they lie: [H / block, D].
        scales, state.original_nested = state.absmax.T.reshape(-1).float(), False
        data, state = back(data.clone(), state)
        state.absmax = scales
    return functional.dequantize_4bit(data, state).float()
