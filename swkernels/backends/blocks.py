"""The blocks of a matrix in plain PyTorch: their ranges, scales and zero points.

Every backend must give the same codes, so what decides about them is exact or has one order. The
sums behind a z-score and the errors behind a search are sums of integers: values in units of
2^-15 of their block's largest power of two. Everything else is one rounded operation after the
other, in float32 where it touches scales, in float64 where it touches sums.
"""

from __future__ import annotations

import math

import torch

from .plan import ZERO_POINTS

TINY = 2.0**-126  # the smallest normal float32; the reciprocal of less may overflow
SMALLEST = 2.0**-149
SMALLEST_HALF = 2.0**-24
_UNIT_BITS = 15


def to_blocks(matrix: torch.Tensor, block: tuple[int, int], fill) -> torch.Tensor:
    """Lay the blocks of ``matrix`` [D, H] out as rows [blocks, elements], padded with ``fill``."""
    r, c = block
    if r == 0:
        flat = matrix.reshape(-1)
        count = -(-len(flat) // c)
        padded = flat.new_full((count * c,), fill)
        padded[: len(flat)] = flat
        return padded.view(count, c)
    D, H = matrix.shape
    down, across = -(-D // r), -(-H // c)
    padded = matrix.new_full((down * r, across * c), fill)
    padded[:D, :H] = matrix
    return padded.view(down, r, across, c).transpose(1, 2).reshape(down * across, r * c)


def from_blocks(blocks: torch.Tensor, block: tuple[int, int], D: int, H: int) -> torch.Tensor:
    """Undo ``to_blocks``: [D, H]."""
    r, c = block
    if r == 0:
        return blocks.reshape(-1)[: D * H].view(D, H)
    down, across = -(-D // r), -(-H // c)
    tiles = blocks.view(down, across, r, c).transpose(1, 2)
    return tiles.reshape(down * r, across * c)[:D, :H]


def spread(per_block: torch.Tensor, plan) -> torch.Tensor:
    """Give each element of the matrix [D, H] the value of its block, from [blocks]."""
    wide = per_block[:, None].expand(-1, plan.block_elements)
    return from_blocks(wide, plan.block, plan.rows, plan.columns)


def extremes(blocks: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value of each block [blocks] in float32; 0 where none is kept."""
    low = torch.where(kept, blocks, torch.inf).amin(1)
    high = torch.where(kept, blocks, -torch.inf).amax(1)
    some = kept.any(1)
    return torch.where(some, low, 0.0), torch.where(some, high, 0.0)


def unit_exponent(magnitude: torch.Tensor) -> torch.Tensor:
    """The exponent e such that magnitude * 2^e lies in [2^15, 2^16), 0 for 0; int32, exact."""
    _, exponent = torch.frexp(magnitude.double())  # magnitude = m * 2^exponent, 0.5 <= m < 1
    return torch.where(magnitude > 0, _UNIT_BITS + 1 - exponent, 0)


def in_units(values: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Round values [blocks, n] times 2^exponent [blocks] to integers, in int64."""
    return (values.double() * _power_of_two(exponent)[:, None]).round().to(torch.int64)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float64, exact on every device, which a power function need not be."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _over(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """values / divisor. By a plain number CUDA multiplies with its reciprocal instead."""
    return values / torch.full_like(values, divisor)


def clipped_range(
    blocks: torch.Tensor, kept: torch.Tensor, plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range that each block [blocks, n] of float32 is quantized over, after clipping.

    ``kept`` tells which elements count: no padding, no outliers.
    """
    low, high = extremes(blocks, kept)
    if plan.clip is None:
        return low, high
    cut = _cut(blocks, kept, low, high, plan)
    # NaN and infinity are not clipped away: they end as scales that tell the caller.
    finite = torch.isfinite(low) & torch.isfinite(high)
    return torch.where(finite, cut[0], low), torch.where(finite, cut[1], high)


def _cut(blocks, kept, low, high, plan):
    clip, count = plan.clip, kept.sum(1)
    if clip.by in ("percentile", "count"):
        bound = _ranked(blocks, kept, count, clip)
        return low.maximum(-bound), high.minimum(bound)
    if clip.by == "search":
        return _searched(blocks, kept, low, high, plan)
    exponent = unit_exponent(low.abs().maximum(high.abs()))
    values = blocks if clip.by == "zscore_signed" else blocks.abs()
    units = torch.where(kept, in_units(values, exponent), 0)
    return zscore_range(
        low, high, units.sum(1), units.square().sum(1), count, exponent, clip
    )


def zscore_range(low, high, total, squares, count, exponent, clip):
    """Cut [low, high] at mean + value * std from sums in units [blocks], all int64 but low, high.

    ``std`` is that of a sample, as in ``torch.std``; 0 for one element.
    """
    total, squares, n = total.double(), squares.double(), count.double()
    mean = total / n.clamp(min=1)
    variance = (squares - total * total / n.clamp(min=1)) / (n - 1).clamp(min=1)
    reach = variance.clamp(min=0).sqrt() * clip.value
    unit = _power_of_two(-exponent)
    top = ((mean + reach) * unit).float()
    if clip.by == "zscore_signed":
        bottom = ((mean - reach) * unit).float()
        return low.maximum(bottom).minimum(high), high.minimum(top).maximum(low)
    return low.maximum(-top), high.minimum(top)


def _ranked(blocks, kept, count, clip):
    ordered = torch.where(kept, blocks.abs(), -1.0).sort(1, descending=True).values
    return ordered.gather(1, rank(count, clip)[:, None])[:, 0].clamp(min=0)


def rank(count: torch.Tensor, clip) -> torch.Tensor:
    """How many magnitudes of a block lie above the bound, int64 [blocks], from their count."""
    if clip.by == "count":
        above = torch.full_like(count, int(clip.value))
    else:  # nearest rank: the ceil(p / 100 * n)-th from below
        above = count - _over(count.double() * clip.value, 100).ceil().to(torch.int64)
    return above.minimum(count - 1).clamp(min=0)


def _searched(blocks, kept, low, high, plan):
    exponent = unit_exponent(low.abs().maximum(high.abs()))
    best = torch.full_like(low, math.inf, dtype=torch.float64)
    factor = torch.ones_like(low)
    for candidate in plan.clip.factors:
        scale, zero = scales(low * candidate, high * candidate, plan.code, plan.scale_dtype)
        values = decode(encode(blocks, scale[:, None], _column(zero), plan.code), plan.code)
        if zero is not None:
            values = values - zero[:, None]
        error = blocks.double() - values.double() * scale.double()[:, None]
        units = torch.where(kept, in_units(error, exponent), 0)
        total = torch.where(torch.isfinite(scale), units.square().sum(1).double(), math.inf)
        better = total < best
        best, factor = torch.where(better, total, best), torch.where(better, candidate, factor)
    return low * factor, high * factor


def scales(low, high, code, scale_dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales float32 [blocks] of ranges, and the zero points int32 of an asymmetric code.

    They are rounded to float16 where that is their type, so that zero points fit them; scales
    that are quantized themselves are not. A block of zeros has scale 0, no other block has; one
    with NaN or infinity has a scale that is not finite.
    """
    magnitude = low.abs().maximum(high.abs())
    if code.symmetric:
        return _stored(_over(magnitude, code.steps), magnitude, scale_dtype), None
    span = high - low
    # Far from zero the zero point would not fit its type: a power of two limits it, exactly.
    least = magnitude * 2.0 ** -ZERO_POINTS[scale_dtype][1]
    # A constant block is one step away from zero, and exact.
    scale = torch.where(span > 0, _over(span, code.steps).maximum(least), magnitude)
    scale = _stored(scale, magnitude, scale_dtype)
    return scale, -divide(low, scale).round().to(torch.int32)


def _stored(scale, magnitude, scale_dtype):
    if scale_dtype == "float16":
        scale = scale.clamp(min=SMALLEST_HALF).half().float()
    return torch.where(magnitude == 0, 0.0, scale.clamp(min=SMALLEST))


def divide(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values / scale, by the reciprocal where it is finite; 0 where the scale is 0."""
    product = values * (1.0 / scale.clamp(min=TINY))
    quotient = torch.where(scale > 0, values / scale.clamp(min=SMALLEST), 0.0)
    return torch.where(scale >= TINY, product, quotient)


def encode(values: torch.Tensor, scale, zero, code) -> torch.Tensor:
    """The codes of float32 values, uint8 of the same shape; values outside end at the bounds."""
    ratio = divide(values, scale)
    if code.table is not None:
        ordered = torch.tensor(code.table, device=values.device)[list(code.order)]
        middles = (ordered[1:] + ordered[:-1]) / 2
        place = torch.bucketize(ratio.clamp(-1, 1).contiguous(), middles)  # middles: to the lower
        return torch.tensor(code.order, dtype=torch.uint8, device=values.device)[place]
    if code.symmetric:
        whole = ratio.clamp(-code.steps, code.steps).round() + code.zero
        return whole.to(torch.int8).view(torch.uint8)
    far = 2.0**25  # beyond any zero point, and exact in float32
    return (ratio.clamp(-far, far).round() + zero).clamp(0, code.steps).to(torch.uint8)


def decode(codes: torch.Tensor, code) -> torch.Tensor:
    """What codes stand for before zero point and scale, float32."""
    if code.table is not None:
        return torch.tensor(code.table, device=codes.device)[codes.long()]
    if code.symmetric and code.bits == 8:
        return codes.view(torch.int8).float()
    return codes.float() - code.zero


def pack(codes: torch.Tensor, code) -> torch.Tensor:
    """Pack codes (uint8, any shape) into bytes: two of 4 bits, the first in the high half."""
    flat = codes.reshape(-1)
    if code.bits == 8:
        return flat
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[::2] << 4 | flat[1::2]


def unpack(packed: torch.Tensor, code, count: int) -> torch.Tensor:
    """Undo ``pack``: uint8 [count]."""
    if code.bits == 8:
        return packed[:count]
    return torch.stack([packed >> 4, packed & 15], 1).view(-1)[:count]


def _column(zero):
    return None if zero is None else zero[:, None]
