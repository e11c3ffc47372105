"""A linear layer over a packed weight."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from swkernels import backends
from swkernels.errors import InvalidInput

from ._arguments import as_rows, check_activation
from ._library import library
from .block_dequantize import as_arguments, block_dequantize, check_packed, from_arguments
from .quantize_activation import integer_linear
from .quantized import QuantizedTensor

library.define(
    "quant_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zero_points, Tensor positions, "
    "Tensor values, Tensor? bias, int[] plan, str code, str? backend) -> Tensor"
)


def quant_linear(
    x: torch.Tensor | QuantizedTensor,
    q: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Return x W^T + bias of a packed weight W [D, H], outliers and bias in the same pass.

    Sums are in float32 (float64 for a float64 ``x``). Differentiable in ``x`` and ``bias``;
    follows autocast as ``torch.nn.functional.linear`` does.

    Args:
        x: [..., H] in float32, bfloat16, float16 or float64; or of ``quantize_activation``, for a
            product of int8 with int8 that is summed in int32 and has no gradient.
        q: the weight, of ``block_quantize``; its last dimension is H.
        bias: [D] or None.
        backend: "reference", "cpu" or "triton"; None lets the device choose.

    Returns:
        [..., D] in x's type.

    Raises:
        InvalidInput: shapes, types or devices that do not go together.
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    check_packed(q)
    if isinstance(x, QuantizedTensor):
        _check_bias(bias, q.plan, x.device)
        return integer_linear(x, q, bias)
    _check(x, q.plan, q.codes, bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.compiler.is_compiling():
        return torch.ops.swkernels.quant_linear(
            x, q.codes, q.block_scales(), q.zero_points, q.positions, q.values, bias,
            *as_arguments(q.plan), backend,
        )  # fmt: skip
    if torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        # A view made inside the function could not be changed in place, as adapters do.
        y = _QuantLinear.apply(as_rows(x), bias, q, backend)
        return y.view(*x.shape[:-1], q.plan.rows)
    return _run(x, q, q.block_scales(), bias, backend)


def _check(x, plan, codes, bias) -> None:
    check_activation("x", x)
    if x.shape[-1] != plan.columns:
        raise InvalidInput(
            f"x must be [..., {plan.columns}] for a weight [{plan.rows}, {plan.columns}], got "
            f"{list(x.shape)}"
        )
    if x.device != codes.device:
        raise InvalidInput(f"the weight is on {codes.device}, x on {x.device}: move it")
    _check_bias(bias, plan, x.device)


def _check_bias(bias, plan, device) -> None:
    if bias is None:
        return
    if not isinstance(bias, torch.Tensor):
        raise InvalidInput(f"bias must be a tensor or None, got {type(bias).__name__}")
    if bias.shape != (plan.rows,) or not bias.is_floating_point() or bias.device != device:
        raise InvalidInput(
            f"bias must be floating-point [{plan.rows}] on {device}, got {bias.dtype} "
            f"{list(bias.shape)} on {bias.device}"
        )


def _run(x, q, scales, bias, backend) -> torch.Tensor:
    rows = as_rows(x.detach())
    run = backends.select("quant_linear", rows, q.plan, backend=backend)
    if bias is not None:
        bias = bias.detach().to(x.dtype)
    y = run(rows, q.codes, scales, q.zero_points, q.positions, q.values, bias, q.plan)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], q.plan.rows)


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, q, backend):
        ctx.q, ctx.backend, ctx.dtype = q, backend, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _run(x, q, q.block_scales(), bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            matrix = block_dequantize(ctx.q, ctx.dtype, backend=ctx.backend)
            d_x = dy @ matrix.view(ctx.q.plan.rows, ctx.q.plan.columns)
        if ctx.needs_input_grad[1]:
            d_bias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
        return d_x, d_bias, None, None


def _compute(x, codes, scales, zero_points, positions, values, bias, plan, code, backend):
    q = from_arguments((codes, scales, zero_points, positions, values), plan, code)
    return _run(x, q, scales, bias, backend)


def _fake(x, codes, scales, zero_points, positions, values, bias, plan, code, backend):
    _check(x, from_arguments([None] * 5, plan, code).plan, codes, bias)
    return x.new_empty(*x.shape[:-1], plan[0])


def _setup_context(ctx, inputs, output):
    x, codes, scales, zero_points, positions, values, bias, plan, code, backend = inputs
    ctx.save_for_backward(codes, scales, zero_points, positions, values)
    ctx.plan, ctx.code, ctx.backend, ctx.dtype = plan, code, backend, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


library.define(
    "quant_linear_dx(Tensor dy, Tensor codes, Tensor scales, Tensor? zero_points, "
    "Tensor positions, Tensor values, int[] plan, str code, ScalarType dtype, str? backend) "
    "-> Tensor"
)


def _compute_dx(dy, codes, scales, zero_points, positions, values, plan, code, dtype, backend):
    q = from_arguments((codes, scales, zero_points, positions, values), plan, code)
    return dy.to(dtype) @ block_dequantize(q, dtype, backend=backend)


def _fake_dx(dy, codes, scales, zero_points, positions, values, plan, code, dtype, backend):
    return dy.new_empty(*dy.shape[:-1], plan[1], dtype=dtype)


def _backward(ctx, dy):
    d_x = d_bias = None
    if ctx.needs_input_grad[0]:
        d_x = torch.ops.swkernels.quant_linear_dx(
            dy, *ctx.saved_tensors, ctx.plan, ctx.code, ctx.dtype, ctx.backend
        )
    if ctx.needs_input_grad[6]:
        d_bias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
    return d_x, *[None] * 5, d_bias, *[None] * 3


library.impl("quant_linear", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("swkernels::quant_linear", _fake)
torch.library.register_autograd("swkernels::quant_linear", _backward, setup_context=_setup_context)
library.impl("quant_linear_dx", _compute_dx, "CompositeExplicitAutograd")
torch.library.register_fake("swkernels::quant_linear_dx", _fake_dx)
