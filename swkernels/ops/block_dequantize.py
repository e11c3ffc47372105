"""The values of a packed matrix."""

from __future__ import annotations

import torch

from swkernels import backends
from swkernels.errors import InvalidInput

from ._arguments import FLOATS
from .quantized import QuantizedTensor


def block_dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Return the values of ``q``, outliers exact, in one pass; see ``QuantizedTensor``.

    Args:
        q: a packed matrix.
        dtype: float32, bfloat16, float16 or float64; None: that of the tensor it was made of.
        backend: "reference", "cpu" or "triton"; None lets the device choose.

    Returns:
        A tensor of ``q.shape``.

    Raises:
        InvalidInput: ``q`` is no packed matrix or ``dtype`` none of these.
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    check_packed(q)
    dtype = q.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise InvalidInput(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    run = backends.select("block_dequantize", q.codes, q.plan, dtype, backend=backend)
    scales = q.block_scales()
    matrix = run(q.codes, scales, q.zero_points, q.positions, q.values, q.plan, dtype)
    return matrix.view(q.shape)


def check_packed(q) -> None:
    """Raise InvalidInput unless ``q`` is a packed matrix."""
    if not isinstance(q, QuantizedTensor):
        raise InvalidInput(f"expected a QuantizedTensor of block_quantize, got {type(q).__name__}")
