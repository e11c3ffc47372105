"""The low-rank part of a linear layer, forward and backward: three products.

The factors are read as they are kept (float32) and become the activation's dtype in registers,
where the mask is applied too: nothing of the size of a factor is written. The activation is read
once in each product; dropout is computed where it is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from swkernels.backends import philox

from .launch import choose, multiprocessors, refusal


@triton.jit
def _dropout(values, tokens, n, N, seed, threshold, scale):
    """values [BLOCK_T, BLOCK_N] of an activation's tile after dropout, see ``backends.philox``."""
    # Columns begin at a multiple of four and come in fours: one counter serves each four.
    BLOCK_T: tl.constexpr = values.shape[0]
    BLOCK_N: tl.constexpr = values.shape[1]
    groups = n // 4 + tl.arange(0, BLOCK_N // 4)
    counter = tokens.to(tl.int64)[:, None] * ((N + 3) // 4) + groups[None, :]
    zero = (counter * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero
    )
    even, odd = tl.join(w0, w2), tl.join(w1, w3)  # [BLOCK_T, BLOCK_N / 4, 2]
    words = tl.reshape(tl.join(even, odd), [BLOCK_T, BLOCK_N])
    return tl.where(words >= threshold.to(tl.uint32), values * scale, 0.0)


@triton.jit
def _factor(P, rows, columns, mask, stride_pr, stride_pn, channel_scale, N, MASKED: tl.constexpr):
    """A tile of P, its columns times the mask; rows and columns broadcast to the tile."""
    tile = tl.load(P + rows * stride_pr + columns * stride_pn, mask=mask, other=0.0).to(tl.float32)
    if MASKED:
        tile *= tl.load(channel_scale + columns, mask=columns < N, other=0.0)
    return tile


@triton.jit(do_not_specialize=["T", "threshold"])
def lora_project_kernel(
    x,  # [T, N]
    P,  # [r, N]
    channel_scale,  # [N] float32
    seed,  # [] int64
    S,  # [T, r]
    T,
    N,
    r,
    threshold,
    scale,
    stride_xt,
    stride_pr,
    stride_pn,
    MASKED: tl.constexpr,
    DROPPED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, RANK)
    sums = tl.zeros([BLOCK_T, RANK], tl.float32)
    for n in range(0, N, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        inside = (tokens < T)[:, None] & (columns < N)[None, :]
        values = tl.load(x + tokens[:, None] * stride_xt + columns[None, :], mask=inside, other=0.0)
        if DROPPED:
            kept = _dropout(values.to(tl.float32), tokens, n, N, tl.load(seed), threshold, scale)
            values = kept.to(values.dtype)
        there = (ranks < r)[None, :] & (columns < N)[:, None]
        factor = _factor(
            P, ranks[None, :], columns[:, None], there, stride_pr, stride_pn, channel_scale, N,
            MASKED,
        )  # fmt: skip
        sums = tl.dot(values, factor.to(values.dtype), sums, input_precision="ieee")
    out = S + tokens[:, None] * r + ranks[None, :]
    tl.store(out, sums.to(S.dtype.element_ty), mask=(tokens < T)[:, None] & (ranks < r)[None, :])


@triton.jit(do_not_specialize=["T", "threshold"])
def lora_expand_kernel(
    y,  # [T, N], in and out; out only without ADD
    S,  # [T, r]
    P,  # [r, N]
    channel_scale,  # [N] float32
    seed,  # [] int64
    T,
    N,
    r,
    threshold,
    scale,
    stride_yt,
    stride_pr,
    stride_pn,
    ADD: tl.constexpr,
    MASKED: tl.constexpr,
    DROPPED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N
    columns, ranks = n + tl.arange(0, BLOCK_N), tl.arange(0, RANK)
    sums = tl.load(
        S + tokens[:, None] * r + ranks[None, :],
        mask=(tokens < T)[:, None] & (ranks < r)[None, :],
        other=0.0,
    )  # [BLOCK_T, RANK]
    there = (ranks < r)[:, None] & (columns < N)[None, :]
    factor = _factor(
        P, ranks[:, None], columns[None, :], there, stride_pr, stride_pn, channel_scale, N, MASKED
    )
    pointers = y + tokens[:, None] * stride_yt + columns[None, :]
    inside = (tokens < T)[:, None] & (columns < N)[None, :]
    dtype = y.dtype.element_ty
    part = tl.dot(sums.to(dtype), factor.to(dtype), input_precision="ieee")
    if DROPPED:
        part = _dropout(part, tokens, n, N, tl.load(seed), threshold, scale)
    if ADD:
        part += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointers, part.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["T", "threshold", "tiles"])
def lora_reduce_kernel(
    x,  # [T, N]
    S,  # [T, r]
    channel_scale,  # [N] float32
    seed,  # [] int64
    partial,  # [shares, r, N] float32
    T,
    N,
    r,
    threshold,
    scale,
    tiles,
    stride_xt,
    MASKED: tl.constexpr,
    DROPPED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N
    columns, ranks = n + tl.arange(0, BLOCK_N), tl.arange(0, RANK)
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_T
    sums = tl.zeros([RANK, BLOCK_N], tl.float32)
    for tile in range(tiles):
        tokens = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (tokens < T)[:, None] & (columns < N)[None, :]
        values = tl.load(x + tokens[:, None] * stride_xt + columns[None, :], mask=inside, other=0.0)
        if DROPPED:
            kept = _dropout(values.to(tl.float32), tokens, n, N, tl.load(seed), threshold, scale)
            values = kept.to(values.dtype)
        factor = tl.load(
            S + tokens[None, :] * r + ranks[:, None],
            mask=(tokens < T)[None, :] & (ranks < r)[:, None],
            other=0.0,
        )  # [RANK, BLOCK_T]
        sums = tl.dot(factor.to(values.dtype), values, sums, input_precision="ieee")
    if MASKED:
        sums *= tl.load(channel_scale + columns, mask=columns < N, other=0.0)[None, :]
    out = partial + tl.program_id(1).to(tl.int64) * r * N
    out += ranks.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out, sums, mask=(ranks < r)[:, None] & (columns < N)[None, :])


def supports(x: torch.Tensor) -> str | None:
    """Return why the kernels cannot take the activation, or None."""
    return refusal(x)


class Products:
    """As the reference's: x and y [T, N], S [T, r], P [r, N]."""

    def project(self, x, P, channel_scale, dropout, seed) -> torch.Tensor:
        """Return dropout(x) (P * scale)^T, [T, r] in x's dtype."""
        T, r = len(x), len(P)
        S = torch.empty(T, r, dtype=x.dtype, device=x.device)
        if T:
            config = _config(x, r, "project")
            with torch.cuda.device_of(x):
                lora_project_kernel[(triton.cdiv(T, config["BLOCK_T"]),)](
                    x, P, _or(channel_scale, x), _or(seed, x), S, T, x.shape[1], r,
                    *_drop(dropout), x.stride(0), *P.stride(), MASKED=channel_scale is not None,
                    DROPPED=bool(dropout), **config,
                )  # fmt: skip
        return S

    def expand(self, y, S, P, channel_scale, dropout, seed, *, add: bool) -> None:
        """Write dropout(S (P * scale)) to y, or add it to what is there."""
        T, N = y.shape
        if T == 0:
            return
        S, config = S.contiguous(), _config(y, len(P), "expand")
        grid = triton.cdiv(T, config["BLOCK_T"]), triton.cdiv(N, config["BLOCK_N"])
        with torch.cuda.device_of(y):
            lora_expand_kernel[grid](
                y, S, P, _or(channel_scale, y), _or(seed, y), T, N, len(P), *_drop(dropout),
                y.stride(0), *P.stride(), ADD=add, MASKED=channel_scale is not None,
                DROPPED=bool(dropout), **config,
            )  # fmt: skip

    def reduce(self, x, S, channel_scale, dropout, seed) -> torch.Tensor:
        """Return (S^T dropout(x)) * scale, float32 [r, N].

        Each share of the tokens writes sums of its own, which are added in one order: the result
        is the same every time.
        """
        (T, N), r = x.shape, S.shape[1]
        if T == 0:
            return torch.zeros(r, N, device=x.device)
        S, config = S.contiguous(), _config(x, r, "reduce")
        blocks, tiles = triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(T, config["BLOCK_T"])
        wanted = max(1, config.pop("waves") * multiprocessors(x.device) // blocks)
        per_share = triton.cdiv(tiles, min(tiles, wanted))
        shares = triton.cdiv(tiles, per_share)
        partial = torch.empty(shares, r, N, device=x.device)
        with torch.cuda.device_of(x):
            lora_reduce_kernel[(blocks, shares)](
                x, S, _or(channel_scale, x), _or(seed, x), partial, T, N, r, *_drop(dropout),
                per_share, x.stride(0), MASKED=channel_scale is not None, DROPPED=bool(dropout),
                **config,
            )  # fmt: skip
        return partial[0] if shares == 1 else partial.sum(0)


def _config(x: torch.Tensor, r: int, variant: str) -> dict:
    T, N = x.shape
    config = dict(choose("lora_linear", x, N, r, T, variant=variant).config)
    return config | {"RANK": max(16, triton.next_power_of_2(r))}  # 16: the least of a tl.dot


def _or(tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x if tensor is None else tensor  # a pointer that is not read


def _drop(dropout: float) -> tuple[int, float]:
    return philox.threshold(dropout), 1.0 / (1.0 - dropout)


lora_linear = Products()
