from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.backends import cpu
from swkernels.errors import BackendUnavailable, InvalidInput

from .backends_here import DEVICE, DTYPES, runnable
from .listed import Allocations, coordinates, dense_gradient, integers, normal

BACKENDS = runnable("sampled_grad")
PAIRS = [(a, b) for a in DTYPES for b in DTYPES]
ISAS = (
    [name for name in cpu.ISAS[1:] if cpu.library().swk_cpu_isa(cpu.ISAS.index(name))]
    if cpu.available() is None
    else []
)
on_cpu = pytest.mark.skipif(DEVICE != "cpu" or not ISAS, reason="no CPU library here")

# NumPy warns where Triton's interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("SWKERNELS_CPU_ISA", request.param)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "tokens, k", [(0, 1), (0, None), (1, 1), (1, None), (63, 1), (63, None), (1000, 1), (1000, 20)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_give_the_dense_gradients_entries(backend, dtype, tokens, k):
    dy, x = integers(tokens, 13, dtype=dtype), integers(tokens, 17, dtype=dtype, seed=1)
    rows, cols = coordinates(13, 17, k)
    values = ops.sampled_grad(dy, x, rows, cols, backend=backend)
    assert values.dtype == torch.float32 and values.shape == rows.shape
    assert torch.equal(values.double(), dense_gradient(dy, x)[rows, cols])


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_differ(backend, pair):
    dy, x = integers(40, 13, dtype=pair[0]), integers(40, 17, dtype=pair[1], seed=1)
    rows, cols = coordinates(13, 17, 60)
    values = ops.sampled_grad(dy, x, rows, cols, backend=backend)
    assert torch.equal(values.double(), dense_gradient(dy, x)[rows, cols])


@pytest.mark.parametrize("other", [torch.float64, *DTYPES], ids=str)
def test_float64_is_exact_to_rounding(other):
    dy, x = normal(200, 13).double() / 3, normal(200, 17, dtype=other, seed=1)
    rows, cols = coordinates(13, 17)
    for a, b, r, c in ((dy, x, rows, cols), (x, dy, cols, rows)):
        values = ops.sampled_grad(a, b, r, c)
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, dense_gradient(a, b)[r, c], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [63, 1000])
def test_error_is_at_most_twice_that_of_pytorchs_dense_gradient(backend, dtype, tokens):
    dy, x = normal(tokens, 13, dtype=dtype), normal(tokens, 17, dtype=dtype, seed=1)
    rows, cols = coordinates(13, 17, 60)
    exact = dense_gradient(dy, x)[rows, cols]
    theirs = (dy.T @ x)[rows, cols].double() - exact
    ours = ops.sampled_grad(dy, x, rows, cols, backend=backend).double() - exact
    assert ours.abs().max() <= 2 * theirs.abs().max()
    assert ours.square().mean() <= 4 * theirs.square().mean()


