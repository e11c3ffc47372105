"""The low-rank part of a linear layer (LoRA), with masks and dropout inside.

y = base_out + scaling dropout(x) (A * c)^T (B * m)^T consists of a product from H features to r
(``lora_project``) and one from r to D (``lora_expand``). Each is the other's derivative with
respect to the activation; ``lora_reduce`` is that with respect to the factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from swkernels import backends
from swkernels.backends import philox
from swkernels.errors import InvalidInput

from ._arguments import as_rows, check_activation
from ._library import library
from .lora_mask import LoraMask, check_mask
from .pattern import SparsePattern
from .sparse_linear import pattern_linear

_DROPOUT = "float dropout, Tensor? seed, str? backend"
library.define(
    "lora_project(Tensor x, Tensor P, Tensor? channel_scale, Tensor? columns, "
    f"{_DROPOUT}) -> (Tensor, Tensor)"
)
library.define(
    f"lora_expand(Tensor? y, Tensor S, Tensor P, Tensor? channel_scale, {_DROPOUT}) -> Tensor"
)
library.define(f"lora_reduce(Tensor x, Tensor S, Tensor? channel_scale, {_DROPOUT}) -> Tensor")


def lora_linear(
    x: torch.Tensor,
    base_out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    mask: LoraMask | None = None,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Return base_out + dropout(x) dW^T for dW = scaling (B * m) (A * c), masked.

    The factors may be kept in float32 whatever the activation is: they are rounded to its dtype
    where they are used. Saved for the backward are x itself, x A^T [..., r], and of masked
    positions the columns of x that they name; dropout is computed anew.

    Args:
        x: [..., H], float32, bfloat16, float16 or float64.
        base_out: [..., D], the output of the base layer; its dtype may differ from x's.
        A: [r, H], B: [D, r], floating-point.
        scaling: alpha / r, or alpha / sqrt(r).
        mask: see ``LoraMask``.
        dropout: the probability that an element of x is dropped, in [0, 1).
        seed: of the dropout, an integer in [0, 2^63) or an int64 scalar on x's device; None draws
            one from PyTorch's generator. The same seed drops the same elements on every backend.
        inplace: add to base_out itself; it must not be needed as it was.
        backend: "reference", "cpu" or "triton"; None lets the device choose.

    Returns:
        [..., D] in base_out's dtype.

    Raises:
        InvalidInput: a wrong shape, dtype or device, r = 0, a mask of another weight, a dropout
            outside [0, 1).
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    outs = lora_linears(
        x, [base_out], [A], [B], [scaling], [mask], dropout, seed, inplace=inplace, backend=backend
    )
    return outs[0]


def lora_linears(
    x: torch.Tensor,
    base_outs: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    scalings: Sequence[float],
    masks: Sequence[LoraMask | None],
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> list[torch.Tensor]:
    """``lora_linear`` of several layers with one input, such as q, k and v: x is read once.

    The layers share the dropout of x. The arguments are lists of one entry per layer.
    """
    for base_out, A, B, mask in zip(base_outs, As, Bs, masks):
        check_lora(x, base_out, A, B, mask)
    seed = as_seed(seed, dropout, x)
    projected = lora_project(x, As, masks, dropout, seed, backend=backend)
    return [
        lora_expand(base_out, *sums, A, B, scaling, mask, inplace=inplace, backend=backend)
        for sums, base_out, A, B, scaling, mask in zip(
            projected, base_outs, As, Bs, scalings, masks
        )
    ]


def lora_project(
    x, As, masks, dropout, seed, *, backend=None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what ``lora_expand`` needs of x for each of the factors A [r, H], reading x once.

    Arguments as of ``lora_linears``, which has checked them; seed as ``as_seed`` gives it.

    Returns:
        For each factor dropout(x) (A * c)^T [..., r], and the columns of dropout(x) that the
        positions of its mask name, [..., C].
    """
    patterns = [None if mask is None else mask.pattern for mask in masks]
    scales = [None if mask is None else mask.column_scale for mask in masks]
    named = [pattern.columns for pattern in patterns if pattern is not None]
    if len(As) == 1:
        [A], [scale] = As, scales
    else:  # more rows of A cost the kernel little, reading x again costs as much as before
        masked = [A if scale is None else A * scale for A, scale in zip(As, scales)]
        A, scale = torch.cat(masked), None
    columns = torch.cat(named) if named else None
    S, taken = torch.ops.swkernels.lora_project(x, A, scale, columns, dropout, seed, backend)
    counts = [0 if pattern is None else len(pattern.columns) for pattern in patterns]
    return list(zip(S.split([len(A) for A in As], -1), taken.split(counts, -1)))


