"""Cases of ``lora_linear``: forward and backward of the LoRA of an attention's projections.

q, k and v share an input, o has its own. The bare work is the frozen base layers alone; what a
provider takes beyond it is what its LoRA costs. The gradients of all factors are judged.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import expected
from benchmarks.case import Case, Error, Provider, lazily, normal, relative_error

OP = "lora_linear"
RANK, SCALING = 8, 2.0
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
MASKED = 16  # coordinates of the mask
_MEASURE = "||gradient - exact|| / ||exact|| of the factors"


class Attention(nn.Module):
    """The projections of an attention without what lies between them."""

    def __init__(self, width: int, kv: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        sizes = zip(NAMES, (width, kv, kv, width))
        for name, rows in sizes:
            setattr(self, name, nn.Linear(width, rows, bias=False, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor, to_o: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(to_o)]


def case(models, width, kv, tokens, dtype, device, *, interpreted=False, dry=False):
    """One case on x [tokens, width] and the projections [width or kv, width]."""
    sizes = (width, kv, kv, width)

    def make(seed):
        inputs = {
            "x": normal(seed, tokens, width, dtype=dtype, device=device),
            "to_o": normal(seed + 1, tokens, width, dtype=dtype, device=device),
        }
        for place, (name, rows) in enumerate(zip(NAMES, sizes)):
            at = seed + 10 * place
            inputs[f"{name} dy"] = normal(at + 2, tokens, rows, dtype=dtype, device=device)
            for part, shape in (("A", (RANK, width)), ("B", (rows, RANK))):
                factor = normal(at + 3, *shape, dtype="float32", device=device, scale=0.02)
                inputs[f"{name} {part}"] = factor
        return inputs

    def base():
        torch.manual_seed(0)
        return Attention(width, kv, getattr(torch, dtype), device).requires_grad_(False)

    def providers():
        listed = {name: [[i, 2 * i] for i in range(MASKED)] for name in NAMES}
        factors = {"coordinates": listed, "mask": "rows and columns"}
        positions = {"coordinates": listed, "mask": "positions"}
        backend = "triton" if interpreted else None
        ways = [
            ("frozen base", "bare", lambda: _bare(base())),
            ("swkernels", "ours", lambda: _ours(base(), {}, backend)),
            ("swkernels, rows and columns", "ours", lambda: _ours(base(), factors, backend)),
            ("swkernels, positions", "ours", lambda: _ours(base(), positions, backend)),
            ("addmm, one autograd function", "eager", lambda: _addmm(base())),
            ("PEFT", "peer", lambda: _peft(base())),
            ("PEFT, masks as hooks", "peer", lambda: _peft(base(), MASKED)),
        ]
        return [Provider(name, role, lazily(make)) for name, role, make in ways]

    shape = {"tokens": tokens, "columns": width, "rows": 2 * (width + kv), "k": RANK}
    work = expected.lora_attention(tokens, width, kv, RANK, dtype)
    label = f"q, k, v, o, r = {RANK}, forward and backward"

    def judge(inputs):
        exact = _gradients(base().double(), inputs, torch.float64)
        theirs = _gradients(base(), inputs, getattr(torch, dtype))
        limit = 2 * relative_error(theirs, exact)

        def error(outputs):
            if "grads" not in outputs:
                return Error(0.0, limit, _MEASURE)
            return Error(relative_error(outputs["grads"], exact), limit, _MEASURE)

        return error

    return Case(
        OP, models, label, shape, dtype, work, 20, make, judge, providers,
        seconds=2.0 if dry else 90.0,
    )  # fmt: skip


def _run(model, inputs, parameters):
    """Forward and backward; the gradients of the parameters."""
    with torch.enable_grad():
        x, to_o = (inputs[name].detach().requires_grad_() for name in ("x", "to_o"))
        outs = model(x, to_o)
        wanted = [x, to_o, *parameters]
        return torch.autograd.grad(outs, wanted, [inputs[f"{name} dy"] for name in NAMES])[2:]


def _bare(model):
    def call(inputs):
        _run(model, inputs, ())
        return {}

    return call


def _adapted(model, *, masked):
    """A call that sets the factors of a PEFT model and runs it; unmasked gradients are judged."""
    layers = [getattr(model.base_model.model, name) for name in NAMES]
    parameters = [
        getattr(layer, f"lora_{part}")["default"].weight for layer in layers for part in "AB"
    ]
    names = [f"{name} {part}" for name in NAMES for part in "AB"]

    def call(inputs):
        for parameter, name in zip(parameters, names):
            parameter.data = inputs[name]
        grads = _run(model.base_model.model, inputs, parameters)
        return {} if masked else {"grads": _flat(grads)}

    return call


def _peft(model, masked=0):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=list(NAMES))
    model = get_peft_model(model, config)
    if masked:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                mask = torch.ones_like(parameter)
                (mask if "lora_B" in name else mask.T)[:masked] = 0
                parameter.register_hook(lambda grad, mask=mask: grad * mask)
    return _adapted(model, masked=bool(masked))


def _ours(model, mask, backend):
    from peft import get_peft_model

    from swkernels import use_backend
    from swkernels.integrations.peft import MaskedLoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MaskedLoraConfig(
            r=RANK, lora_alpha=SCALING * RANK, target_modules=list(NAMES), **mask
        )
        model = get_peft_model(model, config)
    call = _adapted(model, masked=bool(mask))
    if backend is None:
        return call

    def with_backend(inputs):
        with use_backend(backend):
            return call(inputs)

    return with_backend


class _AddMM(torch.autograd.Function):
    """base + s (x A^T) B^T with addmm, as the fastest published formulation of LoRA has it."""

    @staticmethod
    def forward(ctx, x, W, A, B):
        ctx.save_for_backward(x, W, A, B)
        A, B = A.to(x.dtype), B.to(x.dtype)
        return (x @ W.T).addmm_(x @ A.T, B.T, alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        low_A, low_B = A.to(x.dtype), B.to(x.dtype)
        through_B = dy @ low_B
        dx = (dy @ W).addmm_(through_B, low_A, alpha=SCALING)
        d_A = (x.T @ through_B).T.mul_(SCALING)
        d_B = ((x @ low_A.T).T @ dy).T.mul_(SCALING)
        return dx, None, d_A.to(A.dtype), d_B.to(B.dtype)


def _addmm(model):
    def call(inputs):
        parameters = [inputs[f"{name} {part}"].requires_grad_() for name in NAMES for part in "AB"]

        def forward(x, to_o):
            return [
                _AddMM.apply(given, getattr(model, name).weight, *parameters[2 * i : 2 * i + 2])
                for i, (name, given) in enumerate(zip(NAMES, (x, x, x, to_o)))
            ]

        return {"grads": _flat(_run(forward, inputs, parameters))}

    return call


def _gradients(model, inputs, dtype):
    """The factors' gradients by PyTorch alone, everything in one dtype."""
    inputs = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}
    parameters = [inputs[f"{name} {part}"].requires_grad_() for name in NAMES for part in "AB"]

    def forward(x, to_o):
        return [
            F.linear(given, getattr(model, name).weight) + SCALING * F.linear(F.linear(given, A), B)
            for name, given, A, B in zip(NAMES, (x, x, x, to_o), parameters[::2], parameters[1::2])
        ]

    return _flat(_run(forward, inputs, parameters))


def _flat(grads) -> torch.Tensor:
    return torch.cat([grad.detach().flatten() for grad in grads])[None]
