"""Zero or scale a dense gradient at listed coordinates, in place."""

from __future__ import annotations

import math

import torch

from swkernels import backends
from swkernels.errors import InvalidInput

from ._arguments import check_activation
from ._library import library
from .pattern import check_indices, check_inside

library.define(
    "masked_grad_(Tensor(a!) grad, Tensor rows, Tensor cols, float scale, str? backend) -> ()"
)


def masked_grad_(
    grad: torch.Tensor,
    rows: torch.Tensor,
    cols: torch.Tensor,
    scale: float = 0.0,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply grad[rows[i], cols[i]] by ``scale`` in place, for weights that stay frozen.

    Scale 0 writes exact zeros, whatever was there, NaN too.

    Args:
        grad: [D, H], float32, bfloat16, float16 or float64, any strides.
        rows, cols: int32 or int64 [k] on grad's device, different coordinates. On a GPU their
            range is not checked.
        scale: a finite number.
        backend: "reference", "cpu" or "triton"; None lets the device choose.

    Returns:
        ``grad``.

    Raises:
        InvalidInput: a wrong shape, dtype or scale, or a coordinate outside; nothing has been
            changed.
        BackendUnavailable: the backend asked for is not there or does not take the gradient.
    """
    _check(grad, rows, cols)
    if torch.compiler.is_compiling():
        torch.ops.swkernels.masked_grad_(grad, rows, cols, scale, backend)
    else:
        _compute(grad, rows, cols, scale, backend)
    return grad


def _check(grad, rows, cols) -> None:
    check_activation("grad", grad)
    check_indices(rows, cols)
    if grad.dim() != 2 or rows.device != grad.device:
        raise InvalidInput(
            f"grad must be [D, H] on the coordinates' device, got {list(grad.shape)} on "
            f"{grad.device} and coordinates on {rows.device}"
        )


def _compute(grad, rows, cols, scale, backend):
    if not math.isfinite(scale):
        raise InvalidInput(f"scale must be a finite number, got {scale}")
    if grad.device.type == "cpu":  # before int32 wraps a large index; on a GPU it would wait
        check_inside(rows, cols, *grad.shape)
    if not grad.is_inference():
        torch.autograd.graph.increment_version(grad)  # kernels write past PyTorch's sight
    grad = grad.detach()
    if grad.stride(0) == 1 and grad.stride(1) != 1:  # transposed, as Conv1D keeps its weight
        grad, rows, cols = grad.T, cols, rows
    kernel = backends.select("masked_grad", grad, backend=backend)
    kernel(grad, rows.int().contiguous(), cols.int().contiguous(), float(scale))


def _fake(grad, rows, cols, scale, backend):
    _check(grad, rows, cols)


library.impl("masked_grad_", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("swkernels::masked_grad_", _fake)