def lora_expand(
    base_out, S, columns, A, B, scaling, mask, *, inplace=False, backend=None
) -> torch.Tensor:
    """Return base_out + scaling S (B * m)^T, corrected at the mask's positions.

    Arguments as of ``lora_linear``, which has checked them; S and columns as ``lora_project``
    gives them.
    """
    row_scale = None if mask is None else mask.row_scale
    y = _expand(base_out, S * scaling, B.T, row_scale, inplace, backend)
    if mask is None or mask.pattern is None or not len(mask.pattern):
        return y
    # Only the rows of dW that are named are touched again, and only the columns of x.
    pattern, (D, _) = mask.pattern, mask.pattern.shape
    C = len(pattern.columns)
    every = torch.arange(C, dtype=torch.int32, device=y.device)
    among = SparsePattern(
        (D, C), pattern.rows, pattern.column_of, pattern.row_starts, every, pattern.column_of,
        pattern.by_column, pattern.column_starts,
    )  # fmt: skip
    values = correction(A, B, scaling, mask)
    return pattern_linear(columns, y, values, among, inplace=True, backend=backend)


def correction(A: torch.Tensor, B: torch.Tensor, scaling: float, mask: LoraMask) -> torch.Tensor:
    """Return what a mask adds to dW = scaling (B * m) (A * c) at its positions, [k].

    (s - 1) dW + kept: dW itself is not formed, but at the k positions.
    """
    rows, cols = mask.pattern.rows.long(), mask.pattern.cols.long()
    left, right = B[rows], A.T[cols]  # [k, r]
    if mask.row_scale is not None:
        left = left * mask.row_scale[rows, None]
    if mask.column_scale is not None:
        right = right * mask.column_scale[cols, None]
    values = (left * right).sum(1) * (scaling * (mask.scale - 1.0))
    return values if mask.kept is None else values + mask.kept


def as_seed(
    seed: int | torch.Tensor | None, dropout: float, x: torch.Tensor
) -> torch.Tensor | None:
    """Return ``seed`` as an int64 scalar on x's device; None without dropout.

    A seed of None draws one: it respects ``torch.manual_seed``, and a checkpoint that restores
    the generator draws the same one again.

    Raises:
        InvalidInput: the dropout is outside [0, 1), the seed no integer of 63 bits.
    """
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise InvalidInput(f"dropout must be a number in [0, 1), got {dropout!r}")
    if not dropout:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=x.device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.dim() or seed.device != x.device:
            raise InvalidInput(
                f"seed must be an int64 scalar on {x.device}, got {seed.dtype} "
                f"{list(seed.shape)} on {seed.device}"
            )
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidInput(f"seed must be an integer in [0, 2^63), got {seed!r}")
    return torch.tensor(seed, dtype=torch.int64, device=x.device)


def check_lora(x, base_out, A, B, mask) -> None:
    """Raise InvalidInput unless the arguments of ``lora_linear`` fit together."""
    check_activation("x", x)
    check_activation("base_out", base_out)
    for name, factor in (("A", A), ("B", B)):
        if not isinstance(factor, torch.Tensor) or not factor.is_floating_point():
            raise InvalidInput(f"{name} must be a floating-point tensor, got {factor!r:.60}")
        if factor.device != x.device:
            raise InvalidInput(f"{name} is on {factor.device}, x on {x.device}: move it")
    D, H = base_out.shape[-1], x.shape[-1]
    r = A.shape[0] if A.dim() else 0
    if A.shape != (r, H) or B.shape != (D, r) or r == 0:
        raise InvalidInput(
            f"A must be [r, {H}] and B [{D}, r] with r of at least 1, got {list(A.shape)} and "
            f"{list(B.shape)}"
        )
    if x.shape[:-1] != base_out.shape[:-1] or base_out.device != x.device:
        raise InvalidInput(
            f"x and base_out must have the same tokens on one device, got {list(x.shape)} on "
            f"{x.device} and {list(base_out.shape)} on {base_out.device}"
        )
    check_mask(mask, D, H, x.device)


def _kernels(x, backend):
    return backends.select("lora_linear", x, backend=backend)


def _expand(y, S, P, channel_scale, inplace, backend):
    if torch.compiler.is_compiling():
        return torch.ops.swkernels.lora_expand(y, S, P, channel_scale, 0.0, None, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, S, P)):
        if inplace and y.requires_grad and y.is_leaf:
            raise InvalidInput(
                "base_out is a leaf that requires grad and cannot be changed in place: pass "
                "inplace=False"
            )
        return _Expand.apply(y, S, P, channel_scale, inplace, backend)
    if not inplace:
        y = y.clone()
    elif not y.is_inference():
        torch.autograd.graph.increment_version(y)  # kernels write past PyTorch's sight
    return _write(y, S, P, channel_scale, 0.0, None, backend, add=True)


def _write(y, S, P, channel_scale, dropout, seed, backend, *, add) -> torch.Tensor:
    """Write the product to y, or add it; y as the caller sees it."""
    rows = as_rows(y.detach())
    kernels = _kernels(rows, backend)
    sums = as_rows(S.detach())
    kernels.expand(rows, sums, P.detach(), channel_scale, dropout, seed, add=add)
    if rows.data_ptr() != y.data_ptr():  # y's rows could not be viewed as [T, D]
        y.detach().copy_(rows.view(y.shape))
    return y


