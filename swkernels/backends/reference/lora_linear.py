"""The low-rank part of a linear layer, forward and backward, by definition.

Forward and backward consist of three products, of which each is the others' derivative. Dropout is
computed anew, a few tokens at a time, wherever a product needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from swkernels.backends import philox

_CHUNK = 1 << 18  # elements of the activation with dropout that are there at a time


def supports(x: torch.Tensor) -> str | None:
    return None


class Products:
    """The products, on rows x [T, N] and y [T, N], sums S [T, r] and a factor P [r, N].

    ``channel_scale`` (float32 [N] or None) multiplies the columns of P: it is the mask.
    ``dropout`` acts on the activation [T, N].

    Args:
        factors: what rows of an activation are multiplied by, as ``philox.factors``.
    """

    def __init__(self, factors: Callable[..., torch.Tensor] = philox.factors):
        self._factors = factors

    def project(self, x, P, channel_scale, dropout, seed) -> torch.Tensor:
        """Return dropout(x) (P * scale)^T, [T, r] in x's dtype."""
        P = _masked(P, channel_scale).to(x.dtype).contiguous()  # GEMMs are faster on it
        if not dropout:
            return F.linear(x, P)
        S = x.new_empty(len(x), len(P))
        for tokens, factors in self._chunks(x, dropout, seed):
            S[tokens] = F.linear((x[tokens] * factors).to(x.dtype), P)
        return S

    def expand(self, y, S, P, channel_scale, dropout, seed, *, add: bool) -> None:
        """Write dropout(S (P * scale)) to y, or add it to what is there."""
        P, S = _masked(P, channel_scale).to(y.dtype), S.to(y.dtype)
        if not dropout:
            torch.addmm(y, S, P, beta=int(add), out=y)  # beta 0 ignores what is there, NaN too
            return
        for tokens, factors in self._chunks(y, dropout, seed):
            part = (S[tokens] @ P) * factors
            y[tokens] = part + y[tokens] if add else part

    def reduce(self, x, S, channel_scale, dropout, seed) -> torch.Tensor:
        """Return (S^T dropout(x)) * scale, [r, N], float32 or wider."""
        S = S.to(x.dtype).T
        wide = torch.promote_types(x.dtype, torch.float32)
        if not dropout:
            return _masked((S @ x).to(wide), channel_scale)
        G = x.new_zeros(len(S), x.shape[1], dtype=wide)
        for tokens, factors in self._chunks(x, dropout, seed):
            G += S[:, tokens] @ (x[tokens] * factors).to(x.dtype)
        return _masked(G, channel_scale)

    def _chunks(self, x, dropout, seed) -> Iterator[tuple[slice, torch.Tensor]]:
        T, N = x.shape
        step = max(1, _CHUNK // max(1, N))
        for start in range(0, T, step):
            stop = min(T, start + step)
            yield slice(start, stop), self._factors(start, stop, N, dropout, seed)


def _masked(P: torch.Tensor, channel_scale: torch.Tensor | None) -> torch.Tensor:
    return P if channel_scale is None else P * channel_scale


lora_linear = Products()
