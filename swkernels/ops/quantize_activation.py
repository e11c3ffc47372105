"""Activations in int8 with the super activation kept aside, and integer products of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swkernels.backends.blocks import decode
from swkernels.errors import InvalidInput

from .block_quantize import block_quantize, check_source
from .quantized import QuantizedTensor


def quantize_activation(
    x: torch.Tensor,
    *,
    super_activation: int | Sequence[int] | torch.Tensor | None = None,
    per: str = "token",
    backend: str | None = None,
) -> QuantizedTensor:
    """Quantize activations to int8, symmetric, one scale a token or one for all.

    RESTORE(Q^-1(Q(REPLACE(A)))) of arXiv 2411.07191. What is replaced does not widen the range and
    comes back exactly, so it makes no difference what stands in its place meanwhile: the paper
    takes the median, the codes here have a 0, which keeps it out of integer products.

    Args:
        x: [..., H] in float32, bfloat16 or float16, finite.
        super_activation: a channel, or several, that is set aside in every token; or int32 or
            int64 [k, 2], (token, channel), tokens counted over all leading dimensions.
        per: "token" or "tensor".
        backend: as in ``block_quantize``.

    Returns:
        A packed matrix, for ``quant_linear`` and ``block_dequantize``.

    Raises:
        InvalidInput: see ``block_quantize``; or a channel outside of x.
    """
    check_source("x", x)
    if per not in ("token", "tensor"):
        raise InvalidInput(f"per must be 'token' or 'tensor', got {per!r}")
    return block_quantize(
        x,
        code="int8",
        block_size="row" if per == "token" else "tensor",
        outliers=_places(x, super_activation),
        backend=backend,
    )


def _places(x, super_activation) -> torch.Tensor | None:
    if super_activation is None or isinstance(super_activation, torch.Tensor):
        return super_activation
    H = x.shape[-1]
    several = isinstance(super_activation, Sequence)
    channels = super_activation if several else [super_activation]
    for channel in channels:
        if type(channel) is not int or not 0 <= channel < H:
            raise InvalidInput(
                f"super_activation must be channels in [0, {H}) or a tensor of (token, channel), "
                f"got {channel!r}"
            )
    tokens = torch.arange(x.numel() // H if H else 0, device=x.device)
    listed = torch.tensor(sorted(set(channels)), dtype=torch.int64, device=x.device)
    return torch.cartesian_prod(tokens, listed).view(-1, 2)


def integer_linear(
    x: QuantizedTensor, q: QuantizedTensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + bias from codes in int8: sums in int32, what was set aside in float32.

    Raises:
        InvalidInput: x or W is not symmetric int8 with a scale a row or one for all.
    """
    for name, packed in (("x", x), ("the weight", q)):
        if packed.plan.code.name != "int8" or not packed.plan.code.symmetric:
            raise InvalidInput(f"{name} must be symmetric int8 for a quantized activation")
        runs = (packed.plan.columns, packed.plan.elements)
        if packed.plan.block not in [(0, max(run, 1)) for run in runs]:
            raise InvalidInput(
                f"{name} must have block_size 'row' or 'tensor' for a quantized activation, got "
                f"blocks {packed.plan.block}"
            )
    T, H, D = x.plan.rows, x.plan.columns, q.plan.rows
    if q.plan.columns != H or x.device != q.device:
        raise InvalidInput(
            f"x [{T}, {H}] on {x.device} does not go with a weight [{D}, {q.plan.columns}] on "
            f"{q.device}"
        )
    if H * 127**2 >= 2**31:
        raise InvalidInput(f"int32 sums hold {2**31 // 127**2} columns at most, got {H}: split x")
    sums = _int_mm(x.codes.view(T, H), q.codes.view(D, H))
    y = sums.float() * x.block_scales()[:, None] * q.block_scales()[None, :]
    y = _add_kept_weights(y, x, q)
    y = _add_kept_activations(y, x, q)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], D)


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [T, H] b [D, H]^T of int8 in int32; padded to what the libraries' products take."""
    T, H = a.shape
    D = b.shape[0]
    if not (T and H and D):
        return torch.zeros(T, D, dtype=torch.int32, device=a.device)
    down, across, wide = max(-T % 8, 17 - T), -H % 8, -D % 8
    a = torch.nn.functional.pad(a.view(torch.int8), (0, across, 0, max(down, 0)))
    b = b.view(torch.int8)
    if across or wide:
        b = torch.nn.functional.pad(b, (0, across, 0, wide))
    return torch._int_mm(a, b.t())[:T, :D]


def _add_kept_weights(y, x, q) -> torch.Tensor:
    """Add the products with the weight's outliers, whose codes are 0."""
    if not len(q.positions):
        return y
    rows, cols = _divided(q.positions, q.plan.columns)
    columns, where = cols.unique(return_inverse=True)
    taken = _columns(x, columns)[:, where]  # [T, k]
    return y.index_add_(1, rows, taken * q.values.float())


def _add_kept_activations(y, x, q) -> torch.Tensor:
    """Add the products with the activations that were set aside, but for those above."""
    if not len(x.positions):
        return y
    tokens, channels = _divided(x.positions, x.plan.columns)
    columns, where = channels.unique(return_inverse=True)
    kept = y.new_zeros(x.plan.rows, len(columns))
    kept[tokens, where] = x.values.float()
    codes = q.codes.view(q.plan.rows, q.plan.columns)[:, columns]
    weights = decode(codes, q.plan.code) * q.block_scales()[:, None].float()  # outliers are 0
    return y.addmm_(kept, weights.T)


def _columns(x, columns: torch.Tensor) -> torch.Tensor:
    """The columns of a quantized activation in float32 [T, columns], what is kept exact."""
    T, H = x.plan.rows, x.plan.columns
    values = decode(x.codes.view(T, H)[:, columns], x.plan.code) * x.block_scales()[:, None]
    tokens, channels = _divided(x.positions, H)
    place = torch.searchsorted(columns, channels).clamp(max=len(columns) - 1)
    hit = columns[place] == channels
    values[tokens[hit], place[hit]] = x.values[hit].float()
    return values


def _divided(positions, width) -> tuple[torch.Tensor, torch.Tensor]:
    positions = positions.long()
    return positions // width, positions % width
