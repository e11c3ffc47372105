"""A gated linear unit that reports the peaks of its result."""

from __future__ import annotations

import torch

from swkernels import backends
from swkernels.backends.reference.glu_absmax import ACTIVATIONS
from swkernels.errors import InvalidInput

from ._arguments import as_rows, as_token_index, check_activation, check_keys
from ._library import library
from .peaks import empty_keys

library.define(
    "glu_absmax(Tensor gate, Tensor up, str activation, Tensor? keys, Tensor? token_index, "
    "SymInt token_offset, str? backend) -> (Tensor, Tensor)"
)


def glu_absmax(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    keys: torch.Tensor | None = None,
    *,
    token_mask: torch.Tensor | None = None,
    token_offset: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h = act(gate) * up and the running peaks of h's channels, in one pass.

    The kernels compute in float32 and round once, so in 16 bits h differs in the last place from
    eager PyTorch, which rounds act(gate) too; it is the closer one to the exact value. The peaks
    are those of the h that is returned. Differentiable in gate and up.

    Args:
        gate, up: [..., C], the same shape and dtype.
        activation: "silu" (SwiGLU), "gelu" (GeGLU, erf), "gelu_tanh" or "relu".
        keys, token_mask, token_offset, backend: as in ``column_absmax``.

    Returns:
        h [..., C], the keys [C].

    Raises:
        InvalidInput: a wrong shape, dtype, device or activation; nothing has been changed.
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    _check(gate, up, activation, keys)
    index = as_token_index(token_mask, gate, token_offset)
    if torch.compiler.is_compiling():
        h, merged = torch.ops.swkernels.glu_absmax(
            gate, up, activation, keys, index, token_offset, backend
        )
        return h, merged if keys is None else keys.copy_(merged)
    keys = empty_keys(gate.shape[-1], gate.device) if keys is None else keys
    arguments = (gate, up, activation, keys, index, token_offset, backend)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GluAbsmax.apply(*arguments), keys
    return _run(*arguments), keys


def _check(gate, up, activation, keys) -> None:
    check_activation("gate", gate)
    check_activation("up", up)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise InvalidInput(
            f"gate and up must agree: got {list(gate.shape)} {gate.dtype} on {gate.device} "
            f"and {list(up.shape)} {up.dtype} on {up.device}"
        )
    if activation not in ACTIVATIONS:
        raise InvalidInput(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    check_keys("keys", keys, gate.shape[-1], gate)


def _run(gate, up, activation, keys, token_index, token_offset, backend) -> torch.Tensor:
    gate_rows, up_rows = as_rows(gate.detach()), as_rows(up.detach())
    kernel = backends.select("glu_absmax", gate_rows, up_rows, activation, backend=backend)
    h = kernel(gate_rows, up_rows, activation, keys, token_index, token_offset)
    return h.view(gate.shape)


def _gradients(ctx, dh):
    gate, up = ctx.saved_tensors
    activate = ACTIVATIONS[ctx.activation]
    d_gate = d_up = None
    if ctx.needs_input_grad[1]:
        d_up = dh * activate(gate)
    if ctx.needs_input_grad[0]:
        d_gate = _activation_backward(dh * up, gate, ctx.activation)
    return d_gate, d_up


def _activation_backward(d_act, gate, activation):
    aten = torch.ops.aten
    if activation == "silu":
        return aten.silu_backward(d_act, gate)
    if activation == "relu":
        return aten.threshold_backward(d_act, gate, 0)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward(d_act, gate, approximate=approximate)


class _GluAbsmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation, keys, token_index, token_offset, backend):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _run(gate, up, activation, keys, token_index, token_offset, backend)

    @staticmethod
    def backward(ctx, dh):
        return *_gradients(ctx, dh), None, None, None, None, None


def _compute(gate, up, activation, keys, token_index, token_offset, backend):
    keys = empty_keys(gate.shape[-1], gate.device) if keys is None else keys.clone()
    h = _run(gate, up, activation, keys, token_index, token_offset, backend)
    return h, keys


def _fake(gate, up, activation, keys, token_index, token_offset, backend):
    _check(gate, up, activation, keys)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[-1], dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    gate, up, activation = inputs[:3]
    ctx.save_for_backward(gate, up)
    ctx.activation = activation


def _backward(ctx, dh, _d_keys):
    return *_gradients(ctx, dh), None, None, None, None, None


library.impl("glu_absmax", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("swkernels::glu_absmax", _fake)
torch.library.register_autograd("swkernels::glu_absmax", _backward, setup_context=_setup_context)
