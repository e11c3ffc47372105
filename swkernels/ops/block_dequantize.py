"""The values of a packed matrix."""

from __future__ import annotations

import torch

from swkernels import backends
from swkernels.backends.plan import Code, Plan
from swkernels.errors import InvalidInput

from ._arguments import FLOATS
from ._library import library
from .quantized import QuantizedTensor

library.define(
    "block_dequantize(Tensor codes, Tensor scales, Tensor? zero_points, Tensor positions, "
    "Tensor values, int[] plan, str code, ScalarType dtype, str? backend) -> Tensor"
)


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
    scales = q.block_scales()
    if torch.compiler.is_compiling():
        matrix = torch.ops.swkernels.block_dequantize(
            q.codes, scales, q.zero_points, q.positions, q.values, *as_arguments(q.plan), dtype,
            backend,
        )  # fmt: skip
    else:
        matrix = _run(q, scales, dtype, backend)
    return matrix.view(q.shape)


def _run(q, scales, dtype, backend) -> torch.Tensor:
    run = backends.select("block_dequantize", q.codes, q.plan, dtype, backend=backend)
    return run(q.codes, scales, q.zero_points, q.positions, q.values, q.plan, dtype)


def check_packed(q) -> None:
    """Raise InvalidInput unless ``q`` is a packed matrix."""
    if not isinstance(q, QuantizedTensor):
        raise InvalidInput(f"expected a QuantizedTensor of block_quantize, got {type(q).__name__}")


def as_arguments(plan: Plan) -> tuple[list[int], str]:
    """A plan in the types of a schema; the clip has done its work before."""
    return [plan.rows, plan.columns, *plan.block, int(plan.code.symmetric)], plan.code.name


def from_arguments(tensors, plan: list[int], code: str) -> QuantizedTensor:
    """Undo ``as_arguments``; a matrix [D, H]."""
    D, H, r, c, symmetric = plan
    plan = Plan(D, H, (r, c), Code(code, bool(symmetric)))
    codes, scales, zero_points, positions, values = tensors
    return QuantizedTensor(
        (D, H), torch.float32, plan, codes, scales, zero_points, positions, values
    )


def _compute(codes, scales, zero_points, positions, values, plan, code, dtype, backend):
    q = from_arguments((codes, scales, zero_points, positions, values), plan, code)
    return _run(q, scales, dtype, backend)


def _fake(codes, scales, zero_points, positions, values, plan, code, dtype, backend):
    return codes.new_empty(plan[0], plan[1], dtype=dtype)


library.impl("block_dequantize", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("swkernels::block_dequantize", _fake)
