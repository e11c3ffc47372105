"""Quantize a matrix in blocks and keep its outliers exactly."""

from __future__ import annotations

import torch

from swkernels import backends
from swkernels.backends.blocks import divide, from_blocks, to_blocks
from swkernels.backends.plan import SCALE_DTYPES, ZERO_POINTS, Clip, Plan, plan_of
from swkernels.errors import InvalidInput

from ._arguments import check_activation
from .quantized import ELEMENTS_PER_OUTLIER, OUTLIER_DTYPES, SCALE_BLOCK, QuantizedTensor


def block_quantize(
    w: torch.Tensor,
    *,
    code: str = "int4",
    symmetric: bool = True,
    block_size: int | tuple[int, int] | str = 64,
    clip: Clip | None = None,
    scale_dtype: str = "float32",
    outliers: torch.Tensor | None = None,
    largest: int = 0,
    largest_per: str = "tensor",
    outlier_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> QuantizedTensor:
    """Pack ``w`` as RESTORE(Q(CLIP(w))) of arXiv 2411.07191: round to nearest, in blocks.

    Of each block: the range of its elements without the outliers, cut by ``clip``; a scale
    (symmetric: the largest magnitude over the code's largest, asymmetric: the range over 15 or
    255, and an integer zero point); the nearest code of each element, ties of integers to the
    even one, ties between two values of a table to the lower. The outliers keep their exact
    values beside the codes. Codes, scales and packing are the same on every backend. No gradient
    flows through it.

    Args:
        w: [..., H] in float32, bfloat16 or float16, finite, at most 2^31 - 1 elements.
        code: "int4", "int8" (2^bits - 1 steps), "nf4" or "fp4" (the tables of bitsandbytes; codes
            and scales equal its own at its block sizes).
        symmetric: False gives integer codes a zero point in each block.
        block_size: elements of the flattened matrix (any positive number; the last block may be
            shorter), (rows, columns) of a tile, "row", "channel" (a column) or "tensor".
        clip: how ranges are cut; None: not at all.
        scale_dtype: "float32", "float16", or "int8": scales quantized themselves, asymmetric and
            in blocks of 256. Codes are found for the scales as they are stored.
        outliers: int32 or int64 [k, 2], (row, column) of elements to keep exactly.
        largest: how many of the largest magnitudes are kept exactly too: of the whole tensor or,
            ``largest_per="block"``, of every block. Of equal ones the first.
        outlier_dtype: float32, bfloat16 or float16; None keeps w's own, which is exact.
        backend: "reference", "cpu" or "triton"; None lets the device choose.

    Raises:
        InvalidInput: an argument that is not as above, NaN or infinity in ``w``, an outlier
            outside of it or listed twice, more outliers than one in 16 elements (where that is
            less, than one a row, or 16), a range that ``scale_dtype`` or an outlier that
            ``outlier_dtype`` cannot hold.
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    check_source("w", w)
    w = w.detach()
    plan = plan_of(
        w.shape, code=code, symmetric=symmetric, block_size=block_size, clip=clip,
        scale_dtype=scale_dtype,
    )  # fmt: skip
    matrix = w.reshape(plan.rows, plan.columns).contiguous()
    positions = _positions(matrix, plan, outliers, largest, largest_per)
    outlier_dtype = outlier_dtype or w.dtype
    if outlier_dtype not in OUTLIER_DTYPES:
        raise InvalidInput(
            f"outlier_dtype must be float32, bfloat16 or float16, got {outlier_dtype}"
        )
    # What is kept must be finite too, and is not seen by the kernels.
    values = matrix.view(-1)[positions.long()].to(outlier_dtype)
    codes, scales, zero_points = _quantize(matrix, plan, positions, backend)
    _check_finite(matrix, plan, scales, values)
    return QuantizedTensor(
        tuple(w.shape), w.dtype, plan, codes, scales, zero_points, positions, values
    )


def check_source(name: str, w: torch.Tensor) -> None:
    """Raise InvalidInput unless ``w`` is a tensor [..., H] of a type that can be quantized."""
    check_activation(name, w)
    if w.dtype not in OUTLIER_DTYPES:
        raise InvalidInput(
            f"{name} must be float32, bfloat16 or float16, got {w.dtype}: convert it"
        )


def _quantize(matrix, plan: Plan, positions, backend):
    kernels = backends.serving("block_quantize", matrix, plan, backend=backend)
    dtype = SCALE_DTYPES[plan.scale_dtype]
    if plan.scale_dtype != "int8":
        codes, scales, zero_points = kernels.block_quantize(matrix, plan, positions, dtype)
    else:
        ranges, zero_points = kernels.block_scales(matrix, plan, positions)
        if not bool(torch.isfinite(ranges).all()):  # the caller finds out where
            return None, ranges, None
        scales = block_quantize(
            ranges, code="int8", symmetric=False, block_size=SCALE_BLOCK, backend=backend
        )
        stored = scales.dequantize()
        if zero_points is not None:
            zero_points = _refitted(zero_points, ranges, stored, plan)
        codes = kernels.block_encode(matrix, plan, positions, stored, zero_points)
    if zero_points is not None:
        zero_points = zero_points.to(ZERO_POINTS[plan.scale_dtype][0])
    return codes, scales, zero_points


def _refitted(zero_points, ranges, stored, plan) -> torch.Tensor:
    """Zero points for scales that are not what they were: the value nearest to 0 stays in place."""
    nearest = zero_points.clamp(0, plan.code.steps)
    away = divide((zero_points - nearest) * ranges, stored).round()
    limits = torch.iinfo(ZERO_POINTS[plan.scale_dtype][0])
    return (nearest + away).clamp(limits.min, limits.max).to(torch.int32)


def _positions(matrix, plan, outliers, largest, largest_per) -> torch.Tensor:
    """The positions of all that is kept, int32, ascending."""
    if type(largest) is not int or largest < 0:
        raise InvalidInput(f"largest must be an integer from 0, got {largest!r}")
    if largest_per not in ("tensor", "block"):
        raise InvalidInput(f"largest_per must be 'tensor' or 'block', got {largest_per!r}")
    found = [_listed(outliers, plan, matrix.device)]
    check_count(len(found[0]) + largest * (plan.blocks if largest_per == "block" else 1), plan)
    if largest and plan.elements:
        found.append(_largest(matrix, plan, largest, largest_per))
    return torch.cat(found).unique().to(torch.int32)


def check_count(count: int, plan: Plan) -> None:
    """Raise InvalidInput if so many outliers are too many for a matrix."""
    if count > max(plan.elements // ELEMENTS_PER_OUTLIER, plan.rows, ELEMENTS_PER_OUTLIER):
        raise InvalidInput(
            f"{count} outliers of {plan.elements} elements are more than one in "
            f"{ELEMENTS_PER_OUTLIER}: keep fewer, or use an 8-bit code"
        )


def _listed(outliers, plan, device) -> torch.Tensor:
    if outliers is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    integers = (torch.int32, torch.int64)
    if not isinstance(outliers, torch.Tensor) or outliers.dtype not in integers:
        kind = outliers.dtype if isinstance(outliers, torch.Tensor) else type(outliers).__name__
        raise InvalidInput(f"outliers must be int32 or int64 [k, 2] (row, column), got {kind}")
    if outliers.dim() != 2 or outliers.shape[1] != 2:
        raise InvalidInput(
            f"outliers must be [k, 2], (row, column) each, got {list(outliers.shape)}"
        )
    rows, cols = outliers.to(device, torch.int64).unbind(1)
    outside = (rows < 0) | (rows >= plan.rows) | (cols < 0) | (cols >= plan.columns)
    if outside.any():
        row, col = (int(index[outside][0]) for index in (rows, cols))
        raise InvalidInput(
            f"outlier [{row}, {col}] lies outside the matrix [{plan.rows}, {plan.columns}]"
        )
    flat = (rows * plan.columns + cols).sort().values
    twice = flat[1:][flat[1:] == flat[:-1]]
    if len(twice):
        row, col = divmod(int(twice[0]), plan.columns)
        raise InvalidInput(f"outlier [{row}, {col}] is listed more than once")
    return flat


def _largest(matrix, plan, count, per) -> torch.Tensor:
    """The flat positions of the largest magnitudes; of equal ones the first."""
    block = plan.block if per == "block" else (0, plan.elements)
    magnitude = to_blocks(matrix.abs().float(), block, -1.0)
    count = min(count, magnitude.shape[1])
    least = magnitude.topk(count, 1, sorted=False).values.amin(1, keepdim=True)
    above, equal = magnitude > least, (magnitude == least) & (magnitude >= 0)
    missing = count - above.sum(1, keepdim=True)
    chosen = above | equal & (equal.cumsum(1, dtype=torch.int32) <= missing)
    return from_blocks(chosen, block, plan.rows, plan.columns).reshape(-1).nonzero()[:, 0]


def _check_finite(matrix, plan, scales, values) -> None:
    ranges = scales.scales if isinstance(scales, QuantizedTensor) else scales
    if torch.isfinite(ranges).all() and torch.isfinite(values).all():
        return
    wrong = ~torch.isfinite(matrix)
    if wrong.any():
        row, col = divmod(int(wrong.view(-1).nonzero()[0]), plan.columns)
        raise InvalidInput(
            f"there is {float(matrix[row, col])} at [{row}, {col}]: only finite values can be "
            "quantized"
        )
    if not torch.isfinite(values).all():
        raise InvalidInput(f"an outlier is beyond {values.dtype}: use outlier_dtype=torch.float32")
    wider = ", or use scale_dtype='float32'" if plan.scale_dtype == "float16" else ""
    raise InvalidInput(
        f"the range of a block is beyond its scale's type: divide the matrix by a constant{wider}"
    )
