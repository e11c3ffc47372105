"""The contribution of a few trainable deltas of a weight to a linear layer."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from swkernels import backends
from swkernels.errors import InvalidInput

from ._arguments import as_rows, check_activation
from ._library import library
from .pattern import SparsePattern, check_indices
from .sampled_grad import sampled_grad

# The tensors of a SparsePattern, in the order of its fields.
_PATTERN = (
    "Tensor rows, Tensor cols, Tensor row_starts, Tensor columns, Tensor column_of, "
    "Tensor by_column, Tensor column_starts"
)
library.define(
    f"sparse_linear(Tensor x, Tensor base_out, Tensor values, {_PATTERN}, str? backend) -> Tensor"
)


def sparse_linear(
    x: torch.Tensor,
    base_out: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    cols: torch.Tensor,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Return base_out + x S^T for the sparse matrix S with S[rows[i], cols[i]] = values[i].

    Differentiable in x, base_out and values: the gradient of the values is ``sampled_grad``.
    Saved for the backward are only the columns of x that the coordinates name. Sorts the
    coordinates anew in every call; who calls often keeps a ``SparsePattern`` and calls
    ``pattern_linear``.

    Args:
        x: [..., H], float32, bfloat16, float16 or float64.
        base_out: [..., D], the output of the base layer; its dtype may differ from x's.
        values: [k], float32 (or float64).
        rows, cols: int32 or int64 [k], different coordinates [output, input].
        inplace: add to base_out itself, in one pass; it must not be needed as it was.
        backend: "reference", "cpu" or "triton"; None lets the device choose.

    Returns:
        [..., D] in base_out's dtype.

    Raises:
        InvalidInput: a wrong shape, dtype or device, a coordinate outside the weight or listed
            twice; nothing has been changed.
        BackendUnavailable: the backend asked for is not there or does not take the arguments.
    """
    check_activation("x", x)
    check_activation("base_out", base_out)
    check_indices(rows, cols)
    _check_values(values, rows)
    _check_devices(x, base_out, values, rows)
    pattern, order = SparsePattern.sort(rows, cols, (base_out.shape[-1], x.shape[-1]))
    return pattern_linear(x, base_out, values[order], pattern, inplace=inplace, backend=backend)


def pattern_linear(
    x: torch.Tensor,
    base_out: torch.Tensor,
    values: torch.Tensor,
    pattern: SparsePattern,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """``sparse_linear`` with coordinates that were sorted before; values in the pattern's order."""
    _check(x, base_out, values, pattern)
    tensors = _tensors(pattern)
    if torch.compiler.is_compiling():
        return torch.ops.swkernels.sparse_linear(x, base_out, values, *tensors, backend)
    if not len(pattern):
        return base_out if inplace else base_out.clone()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, base_out, values)):
        if inplace and base_out.requires_grad and base_out.is_leaf:
            raise InvalidInput(
                "base_out is a leaf that requires grad and cannot be changed in place: pass "
                "inplace=False"
            )
        return _SparseLinear.apply(base_out, x, values, pattern, inplace, backend)
    if not inplace:
        base_out = base_out.clone()
    elif not base_out.is_inference():
        torch.autograd.graph.increment_version(base_out)  # kernels write past PyTorch's sight
    return _add(x, base_out, values, pattern, backend)


def _tensors(pattern: SparsePattern) -> tuple[torch.Tensor, ...]:
    return (
        pattern.rows, pattern.cols, pattern.row_starts, pattern.columns, pattern.column_of,
        pattern.by_column, pattern.column_starts,
    )  # fmt: skip


def _check(x, base_out, values, pattern) -> None:
    check_activation("x", x)
    check_activation("base_out", base_out)
    D, H = pattern.shape
    if x.shape[-1] != H or base_out.shape[-1] != D or x.shape[:-1] != base_out.shape[:-1]:
        raise InvalidInput(
            f"x must be [..., {H}] and base_out [..., {D}] with the same tokens, got "
            f"{list(x.shape)} and {list(base_out.shape)}"
        )
    _check_values(values, pattern.rows)
    _check_devices(x, base_out, values, pattern.rows)


def _check_values(values, rows) -> None:
    if not isinstance(values, torch.Tensor):
        raise InvalidInput(f"values must be a tensor, got {type(values).__name__}")
    if values.shape != rows.shape or not values.is_floating_point():
        raise InvalidInput(
            f"values must be floating-point {list(rows.shape)}, got {values.dtype} "
            f"{list(values.shape)}"
        )


def _check_devices(x, base_out, values, rows) -> None:
    for name, tensor in (("base_out", base_out), ("values", values), ("rows", rows)):
        if tensor.device != x.device:
            raise InvalidInput(f"{name} is on {tensor.device}, x on {x.device}: move it")


