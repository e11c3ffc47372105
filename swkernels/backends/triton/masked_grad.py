"""A gradient zeroed or scaled at listed coordinates, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import choose, refusal


@triton.jit(do_not_specialize=["k"])
def masked_grad_kernel(
    grad,  # [D, H]
    rows,  # [k] int32
    cols,  # [k] int32
    D,
    H,
    k,
    stride_d,
    stride_h,
    scale,
    BLOCK_K: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(rows + places, mask=places < k, other=-1)
    col = tl.load(cols + places, mask=places < k, other=-1)
    inside = (row >= 0) & (row < D) & (col >= 0) & (col < H)
    pointers = grad + row.to(tl.int64) * stride_d + col.to(tl.int64) * stride_h
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.where(scale == 0.0, 0.0, value * scale)
    tl.store(pointers, scaled.to(grad.dtype.element_ty), mask=inside)


def supports(grad: torch.Tensor) -> str | None:
    """Return why the kernel cannot take the gradient, or None."""
    return refusal(grad)


def masked_grad(grad: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, scale: float) -> None:
    """Multiply grad[rows[i], cols[i]] by scale in place; exactly 0 for scale 0."""
    k = len(rows)
    if k == 0:
        return
    config = choose("masked_grad", grad, *grad.shape, 0).config
    with torch.cuda.device_of(grad):
        masked_grad_kernel[(triton.cdiv(k, config["BLOCK_K"]),)](
            grad, rows, cols, *grad.shape, k, *grad.stride(), scale, **config
        )
