"""Block quantization the slow and obvious way: NumPy on one block after the other."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from swkernels.backends.plan import NF4  # data, held against bitsandbytes in a test of its own

F = np.float32
FP4_MAGNITUDES = [Fraction(p) for p in ("0", "1/192", "2/3", "1", "1/3", "1/2", "1/6", "1/4")]
FP4 = [float(F(float(p))) for p in FP4_MAGNITUDES] + [-float(F(float(p))) for p in FP4_MAGNITUDES]


class Packed(NamedTuple):
    codes: np.ndarray  # [elements], not packed
    scales: np.ndarray  # [blocks] float32, as they are stored
    zeros: np.ndarray | None  # [blocks]
    blocks: list[np.ndarray]  # the flat positions of each block


def table_of(code: str) -> list[float] | None:
    return {"nf4": list(NF4), "fp4": FP4}.get(code)


def steps_of(code: str, symmetric: bool) -> int:
    if table_of(code):
        return 1
    return {("int4", True): 7, ("int4", False): 15, ("int8", True): 127, ("int8", False): 255}[
        code, symmetric
    ]


def blocks_of(shape, block) -> list[np.ndarray]:
    """The flat positions of each block, in the order of their first elements."""
    D, H = shape
    if not D * H:
        return []
    block = {"row": H, "channel": (D, 1), "tensor": D * H}.get(block, block)
    if isinstance(block, int):
        return [np.arange(i, min(i + block, D * H)) for i in range(0, D * H, block)]
    r, c = block
    places = np.arange(D * H).reshape(D, H)
    return [
        places[i : i + r, j : j + c].reshape(-1) for i in range(0, D, r) for j in range(0, H, c)
    ]


@np.errstate(all="ignore")
def quantize(w, code, symmetric, block, clip=None, scale_dtype="float32", apart=()) -> Packed:
    """Quantize float32 w [D, H] but for the flat positions ``apart``; clip: (by, value)."""
    flat, blocks = w.reshape(-1), blocks_of(w.shape, block)
    counted = np.ones(len(flat), bool)
    counted[list(apart)] = False
    scales, zeros = [], []
    for index in blocks:
        low, high = clipped_range(flat[index][counted[index]], code, symmetric, clip, scale_dtype)
        scale, zero = scale_of(low, high, code, symmetric, scale_dtype)
        scales.append(scale), zeros.append(zero)
    scales, zeros = np.array(scales, F), np.array(zeros, np.int64)
    if scale_dtype == "int8":
        stored = dequantize(quantize(scales[None], "int8", False, 256), "int8", False)
        if not symmetric:
            nearest = np.clip(zeros, 0, steps_of(code, False))
            parts = zip((zeros - nearest).astype(F) * scales, stored)
            away = np.array([np.rint(divide(part, scale)) for part, scale in parts])
            zeros = np.clip(nearest + away, -(2**15), 2**15 - 1).astype(np.int64)
        scales = stored
    codes = np.zeros(len(flat), np.uint8)
    for index, scale, zero in zip(blocks, scales, zeros):
        codes[index] = encode(flat[index], scale, zero, code, symmetric)
    codes[list(apart)] = encode(F([0]), F(1), 0, code, symmetric)[0]
    return Packed(codes, scales, None if symmetric else zeros, blocks)


def clipped_range(values, code, symmetric, clip, scale_dtype):
    if not len(values):
        return F(0), F(0)
    low, high, n = values.min(), values.max(), len(values)
    if clip is None:
        return low, high
    by, value = clip
    descending = np.sort(np.abs(values))[::-1]
    if by == "percentile":
        bound = descending[n - max(math.ceil(Fraction(value) * n / 100), 1)]
    elif by == "count":
        bound = descending[min(value, n - 1)]
    elif by == "search":
        return searched(values, code, symmetric, value, scale_dtype)
    else:
        bottom, top = zscore_bounds(values, by, value)
        if by == "zscore_signed":
            return min(max(low, bottom), high), max(min(high, top), low)
        bound = top
    return max(low, -bound), min(high, bound)


def zscore_bounds(values, by, z):
    """mean -+ z std in units of 2^-15 of the largest magnitude's power of two, sums exact."""
    exponent = math.frexp(float(np.abs(values).max()))[1] - 16
    if by == "zscore":
        values = np.abs(values)
    units = [int(unit) for unit in np.rint(np.ldexp(values.astype(np.float64), -exponent))]
    n, total, squares = len(units), float(sum(units)), float(sum(unit**2 for unit in units))
    variance = max((squares - total * total / n) / max(n - 1, 1), 0.0)
    mean, reach = total / n, math.sqrt(variance) * z
    return F(math.ldexp(mean - reach, exponent)), F(math.ldexp(mean + reach, exponent))


