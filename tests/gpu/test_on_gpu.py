"""What has to be seen on a GPU: each kernel against float64, twice the same bits, a stream of its
own, a second device, addresses beyond 2^31 elements. Where there is no GPU, what can be runs in
Triton's interpreter, so that the tests themselves are tested."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from swkernels import backends, ops
from swkernels.backends.plan import Code, Plan
from swkernels.backends.reference import block_dequantize as exact_values
from swkernels.backends.reference import block_quantize as exact_codes
from swkernels.backends.triton import block_dequantize, block_quantize
from swkernels.backends.triton import linear_absmax as linear
from tests.backends.oracle import expected_keys

CUDA = torch.cuda.is_available()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter takes milliseconds for each tile.
TOKENS, ROWS_TWICE, WIDTH = ((0, 1, 63, 1000), 777, 144) if CUDA else ((0, 1, 63), 77, 48)

needs_gpu = pytest.mark.skipif(not CUDA, reason="PyTorch sees no GPU")
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"{torch.cuda.device_count()} GPUs are there, not 2"
)
DEVICES = [
    pytest.param("cuda", marks=needs_gpu),
    pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(CUDA, reason="a GPU is there")),
]

# NumPy warns where the interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run_column(x, backend):
    return (ops.column_absmax(x, backend=backend),)


def run_glu(x, backend):
    gate, up = x.chunk(2, dim=1)
    return ops.glu_absmax(gate, up, "silu", backend=backend)


@cache
def weight_of(columns, dtype, device):
    return normal(40, columns, dtype=dtype, seed=7).to(device)


def weight_for(x):
    return weight_of(x.shape[1], x.dtype, x.device)


def run_linear(x, variant):
    """Triton's fused kernel, by how it loads; on nothing it takes the library's product."""
    weight = weight_for(x)
    in_keys, out_keys = (ops.empty_keys(n, x.device) for n in (x.shape[1], len(weight)))
    y = linear.fused_linear_absmax(
        x, weight, None, in_keys, out_keys, None, 0, descriptors=variant == "descriptors"
    )
    return y, in_keys, out_keys


@cache
def listed(rows, columns, device):
    """Every seventh entry of a matrix: the sorted coordinates, and the matrix of their deltas."""
    flat = torch.arange(0, rows * columns, 7)
    values = normal(len(flat), seed=8)
    deltas = torch.zeros(rows, columns)
    deltas.view(-1)[flat] = values
    pattern, _ = ops.SparsePattern.sort(flat // columns, flat % columns, (rows, columns))
    moved = [getattr(pattern, field.name) for field in dataclasses.fields(pattern)[1:]]
    pattern = ops.SparsePattern((rows, columns), *(tensor.to(device) for tensor in moved))
    return pattern, values.to(device), deltas.to(device)


def halves(x):
    """x [T, 2 C] as dy and x of a layer [C, C], and its coordinates."""
    left, right = x.chunk(2, dim=1)
    return left, right, listed(right.shape[1], right.shape[1], x.device)


def run_sampled(x, backend):
    dy, right, (pattern, _, _) = halves(x)
    return (ops.sampled_grad(dy, right, pattern.rows, pattern.cols, backend=backend),)


def run_sparse(x, backend):
    y, right, (pattern, values, _) = halves(x)
    return (ops.pattern_linear(right, y.clone(), values, pattern, inplace=True, backend=backend),)


def run_masked(x, backend):
    pattern = listed(*x.shape, x.device)[0]
    return (ops.masked_grad_(x.clone(), pattern.rows, pattern.cols, 0.5, backend=backend),)


@cache
def low_rank(width, device):
    """Factors A [8, width] and B [width, 8]."""
    return normal(8, width, seed=9).to(device), normal(width, 8, seed=10).to(device)


def run_lora(x, backend):
    """The result of x [T, 2 C] as base output and input, and every gradient."""
    base_out, right = (part.clone().requires_grad_() for part in x.chunk(2, dim=1))
    A, B = (factor.clone().requires_grad_() for factor in low_rank(right.shape[1], x.device))
    y = ops.lora_linear(right, base_out, A, B, 0.5, backend=backend)
    y.backward(right.detach())
    return y.detach(), right.grad, A.grad, B.grad


def plan_for(x):
    """Asymmetric int4 in blocks of 30, and three outliers."""
    T, C = x.shape
    positions = torch.tensor([0, C, T * C - 1][: 3 if T > 1 else T], device=x.device)
    return Plan(T, C, (0, 30), Code("int4", False)), positions.to(torch.int32)


def run_quantize(x, name):
    plan, positions = plan_for(x)
    return block_quantize.block_quantize(x, plan, positions, torch.float32)


def run_dequantize(x, name):
    plan, positions = plan_for(x)
    packed = exact_codes.block_quantize(x, plan, positions, torch.float32)
    values = x.reshape(-1)[positions.long()]
    return (block_dequantize.block_dequantize(*packed, positions, values, plan, x.dtype),)


@cache
def packed_weight(columns, device):
    w = normal(40, columns, seed=11).to(device)
    return ops.block_quantize(w, code="nf4", block_size=32, largest=9)


def packed_input(x):
    """As many columns of x as are whole runs, and the weight for them."""
    x = x[:, : x.shape[1] // 32 * 32]
    return x, packed_weight(x.shape[1], x.device)


def run_quant_linear(x, backend):
    """By tokens: the kernel for one or a few, the one for some, the library's product."""
    return (ops.quant_linear(*packed_input(x), backend=backend),)


