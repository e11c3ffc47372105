"""The values of packed weights, as their modules compute with them, by rows.

Each kind is told by what its module holds, so no optional library is imported before one of its
modules is met.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from math import gcd

import torch
from torch import nn

from swkernels.ops.quantized import QuantizedTensor

from .structure import base_of

_CPU_ROWS = 32  # that bitsandbytes interleaves in its layout for CPUs


def is_packed(module: nn.Module, weight: object) -> bool:
    """Whether ``packed_rows`` knows the weight; reads none of it. Arguments as there."""
    if getattr(weight, "is_expert_stack", False):
        return True
    base, _ = base_of(module)
    stored = getattr(base, "weight", None)
    return (
        getattr(base, "packed", None) is not None
        or getattr(stored, "quant_state", None) is not None
        or _int8_scales(base) is not None
    )


def packed_rows(
    module: nn.Module, weight: object, expert: int | None, start: int, stop: int
) -> torch.Tensor:
    """Return a dequantized copy of rows [stop - start, columns] of a packed weight in float32.

    Known are what ``swkernels.quant`` writes (layers and stacks of experts) and the 4-bit and
    8-bit layers of bitsandbytes. Only the codes of these rows are decoded (of bitsandbytes'
    layout for CPUs: of the 32 rows that they lie among).

    Args:
        module: the linear layer, through adapters, or the module of the experts.
        weight: its weight as it is stored; ``is_packed`` of both must hold.
        expert: which one of a stack of experts.
        start, stop: the rows.
    """
    if getattr(weight, "is_expert_stack", False):
        return _own(weight.expert(expert).packed, start, stop)
    base, _ = base_of(module)
    packed = getattr(base, "packed", None)
    if packed is not None:
        return _own(packed, start, stop)
    stored = base.weight
    if getattr(stored, "quant_state", None) is not None:
        return _four_bit(stored, start, stop)
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(stored.data[start:stop], _int8_scales(base)[start:stop]).float()


def _int8_scales(base: nn.Module) -> torch.Tensor | None:
    scales = getattr(getattr(base, "state", None), "SCB", None)
    return getattr(getattr(base, "weight", None), "SCB", None) if scales is None else scales


def _own(q: QuantizedTensor, start: int, stop: int) -> torch.Tensor:
    """Cut the rows out as a packed matrix of their own, with a scale for each part of a row."""
    H, (r, c), bits = q.plan.columns, q.plan.block, q.plan.code.bits
    first = start - (bits == 4 and start * H % 2)  # a row that begins within a byte
    if r == 0:
        width = gcd(c, H)
        of_block = torch.arange(first * H, stop * H, width, device=q.device) // c
    else:
        width, across = c, -(-H // c)
        rows = torch.arange(first, stop, device=q.device)[:, None] // r
        of_block = (rows * across + torch.arange(across, device=q.device)).view(-1)
    bounds = torch.tensor([first * H, stop * H], dtype=torch.int32, device=q.device)
    low, high = torch.searchsorted(q.positions, bounds).tolist()
    scales = q.block_scales()[of_block]
    cut = replace(
        q,
        shape=(stop - first, H),
        plan=replace(
            q.plan,
            rows=stop - first,
            block=(0 if r == 0 else 1, width),
            scale_dtype="float16" if scales.dtype == torch.float16 else "float32",
        ),
        codes=q.codes[first * H * bits // 8 : -(-stop * H * bits // 8)],
        scales=scales,
        zero_points=None if q.zero_points is None else q.zero_points[of_block],
        positions=q.positions[low:high] - first * H,
        values=q.values[low:high],
    )
    return cut.dequantize(torch.float32)[start - first :]


def _four_bit(stored: nn.Parameter, start: int, stop: int) -> torch.Tensor:
    from bitsandbytes import functional

    data, state = stored.data, stored.quant_state
    (D, H), block = state.shape, state.blocksize
    absmax, dtype, first = state.absmax, state.dtype, 0  # the row at which data begins
    if getattr(state, "packing_format_for_cpu", False):  # its first forward on a CPU rearranges it
        first = start // _CPU_ROWS * _CPU_ROWS
        last = min(-(-stop // _CPU_ROWS) * _CPU_ROWS, D)
        data, dtype = data[first:last], state.original_dtype
        # Back would quantize the scales once more, or leave them as they lie: [H / block, D].
        absmax = absmax[:, first:last].T.reshape(-1).float()
        part = copy(state)
        part.original_nested, part.original_qshape = False, (-1, 1)
        part.original_storage_type = None
        data, _ = functional._convert_weight_packed_for_cpu_inverse(data.clone(), part)
        D = last
    elif state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        absmax = absmax.float()
    low, high = (start - first) * H, (stop - first) * H
    a, b = low // block * block, min(-(-high // block) * block, (D - first) * H)  # whole blocks
    codes = data.contiguous().view(-1).view(torch.uint8)[a // 2 : -(-b // 2)].view(-1, 1)
    cut = functional.QuantState(
        absmax=absmax[a // block : -(-b // block)].contiguous(),
        shape=(b - a,),
        dtype=dtype,
        blocksize=block,
        quant_type=state.quant_type,
        code=state.code,
    )
    values = functional.dequantize_4bit(codes, cut).view(-1)
    return values[low - a : high - a].view(stop - start, H).float()
