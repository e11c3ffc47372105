"""masked_grad_: a gradient zeroed or scaled at listed coordinates, in place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.errors import BackendUnavailable, InvalidInput

from .backends_here import DEVICE, DTYPES, runnable
from .listed import coordinates, normal

BACKENDS = runnable("masked_grad")


def by_definition(grad, rows, cols, scale):
    """In float64; scale 0 writes zeros."""
    wide = grad.double().clone()
    rows, cols = rows.long(), cols.long()
    wide[rows, cols] = wide[rows, cols] * scale if scale else 0.0
    return wide.to(grad.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_only_the_listed_entries_change(backend, dtype, scale, index):
    grad = normal(13, 17, dtype=dtype)
    rows, cols = coordinates(13, 17, 50, dtype=index)
    expected = by_definition(grad, rows, cols, scale)
    assert ops.masked_grad_(grad, rows, cols, scale, backend=backend) is grad
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_is_zero_whatever_was_there(backend):
    grad = torch.tensor([[math.nan, math.inf, -0.0, 1.0]], device=DEVICE).repeat(2, 1)
    rows, cols = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    ops.masked_grad_(grad, rows.to(DEVICE), cols.to(DEVICE), backend=backend)
    assert grad[0].view(torch.int32).tolist()[:3] == [0, 0, 0] and grad[0, 3] == 1
    assert grad[1, 0].isnan() and grad[1, 1].isinf()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["transposed", "rows", "columns", "slice"])
def test_any_strides(backend, view):
    base = normal(40, 60)
    pick = {
        "transposed": lambda t: t.T, "rows": lambda t: t[::2], "columns": lambda t: t[:, ::2],
        "slice": lambda t: t[3:9, 5:30],
    }[view]  # fmt: skip
    shape = pick(base).shape
    rows, cols = coordinates(*shape, 30)
    expected = base.clone()
    pick(expected)[rows, cols] *= 0.25
    if (view, backend) == ("columns", "cpu"):  # C++ wants adjacent columns; the choice moves on
        with pytest.raises(BackendUnavailable, match="adjacent"):
            ops.masked_grad_(pick(base), rows, cols, 0.25, backend=backend)
        backend = None
    ops.masked_grad_(pick(base), rows, cols, 0.25, backend=backend)
    assert torch.equal(base, expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    D, H = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(0, D * H))
    dtype = data.draw(st.sampled_from([*DTYPES, torch.float64]))
    usable = [p.values[0] for p in BACKENDS if not p.marks]
    backend = data.draw(st.sampled_from(["reference"] if dtype == torch.float64 else usable))
    grad, (rows, cols) = normal(D, H, dtype=dtype), coordinates(D, H, k)
    expected = by_definition(grad, rows, cols, 0.5)
    assert torch.equal(ops.masked_grad_(grad, rows, cols, 0.5, backend=backend), expected)


def test_what_autograd_kept_is_guarded():
    x = normal(4, 5).requires_grad_()
    y = x * 1.0
    z = y.square()
    with torch.no_grad():
        ops.masked_grad_(y, *coordinates(4, 5, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_opcheck():
    grad, (rows, cols) = normal(6, 7), coordinates(6, 7, 5, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.swkernels.masked_grad_.default, (grad, rows, cols, 0.5, None),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_compiles_without_a_break():
    rows, cols = coordinates(6, 7, 5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def masked(grad):
        return ops.masked_grad_(grad * 1.0, rows, cols, 0.5)

    grad = normal(6, 7)
    assert torch.equal(masked(grad), by_definition(grad, rows, cols, 0.5))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not check the range")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [(4, 0), (0, 5), (-1, 0), (2**32, 0)])
def test_coordinates_outside_change_nothing(backend, place):
    grad = torch.ones(4, 5)
    rows, cols = torch.tensor([[0, 0], place]).unbind(1)
    with pytest.raises(InvalidInput, match=rf"\[{place[0]}, {place[1]}\].*\[4, 5\]"):
        ops.masked_grad_(grad, rows, cols, backend=backend)
    assert torch.equal(grad, torch.ones(4, 5))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(grad=torch.ones(2, 3, 4)), r"grad must be \[D, H\]"),
        (dict(grad=torch.ones(2, 3, dtype=torch.int64)), "dequantize"),
        (dict(rows=torch.zeros(1)), "rows must be int32 or int64"),
        (dict(rows=torch.zeros(2, dtype=torch.int64)), "belong together"),
        (dict(scale=math.nan), "finite number, got nan"),
        (dict(scale=math.inf), "finite number, got inf"),
    ],
)
def test_bad_arguments_change_nothing(change, message):
    zero = torch.zeros(1, dtype=torch.int64)
    given = dict(grad=torch.ones(2, 3), rows=zero, cols=zero) | change
    before = given["grad"].clone()
    with pytest.raises(InvalidInput, match=message) as error:
        ops.masked_grad_(**given)
    assert "\n" not in str(error.value) and torch.equal(given["grad"], before)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the backends of a CPU")
def test_the_backend_asked_for_runs_or_says_why_not():
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(BackendUnavailable, match="float64"):
        ops.masked_grad_(torch.ones(2, 2).double(), zero, zero, backend="cpu")
    with pytest.raises(BackendUnavailable, match="cuda"):
        ops.masked_grad_(torch.ones(2, 2), zero, zero, backend="cuda")