# Each kernel: what runs it, and the name by which that knows it.
KERNELS = {
    "column_absmax-triton": (run_column, "triton"),
    "column_absmax-cuda": (run_column, "cuda"),
    "glu_absmax-triton": (run_glu, "triton"),
    "linear_absmax-pointers": (run_linear, "pointers"),
    "linear_absmax-descriptors": (run_linear, "descriptors"),
    "sampled_grad-triton": (run_sampled, "triton"),
    "sparse_linear-triton": (run_sparse, "triton"),
    "masked_grad-triton": (run_masked, "triton"),
    "lora_linear-triton": (run_lora, "triton"),
    "block_quantize-triton": (run_quantize, "triton"),
    "block_dequantize-triton": (run_dequantize, "triton"),
    "quant_linear-triton": (run_quant_linear, "triton"),
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_device = pytest.mark.parametrize("device", DEVICES)


def outputs(kernel, x):
    """Run a kernel on x [T, 2 C]; skip where it cannot run on this device or type."""
    run, name = KERNELS[kernel]
    if run is run_linear:
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            pytest.skip("the interpreter cannot multiply bfloat16")
        if name == "descriptors" and x.device.type == "cuda":
            if not linear._has_descriptors(x.device):
                pytest.skip("this GPU has no tensor memory accelerator")
            if x.dtype == torch.float32:
                pytest.skip("float32 without TF32 has no descriptor configuration")
    elif run is run_lora and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot multiply bfloat16")
    elif name == "cuda" and x.device.type == "cpu":
        pytest.skip("CUDA C++ needs a GPU")
    return run(x, name)


def check(kernel, x, found):
    """Values against float64 with PyTorch's own error as the measure; peaks for equality."""
    x = x.cpu()
    if kernel.startswith("column"):
        assert torch.equal(found[0].cpu(), expected_keys(x))
        return
    value = found[0]
    if kernel.startswith(("block", "quant")):
        check_packed(kernel, x.to(value.device), found)
        return
    if not kernel.startswith(("glu", "linear")):
        check_at_coordinates(kernel, x.to(value.device), value)
        return
    assert torch.equal(found[-1].cpu(), expected_keys(value.cpu()))
    if kernel.startswith("glu"):
        gate, up = x.to(value.device).chunk(2, dim=1)
        exact, theirs = F.silu(gate.double()) * up.double(), F.silu(gate) * up
    else:
        assert torch.equal(found[1].cpu(), expected_keys(x))
        x = x.to(value.device)
        weight = weight_for(x)
        exact, theirs = F.linear(x.double(), weight.double()), F.linear(x, weight)
    if value.numel():
        assert (value - exact).norm() <= 2 * (theirs - exact).norm()


def check_packed(kernel, x, found):
    if kernel.startswith("block_quantize"):
        expected = exact_codes.block_quantize(x, *plan_for(x), torch.float32)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))
    elif kernel.startswith("block_dequantize"):
        plan, positions = plan_for(x)
        packed = exact_codes.block_quantize(x, plan, positions, torch.float32)
        values = x.reshape(-1)[positions.long()]
        exact = exact_values.block_dequantize(*packed, positions, values, plan, x.dtype)
        assert torch.equal(found[0], exact)
    else:
        x, q = packed_input(x)
        exact = F.linear(x.double(), q.dequantize().double())
        theirs = F.linear(x, q.dequantize(x.dtype))
        assert (found[0] - exact).norm() <= 2 * (theirs - exact).norm()