VIEWS = {
    "rows that lie apart": lambda t: t[:, 3:],
    "every other token": lambda t: t[::2],
    "every other channel": lambda t: t[:, ::2],
    "transposed": lambda t: t.T.contiguous().T,
    "one token for all": lambda t: t[:1].expand(40, -1),
    "one value for all": lambda t: t[:1, :1].expand(40, 20),
    "no channels apart": lambda t: t[:, 2:3],
    "batches": lambda t: t.view(2, 5, 4, -1),
    "batches that cannot be flattened": lambda t: t.view(4, 10, -1)[:, 1:4],
    "batch and token exchanged": lambda t: t.view(4, 10, -1).transpose(0, 1),
    "a token": lambda t: t[0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_batches(backend, view):
    dy, x = view(integers(40, 26)), view(integers(40, 34, seed=1))
    rows, cols = coordinates(dy.shape[-1], x.shape[-1], 50)
    expected = dense_gradient(dy, x)[rows, cols]
    for a, b in ((dy, x), (dy.contiguous(), x), (dy, x.contiguous())):
        assert torch.equal(ops.sampled_grad(a, b, rows, cols, backend=backend).double(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coordinates_in_any_order_and_integer_type(backend):
    dy, x = integers(30, 13), integers(30, 17, seed=1)
    rows, cols = coordinates(13, 17, 40)
    expected = dense_gradient(dy, x)[rows, cols].float()
    for dtype in (torch.int32, torch.int64):
        ours = ops.sampled_grad(dy, x, rows.to(dtype), cols.to(dtype), backend=backend)
        assert torch.equal(ours, expected)
    order = (cols * 13 + rows).argsort()
    sorted_ = ops.sampled_grad(dy, x, rows[order], cols[order], backend=backend)
    assert torch.equal(sorted_, expected[order])
    pair = torch.stack([rows, cols], 1)  # columns of one tensor are not contiguous
    assert torch.equal(ops.sampled_grad(dy, x, *pair.unbind(1), backend=backend), expected)
    twice = ops.sampled_grad(dy, x, rows.repeat(2), cols.repeat(2), backend=backend)
    assert torch.equal(twice, expected.repeat(2))
    none = ops.sampled_grad(dy, x, rows[:0], cols[:0], backend=backend)
    assert none.shape == (0,) and none.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_pass_through_and_stay_where_they_are(backend, dtype):
    dy, x = integers(70, 6, dtype=dtype), integers(70, 5, dtype=dtype, seed=1)
    dy[:, 0], x[:, 0] = 1, 1
    dy[3, 1], dy[4, 2], x[5, 1], x[69, 2] = float("inf"), float("nan"), -float("inf"), float("nan")
    dy[8, 3], dy[9, 3] = float("inf"), -float("inf")
    rows, cols = coordinates(6, 5)
    values = ops.sampled_grad(dy, x, rows, cols, backend=backend).double()
    products = dy.double()[:, rows] * x.double()[:, cols]
    torch.testing.assert_close(values, products.sum(0), rtol=0, atol=0, equal_nan=True)
    assert values.isinf().any() and values.isnan().any() and values.isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_float32_cannot_hold_becomes_infinite(backend):
    dy, x = torch.full((2, 1), 3e38, device=DEVICE), torch.full((2, 1), 10.0, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert ops.sampled_grad(dy, x, zero, zero, backend=backend).item() == float("inf")
    assert ops.sampled_grad(dy, -x, zero, zero, backend=backend).item() == -float("inf")


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_numbers_are_not_lost(backend):
    """Denormal float16 and bfloat16 are numbers as any other."""
    interpreted = backend == "triton" and DEVICE == "cpu"  # flushes bfloat16's to zero
    for dtype in (torch.float16,) if interpreted else (torch.float16, torch.bfloat16):
        dy = torch.full((4, 1), torch.finfo(dtype).smallest_normal / 4, device=DEVICE).to(dtype)
        x = torch.full((4, 1), 1024.0, dtype=dtype, device=DEVICE)
        zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        ours = ops.sampled_grad(dy, x, zero, zero, backend=backend)
        assert ours.item() == 4096 * dy[0, 0].item() > 0


# Across the C++ kernel's limits: 16384 coordinates a panel, 256 tokens or 1/64 of them a chunk.


@on_cpu
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_more_coordinates_than_a_panel(dtypes, isa):
    dy, x = integers(300, 160, dtype=dtypes[0]), integers(300, 130, dtype=dtypes[1], seed=1)
    rows, cols = coordinates(160, 130)
    assert len(rows) > 16384
    ours = ops.sampled_grad(dy, x, rows, cols, backend="cpu")
    assert torch.equal(ours.double(), dense_gradient(dy, x)[rows, cols])


@on_cpu
@pytest.mark.parametrize("tokens", [255, 256, 257, 512, 513, 16384, 16385, 20000])
def test_more_tokens_than_a_chunk(tokens):
    dy, x = integers(tokens, 5), integers(tokens, 3, seed=1)
    rows, cols = coordinates(5, 3)
    ours = ops.sampled_grad(dy, x, rows, cols, backend="cpu")
    assert torch.equal(ours.double(), dense_gradient(dy, x)[rows, cols])


@on_cpu
@pytest.mark.parametrize("shape", [(3000, 20), (20, 3000), (2000, 3000), (20, 30)], ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_wide_and_narrow_rows(dtypes, shape, isa):
    """Rows of which few elements are used are read as they are, others are widened first."""
    D, H = shape
    dy, x = integers(9, D, dtype=dtypes[0]), integers(9, H, dtype=dtypes[1], seed=1)
    rows, cols = coordinates(D, H, 100)
    ours = ops.sampled_grad(dy, x, rows, cols, backend="cpu")
    assert torch.equal(ours.double(), dense_gradient(dy, x)[rows, cols])


@on_cpu
def test_many_tokens_are_as_exact_as_pytorch():
    dy, x = normal(40_000, 9), normal(40_000, 11, seed=1)
    rows, cols = coordinates(9, 11)
    exact = dense_gradient(dy, x)[rows, cols]
    theirs = (dy.T @ x)[rows, cols].double() - exact
    ours = ops.sampled_grad(dy, x, rows, cols, backend="cpu").double() - exact
    assert ours.abs().max() <= 2 * theirs.abs().max()


@on_cpu
def test_the_number_of_threads_does_not_matter(threads):
    dy, x = normal(3000, 40), normal(3000, 50, seed=1)
    rows, cols = coordinates(40, 50, 300)
    results = []
    for count in (1, 2, 3, 2, 1):
        threads(count)
        results.append(ops.sampled_grad(dy, x, rows, cols, backend="cpu"))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same(backend):
    dy, x = normal(500, 13), normal(500, 17, seed=1)
    rows, cols = coordinates(13, 17, 5)
    first = ops.sampled_grad(dy, x, rows, cols, backend=backend)
    assert torch.equal(first, ops.sampled_grad(dy, x, rows, cols, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    D, H = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    tokens, seed = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 99))
    k = data.draw(st.integers(0, D * H if backend != "triton" else min(40, D * H)))
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))

    def activation(channels, dtype, seed):
        return integers(tokens, before + channels + after, dtype=dtype, seed=seed)[
            :, before : before + channels
        ]

    dy = activation(D, data.draw(st.sampled_from(DTYPES)), seed)
    x = activation(H, data.draw(st.sampled_from(DTYPES)), seed + 1)
    rows, cols = coordinates(D, H, k, seed, data.draw(st.sampled_from([torch.int32, torch.int64])))
    ours = ops.sampled_grad(dy, x, rows, cols, backend=backend)
    assert torch.equal(ours.double(), dense_gradient(dy, x)[rows.long(), cols.long()])


def test_no_gradient_flows_and_no_dense_gradient_is_made():
    dy, x = normal(20, 200), normal(20, 300, seed=1).requires_grad_()
    rows, cols = coordinates(200, 300, 50)
    for backend in ("reference", None):
        with Allocations() as made:
            values = ops.sampled_grad(dy, x, rows, cols, backend=backend)
        assert max(made.sizes) < 200 * 300 / 10
        assert not values.requires_grad


def test_opcheck():
    dy, x = normal(5, 4), normal(5, 3, seed=1)
    rows, cols = coordinates(4, 3, 6)
    op = torch.ops.swkernels.sampled_grad.default
    for backend in (None, "reference"):
        torch.library.opcheck(op, (dy, x, rows, cols, backend))
    torch.library.opcheck(op, (dy.view(1, 5, 4), x.double().view(1, 5, 3), rows, cols, None))
    torch.library.opcheck(op, (dy.bfloat16(), x.half(), rows.int(), cols.int(), None))


def test_compiles_without_a_break():
    compiled = torch.compile(ops.sampled_grad, fullgraph=True, backend="aot_eager")
    rows, cols = coordinates(13, 17, 40)
    for tokens in (9, 30, 31):
        dy, x = integers(tokens, 13), integers(tokens, 17, seed=1)
        assert torch.equal(compiled(dy, x, rows, cols), ops.sampled_grad(dy, x, rows, cols))


LARGE = 2**32  # wraps to 0 in int32


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not check the range")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [(8, 0), (0, 16), (-1, 0), (0, -1), (LARGE, 0), (1, LARGE + 1)])
def test_coordinates_outside(backend, place):
    dy, x = torch.ones(2, 8), torch.ones(2, 16)
    rows, cols = torch.tensor([[3, 4], place, [1, 1]]).unbind(1)
    with pytest.raises(InvalidInput, match=rf"\[{place[0]}, {place[1]}\].*\[8, 16\]"):
        ops.sampled_grad(dy, x, rows, cols, backend=backend)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dy=torch.ones(3, 8)), "the same tokens, got .3, 8. and .2, 16."),
        (dict(dy=torch.ones(1, 2, 8)), "the same tokens"),
        (dict(x=torch.ones(2, 16, dtype=torch.int64)), "dequantize"),
        (dict(x=torch.tensor(1.0)), "got a scalar"),
        (dict(dy=[1.0]), "dy must be a tensor, got list"),
        (dict(dy=torch.ones(2, 8, device="meta")), "dy is on the meta device"),
        (dict(rows=torch.tensor([0.0])), r"rows must be int32 or int64 \[k\], got torch.float32"),
        (dict(cols=torch.tensor([True])), "cols must be int32 or int64"),
        (dict(cols=torch.tensor([[0]])), r"cols must be .* \[1, 1\]"),
        (dict(rows=[0]), "rows must be a tensor of integers, got list"),
        (dict(rows=torch.tensor([0, 1])), "belong together"),
        (
            dict(
                rows=torch.zeros(1, dtype=torch.int64, device="meta"),
                cols=torch.zeros(1, dtype=torch.int64, device="meta"),
            ),
            "on one device, got cpu, cpu and meta",
        ),
    ],
)
def test_bad_arguments(change, message):
    zero = torch.tensor([0])
    arguments = dict(dy=torch.ones(2, 8), x=torch.ones(2, 16), rows=zero, cols=zero) | change
    with pytest.raises(InvalidInput, match=message) as error:
        ops.sampled_grad(**arguments)
    assert "\n" not in str(error.value)


@on_cpu
def test_the_backend_asked_for_runs_or_says_why_not():
    dy, x, zero = torch.ones(2, 8).double(), torch.ones(2, 16), torch.tensor([0])
    with pytest.raises(BackendUnavailable, match="float64"):
        ops.sampled_grad(dy, x, zero, zero, backend="cpu")
    with pytest.raises(BackendUnavailable, match="cuda"):
        ops.sampled_grad(dy, x, zero, zero, backend="cuda")
