"""The gradient of a linear layer's weight at listed coordinates only."""

from __future__ import annotations

import torch

from swkernels import backends
from swkernels.errors import InvalidInput

from ._arguments import as_rows, check_activation
from ._library import library
from .pattern import check_indices, check_inside

library.define(
    "sampled_grad(Tensor dy, Tensor x, Tensor rows, Tensor cols, str? backend) -> Tensor"
)


def sampled_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    cols: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Return dW[rows[i], cols[i]] = sum_t dy[t, rows[i]] x[t, cols[i]] for y = x W^T.

    k dot products over tokens: no dense gradient is formed and no transposed copy is made. Sums
    in float32 (float64 where an input is). Infinities and NaN pass through. No gradient flows
    through the result.

    Args:
        dy: [..., D], the gradient of the output. float32, bfloat16, float16 or float64.
        x: [..., H], the input, with the same tokens; its dtype may differ.
        rows, cols: int32 or int64 [k] on x's device, the coordinates [output, input]. Sorted by
            column, or by row, they use the cache best. On a GPU their range is not checked.
        backend: "reference", "cpu" or "triton"; None lets the device choose.

    Returns:
        float32 [k], or float64.

    Raises:
        InvalidInput: a wrong shape, dtype or device, or a coordinate outside the weight.
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    _check(dy, x, rows, cols)
    if torch.compiler.is_compiling():
        return torch.ops.swkernels.sampled_grad(dy, x, rows, cols, backend)
    return _compute(dy, x, rows, cols, backend)


def _check(dy, x, rows, cols) -> None:
    check_activation("dy", dy)
    check_activation("x", x)
    check_indices(rows, cols)
    if dy.shape[:-1] != x.shape[:-1]:
        raise InvalidInput(
            f"dy and x must have the same tokens, got {list(dy.shape)} and {list(x.shape)}"
        )
    if dy.device != x.device or rows.device != x.device:
        raise InvalidInput(
            f"dy, x and the coordinates must be on one device, got {dy.device}, {x.device} and "
            f"{rows.device}"
        )


def _compute(dy, x, rows, cols, backend):
    if x.device.type == "cpu":  # before int32 wraps a large index; on a GPU it would wait
        check_inside(rows, cols, dy.shape[-1], x.shape[-1])
    dy, x = as_rows(dy.detach()), as_rows(x.detach())
    kernel = backends.select("sampled_grad", dy, x, backend=backend)
    return kernel(dy, x, rows.int().contiguous(), cols.int().contiguous())


def _fake(dy, x, rows, cols, backend):
    _check(dy, x, rows, cols)
    wide = torch.float64 in (dy.dtype, x.dtype)
    return x.new_empty(rows.shape[0], dtype=torch.float64 if wide else torch.float32)


library.impl("sampled_grad", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("swkernels::sampled_grad", _fake)