def check_at_coordinates(kernel, x, value):
    if kernel.startswith("masked"):
        pattern = listed(*x.shape, x.device)[0]
        x[pattern.rows.long(), pattern.cols.long()] *= 0.5
        assert torch.equal(value, x)
        return
    if kernel.startswith("lora"):
        left, right = x.chunk(2, dim=1)
        A, B = low_rank(right.shape[1], x.device)
        exact = left.double() + 0.5 * right.double() @ A.double().T @ B.double().T
        theirs = left + 0.5 * right @ A.to(x.dtype).T @ B.to(x.dtype).T
        assert (value - exact).norm() <= 2 * (theirs - exact).norm()
        return
    left, right, (pattern, _, deltas) = halves(x)
    if kernel.startswith("sampled"):
        index = pattern.rows.long(), pattern.cols.long()
        exact = (left.double().T @ right.double())[index]
        theirs = (left.T @ right)[index]
    else:
        exact = left.double() + right.double() @ deltas.double().T
        theirs = left + right @ deltas.to(right.dtype).T
    assert (value - exact).norm() <= 2 * (theirs - exact).norm()


@each_kernel
@each_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens_against_float64(kernel, device, dtype, tokens):
    x = normal(tokens, WIDTH, dtype=dtype, seed=tokens).to(device)
    check(kernel, x, outputs(kernel, x))


@each_kernel
@each_device
def test_twice_the_same_bits(kernel, device):
    x = normal(ROWS_TWICE, WIDTH, dtype=torch.float16, seed=1).round().to(device)  # many ties
    first, second = outputs(kernel, x), outputs(kernel, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(kernel, x, first)


@needs_gpu
@each_kernel
def test_on_a_stream_of_its_own(kernel):
    """The input comes late on a side stream: a launch on another stream would not wait for it."""
    late = normal(300, WIDTH, dtype=torch.float16, seed=2).cuda()
    x = torch.zeros_like(late)
    outputs(kernel, x)  # compiled before: compiling would wait for longer than the stream
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(1_000_000_000)  # cycles, about 0.5 s
        x.copy_(late)
        found = outputs(kernel, x)
    assert not side.query(), "the call waited for the device"
    side.synchronize()
    check(kernel, late, found)


@needs_two
@each_kernel
def test_on_a_second_device(kernel):
    """The current device is the first; the work belongs to the second."""
    x = normal(300, WIDTH, dtype=torch.float16, seed=3).to("cuda:1")
    with torch.cuda.device(0):
        found = outputs(kernel, x)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == x.device for tensor in found)
    check(kernel, x, found)


COLUMNS = 4096
ROWS = 2**31 // COLUMNS + 70  # the last rows lie beyond 2^31 elements


def need_bytes(wanted):
    free = torch.cuda.mem_get_info()[0]
    if free < 1.1 * wanted:
        pytest.skip(f"it needs {wanted / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")


@pytest.fixture
def emptied_cache():
    """Give the memory back: other processes test on the same GPU."""
    yield
    torch.cuda.empty_cache()