class _Expand(torch.autograd.Function):
    # y comes first: where it is a view, autograd takes the first argument for the one that is
    # changed in place.
    @staticmethod
    def forward(ctx, y, S, P, channel_scale, inplace, backend):
        ctx.save_for_backward(S, P, channel_scale)
        ctx.backend = backend
        if inplace:
            ctx.mark_dirty(y)
        y = y if inplace else y.clone()
        return _write(y, S, P, channel_scale, 0.0, None, backend, add=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return (*_expand_grads(ctx, dy), None, None, None)


def _expand_grads(ctx, dy):
    """The gradients of y, S and P of an expansion without dropout."""
    S, P, channel_scale = ctx.saved_tensors
    d_S = d_P = None
    if ctx.needs_input_grad[1]:
        rest = (channel_scale, None, 0.0, None, ctx.backend)
        d_S = torch.ops.swkernels.lora_project(dy, P, *rest)[0].to(S.dtype)
    if ctx.needs_input_grad[2]:
        d_P = torch.ops.swkernels.lora_reduce(dy, S, channel_scale, 0.0, None, ctx.backend)
        d_P = d_P.to(P.dtype)
    return dy, d_S, d_P


def _compute_project(x, P, channel_scale, columns, dropout, seed, backend):
    rows = as_rows(x.detach())
    S = _kernels(rows, backend).project(rows, P.detach(), channel_scale, dropout, seed)
    S = S.view(*x.shape[:-1], len(P))
    if columns is None:
        return S, x.new_empty(*x.shape[:-1], 0)
    taken = x.detach().index_select(-1, columns)
    return S, taken * _factors_at(columns, x, dropout, seed) if dropout else taken


def _factors_at(columns, x, dropout, seed) -> torch.Tensor:
    """What dropout multiplies some columns of x by, [..., C]."""
    T = x.numel() // max(1, x.shape[-1])
    factors = philox.factors_at(columns, T, x.shape[-1], dropout, seed)
    return factors.view(*x.shape[:-1], len(columns)).to(x.dtype)


def _fake_project(x, P, channel_scale, columns, dropout, seed, backend):
    count = 0 if columns is None else columns.shape[0]
    return x.new_empty(*x.shape[:-1], P.shape[0]), x.new_empty(*x.shape[:-1], count)


def _project_context(ctx, inputs, output):
    x, P, channel_scale, columns, ctx.dropout, seed, ctx.backend = inputs
    ctx.save_for_backward(x, P, channel_scale, columns, seed)


def _project_backward(ctx, d_S, d_taken):
    x, P, channel_scale, columns, seed = ctx.saved_tensors
    rest = (channel_scale, ctx.dropout, seed, ctx.backend)
    d_x = d_P = None
    if ctx.needs_input_grad[0]:
        d_x = torch.ops.swkernels.lora_expand(None, d_S, P, *rest)
        if columns is not None:
            if ctx.dropout:
                d_taken = d_taken * _factors_at(columns, x, ctx.dropout, seed)
            d_x.index_add_(-1, columns, d_taken)
    if ctx.needs_input_grad[1]:
        d_P = torch.ops.swkernels.lora_reduce(x, d_S, *rest).to(P.dtype)
    return d_x, d_P, None, None, None, None, None


def _compute_expand(y, S, P, channel_scale, dropout, seed, backend):
    add = y is not None
    y = y.clone() if add else S.new_empty(*S.shape[:-1], P.shape[1])
    return _write(y, S, P, channel_scale, dropout, seed, backend, add=add)


def _fake_expand(y, S, P, channel_scale, dropout, seed, backend):
    return S.new_empty(*S.shape[:-1], P.shape[1]) if y is None else torch.empty_like(y)


def _expand_context(ctx, inputs, output):
    y, S, P, channel_scale, dropout, _, ctx.backend = inputs
    if dropout or y is None:
        raise InvalidInput("lora_expand with dropout is a derivative and has none of its own")
    ctx.save_for_backward(S, P, channel_scale)


def _expand_backward(ctx, dy):
    return (*_expand_grads(ctx, dy), None, None, None, None)


def _compute_reduce(x, S, channel_scale, dropout, seed, backend):
    rows, sums = as_rows(x.detach()), as_rows(S.detach())
    return _kernels(rows, backend).reduce(rows, sums, channel_scale, dropout, seed)


def _fake_reduce(x, S, channel_scale, dropout, seed, backend):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(S.shape[-1], x.shape[-1], dtype=wide)


for _name, _compute, _fake in (
    ("lora_project", _compute_project, _fake_project),
    ("lora_expand", _compute_expand, _fake_expand),
    ("lora_reduce", _compute_reduce, _fake_reduce),
):
    library.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"swkernels::{_name}", _fake)
torch.library.register_autograd(
    "swkernels::lora_project", _project_backward, setup_context=_project_context
)
torch.library.register_autograd(
    "swkernels::lora_expand", _expand_backward, setup_context=_expand_context
)
