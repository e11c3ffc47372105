"""Per-channel peaks of an activation."""

from __future__ import annotations

import torch

from swkernels import backends

from ._arguments import as_rows, as_token_index, check_activation, check_keys
from ._library import library
from .peaks import empty_keys

library.define(
    "column_absmax(Tensor x, Tensor? keys, Tensor? token_index, SymInt token_offset, "
    "str? backend) -> Tensor"
)


def column_absmax(
    x: torch.Tensor,
    keys: torch.Tensor | None = None,
    *,
    token_mask: torch.Tensor | None = None,
    token_offset: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Merge the peak of every channel of ``x`` into a running state.

    For each channel c, the largest |x[t, c]| over the tokens t that count, and the earliest t
    that reaches it, packed as ``swkernels.ops.peaks`` says. Exact and deterministic: the keys do
    not depend on the backend, on how the tokens are split over calls, nor on padding.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64 (rounded to float32). Not changed;
            no gradient flows through the keys.
        keys: int64 [C], contiguous, on x's device: updated in place. None starts anew.
        token_mask: bool of x's leading shape, False for padding: such a token neither counts nor
            takes an index. Or int64: the index of each token, negative for padding.
        token_offset: index of the first token that counts (how many came before this call).
        backend: "reference", "cpu", "triton" or "cuda"; None lets the device choose.

    Returns:
        ``keys``, or a new int64 [C]; read them with ``peaks(keys)``.

    Raises:
        InvalidInput: a wrong shape, dtype or device; nothing has been changed.
        BackendUnavailable: the backend asked for is not there or does not take ``x``.
    """
    check_activation("x", x)
    check_keys("keys", keys, x.shape[-1], x)
    index = as_token_index(token_mask, x, token_offset)
    if torch.compiler.is_compiling():
        merged = torch.ops.swkernels.column_absmax(x, keys, index, token_offset, backend)
        return merged if keys is None else keys.copy_(merged)
    x = x.detach()
    if keys is None:
        keys = empty_keys(x.shape[-1], x.device)
    rows = as_rows(x)
    backends.select("column_absmax", rows, backend=backend)(rows, keys, index, token_offset)
    return keys


def _compute(x, keys, token_index, token_offset, backend):
    keys = empty_keys(x.shape[-1], x.device) if keys is None else keys.clone()
    rows = as_rows(x)
    backends.select("column_absmax", rows, backend=backend)(rows, keys, token_index, token_offset)
    return keys


def _fake(x, keys, token_index, token_offset, backend):
    check_activation("x", x)
    check_keys("keys", keys, x.shape[-1], x)
    return x.new_empty(x.shape[-1], dtype=torch.int64)


library.impl("column_absmax", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("swkernels::column_absmax", _fake)
