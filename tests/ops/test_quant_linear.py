from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.backends import cpu
from swkernels.errors import BackendUnavailable, InvalidInput
from swkernels.ops.block_dequantize import as_arguments

from .backends_here import DEVICE, DTYPES, runnable
from .listed import Allocations, integers, normal
from .packed import CODE_NAMES, CODES, SCALE_DTYPES, heavy, interpreted, quantize, some_of

codes = pytest.mark.parametrize("code, symmetric", CODES, ids=CODE_NAMES)
backends = pytest.mark.parametrize("backend", runnable("quant_linear"))
on_cpu = pytest.mark.skipif(
    DEVICE != "cpu" or cpu.available() is not None, reason="no CPU library here"
)
# One token, a few, the fused products' last and first beyond, and dequantize and multiply.
TOKENS = (1, 2, 5, 16, 33, 300)

# NumPy warns where Triton's interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def columns_of(T, H, seed=0):
    """T columns; all of them where T is large enough."""
    return torch.arange(seed, seed + T, device=DEVICE) * 7 % H


def assert_reads_back(q, dtype, tokens, backend, seed=0):
    D, H = q.plan.rows, q.plan.columns
    wanted = ops.block_dequantize(q, torch.float32, backend="reference").to(dtype)
    columns = columns_of(tokens, H, seed)
    x = F.one_hot(columns, H).to(dtype)
    y = ops.quant_linear(x, q, backend=backend)
    assert y.dtype == dtype and y.shape == (tokens, D)
    assert torch.equal(y, wanted.view(D, H)[:, columns].T)


@codes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_one_hot_tokens_read_the_weight(backend, dtype, code, symmetric):
    blocks = (64, 32, 7, (8, 16), "row", "channel", "tensor", 128)
    for i, block in some_of(backend, enumerate(blocks), 3 + DTYPES.index(dtype)):
        H = 129 if i % 2 else 128
        q = quantize(
            heavy(11, H, seed=i), code, symmetric, block, None, SCALE_DTYPES[i % 3],
            largest=0 if i == 1 else 20,
        )  # fmt: skip
        for tokens in TOKENS if not interpreted(backend) else (1, 16) if i else (5, 33):
            assert_reads_back(q, dtype, tokens, backend, seed=i)


@backends
def test_all_columns_by_few_tokens(backend):
    blocks = (64, 16, (4, 8), "row", 9, "tensor")
    for (code, symmetric), block in some_of(backend, zip(CODES, blocks), 3):
        q = quantize(heavy(6, 67), code, symmetric, block, largest=5)
        for tokens in (1, 4):
            step = 1 if not interpreted(backend) else 13
            for seed in range(0, 67, tokens * step):
                assert_reads_back(q, torch.float32, tokens, backend, seed)


@backends
def test_rows_of_outliers_and_every_byte(backend):
    w = heavy(9, 64)
    places = [(2, column) for column in range(20)] + [(8, 63), (0, 0)]
    q = quantize(w, "int8", False, 64, outliers=torch.tensor(places, device=DEVICE))
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(3)[: 9 * 64]
    for packed, tokens in itertools.product((q, replace(q, codes=every)), (1, 5, 64)):
        assert_reads_back(packed, torch.float32, tokens, backend)


