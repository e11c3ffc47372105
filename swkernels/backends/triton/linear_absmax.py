"""y = x W^T + b and the peaks of x and y: one fused persistent GEMM, or a library GEMM and passes.

The kernel computes tiles of y^T = W x^T. Tokens then run along the columns of the accumulator,
which a thread (almost) owns alone, so a channel's peak is reduced in registers and by two
shuffles; with tokens along the rows it would take shuffles for every column of the tile.
See docs/kernels/triton.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from swkernels.errors import BackendUnavailable

from . import interpreted
from .column_absmax import column_absmax
from .launch import choose, multiprocessors, names, refusal
from .peaks import merge_keys, row_tokens, tile_keys

_DESCRIPTOR_ALIGNMENT = 16  # bytes, for the base and the row stride of a TMA tensor


@triton.jit
def _load_tile(
    matrix,
    row,
    column,
    R,
    C,
    stride_r,
    stride_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    if DESCRIPTORS:
        return matrix.load([row, column])
    else:
        # A row past the end reads the last row again: its results are neither stored nor counted.
        rows = tl.minimum(row + tl.arange(0, BLOCK_R), R - 1)[:, None].to(tl.int64)
        columns = column + tl.arange(0, BLOCK_C)[None, :]
        pointers = matrix + rows * stride_r + columns.to(tl.int64) * stride_c
        return tl.load(pointers, mask=columns < C, other=0.0)


@triton.jit(do_not_specialize=["T", "token_offset"])
def linear_absmax_kernel(
    x,  # [T, H], a pointer or a tensor descriptor
    weight,  # [D, H], likewise
    bias,  # [D] or None
    y,  # [T, D], likewise
    in_keys,  # [H] int64 or None
    out_keys,  # [D] int64 or None
    token_index,  # [T] int64 or None
    T,
    D,
    H,
    stride_xt,
    stride_xh,
    stride_wd,
    stride_wh,
    token_offset,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_d = tl.cdiv(D, BLOCK_D)
    steps = tl.cdiv(H, BLOCK_H)
    dtype: tl.constexpr = y.dtype if DESCRIPTORS else y.dtype.element_ty
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_d, tl.num_programs(0)):
        # Neighbouring programs share GROUP_T row blocks of x and few of W: both stay in L2.
        group = tile // (GROUP_T * tiles_d)
        members = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
        rank = tile % (GROUP_T * tiles_d)
        tile_d = rank // members
        start_t = (group * GROUP_T + rank % members) * BLOCK_T
        start_d = tile_d * BLOCK_D

        acc = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
        for step in range(steps):
            w_tile = _load_tile(
                weight, start_d, step * BLOCK_H, D, H, stride_wd, stride_wh,
                BLOCK_D, BLOCK_H, DESCRIPTORS,
            )  # fmt: skip
            x_tile = _load_tile(
                x, start_t, step * BLOCK_H, T, H, stride_xt, stride_xh,
                BLOCK_T, BLOCK_H, DESCRIPTORS,
            )  # fmt: skip
            acc = tl.dot(w_tile, x_tile.T, acc, input_precision=PRECISION)

        channels = start_d + tl.arange(0, BLOCK_D)
        rows = start_t + tl.arange(0, BLOCK_T)
        if bias is not None:
            acc += tl.load(bias + channels, mask=channels < D, other=0.0).to(tl.float32)[:, None]
        out = acc.to(dtype)  # [BLOCK_D, BLOCK_T]
        # The store comes first: as a descriptor store it runs while the peaks are reduced.
        if DESCRIPTORS:
            y.store([start_t, start_d], out.T)
        else:
            pointers = y + rows[:, None].to(tl.int64) * D + channels[None, :]
            tl.store(pointers, out.T, mask=(rows < T)[:, None] & (channels < D)[None, :])
        low, mask = row_tokens(rows, T, token_index, token_offset)
        if out_keys is not None:
            y_keys = tile_keys(out, low[None, :], mask[None, :])  # [BLOCK_D, BLOCK_T]
            merge_keys(out_keys, channels, tl.max(y_keys, axis=1), D)
        if in_keys is not None:
            # Every tile of this row block has loaded the same x: share its columns out among
            # them. No tile is slower than another, and the loop over H above stays bare.
            for step in range(tile_d, steps, tiles_d):
                x_tile = _load_tile(
                    x, start_t, step * BLOCK_H, T, H, stride_xt, stride_xh,
                    BLOCK_T, BLOCK_H, DESCRIPTORS,
                )  # fmt: skip
                x_keys = tile_keys(x_tile, low[:, None], mask[:, None])  # [BLOCK_T, BLOCK_H]
                columns = step * BLOCK_H + tl.arange(0, BLOCK_H)
                merge_keys(in_keys, columns, tl.max(x_keys, axis=0), H)


def supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Return why the backend cannot take the arguments, or None."""
    return refusal(x, weight, bias)


