"""The largest entries of products of low rank, by definition, a few rows at a time.

An entry is the sum of its r products in float64, one after the other; products of two float32
values are exact there. The order is that of these sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Factors = Sequence[tuple[torch.Tensor, torch.Tensor]]
_CHUNK = 1 << 22  # entries of a product that are there at a time


def supports(B: torch.Tensor, A: torch.Tensor) -> str | None:
    return None


def topk_low_rank(factors: Factors, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (sums float64 [k], place int64 [k], module int64 [k]); place is row * H + column."""
    best = empty(factors[0][0].device)
    for module, (B, A) in enumerate(factors):
        (D, _), H = B.shape, A.shape[1]
        step = max(1, _CHUNK // max(1, H))
        A = A.double()
        for start in range(0, D, step):
            rows = B[start : start + step].double()
            sums = torch.zeros(len(rows), H, dtype=torch.float64, device=A.device)
            for left, right in zip(rows.unbind(1), A):
                sums += left[:, None] * right
            sums = sums.flatten()
            place = torch.arange(len(sums), device=A.device) + start * H
            best = largest(join(best, (sums, place, torch.full_like(place, module))), k)
    return best


def empty(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """No candidates."""
    place = torch.empty(0, dtype=torch.int64, device=device)
    return torch.empty(0, dtype=torch.float64, device=device), place, place


def join(first, second) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The candidates of both."""
    return tuple(torch.cat(pair) for pair in zip(first, second))


def largest(candidates, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k first of candidates (sums, place, module) in the order of ``TopK``."""
    sums, place, module = candidates
    magnitudes = sums.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    if len(sums) > k:  # those that are certainly too small first; ties stay
        bound = magnitudes.topk(k).values[-1]
        kept = (magnitudes >= bound).nonzero().squeeze(1)
        sums, place, module, magnitudes = (t[kept] for t in (sums, place, module, magnitudes))
    # Stable sorts from the last criterion to the first.
    order = place.argsort(stable=True)
    order = order[module[order].argsort(stable=True)]
    order = order[magnitudes[order].argsort(descending=True, stable=True)]
    order = order[(~sums[order].isnan()).byte().argsort(stable=True)][:k]
    return sums[order], place[order], module[order]
