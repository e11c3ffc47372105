"""NF4 and FP4 against bitsandbytes itself: the same bytes, and the few places where it differs.

What it does is what it does on a CPU. Where it takes other values than its own definition, the
test says which, so that a version that mends it is noticed.
"""

from __future__ import annotations

import bitsandbytes.functional as theirs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops

from .backends_here import DEVICE, DTYPES, runnable
from .listed import normal

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODES = ("nf4", "fp4")
TABLES = {code: theirs.get_4bit_type(code, device="cpu") for code in CODES}
MIDDLES = {code: (t.sort().values[1:] + t.sort().values[:-1]) / 2 for code, t in TABLES.items()}

backends = pytest.mark.parametrize("backend", runnable("block_quantize"))
codes = pytest.mark.parametrize("code", CODES)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles how it dequantizes blocks of 2048 and more: seconds for each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def both(w, code, block_size, backend=None):
    """Codes, one an element, and scales: theirs and ours."""
    packed, state = theirs.quantize_4bit(w.cpu(), blocksize=block_size, quant_type=code)
    q = ops.block_quantize(w.to(DEVICE), code=code, block_size=block_size, backend=backend)
    count = w.numel()
    return (unpacked(packed, count), state.absmax), (unpacked(q.codes, count), q.scales.cpu())


def unpacked(packed, count):
    flat = packed.view(-1).cpu()
    return torch.stack([flat >> 4, flat & 15], 1).view(-1)[:count]


def assert_same(w, code, block_size, backend=None):
    (their_codes, their_scales), (our_codes, our_scales) = both(w, code, block_size, backend)
    assert torch.equal(our_scales, their_scales)
    assert torch.equal(our_codes, their_codes)


def interpreted(backend) -> bool:
    """Whether the kernels run in Triton's interpreter, which is slow."""
    return backend == "triton" and DEVICE == "cpu"


def near_middles(code, dtype, scale) -> torch.Tensor:
    """A row whose largest magnitude is ``scale``: around the middle of each two codes, every
    value of the type within a few steps, where rounding decides."""
    edges = (MIDDLES[code].double() * scale).to(dtype)
    found = [torch.tensor([scale], dtype=dtype), edges]
    for direction in (torch.inf, -torch.inf):
        value = edges
        for _ in range(4):
            value = torch.nextafter(value, torch.full_like(value, direction))
            found.append(value)
    return torch.cat(found)


@codes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_where_rounding_decides(backend, dtype, code):
    for scale in (1.0, 0.6875, 3.140625, 0.0146484375, 1.0013580322265625):
        scale = float(torch.tensor(scale, dtype=dtype))
        row = near_middles(code, dtype, scale)
        w = torch.zeros(256, dtype=dtype)
        w[: len(row)] = row
        assert_same(w.view(1, 256), code, 256, backend)


@codes
@settings(max_examples=60, deadline=None)
@given(
    block_size=st.sampled_from(BLOCK_SIZES),
    rows=st.integers(1, 8),
    parts=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_any_matrix_of_whole_blocks(code, block_size, rows, parts, dtype, spread, seed):
    """Rows may end inside of a block."""
    w = normal(rows * parts * block_size, seed=seed) ** 3 * spread
    w = w.to(dtype).view(rows if parts * block_size % rows else parts, -1)
    if torch.isfinite(w).all():
        assert_same(w, code, block_size)


@codes
@backends
def test_the_weights_of_a_real_model(backend, code, smollm2):
    model, _ = smollm2
    every, rows = (30, 4) if interpreted(backend) else (6, None)
    for layer in model.model.layers[::every]:
        w = layer.mlp.down_proj.weight.detach()[:rows]
        for dtype, block_size in ((torch.float32, 64), (torch.bfloat16, 512)):
            assert_same(w.to(dtype), code, block_size, backend)


# The way back.


@codes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", runnable("block_dequantize"))
def test_dequantized(backend, dtype, code):
    for block_size in (64, 4096) if interpreted(backend) else BLOCK_SIZES:
        w = normal(1 if interpreted(backend) else 2, 4096, seed=block_size).to("cpu", dtype)
        packed, state = theirs.quantize_4bit(w, blocksize=block_size, quant_type=code)
        q = ops.block_quantize(w.to(DEVICE), code=code, block_size=block_size)
        definition = TABLES[code][unpacked(packed, w.numel()).long()].view(-1, block_size)
        definition = (definition * state.absmax[:, None]).view(w.shape)
        for wanted in (dtype, torch.float32):
            ours = ops.block_dequantize(q, wanted, backend=backend).cpu()
            assert torch.equal(ours, definition.to(wanted))
            state.dtype = wanted
            assert torch.equal(ours, theirs.dequantize_4bit(packed, state))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="a kernel for AVX-512 only"
)
def test_their_kernel_for_avx512_takes_wrong_scales_where_rows_end_inside_a_block():
    w = normal(8, 96).cpu()
    packed, state = theirs.quantize_4bit(w, blocksize=64, quant_type="nf4")
    q = ops.block_quantize(w.to(DEVICE), code="nf4", block_size=64)
    error = (q.dequantize().cpu() - w).abs().max()
    assert (theirs.dequantize_4bit(packed, state) - w).abs().max() > 4 * error