def linear_absmax(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    in_keys: torch.Tensor | None,
    out_keys: torch.Tensor | None,
    token_index: torch.Tensor | None,
    token_offset: int,
    *,
    fused: bool | None = None,
) -> torch.Tensor:
    """Return y = x W^T + b [T, D]; merge the peaks of x [T, H] and of the rounded y in place.

    `fused` chooses the fused kernel (True) or the library's GEMM and one pass for each peak
    (False); None follows the tuning record of this device and shape, and without a record takes
    the library's GEMM.
    """
    arguments = (x, weight, bias, in_keys, out_keys, token_index, token_offset)
    D, H = weight.shape
    if fused is None:
        variant = choose("linear_absmax", x, D, H, x.shape[0], dtype=_multiplied(x.dtype)).variant
        if variant == "two_pass" or (variant == "descriptors" and not _describable(x, weight)):
            return two_pass(*arguments)
        return fused_linear_absmax(*arguments, descriptors=variant == "descriptors")
    return fused_linear_absmax(*arguments) if fused else two_pass(*arguments)


def two_pass(x, weight, bias, in_keys, out_keys, token_index, token_offset) -> torch.Tensor:
    """The library's GEMM (cuBLAS, hipBLASLt), then `column_absmax` over x and over y."""
    y = F.linear(x, weight, bias)
    if in_keys is not None:
        column_absmax(x, in_keys, token_index, token_offset)
    if out_keys is not None:
        column_absmax(y, out_keys, token_index, token_offset)
    return y


def fused_linear_absmax(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    in_keys: torch.Tensor | None,
    out_keys: torch.Tensor | None,
    token_index: torch.Tensor | None,
    token_offset: int,
    *,
    descriptors: bool | None = None,
) -> torch.Tensor:
    """One persistent kernel for y and both peaks. Any strides with `descriptors` off.

    `descriptors` loads and stores through TMA tensor descriptors; None does so where the device
    has them, base, strides and sizes allow it, and the product is one for tensor cores (float32
    without TF32 is multiplied in registers, where tiles in shared memory only cost).
    """
    if interpreted() and x.dtype == torch.bfloat16:
        raise BackendUnavailable(
            "Triton's interpreter cannot multiply bfloat16: use float32 or float16, or a GPU"
        )
    T, D, H = x.shape[0], *weight.shape
    if 0 in (T, D, H):
        return two_pass(x, weight, bias, in_keys, out_keys, token_index, token_offset)
    multiplied = _multiplied(x.dtype)
    if descriptors is None:
        descriptors = multiplied != "float32" and _has_descriptors(x.device)
        descriptors = descriptors and _describable(x, weight)
    elif descriptors and not _describable(x, weight):
        raise BackendUnavailable(
            "tensor descriptors need rows of x, weight and y that are contiguous and start on "
            f"{_DESCRIPTOR_ALIGNMENT} bytes, got strides {x.stride()} and {weight.stride()} for "
            f"{D} outputs in {x.dtype}: use descriptors=False"
        )
    variant = "descriptors" if descriptors else "pointers"
    config = choose("linear_absmax", x, D, H, T, dtype=multiplied, variant=variant).config
    y = torch.empty((T, D), dtype=x.dtype, device=x.device)
    block_t, block_d, block_h = (config[name] for name in ("BLOCK_T", "BLOCK_D", "BLOCK_H"))
    matrices = (x, weight, y)
    if descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = ([block_t, block_h], [block_d, block_h], [block_t, block_d])
        matrices = tuple(map(TensorDescriptor.from_tensor, matrices, blocks))
    tiles = triton.cdiv(T, block_t) * triton.cdiv(D, block_d)
    with torch.cuda.device_of(x):
        linear_absmax_kernel[(min(tiles, multiprocessors(x.device)),)](
            matrices[0], matrices[1], bias, matrices[2], in_keys, out_keys, token_index,
            T, D, H, *x.stride(), *weight.stride(), token_offset,
            DESCRIPTORS=descriptors, PRECISION="tf32" if multiplied == "tfloat32" else "ieee",
            **config,
        )  # fmt: skip
    return y


def _has_descriptors(device: torch.device) -> bool:
    """Return whether the device has a tensor memory accelerator (compute capability 9 or 10)."""
    return names(device)[1].startswith(("sm_90", "sm_10"))


def _describable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether x, weight and a contiguous y [T, D] can be TMA tensors."""
    for matrix in (x, weight):
        row = matrix.stride(0) * matrix.element_size()
        if matrix.stride(1) != 1 or row <= 0 or row % _DESCRIPTOR_ALIGNMENT:
            return False
        if matrix.data_ptr() % _DESCRIPTOR_ALIGNMENT:
            return False
    return weight.shape[0] * x.element_size() % _DESCRIPTOR_ALIGNMENT == 0


def _multiplied(dtype: torch.dtype) -> str:
    """Return the type that the product is computed in: "tfloat32" for float32 if, and only if,
    PyTorch's own float32 matmul would use it."""
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # PyTorch >= 2.9
    if precision is None:
        precision = "tf32" if matmul.allow_tf32 else "ieee"
    if precision == "none":
        precision = torch.backends.fp32_precision
    return "tfloat32" if precision == "tf32" else "float32"