def _add(x, y, values, pattern, backend) -> torch.Tensor:
    """Add the contribution to y in place; y as the caller sees it."""
    rows, y_rows = as_rows(x.detach()), as_rows(y.detach())
    wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    values = values.detach().to(wide).contiguous()
    kernel = backends.select("sparse_linear", rows, y_rows, backend=backend)
    kernel(rows, y_rows, values, pattern.rows, pattern.cols, pattern.row_starts)
    if y_rows.data_ptr() != y.data_ptr():  # y's rows could not be viewed as [T, D]
        y.detach().copy_(y_rows.view(y.shape))
    return y


def _saved_columns(x: torch.Tensor, pattern: SparsePattern) -> tuple[torch.Tensor, torch.Tensor]:
    """What the backward reads of x, and where in it the columns of the coordinates are.

    Half of x's columns or more are no saving over x itself, which is then not copied.
    """
    x = x.detach()
    if 2 * len(pattern.columns) >= x.shape[-1]:
        return x, pattern.cols
    return x.index_select(-1, pattern.columns), pattern.column_of


def _d_x(dy, values, pattern, dtype, backend) -> torch.Tensor:
    """dy S, [..., H] in x's dtype: the entries by column, rows and columns exchanged."""
    dx = dy.new_zeros(*dy.shape[:-1], pattern.shape[1], dtype=dtype)
    by_column = pattern.by_column
    flipped = SparsePattern(
        pattern.shape[::-1], pattern.cols[by_column], pattern.rows[by_column],
        pattern.column_starts, *[by_column] * 4,
    )  # fmt: skip
    return _add(dy, dx, values[by_column], flipped, backend)


class _SparseLinear(torch.autograd.Function):
    # base_out comes first: where it is a view, autograd takes the first argument for the one
    # that is changed in place.
    @staticmethod
    def forward(ctx, base_out, x, values, pattern, inplace, backend):
        ctx.pattern, ctx.backend, ctx.x_dtype = pattern, backend, x.dtype
        saved = ctx.column_of = None
        if ctx.needs_input_grad[2]:
            saved, ctx.column_of = _saved_columns(x, pattern)
        ctx.save_for_backward(saved, values if ctx.needs_input_grad[1] else None)
        ctx.values_dtype = values.dtype
        if inplace:
            ctx.mark_dirty(base_out)
        return _add(x, base_out if inplace else base_out.clone(), values, pattern, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, values = ctx.saved_tensors
        d_x = d_values = None
        if ctx.needs_input_grad[1]:
            d_x = _d_x(dy, values, ctx.pattern, ctx.x_dtype, ctx.backend)
        if ctx.needs_input_grad[2]:
            rows = ctx.pattern.rows
            d_values = sampled_grad(dy, saved, rows, ctx.column_of, backend=ctx.backend)
            d_values = d_values.to(ctx.values_dtype)
        return dy if ctx.needs_input_grad[0] else None, d_x, d_values, None, None, None


def _compute(x, base_out, values, *rest):
    *tensors, backend = rest
    pattern = SparsePattern((base_out.shape[-1], x.shape[-1]), *tensors)
    return _add(x, base_out.clone(), values, pattern, backend)


def _fake(x, base_out, values, *rest):
    *tensors, _ = rest
    _check(x, base_out, values, SparsePattern((base_out.shape[-1], x.shape[-1]), *tensors))
    return torch.empty_like(base_out)


def _setup_context(ctx, inputs, output):
    x, base_out, values, *tensors, backend = inputs
    pattern = SparsePattern((base_out.shape[-1], x.shape[-1]), *tensors)
    saved, column_of = _saved_columns(x, pattern)
    ctx.save_for_backward(saved, values, column_of, *tensors)
    ctx.backend, ctx.width, ctx.x_dtype = backend, x.shape[-1], x.dtype


def _backward(ctx, dy):
    saved, values, column_of, rows, cols, _, _, _, by_column, column_starts = ctx.saved_tensors
    d_x = d_values = None
    if ctx.needs_input_grad[0]:
        unused = [by_column] * 4
        zeros = dy.new_zeros(*dy.shape[:-1], ctx.width, dtype=ctx.x_dtype)
        d_x = torch.ops.swkernels.sparse_linear(
            dy, zeros, values[by_column], cols[by_column], rows[by_column], column_starts,
            *unused, ctx.backend,
        )  # fmt: skip
    if ctx.needs_input_grad[2]:
        sampled = torch.ops.swkernels.sampled_grad(dy, saved, rows, column_of, ctx.backend)
        d_values = sampled.to(values.dtype)
    return d_x, dy, d_values, *[None] * 8


library.impl("sparse_linear", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("swkernels::sparse_linear", _fake)
torch.library.register_autograd("swkernels::sparse_linear", _backward, setup_context=_setup_context)
