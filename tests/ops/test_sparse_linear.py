from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.backends import cpu
from swkernels.errors import BackendUnavailable, InvalidInput

from .backends_here import DEVICE, DTYPES, runnable
from .listed import Allocations, coordinates, dense_gradient, integers, normal

BACKENDS = runnable("sparse_linear")
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


def matrix(values, rows, cols, D, H):
    """S [D, H], in float64."""
    dense = torch.zeros(D, H, dtype=torch.float64, device=values.device)
    dense[rows.long(), cols.long()] = values.detach().double()
    return dense


def expected(x, base_out, values, rows, cols):
    """base_out + x S^T, in float64."""
    S = matrix(values, rows, cols, base_out.shape[-1], x.shape[-1])
    return base_out.double() + x.double() @ S.T


def noting(tensors: list):
    """A hook that keeps what autograd saves in ``tensors``."""

    def keep(tensor):
        tensors.append(tensor)
        return tensor

    return keep


def arguments(tokens, D=13, H=17, k=40, dtypes=(torch.float32, torch.float32), seed=0):
    """Whole numbers, so small that sums of a row are exact in float16 and nearly so in bfloat16."""
    x, base_out = (
        integers(tokens, H, dtype=dtypes[0], seed=seed),
        integers(tokens, D, seed=seed + 1),
    )
    rows, cols = coordinates(D, H, k, seed)
    return x, base_out.to(dtypes[1]), integers(len(rows), seed=seed + 2), rows, cols


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "tokens, k", [(0, 1), (0, None), (1, 1), (1, None), (63, 1), (63, None), (1000, 1), (1000, 30)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_numbers_are_exact(backend, tokens, k, inplace):
    given_ = arguments(tokens, k=k)
    exact, before = expected(*given_), given_[1].clone()
    y = ops.sparse_linear(*given_, inplace=inplace, backend=backend)
    assert y.dtype == torch.float32 and torch.equal(y.double(), exact)
    assert (y is given_[1]) == inplace
    assert inplace or torch.equal(given_[1], before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_differ_and_are_rounded_once(backend, dtypes, inplace):
    """A row is summed in float32 and rounded to base_out's dtype at the end."""
    x, base_out, values, rows, cols = arguments(63, k=None, dtypes=dtypes)
    values = values / 1024  # what one of them adds is less than bfloat16 can show
    exact = expected(x, base_out, values, rows, cols)
    y = ops.sparse_linear(x, base_out, values, rows, cols, inplace=inplace, backend=backend)
    assert y.dtype == dtypes[1] and torch.equal(y, exact.to(dtypes[1]))


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@on_cpu
def test_every_instruction_set(dtypes, isa):
    x, base_out, values, rows, cols = arguments(70, D=40, H=50, k=700, dtypes=dtypes)
    values = values / 1024
    exact = expected(x, base_out, values, rows, cols)
    y = ops.sparse_linear(x, base_out, values, rows, cols, backend="cpu")
    assert torch.equal(y, exact.to(dtypes[1]))


@pytest.mark.parametrize("other", [torch.float64, *DTYPES], ids=str)
def test_float64_is_exact_to_rounding(other):
    rows, cols = coordinates(13, 17, 100)
    values, wide = normal(100).double() / 3, normal(30, 17).double() / 3
    base_out, narrow = normal(30, 13, dtype=other), normal(30, 17, dtype=other, seed=1)
    for x, y in ((wide, wide[:, :13]), (narrow, wide[:, :13]), (wide, base_out)):
        ours = ops.sparse_linear(x, y, values, rows, cols)
        exact = expected(x, y, values, rows, cols)
        rounding = {} if y.dtype != torch.float64 else dict(rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(ours, exact.to(y.dtype), **rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_a_dense_product(backend, dtype):
    x, base_out = normal(100, 17, dtype=dtype), normal(100, 13, dtype=dtype, seed=1)
    rows, cols = coordinates(13, 17)
    values = normal(len(rows), seed=2).to(dtype).float()
    exact = expected(x, base_out, values, rows, cols)
    theirs = base_out + F.linear(x, matrix(values, rows, cols, 13, 17).to(dtype))
    ours = ops.sparse_linear(x, base_out, values, rows, cols, backend=backend)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


VIEWS = {
    "rows that lie apart": lambda t: t[:, 3:],
    "every other token": lambda t: t[::2],
    "every other channel": lambda t: t[:, ::2],
    "transposed": lambda t: t[:20, :20].T,
    "no channels apart": lambda t: t[:, 2:3],
    "batches": lambda t: t.view(2, 5, 4, -1),
    "batches that cannot be flattened": lambda t: t.view(4, 10, -1)[:, 1:4],
    "batch and token exchanged": lambda t: t.view(4, 10, -1).transpose(0, 1),
    "a token": lambda t: t[0],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_batches(backend, view, inplace):
    x, whole = view(integers(40, 34)), integers(40, 26, seed=1)
    base_out, before = view(whole), whole.clone()
    rows, cols = coordinates(base_out.shape[-1], x.shape[-1], 50)
    values = integers(len(rows), seed=2)
    exact, changed = expected(x, base_out, values, rows, cols).float(), whole.clone()
    view(changed).copy_(exact)  # and around it nothing
    for given_x in (x, x.contiguous()):
        whole.copy_(before)
        y = ops.sparse_linear(
            given_x, base_out, values, rows, cols, inplace=inplace, backend=backend
        )
        assert torch.equal(y, exact) and (y is base_out) == inplace
        assert torch.equal(whole, changed if inplace else before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_belong_to_the_coordinates_as_they_are_given(backend):
    x, base_out, values, rows, cols = arguments(20)
    exact = expected(x, base_out, values, rows, cols).float()
    for dtype in (torch.int32, torch.int64):
        y = ops.sparse_linear(x, base_out, values, rows.to(dtype), cols.to(dtype), backend=backend)
        assert torch.equal(y, exact)
    pattern, order = ops.SparsePattern.sort(rows, cols, (13, 17))
    assert torch.equal(
        ops.pattern_linear(x, base_out, values[order], pattern, backend=backend), exact
    )
    apart = torch.stack([values[order], torch.full_like(values, 9)], 1)[:, 0]
    assert not apart.is_contiguous()
    assert torch.equal(ops.pattern_linear(x, base_out, apart, pattern, backend=backend), exact)
    low = ops.sparse_linear(x, base_out, values.bfloat16(), rows, cols, backend=backend)
    assert torch.equal(low, exact)


def test_a_pattern_is_sorted_and_complete():
    rows, cols = coordinates(13, 17, 40)
    pattern, order = ops.SparsePattern.sort(rows, cols, (13, 17))
    assert len(pattern) == 40 and pattern.shape == (13, 17)
    listed = sorted(zip(rows.tolist(), cols.tolist()))
    assert list(zip(pattern.rows.tolist(), pattern.cols.tolist())) == listed
    assert torch.equal(rows[order], pattern.rows) and torch.equal(cols[order], pattern.cols)
    assert pattern.columns.tolist() == sorted(set(cols.tolist()))
    assert torch.equal(pattern.columns[pattern.column_of], pattern.cols)
    by_column = [(c, r) for r, c in zip(*(t[pattern.by_column].tolist() for t in
                                          (pattern.rows, pattern.cols)))]  # fmt: skip
    assert by_column == sorted((c, r) for r, c in listed)
    for starts, run in ((pattern.row_starts, 0), (pattern.column_starts, 1)):
        keys = [pair[0] for pair in (listed if run == 0 else by_column)]
        counts = [keys.count(key) for key in sorted(set(keys))]
        assert starts.diff().tolist() == counts and starts[0] == 0
    moved = pattern.to(torch.device("meta"))
    assert moved.rows.is_meta and moved.by_column.is_meta and moved.shape == (13, 17)
    empty, _ = ops.SparsePattern.sort(rows[:0], cols[:0], (13, 17))
    assert len(empty) == 0 and empty.row_starts.tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_and_nan_pass_through_and_stay_where_they_are(backend):
    x, base_out, values, rows, cols = arguments(12, k=60)
    x[1, 3], x[2, 4], x[3, 5] = float("inf"), float("nan"), -float("inf")
    base_out[4, 2], base_out[5, 6], base_out[1, 0] = float("inf"), float("nan"), -float("inf")
    values[7], values[8] = float("inf"), float("nan")
    exact = base_out.double()
    for i in range(60):  # not through S, where 0 * inf would be NaN
        exact[:, rows[i]] += values[i].double() * x[:, cols[i]].double()
    y = ops.sparse_linear(x, base_out, values, rows, cols, backend=backend)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=0, equal_nan=True)
    assert y.isinf().any() and y.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_float16_cannot_hold_becomes_infinite(backend):
    x = torch.full((1, 1), 300.0, device=DEVICE)
    base_out = torch.zeros(1, 1, dtype=torch.float16, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for sign in (1, -1):
        values = torch.tensor([300.0 * sign], device=DEVICE)
        y = ops.sparse_linear(x, base_out, values, zero, zero, backend=backend)
        assert y.item() == sign * float("inf")


@on_cpu
@pytest.mark.parametrize("tokens, k", [(200, 20_000), (40_000, 3)])
def test_more_work_than_one_task(tokens, k):
    """Tasks are 32768 products: fewer than one token's, or many tokens."""
    given_ = arguments(tokens, D=160, H=130, k=k)
    y = ops.sparse_linear(*given_, backend="cpu")
    assert torch.equal(y.double(), expected(*given_))


@on_cpu
def test_the_number_of_threads_does_not_matter(threads):
    x, base_out = normal(3000, 50), normal(3000, 40, seed=1)
    rows, cols = coordinates(40, 50, 300)
    values, results = normal(300, seed=2), []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(ops.sparse_linear(x, base_out, values, rows, cols, backend="cpu"))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    D, H = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    tokens, seed = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 99))
    k = data.draw(st.integers(0, min(40, D * H)))
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in range(2)]
    x = integers(tokens, before + H + after, dtype=dtypes[0], seed=seed)[:, before : before + H]
    whole = integers(tokens, after + D + before, dtype=dtypes[1], seed=seed + 1)
    base_out = whole[:, after : after + D]
    rows, cols = coordinates(D, H, k, seed, data.draw(st.sampled_from([torch.int32, torch.int64])))
    values, inplace = integers(k, seed=seed + 2) / 256, data.draw(st.booleans())
    exact = expected(x, base_out, values, rows, cols).to(dtypes[1])
    frame = whole.clone()
    y = ops.sparse_linear(x, base_out, values, rows, cols, inplace=inplace, backend=backend)
    assert torch.equal(y, exact)
    frame[:, after : after + D] = exact if inplace else base_out
    assert torch.equal(whole, frame)


# Gradients


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("k", [1, 40, None])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_dense_layer(backend, dtypes, k, inplace):
    """Whole numbers: exact in float32, rounded once where the gradient of x is narrower."""
    x, base_out, values, rows, cols = arguments(30, k=k, dtypes=dtypes)
    dy = integers(30, 13, dtype=dtypes[1], seed=9)
    x, base_out, values = leaves((x, base_out, values))
    kept = base_out * 1  # a leaf cannot be changed in place
    y = ops.sparse_linear(x, kept, values, rows, cols, inplace=inplace, backend=backend)
    assert y.requires_grad and (y is kept) == inplace
    y.backward(dy)
    assert [t.grad.dtype for t in (x, base_out, values)] == [*dtypes, torch.float32]
    assert torch.equal(base_out.grad, dy)
    assert torch.equal(values.grad.double(), dense_gradient(dy, x)[rows, cols])
    d_x = dy.double() @ matrix(values, rows, cols, 13, 17)
    assert torch.equal(x.grad, d_x.to(dtypes[0]))


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_only_the_gradients_that_are_wanted(wanted):
    x, base_out, values, rows, cols = arguments(10)
    pattern, order = ops.SparsePattern.sort(rows, cols, (13, 17))
    tensors = [t.requires_grad_(bool(w)) for t, w in zip((x, base_out, values[order]), wanted)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(noting(saved), lambda t: t):
        y = ops.pattern_linear(*tensors, pattern)
    y.backward(torch.ones_like(y))
    assert [t.grad is not None for t in tensors] == [bool(w) for w in wanted]
    assert len(saved) == wanted[0] + wanted[2]  # the values for x, columns of x for the values


def test_gradcheck():
    x, base_out = normal(2, 5, 7).double(), normal(2, 5, 6, seed=1).double()
    for k in (1, 9, None):
        rows, cols = coordinates(6, 7, k)
        given_ = leaves((x, base_out, normal(len(rows), seed=2).double()))

        def y(x, base_out, values, inplace, rows=rows, cols=cols):
            return ops.sparse_linear(x, base_out * 1, values, rows, cols, inplace=inplace)

        for inplace in (False, True):
            assert torch.autograd.gradcheck(lambda *t, i=inplace: y(*t, i), given_)


def test_a_second_derivative_is_refused_and_not_wrong():
    x, base_out, values, rows, cols = arguments(5)
    x.requires_grad_(), values.requires_grad_()
    y = ops.sparse_linear(x, base_out, values, rows, cols)
    (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        d_x.sum().backward()


def test_saved_are_only_the_columns_of_x_that_are_named():
    x, base_out, values, _, _ = arguments(20, D=30, H=100, k=9)
    rows = torch.arange(9, device=DEVICE)
    cols = torch.tensor([5, 90, 90, 5, 5, 41, 90, 0, 0], device=DEVICE)
    every = torch.arange(9, device=DEVICE) * 2
    for width, listed, shape in ((100, cols, [20, 4]), (18, every, [20, 18])):
        pattern, _ = ops.SparsePattern.sort(rows, listed, (30, width))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(noting(saved), lambda t: t):
            ops.pattern_linear(x[:, :width], base_out, values.requires_grad_(), pattern)
        assert [list(t.shape) for t in saved] == [shape]
        if width == 100:
            assert torch.equal(saved[0], x[:, [0, 5, 41, 90]])
        else:  # half of the columns or more: x itself, not a copy
            assert saved[0].data_ptr() == x.data_ptr()


def test_nothing_of_the_weights_size_is_made():
    x, base_out, values, rows, cols = arguments(20, D=200, H=300, k=50)
    for backend in ("reference", None):
        given_ = leaves((x, base_out, values))
        with Allocations() as made:
            y = ops.sparse_linear(given_[0], given_[1] * 1, given_[2], rows, cols, backend=backend)
            y.square().sum().backward()
        assert max(made.sizes) < 200 * 300 / 5
        assert given_[2].grad is not None


def test_what_an_earlier_operation_kept_is_guarded():
    """PyTorch must see that base_out was changed in place, or other gradients would be wrong."""
    x, base_out, values, rows, cols = arguments(10)
    factor = torch.ones(10, 13, device=DEVICE, requires_grad=True)
    product = base_out * factor
    ops.sparse_linear(x, base_out, values, rows, cols, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    product = base_out * factor
    ops.sparse_linear(x, base_out, values.requires_grad_(), rows, cols, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inference_mode_and_no_grad():
    x, base_out, values, rows, cols = arguments(10)
    exact = expected(x, base_out, values, rows, cols).float()
    values.requires_grad_()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            mine = base_out.clone()
            y = ops.sparse_linear(x, mine, values, rows, cols, inplace=True)
            assert y is mine and torch.equal(y, exact) and not y.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_view_that_conv1d_returns_is_changed_in_place(backend):
    """addmm(...).view(...), with gradients that flow through the base."""
    x, _, values, rows, cols = arguments(12)
    weight, bias = integers(17, 13, seed=5), integers(13, seed=6)

    def run(x, values, weight, sparse):
        y = torch.addmm(bias, x.reshape(-1, 17), weight).view(3, 4, 13)
        if sparse:
            assert y._is_view()
            base, y = (
                y,
                ops.sparse_linear(
                    x.view(3, 4, 17), y, values, rows, cols, inplace=True, backend=backend
                ),
            )
            assert y is base
        else:
            index = (rows, cols)
            dense = torch.zeros(13, 17, device=DEVICE).index_put(index, values)
            y = y + F.linear(x.view(3, 4, 17), dense)
        y.square().sum().backward()
        return y.detach()

    ours, theirs = leaves((x, values, weight)), leaves((x, values, weight))
    assert torch.equal(run(*ours, True), run(*theirs, False))
    for mine, other in zip(ours, theirs):
        assert torch.equal(mine.grad, other.grad)


def test_a_gradient_of_any_strides():
    """sum() hands back an expanded gradient, a transposed consumer a transposed one."""
    x, base_out, values, rows, cols = arguments(10)
    for consume in (torch.sum, lambda y: (y.T @ integers(10, 3)).sum(), lambda y: y[:, ::2].sum()):
        ours, theirs = leaves((x, base_out, values)), leaves((x, base_out, values))
        consume(ops.sparse_linear(*ours, rows, cols)).backward()
        dense = torch.zeros(13, 17, device=DEVICE).index_put((rows, cols), theirs[2])
        consume(theirs[1] + F.linear(theirs[0], dense)).backward()
        for mine, other in zip(ours, theirs):
            assert torch.equal(mine.grad, other.grad)


def test_under_autocast():
    """The base runs in bfloat16, x comes in float32: values and their gradient stay float32."""
    x, _, values, rows, cols = arguments(10)
    weight = integers(13, 17, seed=4)
    x, values = leaves((x, values))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        base_out = F.linear(x, weight)
        y = ops.sparse_linear(x, base_out, values, rows, cols, inplace=True)
        loss = y.float().sum()
    assert y.dtype == torch.bfloat16
    loss.backward()
    assert values.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    ones = torch.ones(10, 13, device=DEVICE)
    assert torch.equal(values.grad.double(), dense_gradient(ones, x)[rows, cols])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_grad_scaler_sees_gradients_that_overflow(bad):
    x, base_out, values, rows, cols = arguments(10)
    values = torch.nn.Parameter(values)
    optimizer = torch.optim.SGD([values], lr=1.0)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    before = values.detach().clone()
    y = ops.sparse_linear(x, base_out, values, rows, cols)
    dy = torch.ones_like(y)
    dy[3, int(rows[0])] = bad
    scaler.scale(y).backward(dy)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(values, before) and scaler.get_scale() == 2.0
    optimizer.zero_grad()
    y = ops.sparse_linear(x, base_out, values, rows, cols)
    scaler.scale(y.sum()).backward()
    scaler.step(optimizer)
    gradient = dense_gradient(torch.ones_like(y), x)[rows, cols].float()
    assert torch.equal(values, before - gradient)


def test_opcheck():
    op = torch.ops.swkernels.sparse_linear.default
    for dtypes, backend in (((torch.float32,) * 2, None), ((torch.float16, torch.bfloat16), None)):
        x, base_out, values, rows, cols = arguments(6, D=4, H=9, k=5, dtypes=dtypes)
        x, base_out, values = leaves((x, base_out, values))
        pattern, order = ops.SparsePattern.sort(rows, cols, (4, 9))
        tensors = [
            pattern.rows, pattern.cols, pattern.row_starts, pattern.columns, pattern.column_of,
            pattern.by_column, pattern.column_starts,
        ]  # fmt: skip
        torch.library.opcheck(op, (x, base_out, values, *tensors, backend))
    wide = [t.detach().double().requires_grad_() for t in (x, base_out, values)]
    assert torch.autograd.gradcheck(lambda *t: op(*t, *tensors, "reference"), wide)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_a_break(inplace):
    rows, cols = coordinates(13, 17, 40)
    pattern, _ = ops.SparsePattern.sort(rows, cols, (13, 17))

    def layer(x, weight, values):
        return ops.pattern_linear(x, F.linear(x, weight), values, pattern, inplace=inplace).square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (9, 30, 31):
        x, _, values, _, _ = arguments(tokens)
        given_ = x, integers(13, 17, seed=3), values
        ours, theirs = leaves(given_), leaves(given_)
        compiled(*ours).sum().backward()
        layer(*theirs).sum().backward()
        assert torch.equal(compiled(*given_), layer(*given_))
        for mine, other in zip(ours, theirs):
            assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_coordinates_at_all(backend):
    x, base_out, values, rows, cols = arguments(5)
    none = (values[:0], rows[:0], cols[:0])
    y = ops.sparse_linear(x, base_out, *none, backend=backend)
    assert torch.equal(y, base_out) and y.data_ptr() != base_out.data_ptr()
    assert ops.sparse_linear(x, base_out, *none, inplace=True, backend=backend) is base_out


# What it refuses

ZERO = torch.tensor([0])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.ones(3, 16)), "the same tokens"),
        (dict(base_out=torch.ones(1, 2, 8)), "the same tokens"),
        (dict(base_out=torch.ones(2, 8, dtype=torch.int32)), "dequantize"),
        (dict(x=torch.ones(2, 16, device="meta")), "x is on the meta device"),
        (dict(x=[1.0]), "x must be a tensor, got list"),
        (dict(values=torch.ones(2)), r"values must be floating-point \[1\], got .* \[2\]"),
        (dict(values=torch.ones(1, 1)), r"got torch.float32 \[1, 1\]"),
        (dict(values=torch.ones(1, dtype=torch.int64)), "got torch.int64"),
        (dict(values=[1.0]), "values must be a tensor, got list"),
        (dict(values=torch.ones(1, device="meta")), "values is on meta, x on cpu"),
        (dict(rows=ZERO.to("meta"), cols=ZERO.to("meta")), "rows is on meta, x on cpu"),
        (dict(rows=ZERO.float()), "rows must be int32 or int64"),
        (dict(cols=ZERO.bool()), "cols must be int32 or int64"),
        (dict(cols=torch.tensor([0, 1])), "belong together"),
        (dict(cols=ZERO.view(1, 1)), r"\[1, 1\]"),
        (dict(rows=ZERO + 8), r"\[8, 0\] lies outside the weight \[8, 16\]"),
        (dict(cols=ZERO + 16), r"\[0, 16\] lies outside"),
        (dict(rows=ZERO - 1), r"\[-1, 0\] lies outside"),
        (dict(cols=ZERO - 1), r"\[0, -1\] lies outside"),
        (dict(cols=ZERO + 2**32), r"\[0, 4294967296\] lies outside"),
        (
            dict(rows=torch.tensor([3, 0, 3]), cols=torch.tensor([5, 5, 5]), values=torch.ones(3)),
            r"\[3, 5\] is listed more than once",
        ),
    ],
)
@pytest.mark.skipif(DEVICE != "cpu", reason="messages name the CPU")
def test_bad_arguments_change_nothing(change, message):
    given_ = dict(x=torch.ones(2, 16), base_out=torch.ones(2, 8), values=torch.ones(1))
    given_ |= dict(rows=ZERO, cols=ZERO) | change
    before = copy.deepcopy(given_)
    with pytest.raises(InvalidInput, match=message) as error:
        ops.sparse_linear(**given_, inplace=True)
    assert "\n" not in str(error.value)
    for name in ("base_out", "values"):
        if isinstance(given_[name], torch.Tensor) and not given_[name].is_meta:
            assert torch.equal(given_[name], before[name])


def test_a_leaf_is_not_changed_in_place():
    x, base_out, values, rows, cols = arguments(4)
    before = base_out.clone()
    with pytest.raises(InvalidInput, match="leaf.*inplace=False"):
        ops.sparse_linear(x, base_out.requires_grad_(), values, rows, cols, inplace=True)
    assert torch.equal(base_out, before)


def test_a_pattern_of_another_shape():
    x, base_out, values, rows, cols = arguments(4)
    pattern, _ = ops.SparsePattern.sort(rows, cols, (13, 17))
    for other in (dict(x=x[:, :16]), dict(base_out=base_out[:, :12]), dict(values=values[:3])):
        with pytest.raises(InvalidInput):
            ops.pattern_linear(**(dict(x=x, base_out=base_out, values=values) | other),
                               pattern=pattern)  # fmt: skip


@on_cpu
def test_the_backend_asked_for_runs_or_says_why_not():
    x, base_out, values, rows, cols = arguments(4)
    with pytest.raises(BackendUnavailable, match="float64"):
        ops.sparse_linear(x.double(), base_out, values, rows, cols, backend="cpu")