@backends
@pytest.mark.parametrize("tokens", [0, *TOKENS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_give_exact_sums(backend, dtype, tokens):
    """In any order of summation, with bias and outliers."""
    for block, H in some_of(backend, ((64, 128), (16, 80), ("row", 112)), 3):
        w = integers(13, H, seed=3).clamp(-7, 7)
        w.view(-1)[::16] = 7
        places = torch.tensor([[0, 5], [12, H - 1]], device=DEVICE)
        w[0, 5], w[12, H - 1] = 100, -50
        q = quantize(w, "int4", True, block, outliers=places)
        assert torch.equal(q.dequantize(), w)
        x, bias = integers(tokens, H, seed=1).to(dtype), integers(13, seed=2).float()
        exact = x.double() @ w.double().T + bias.double()
        y = ops.quant_linear(x, q, bias, backend=backend)
        assert torch.equal(y, exact.float().to(dtype))
        assert y.shape == (tokens, 13) and y.dtype == dtype


@codes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_error_is_at_most_twice_that_of_linear_on_the_dequantized_weight(
    backend, dtype, code, symmetric
):
    D = 20 if interpreted(backend) else 70
    q = quantize(normal(D, 250) * 0.1, code, symmetric, 64, largest=30)
    bias = normal(D, seed=4)
    weight = q.dequantize(dtype)
    for tokens in TOKENS if not interpreted(backend) else (16,):
        x = normal(max(tokens, 16 if interpreted(backend) else 48), 250, dtype=dtype, seed=5)
        exact = F.linear(x.double(), q.dequantize().double(), bias.to(dtype).double())
        parts = x.split(tokens)
        theirs = torch.cat([F.linear(part, weight, bias.to(dtype)) for part in parts]) - exact
        ours = torch.cat([ops.quant_linear(part, q, bias, backend=backend) for part in parts])
        ours = ours - exact
        assert ours.square().mean() <= 4 * theirs.square().mean()
        assert ours.abs().max() <= 2 * theirs.abs().max()


VIEWS = {
    "rows that lie apart": lambda t: t[:, 3:],
    "every other token": lambda t: t[::2],
    "every other column": lambda t: t[:, ::2],
    "transposed": lambda t: t.T.contiguous().T,
    "one token for all": lambda t: t[:1].expand(12, -1),
    "batches": lambda t: t.view(2, 3, 2, -1),
    "batch and token exchanged": lambda t: t.view(4, 3, -1).transpose(0, 1),
    "a token": lambda t: t[0],
    "no tokens": lambda t: t.view(4, 3, -1)[:, :0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@backends
def test_any_strides_and_batches(backend, view):
    x = view(integers(12, 134))
    H = x.shape[-1]
    w = integers(9, H, seed=1).clamp(-7, 7)
    w[:, ::5] = 7
    q = quantize(w, block="row")
    bias = torch.stack([integers(9, seed=2), integers(9, seed=3)], 1)[:, 0]  # strided
    y = ops.quant_linear(x, q, bias, backend=backend)
    assert torch.equal(y, F.linear(x, w, bias)) and y.shape == (*x.shape[:-1], 9)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 1), (1, 3)], ids=str)
@backends
def test_small_and_empty_weights(backend, shape):
    D, H = shape
    q, bias = quantize(torch.ones(D, H, device=DEVICE)), integers(D)
    for tokens in (0, 1, 3, 40):
        y = ops.quant_linear(torch.ones(tokens, H, device=DEVICE), q, bias, backend=backend)
        assert torch.equal(y, (bias + H).expand(tokens, -1))


@backends
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    draw = data.draw
    most = 16 if interpreted(backend) else 70
    D, H = draw(st.integers(1, most)), draw(st.integers(1, most))
    block = draw(
        st.one_of(
            st.integers(1, 200),
            st.tuples(st.integers(1, 40), st.integers(1, 40)),
            st.sampled_from(["row", "channel", "tensor"]),
        )
    )
    code, symmetric = draw(st.sampled_from(CODES))
    seed, dtype = draw(st.integers(0, 9)), draw(st.sampled_from(DTYPES))
    w = heavy(D, H, draw(st.sampled_from(DTYPES)), seed)
    q = quantize(
        w, code, symmetric, block, None, draw(st.sampled_from(SCALE_DTYPES)),
        largest=draw(st.integers(0, 16)), backend="reference",
    )  # fmt: skip
    tokens = draw(st.integers(1, 40))
    assert_reads_back(q, dtype, tokens, backend, seed)
    x = normal(tokens, H, seed=seed, dtype=dtype)
    y = ops.quant_linear(x, q, backend=backend).double()
    # Every order of H float32 sums stays below this bound; then one rounding of weight and sum.
    wide = q.dequantize(torch.float32).double()
    size = x.double().abs() @ wide.abs().T
    unit = torch.finfo(dtype).eps
    bound = size * (2 * unit + (H + 2) * 2.0**-23) + torch.finfo(dtype).smallest_normal
    assert ((y - x.double() @ wide.T).abs() <= bound).all()


@backends
def test_infinity_and_nan_pass_and_stay_in_their_token(backend):
    q = quantize(heavy(6, 64), largest=3)
    for tokens in (3, 40):
        x = normal(tokens, 64)
        x[1, 9], x[2, 9] = torch.inf, torch.nan
        y = ops.quant_linear(x, q, backend=backend)
        assert y[0].isfinite().all() and not y[1].isfinite().any() and y[2].isnan().all()


@backends
def test_twice_the_same(backend):
    q = quantize(normal(10, 200), "nf4", largest=40)
    for tokens in (1, 8, 40):
        x = normal(tokens, 200, seed=1)
        first = ops.quant_linear(x, q, backend=backend)
        assert torch.equal(first, ops.quant_linear(x, q, backend=backend))


@on_cpu
def test_nothing_of_the_weights_size_is_made_for_few_tokens():
    D, H = 1024, 512
    for (code, symmetric), block in zip(CODES, (64, "row", (8, 8), 128, 32, 100)):
        q = quantize(heavy(D, H), code, symmetric, block, largest=20)
        for tokens in (1, 2, 16):
            x = normal(tokens, H)
            with Allocations() as made:
                ops.quant_linear(x, q, normal(D), backend="cpu")
            assert max(made.sizes) < D * H / 4
        with Allocations() as made:
            ops.quant_linear(x, q, backend="reference")
        assert max(made.sizes) >= D * H


# Gradients.


@codes
@pytest.mark.parametrize("tokens", [1, 5, 40])
@backends
def test_gradients(backend, tokens, code, symmetric):
    q = quantize(heavy(13, 50), code, symmetric, 16, largest=4)
    for dtype in some_of(backend, DTYPES, 3):
        x = normal(2, tokens, 50, dtype=dtype, seed=1).requires_grad_()
        bias = normal(13, seed=2).requires_grad_()
        dy = normal(2, tokens, 13, dtype=dtype, seed=3)
        y = ops.quant_linear(x, q, bias, backend=backend)
        assert torch.equal(y, ops.quant_linear(x.detach(), q, bias.detach(), backend=backend))
        y.backward(dy)
        assert torch.equal(x.grad, dy @ q.dequantize(dtype)) and x.grad.dtype == dtype
        assert torch.equal(bias.grad, dy.reshape(-1, 13).sum(0).float())
        alone = bias.detach().requires_grad_()
        ops.quant_linear(x.detach(), q, alone, backend=backend).backward(dy)
        assert torch.equal(alone.grad, bias.grad)


@codes
def test_gradcheck(code, symmetric):
    q = quantize(heavy(3, 10), code, symmetric, 4, largest=2)
    x, bias = normal(4, 10).double().requires_grad_(), normal(3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: ops.quant_linear(x, q, bias), (x, bias))


def test_float64_is_exact_to_rounding():
    q = quantize(heavy(13, 50), "nf4", largest=4)
    x = normal(6, 50).double() / 3
    y = ops.quant_linear(x, q)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, x @ q.dequantize().double().T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tokens", [5, 40])
def test_autocast(tokens):
    q, bias = quantize(heavy(6, 32), largest=2), normal(6, seed=1).requires_grad_()
    x = normal(tokens, 32).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = ops.quant_linear(x, q, bias)
        assert ops.quant_linear(x.double(), q).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.quant_linear(x.bfloat16(), q, bias))
    y.float().sum().backward()
    ones = torch.ones(tokens, 6, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(x.grad, (ones @ q.dequantize(torch.bfloat16)).float())
    assert bias.grad.dtype == torch.float32


def test_the_output_may_be_added_to_in_place():
    """As adapters do with what a layer gives."""
    q, x = quantize(heavy(6, 32)), normal(3, 32).requires_grad_()
    y = ops.quant_linear(x, q)
    y += 1
    y.sum().backward()
    assert x.grad is not None


def operation(x, q, bias=None, backend=None):
    held = q.codes, q.block_scales(), q.zero_points, q.positions, q.values
    return x, *held, bias, *as_arguments(q.plan), backend


def test_opcheck():
    op = torch.ops.swkernels.quant_linear.default
    q = quantize(heavy(5, 18), "int4", False, 7, None, "float16", largest=2)
    x, bias = normal(2, 3, 18).requires_grad_(), normal(5).requires_grad_()
    torch.library.opcheck(op, operation(x, q, bias))
    torch.library.opcheck(op, operation(x.detach(), q, None, "reference"))
    q = quantize(heavy(5, 18), "nf4", True, 7, None, "int8")
    torch.library.opcheck(op, operation(normal(4, 18).bfloat16(), q, bias.detach()))


def assert_compiles(q, compiler, *tokens):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, bias: ops.quant_linear(x, q, bias), fullgraph=True, backend=compiler
    )
    for count in tokens:
        leaves = [normal(count, 30), normal(9, seed=1)]
        found, plain = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
        y, want = compiled(*found), ops.quant_linear(plain[0], q, plain[1])
        assert torch.equal(y, want)
        y.square().sum().backward()
        want.square().sum().backward()
        for ours, theirs in zip(found, plain):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_compiles_without_a_break():
    for (code, symmetric), scale_dtype in zip(CODES, itertools.cycle(SCALE_DTYPES)):
        q = quantize(heavy(9, 30), code, symmetric, 8, None, scale_dtype, largest=2)
        assert_compiles(q, "aot_eager", 3, 40)
    assert_compiles(q, "inductor", 3)