# Where bitsandbytes differs.


@codes
def test_a_last_block_that_is_shorter(code):
    """bitsandbytes divides there; everywhere else it multiplies by the reciprocal, as we do."""
    for columns in (1, 33, 65, 100):
        assert_same(normal(1, columns), code, 64)
        assert_same(normal(3, columns).bfloat16(), code, 128)
    scale, differing = decided_by_the_way(code)
    for value in differing[:20].tolist():
        short = torch.zeros(1, 70)
        short[0, 64:66] = torch.tensor([scale, value])
        (divided, _), (ours, _) = both(short, code, 64)
        whole = torch.zeros(1, 128)
        whole[0, :70] = short
        (multiplied, _), _ = both(whole, code, 64)
        assert int(ours[65]) == int(multiplied[65]) != int(divided[65])


def decided_by_the_way(code) -> tuple[float, torch.Tensor]:
    """A scale, and values whose code it decides whether they are divided by it or multiplied."""
    for scale in torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.5:
        values = near_middles(code, torch.float32, float(scale))
        sides = [torch.bucketize(r, MIDDLES[code]) for r in (values / scale, values * (1 / scale))]
        if (sides[0] != sides[1]).any():
            return float(scale), values[sides[0] != sides[1]]
    raise AssertionError("no scale decides")


@codes
def test_a_last_block_of_zeros(code):
    """Its scale is 1e-38 in bitsandbytes and 0 here; the codes are the same, and all values 0."""
    (their_codes, their_scales), (our_codes, our_scales) = both(torch.zeros(1, 96), code, 64)
    assert torch.equal(their_codes, our_codes)
    assert their_scales.tolist() == torch.tensor([0.0, 1e-38]).tolist()
    assert our_scales.tolist() == [0.0, 0.0]


@codes
def test_the_half_byte_behind_an_odd_number_of_codes(code):
    """Never read: the code of 0 in bitsandbytes, 0 here."""
    w = normal(3, 11).cpu()
    packed, _ = theirs.quantize_4bit(w, blocksize=64, quant_type=code)
    q = ops.block_quantize(w.to(DEVICE), code=code, block_size=64)
    assert int(packed.view(-1)[-1]) & 15 == TABLES[code].tolist().index(0.0)
    assert int(q.codes[-1]) & 15 == 0


@codes
@backends
@pytest.mark.parametrize("scale", [2.0**-126, 1e-38, 2.0**-128, 2.0**-140])
def test_ranges_below_the_smallest_normal_number(scale, code, backend):
    """bitsandbytes divides by 1e-38 at least, and loses what is smaller; here codes are nearest."""
    w = torch.linspace(-1, 1, 64)[None] * scale
    (their_codes, their_scales), (our_codes, our_scales) = both(w, code, 64, backend)
    assert torch.equal(their_scales, our_scales)
    table = TABLES[code].double()
    distance = (w.double()[0, :, None] - table * our_scales.double()).abs()
    assert torch.equal(distance.gather(1, our_codes.long()[:, None])[:, 0], distance.amin(1))
    assert torch.equal(their_codes, our_codes) == (scale >= 1e-38)
