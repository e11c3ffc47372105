"""The largest entries of products of low rank: tiles in registers, candidates in a short list.

A tile's float32 sums are held against the k-th largest found so far, less their own rounding
error; the few that remain are listed, and summed again exactly. The host waits for the device once
a product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from swkernels.backends.reference.topk_low_rank import empty, join, largest
from swkernels.backends.reference.topk_low_rank import topk_low_rank as by_definition

from .launch import choose, refusal

_CAPACITY = 1 << 16


@triton.jit(do_not_specialize=["first", "last", "capacity"])
def topk_low_rank_kernel(
    B,  # [D, r]
    A,  # [r, H]
    bound,  # [2] float32: the k-th largest magnitude so far, the largest magnitude in A
    places,  # [capacity] int64, out
    counter,  # [] int32, in and out
    first,
    last,
    H,
    r,
    capacity,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = first + tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    sums = tl.zeros([BLOCK_D, BLOCK_H], tl.float32)
    most = tl.zeros([BLOCK_D], tl.float32)
    at_left, at_right = B + rows.to(tl.int64) * r, A + columns
    for _ in range(r):
        left = tl.load(at_left, mask=rows < last, other=0.0).to(tl.float32)
        right = tl.load(at_right, mask=columns < H, other=0.0)
        sums += left[:, None] * right.to(tl.float32)[None, :]
        most += tl.abs(left)
        at_left += 1
        at_right += H
    # The rounding error of r products and sums, and of the bound itself; see docs/kernels/topk.md.
    error = (r + 4) * (most * tl.load(bound + 1) * 5.97e-8 + 1.2e-38)
    least = tl.load(bound) * (1.0 - 1e-6) - error
    wanted = (rows < last)[:, None] & (columns < H)[None, :]
    wanted = wanted & ((tl.abs(sums) < least[:, None]) == 0)  # NaN is wanted
    flat = tl.reshape(wanted.to(tl.int32), [BLOCK_D * BLOCK_H])
    count = tl.sum(flat, axis=0)
    if count > 0:
        place = tl.reshape(
            rows.to(tl.int64)[:, None] * H + columns[None, :], [BLOCK_D * BLOCK_H]
        )
        offset = tl.atomic_add(counter, count) + tl.cumsum(flat, axis=0) - 1
        tl.store(places + offset, place, mask=(flat > 0) & (offset < capacity))


def supports(B: torch.Tensor, A: torch.Tensor) -> str | None:
    """Return why the kernel cannot take the factors, or None."""
    return refusal(B) or refusal(A)


def topk_low_rank(factors, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (sums float64 [k], place int64 [k], module int64 [k]); place is row * H + column."""
    best = empty(factors[0][0].device)
    for module, (B, A) in enumerate(factors):
        D, H = len(B), A.shape[1]
        if D == 0 or H == 0:
            continue
        B, A = B.contiguous(), A.contiguous()
        rows = 0
        if len(best[0]) < k:  # until there are k there is no bound: a few rows as they are
            rows = min(D, triton.cdiv(k - len(best[0]), H))
            sums, place, _ = by_definition([(B[:rows], A)], rows * H)
            best = largest(join(best, (sums, place, torch.full_like(place, module))), k)
        ranges = [(rows, D)]
        while ranges:
            first, last = ranges.pop()
            found = _listed(B, A, first, last, best, k)
            if found is None:  # more than the list takes: half of the rows, which raise the bound
                middle = (first + last) // 2
                ranges += [(middle, last), (first, middle)]
                continue
            sums = _exact(B, A, found)
            best = largest(join(best, (sums, found, torch.full_like(found, module))), k)
    return best


def _listed(B, A, first: int, last: int, best, k: int) -> torch.Tensor | None:
    """Places in rows [first, last) that may be among the k largest; None if they are too many."""
    if first == last:
        return torch.empty(0, dtype=torch.int64, device=B.device)
    D, H = len(B), A.shape[1]
    capacity = max(_CAPACITY, 4 * k, H)
    # Rounded to float32 it may have risen by 2^-24 of itself, which the kernel takes off again.
    kth = best[0][k - 1].abs().float()
    bound = torch.stack([kth, A.abs().max().float()])
    places = torch.empty(capacity, dtype=torch.int64, device=B.device)
    counter = torch.zeros((), dtype=torch.int32, device=B.device)
    config = dict(choose("topk_low_rank", B, D, H, A.shape[0]).config)
    grid = triton.cdiv(last - first, config["BLOCK_D"]), triton.cdiv(H, config["BLOCK_H"])
    with torch.cuda.device_of(B):
        topk_low_rank_kernel[grid](
            B, A, bound, places, counter, first, last, H, A.shape[0], capacity, **config
        )
    count = int(counter)
    return places[:count] if count <= capacity else None


def _exact(B: torch.Tensor, A: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The entries at some places, summed in float64, one product after the other."""
    H = A.shape[1]
    sums = torch.zeros(len(places), dtype=torch.float64, device=B.device)
    for left, right in zip(B.unbind(1), A):
        sums += left[places // H].double() * right[places % H].double()
    return sums