# Arguments.


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(x=torch.ones(2, 17)), r"x must be .* 16\] for a weight \[4, 16\], got \[2, 17\]"),
        (dict(x=torch.ones(16, 2)), r"got \[16, 2\]"),
        (dict(x=torch.ones(2, 16, dtype=torch.int8)), "x must be float32.*dequantize it first"),
        (dict(x=torch.tensor(1.0)), "got a scalar"),
        (dict(x=[1.0] * 16), "x must be a tensor, got list"),
        (dict(x=torch.ones(2, 16, device="meta")), "meta device"),
        (dict(q=torch.ones(4, 16)), "expected a QuantizedTensor of block_quantize, got Tensor"),
        (dict(bias=torch.ones(5)), r"bias must be floating-point \[4\].*\[5\]"),
        (dict(bias=torch.ones(1, 4)), r"bias must be floating-point \[4\].*\[1, 4\]"),
        (dict(bias=torch.ones(4, dtype=torch.int32)), "bias must be floating-point .* torch.int32"),
        (dict(bias=torch.ones(4, device="meta")), "on meta"),
        (dict(bias=[0.0] * 4), "bias must be a tensor or None, got list"),
    ],
)
def test_bad_arguments(changes, says):
    given_ = dict(x=torch.ones(2, 16, device=DEVICE), q=quantize(heavy(4, 16))) | changes
    with pytest.raises(InvalidInput, match=says) as error:
        ops.quant_linear(**given_)
    assert "\n" not in str(error.value)


def test_another_device():
    q = quantize(heavy(4, 16)).to("meta")
    with pytest.raises(InvalidInput, match="the weight is on meta, x on .*: move it"):
        ops.quant_linear(torch.ones(2, 16, device=DEVICE), q)


@on_cpu
def test_the_backend_asked_for_runs_or_says_why_not():
    q = quantize(heavy(4, 16))
    with pytest.raises(BackendUnavailable, match="float64"):
        ops.quant_linear(torch.ones(2, 16).double(), q, backend="cpu")
    with pytest.raises(BackendUnavailable, match="cuda"):
        ops.quant_linear(torch.ones(2, 16), q, backend="cuda")
