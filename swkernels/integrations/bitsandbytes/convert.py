"""Packed matrices in bitsandbytes' format, and its layers as packed matrices."""

from __future__ import annotations

from dataclasses import replace

import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch import nn

from swkernels.backends.blocks import pack, unpack
from swkernels.errors import InvalidInput
from swkernels.ops import QuantizedTensor
from swkernels.ops.block_dequantize import check_packed

from .layers import read_4bit, read_layer
from .restore import restoration_of

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def from_bitsandbytes(weight: Linear4bit | Linear8bitLt | Params4bit) -> QuantizedTensor:
    """Return a quantized weight of bitsandbytes as a packed matrix.

    4-bit codes are the same bytes and scales the same numbers; scales that are quantized
    themselves (double quantization) are those that bitsandbytes computes from them. An 8-bit
    weight has blocks of a row with scales SCB / 127. What ``restore_super_weights`` has restored
    in a layer comes along as outliers. Codes share the layer's memory where they can.

    Args:
        weight: a layer, or the parameter of a Linear4bit.

    Raises:
        InvalidInput: something else, or a weight that is not quantized yet, sharded, or kept in
            16 bits.
    """
    if isinstance(weight, Params4bit):
        return read_4bit(weight, weight.quant_state, "the parameter")
    if not isinstance(weight, nn.Module):
        raise InvalidInput(
            "expected a Linear4bit, Linear8bitLt or Params4bit of bitsandbytes, got "
            f"{type(weight).__name__}"
        )
    q = read_layer(weight, "the layer")
    restoration = restoration_of(weight)
    if restoration is None:
        return q
    positions = restoration.positions.to(q.device)
    codes = unpack(q.codes, q.plan.code, q.plan.elements).clone()
    codes[positions] = q.plan.code.zero
    return replace(
        q,
        codes=pack(codes, q.plan.code),
        positions=positions.int(),
        values=restoration.values.to(q.device),
    )


def to_bitsandbytes(
    q: QuantizedTensor,
    *,
    bias: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    drop_outliers: bool = False,
) -> Linear4bit:
    """Return a Linear4bit that holds a packed matrix: the same codes, the same scales.

    The scales are not quantized themselves (``compress_statistics=False``).

    Args:
        q: a matrix [D, H] in NF4 or FP4, in blocks that bitsandbytes has: runs of 32, 64, ...,
            4096 elements. The layer shares its codes, and its scales where they are float32.
        bias: [D] or None.
        compute_dtype: as in Linear4bit.
        drop_outliers: leave out what is kept exactly beside the codes, for which bitsandbytes has
            no place: these weights are 0 in the layer until
            ``restore_super_weights(model, {name of the layer: q})`` puts them back.

    Raises:
        InvalidInput: another code, other blocks or no matrix, outliers that are not to be dropped,
            or a bias of another shape.
    """
    check_packed(q)
    plan = q.plan
    if plan.code.table is None:
        raise InvalidInput(f"bitsandbytes packs nf4 and fp4, got {plan.code.name}: quantize anew")
    if len(q.shape) != 2:
        raise InvalidInput(f"a layer has a matrix [D, H], got {list(q.shape)}: reshape it before")
    if len(q.positions) and not drop_outliers:
        raise InvalidInput(
            f"bitsandbytes has no place for the {len(q.positions)} outliers: pass "
            "drop_outliers=True, then restore_super_weights(model, {name: q})"
        )
    if bias is not None and tuple(bias.shape) != (plan.rows,):
        raise InvalidInput(f"bias must be [{plan.rows}], got {list(bias.shape)}")
    block_size, name = _block_size(plan), plan.code.name
    state = QuantState(
        absmax=q.block_scales().float(),
        shape=torch.Size(q.shape),
        code=get_4bit_type(name, device=q.device),
        blocksize=block_size,
        quant_type=name,
        dtype=q.dtype,
    )
    layer = Linear4bit(
        plan.columns, plan.rows, bias=bias is not None, compute_dtype=compute_dtype,
        compress_statistics=False, quant_type=name, device="meta",
    )  # fmt: skip
    layer.weight = Params4bit(
        q.codes.view(-1, 1), requires_grad=False, quant_state=state, blocksize=block_size,
        compress_statistics=False, quant_type=name, bnb_quantized=True, module=layer,
    )  # fmt: skip
    layer.quant_state = state
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _block_size(plan) -> int:
    """The size of bitsandbytes' blocks that are the plan's."""
    tile, size = plan.block
    fitting = [s for s in BLOCK_SIZES if s == size or (plan.blocks == 1 and s > size)]
    if tile or not fitting:
        blocks = f"tiles of {tile} x {size}" if tile else f"blocks of {size} elements"
        raise InvalidInput(
            f"bitsandbytes has blocks of {', '.join(map(str, BLOCK_SIZES))} elements, got "
            f"{blocks}: quantize with one of these as block_size"
        )
    return fitting[0]
