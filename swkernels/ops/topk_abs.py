"""The largest entries of several matrices together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swkernels import backends
from swkernels.errors import InvalidInput

from ._arguments import FLOATS
from .topk import TopK

_TYPES = (
    *FLOATS,
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)


def topk_abs(
    tensors: torch.Tensor | Sequence[torch.Tensor], k: int, *, backend: str | None = None
) -> TopK:
    """Return the k entries of largest magnitude over all matrices, with their places.

    The memory is O(k). Every backend gives the same entries in the same order, with the same bits.
    On a GPU it waits for the device. No gradient flows through it, and ``torch.compile`` breaks the
    graph there.

    Args:
        tensors: matrices [D, H], or vectors [H], which count as one row; one alone may come
            without a list. float32, bfloat16, float16, float64 and float8, mixed at will, with
            any strides, all on one device.
        k: how many, from 0 (then nothing is looked at). All entries where there are fewer.
        backend: "reference", "cpu" or "cuda"; None lets the device choose.

    Returns:
        The entries; values are float32, or float64 where a tensor is.

    Raises:
        InvalidInput: no tensors, a wrong shape, dtype, kind or device, k below 0, or a NaN: the
            message names the first one.
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    if torch.compiler.is_compiling():  # traced, the call would read memory that is gone
        return torch.compiler.disable(topk_abs)(tensors, k, backend=backend)
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    _check(tensors, k)
    plain = (tensor.detach().resolve_neg() for tensor in tensors)
    matrices = [tensor if tensor.dim() == 2 else tensor[None] for tensor in plain]
    run = backends.select("topk_abs", *matrices, backend=backend)
    wide = any(matrix.dtype == torch.float64 for matrix in matrices)
    k = min(k, sum(matrix.numel() for matrix in matrices))
    if k == 0:
        place = torch.empty(0, dtype=torch.int64, device=matrices[0].device)
        values = torch.empty(0, dtype=torch.float64 if wide else torch.float32, device=place.device)
        return TopK(values, place, place, place)
    values, place, number = run(matrices, k)
    widths = torch.tensor([matrix.shape[1] for matrix in matrices], device=place.device)[number]
    row = place // widths
    return TopK(values, number, row, place - row * widths)


def _check(tensors: list, k: object) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise InvalidInput(f"k must be an integer from 0, got {k!r}")
    if not tensors:
        raise InvalidInput("there are no tensors: expected one matrix [D, H] at least")
    device = getattr(tensors[0], "device", None)
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInput(f"tensor {number} must be a tensor, got {type(tensor).__name__}")
        if hasattr(tensor, "to_local"):
            raise InvalidInput(f"tensor {number} is a DTensor: pass its full_tensor()")
        if tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
            raise InvalidInput(
                f"tensor {number} is {type(tensor).__name__} of layout {tensor.layout}: expected a "
                "plain dense tensor; make it dense or dequantize it first"
            )
        if tensor.dtype not in _TYPES:
            raise InvalidInput(
                f"tensor {number} must be float32, bfloat16, float16, float64 or float8, got "
                f"{tensor.dtype}; dequantize it first"
            )
        if tensor.is_meta or tensor.device != device:
            raise InvalidInput(
                f"tensor {number} is on {tensor.device}, the first on {device}: bring all to one "
                "device that holds values"
            )
        if tensor.dim() not in (1, 2):
            raise InvalidInput(
                f"tensor {number} must be a matrix [D, H] or a vector [H], got "
                f"{list(tensor.shape)}; pass one matrix an expert"
            )