def mark(x):
    """Put the peaks into the last row, and something smaller at 2^31 elements before it."""
    x[-1] = torch.arange(1, COLUMNS + 1, device="cuda") / 4096
    x[ROWS - 2**31 // COLUMNS - 1] = 1 / 8192


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_column_absmax_beyond_2_to_the_31_elements(backend, emptied_cache):
    need_bytes(2 * ROWS * COLUMNS)
    x = torch.zeros(ROWS, COLUMNS, dtype=torch.float16, device="cuda")
    mark(x)
    values, tokens = ops.peaks(ops.column_absmax(x, backend=backend))
    assert torch.equal(values, x[-1].float())
    assert (tokens == ROWS - 1).all()


@needs_gpu
def test_glu_absmax_beyond_2_to_the_31_elements(emptied_cache):
    need_bytes(3 * 2 * ROWS * COLUMNS)
    gate = torch.ones(1, 1, dtype=torch.float16, device="cuda").expand(ROWS, COLUMNS).contiguous()
    up = torch.zeros(ROWS, COLUMNS, dtype=torch.float16, device="cuda")
    mark(up)
    h, keys = ops.glu_absmax(gate, up, "relu", backend="triton")  # relu(1) * up is up
    values, tokens = ops.peaks(keys)
    assert torch.equal(h[-1], up[-1]) and torch.equal(h[-3], up[-3])
    assert torch.equal(values, up[-1].float())
    assert (tokens == ROWS - 1).all()


@needs_gpu
@pytest.mark.parametrize("variant", ["pointers", "descriptors"])
def test_linear_absmax_beyond_2_to_the_31_elements(variant, emptied_cache):
    """The output passes 2^31 elements; then the input does."""
    if variant == "descriptors" and not linear._has_descriptors(torch.device("cuda", 0)):
        pytest.skip("this GPU has no tensor memory accelerator")
    need_bytes(2 * ROWS * COLUMNS + (1 << 30))
    options = {"descriptors": variant == "descriptors"}
    x = torch.zeros(ROWS, 16, dtype=torch.float16, device="cuda")
    weight = torch.ones(COLUMNS, 16, dtype=torch.float16, device="cuda")
    x[-1, 5] = 3.0
    keys = ops.empty_keys(COLUMNS, "cuda")
    y = linear.fused_linear_absmax(x, weight, None, None, keys, None, 0, **options)
    values, tokens = ops.peaks(keys)
    assert (y[-1] == 3).all() and not y[-2].any()
    assert (values == 3).all() and (tokens == ROWS - 1).all()
    del y

    x = torch.zeros(ROWS, COLUMNS, dtype=torch.float16, device="cuda")
    mark(x)
    weight = torch.zeros(16, COLUMNS, dtype=torch.float16, device="cuda")
    weight[:, -1] = 2.0
    in_keys, out_keys = ops.empty_keys(COLUMNS, "cuda"), ops.empty_keys(16, "cuda")
    y = linear.fused_linear_absmax(x, weight, None, in_keys, out_keys, None, 0, **options)
    values, tokens = ops.peaks(in_keys)
    assert torch.equal(values, x[-1].float()) and (tokens == ROWS - 1).all()
    assert (y[-1] == 2).all() and (ops.peaks(out_keys).tokens == ROWS - 1).all()


@needs_gpu
@pytest.mark.parametrize("block", [64, "row", "tensor"])
def test_a_packed_matrix_of_the_most_elements(block, emptied_cache):
    """Just below 2^31, which is its limit: the last row must be right."""
    rows = 2**31 // COLUMNS - 1
    need_bytes(5 * rows * COLUMNS)
    w = torch.zeros(rows, COLUMNS, dtype=torch.float16, device="cuda")
    w[-1] = normal(COLUMNS, seed=12)
    outliers = torch.tensor([[rows - 1, COLUMNS - 1]])
    q = ops.block_quantize(w, block_size=block, outliers=outliers, backend="triton")
    alone = ops.block_quantize(
        w[-1:], block_size=block, outliers=torch.tensor([[0, COLUMNS - 1]]), backend="triton"
    )
    assert torch.equal(q.dequantize()[-1:], alone.dequantize())
    x = torch.ones(1, COLUMNS, dtype=torch.float16, device="cuda")
    ours, theirs = ops.quant_linear(x, q)[0, -1], ops.quant_linear(x, alone)[0, 0]
    assert torch.equal(ours, theirs)


@needs_gpu
@pytest.mark.parametrize("dtype", (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2), ids=str)
def test_topk_abs(dtype):
    """Sampled, with many ties, transposed, and equal throughout: by guess and by exact bounds."""
    wide = normal(4500, 4500, dtype=dtype, seed=13).cuda()
    equal = torch.ones(4500, 4500, device="cuda").to(dtype)
    for tensors in ([wide], [wide[:, 3:], wide.t(), wide[:5]], [equal, wide, equal]):
        for k in (1, 1000, 300_000):
            first, second = (ops.topk_abs(tensors, k, backend="cuda") for _ in range(2))
            exact = ops.topk_abs(tensors, k, backend="reference")
            for ours, again, theirs in zip(first, second, exact, strict=True):
                assert torch.equal(ours, theirs) and torch.equal(ours, again)


@needs_gpu
def test_topk_abs_beyond_2_to_the_31_elements(emptied_cache):
    need_bytes(ROWS * COLUMNS)
    x = torch.zeros(ROWS, COLUMNS, dtype=torch.float8_e5m2, device="cuda")
    x[-1, -1], x[0, 0] = 3.0, -2.0
    for tensor, place in ((x, (ROWS - 1, COLUMNS - 1)), (x.t(), (COLUMNS - 1, ROWS - 1))):
        found = ops.topk_abs(tensor, 4, backend="cuda")
        assert found.values.tolist() == [3.0, -2.0, 0.0, 0.0]
        assert found.row.tolist() == [place[0], 0, 0, 0]
        assert found.column.tolist() == [place[1], 0, 1, 2]


def test_every_operation_has_a_kernel_here():
    """A new one is to be added to KERNELS."""
    named = {name.split("-")[0] for name in KERNELS}
    # They wait for the device by design, and have tests of their own or benchmarks.kernel_cases.
    assert named | {"topk_low_rank", "topk_abs"} == set(backends.OPERATIONS)
