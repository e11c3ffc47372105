"""The largest entries of low-rank updates, which are never built."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swkernels import backends
from swkernels.errors import InvalidInput

from ._arguments import FLOATS
from .topk import TopK


def topk_low_rank(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], k: int, *, backend: str | None = None
) -> TopK:
    """Return the k entries of largest magnitude over all products B A, with their places.

    No matrix of the product's size is formed; the memory is O(k). Exact: an entry is the sum of
    its r products in float64, one after the other, and these sums are compared, so every backend
    gives the same entries in the same order. On a GPU it waits for the device. No gradient flows
    through it, and ``torch.compile`` breaks the graph there.

    Args:
        factors: (B [D, r], A [r, H]) of each product, float32, bfloat16, float16 or float64, on
            one device; D, H and r may differ between them.
        k: how many, from 0. All entries where there are fewer.
        backend: "reference", "cpu" or "triton"; None lets the device choose.

    Returns:
        The entries; values are float32, or float64 where a factor is.

    Raises:
        InvalidInput: no factors, a wrong shape, dtype or device, r = 0, or k below 0.
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    if torch.compiler.is_compiling():  # traced, the call would read memory that is gone
        return torch.compiler.disable(topk_low_rank)(factors, k, backend=backend)
    factors = [(B, A) for B, A in factors]
    _check(factors, k)
    factors = [(B.detach(), A.detach()) for B, A in factors]
    wide = any(tensor.dtype == torch.float64 for pair in factors for tensor in pair)
    total = sum(B.shape[0] * A.shape[1] for B, A in factors)
    widest = max(factors, key=lambda pair: pair[0].dtype.itemsize + pair[1].dtype.itemsize)
    run = backends.select("topk_low_rank", *widest, backend=backend)
    if not min(k, total):
        place = torch.empty(0, dtype=torch.int64, device=factors[0][0].device)
        return TopK(torch.empty(0, device=place.device), place, place, place)
    sums, place, module = run(factors, min(k, total))
    widths = torch.tensor([A.shape[1] for _, A in factors], device=place.device)[module]
    values = sums if wide else sums.float()
    return TopK(values, module, place // widths, place % widths)


def _check(factors, k) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise InvalidInput(f"k must be an integer from 0, got {k!r}")
    if not factors:
        raise InvalidInput("there are no factors: expected one pair (B [D, r], A [r, H]) at least")
    device = getattr(factors[0][0], "device", None)
    for number, (B, A) in enumerate(factors):
        for name, factor in (("B", B), ("A", A)):
            if not isinstance(factor, torch.Tensor) or factor.dtype not in FLOATS:
                raise InvalidInput(
                    f"{name} of factors {number} must be a tensor of float32, bfloat16, float16 "
                    f"or float64, got {getattr(factor, 'dtype', type(factor).__name__)}"
                )
            if factor.device != device or factor.is_meta:
                raise InvalidInput(
                    f"{name} of factors {number} is on {factor.device}, the first on {device}: "
                    "bring all to one device that holds values"
                )
        if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0] or A.shape[0] == 0:
            raise InvalidInput(
                f"factors {number} must be B [D, r] and A [r, H] with r from 1, got "
                f"{list(B.shape)} and {list(A.shape)}"
            )
