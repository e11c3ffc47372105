"""h = act(gate) * up and the peaks of h, in one read of gate and up and one write of h."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from swkernels.errors import InvalidInput

from .launch import choose, refusal, split_rows
from .peaks import merge_keys, row_tokens, tile_keys

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    """act(g) for a float32 tile; division is IEEE, which costs nothing in a kernel that waits
    for memory."""
    if ACTIVATION == "silu":
        return tl.div_rn(g, 1.0 + tl.exp(-g))
    elif ACTIVATION == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)): no tanh, and no cancellation for negative z.
        return tl.div_rn(g, 1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    else:
        return tl.where(g < 0.0, 0.0, g)  # keeps NaN, which max(g, 0) would drop


@triton.jit(do_not_specialize=["T", "tiles", "token_offset"])
def glu_absmax_kernel(
    gate,  # [T, C]
    up,  # [T, C]
    h,  # [T, C], contiguous
    keys,  # [C] int64 or None
    token_index,  # [T] int64 or None
    T,
    C,
    stride_gt,
    stride_gc,
    stride_ut,
    stride_uc,
    tiles,
    token_offset,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = channels[None, :].to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_T
    best = tl.zeros([BLOCK_T, BLOCK_C], tl.int64)
    for tile in range(tiles):
        rows = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (rows < T)[:, None] & (channels < C)[None, :]
        g = tl.load(gate + rows[:, None] * stride_gt + columns * stride_gc, mask=inside, other=0.0)
        u = tl.load(up + rows[:, None] * stride_ut + columns * stride_uc, mask=inside, other=0.0)
        values = _activate(g.to(tl.float32), ACTIVATION) * u.to(tl.float32)
        values = values.to(h.dtype.element_ty)  # [BLOCK_T, BLOCK_C], the one rounding
        tl.store(h + rows[:, None] * C + columns, values, mask=inside)
        if keys is not None:
            low, mask = row_tokens(rows, T, token_index, token_offset)
            best = tl.maximum(best, tile_keys(values, low[:, None], mask[:, None]))
    if keys is not None:
        merge_keys(keys, channels, tl.max(best, axis=0), C)


def supports(gate: torch.Tensor, up: torch.Tensor, activation: str) -> str | None:
    """Return why the kernel cannot take the arguments, or None."""
    return refusal(gate, up)


def glu_absmax(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    keys: torch.Tensor | None,
    token_index: torch.Tensor | None,
    token_offset: int,
) -> torch.Tensor:
    """Return h = act(gate) * up [T, C], computed in float32 and rounded once to gate's dtype.

    Merges the peaks of the rounded h into `keys` [C] in place. Any strides, so both halves of a
    fused gate-and-up projection can be passed as views.
    """
    if activation not in ACTIVATIONS:
        raise InvalidInput(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    T, C = gate.shape
    h = torch.empty((T, C), dtype=gate.dtype, device=gate.device)
    if h.numel() == 0:
        return h
    config = dict(choose("glu_absmax", gate, C, C, T).config)
    launch = {name: config.pop(name) for name in ("BLOCK_T", "BLOCK_C")}
    grid, tiles = split_rows(T, C, gate.device, waves=config.pop("waves"), **launch)
    with torch.cuda.device_of(gate):
        glu_absmax_kernel[grid](
            gate, up, h, keys, token_index, T, C, *gate.stride(), *up.stride(),
            tiles, token_offset, ACTIVATION=activation, **launch, **config,
        )  # fmt: skip
    return h
