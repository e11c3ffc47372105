"""A linear layer that reports the peaks of its input and output channels."""

from __future__ import annotations

import torch

from swkernels import backends
from swkernels.errors import InvalidInput

from ._arguments import as_rows, as_token_index, check_activation, check_keys
from ._library import library
from .peaks import empty_keys

library.define(
    "linear_absmax(Tensor x, Tensor weight, Tensor? bias, Tensor? in_keys, Tensor? out_keys, "
    "Tensor? token_index, SymInt token_offset, str? backend) -> (Tensor, Tensor, Tensor)"
)


def linear_absmax(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    in_keys: torch.Tensor | None = None,
    out_keys: torch.Tensor | None = None,
    *,
    token_mask: torch.Tensor | None = None,
    token_offset: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y = x W^T + b and the running peaks of x's and of y's channels.

    The peaks are those of the tensors as the caller holds them: y after rounding to its dtype.
    Differentiable in x, weight and bias, like ``torch.nn.functional.linear``; follows autocast
    as it does (the peaks of x are then those of the cast x).

    Args:
        x: [..., H], float32, bfloat16, float16 or float64.
        weight: [D, H], x's dtype.
        bias: [D] or None.
        in_keys: int64 [H] or None (start anew), updated in place; see ``column_absmax``.
        out_keys: int64 [D] or None (start anew), updated in place.
        token_mask, token_offset, backend: as in ``column_absmax``.

    Returns:
        y [..., D], the keys of x [H], the keys of y [D].

    Raises:
        InvalidInput: a wrong shape, dtype or device; nothing has been changed.
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, bias, in_keys, out_keys)
    index = as_token_index(token_mask, x, token_offset)
    if torch.compiler.is_compiling():
        y, new_in, new_out = torch.ops.swkernels.linear_absmax(
            x, weight, bias, in_keys, out_keys, index, token_offset, backend
        )
        new_in = new_in if in_keys is None else in_keys.copy_(new_in)
        new_out = new_out if out_keys is None else out_keys.copy_(new_out)
        return y, new_in, new_out
    in_keys = empty_keys(x.shape[-1], x.device) if in_keys is None else in_keys
    out_keys = empty_keys(weight.shape[0], x.device) if out_keys is None else out_keys
    arguments = (x, weight, bias, in_keys, out_keys, index, token_offset, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:3]):
        y = _LinearAbsmax.apply(*arguments)
    else:
        y = _run(*arguments)
    return y, in_keys, out_keys


def _check(x, weight, bias, in_keys, out_keys) -> None:
    check_activation("x", x)
    check_activation("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise InvalidInput(
            f"weight must be [D, {x.shape[-1]}] for x {list(x.shape)}, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise InvalidInput(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise InvalidInput(
                f"{name} must be {x.dtype} on {x.device} like x, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    check_keys("in_keys", in_keys, x.shape[-1], x)
    check_keys("out_keys", out_keys, weight.shape[0], x)


def _run(x, weight, bias, in_keys, out_keys, token_index, token_offset, backend) -> torch.Tensor:
    rows = as_rows(x.detach())
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    kernel = backends.select("linear_absmax", rows, weight, bias, backend=backend)
    y = kernel(rows, weight, bias, in_keys, out_keys, token_index, token_offset)
    return y.view(*x.shape[:-1], weight.shape[0])


def _save(ctx, x, weight, bias) -> None:
    """Keep for the backward only what it reads: x for dW, the weight for dx."""
    keep_x = x if ctx.needs_input_grad[1] else None
    keep_weight = weight if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(keep_x, keep_weight)
    ctx.has_bias = bias is not None


def _gradients(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = dy @ weight
    if ctx.needs_input_grad[1]:
        dw = dy.flatten(0, -2).T @ x.flatten(0, -2)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        db = dy.flatten(0, -2).sum(0)
    return dx, dw, db


class _LinearAbsmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, in_keys, out_keys, token_index, token_offset, backend):
        _save(ctx, x, weight, bias)
        return _run(x, weight, bias, in_keys, out_keys, token_index, token_offset, backend)

    @staticmethod
    def backward(ctx, dy):
        return *_gradients(ctx, dy), None, None, None, None, None


def _compute(x, weight, bias, in_keys, out_keys, token_index, token_offset, backend):
    in_keys = empty_keys(x.shape[-1], x.device) if in_keys is None else in_keys.clone()
    out_keys = empty_keys(weight.shape[0], x.device) if out_keys is None else out_keys.clone()
    y = _run(x, weight, bias, in_keys, out_keys, token_index, token_offset, backend)
    return y, in_keys, out_keys


def _fake(x, weight, bias, in_keys, out_keys, token_index, token_offset, backend):
    _check(x, weight, bias, in_keys, out_keys)
    rows, columns = weight.shape
    return (
        x.new_empty(*x.shape[:-1], rows),
        x.new_empty(columns, dtype=torch.int64),
        x.new_empty(rows, dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs[:3]
    _save(ctx, x, weight, bias)


def _backward(ctx, dy, _d_in_keys, _d_out_keys):
    return *_gradients(ctx, dy), None, None, None, None, None


library.impl("linear_absmax", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("swkernels::linear_absmax", _fake)
torch.library.register_autograd("swkernels::linear_absmax", _backward, setup_context=_setup_context)