def searched(values, code, symmetric, least, scale_dtype):
    low, high = values.min(), values.max()
    exponent = math.frexp(float(max(-low, high)))[1] - 16
    best = None
    for i in range(40):
        if 1 - 0.025 * i < least - 1e-9:
            break
        factor = F(1 - 0.025 * i)
        scale, zero = scale_of(low * factor, high * factor, code, symmetric, scale_dtype)
        if not np.isfinite(scale):
            continue
        whole = decode(encode(values, scale, zero, code, symmetric), F(1), zero, code, symmetric)
        error = values.astype(np.float64) - whole.astype(np.float64) * float(scale)
        total = sum(int(unit) ** 2 for unit in np.rint(np.ldexp(error, -exponent)))
        if best is None or total < best[0]:
            best = total, low * factor, high * factor
    return best[1:] if best else (low, high)


def scale_of(low, high, code, symmetric, scale_dtype):
    magnitude, steps = max(abs(low), abs(high)), F(steps_of(code, symmetric))
    if magnitude == 0:
        return F(0), 0
    if symmetric:
        scale = magnitude / steps
    elif high > low:
        least = F(2.0**-20 if scale_dtype == "float32" else 2.0**-13)
        scale = max((high - low) / steps, magnitude * least)
    else:
        scale = magnitude
    if scale_dtype == "float16":
        scale = F(np.float16(max(scale, F(2.0**-24))))
    scale = max(scale, F(2.0**-149))
    return scale, 0 if symmetric or not np.isfinite(scale) else -int(np.rint(divide(low, scale)))


def divide(values, scale):
    if scale == 0:
        return values * F(0)
    return values * (F(1) / scale) if scale >= F(2.0**-126) else values / scale


def encode(values, scale, zero, code, symmetric):
    ratio, steps = divide(values, scale), steps_of(code, symmetric)
    table = table_of(code)
    if table:
        # FP4 has two zeros: code 0 takes what lies below or at 0, code 8 what lies above.
        order = sorted(range(16), key=lambda c: (table[c], c))
        ordered = np.array([table[c] for c in order], F)
        above = ratio[:, None] > (ordered[:-1] + ordered[1:]) / F(2)
        return np.array(order, np.uint8)[above.sum(1)]
    whole = np.rint(np.clip(ratio, -(2.0**25), 2.0**25)).astype(np.int64)
    if not symmetric:
        return np.clip(whole + zero, 0, steps).astype(np.uint8)
    whole = np.clip(whole, -steps, steps)
    return (whole + 8 if code == "int4" else whole % 256).astype(np.uint8)


def decode(codes, scale, zero, code, symmetric):
    table = table_of(code)
    if table:
        return np.array(table, F)[codes] * scale
    if symmetric and code == "int8":
        return codes.view(np.int8).astype(F) * scale
    return (codes.astype(np.int64) - (8 if symmetric else zero)).astype(F) * scale


@np.errstate(all="ignore")
def dequantize(packed: Packed, code, symmetric) -> np.ndarray:
    """float32 [elements], without what is kept apart."""
    zeros = [0] * len(packed.blocks) if packed.zeros is None else packed.zeros
    values = np.zeros(len(packed.codes), F)
    for index, scale, zero in zip(packed.blocks, packed.scales, zeros):
        values[index] = decode(packed.codes[index], scale, zero, code, symmetric)
    return values


def pack(codes, code) -> list[int]:
    if code == "int8":
        return codes.tolist()
    padded = [*codes.tolist(), 0]
    return [16 * padded[i] + padded[i + 1] for i in range(0, len(codes), 2)]


def largest(w, count, blocks) -> set[int]:
    """The flat positions of the largest magnitudes of each block; of equal ones the first."""
    flat = np.abs(w.reshape(-1))
    return {int(i) for index in blocks for i in sorted(index, key=lambda i: (-flat[i], i))[:count]}
