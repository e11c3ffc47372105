from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.errors import BackendUnavailable, InvalidInput

from .backends_here import DEVICE, DTYPES, runnable
from .listed import Allocations, normal
from .packed import (
    BLOCKS,
    CODE_NAMES,
    CODES,
    SCALE_DTYPES,
    expected,
    heavy,
    interpreted,
    quantize,
    some_of,
    values_of,
)

codes = pytest.mark.parametrize("code, symmetric", CODES, ids=CODE_NAMES)
backends = pytest.mark.parametrize("backend", runnable("block_dequantize"))
TO = [*DTYPES, torch.float64]

# NumPy warns where Triton's interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def takes(backend, dtype):
    return backend == "reference" or dtype != torch.float64


@codes
@backends
def test_values_are_those_of_the_codes_rounded_once(backend, code, symmetric):
    apart = [0, 1, 36, 37, 300, 480]
    for block, scale_dtype in some_of(backend, zip(BLOCKS, itertools.cycle(SCALE_DTYPES)), 4):
        w = heavy(13, 37)
        places = torch.tensor([divmod(place, 37) for place in apart], device=DEVICE)
        q = quantize(w, code, symmetric, block, None, scale_dtype, outliers=places)
        packed = expected(w, code, symmetric, block, None, scale_dtype, apart)
        values = values_of(packed, w, code, symmetric, apart)
        for dtype in filter(lambda dtype: takes(backend, dtype), TO):
            back = ops.block_dequantize(q, dtype, backend=backend)
            assert back.dtype == dtype and back.is_contiguous()
            assert torch.equal(back, values.to(dtype))


@backends
@pytest.mark.parametrize("kept_as", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_outliers_come_back_exactly(backend, source, kept_as):
    w = heavy(7, 65, source)
    q = quantize(w, "nf4", True, 64, largest=20, outlier_dtype=kept_as)
    at = q.positions.long()
    for dtype in DTYPES:
        back = ops.block_dequantize(q, dtype, backend=backend).view(-1)
        exact = w.view(-1)[at].to(kept_as)
        assert torch.equal(back[at], exact.float().to(dtype))
    if source == kept_as:
        assert torch.equal(ops.block_dequantize(q, backend=backend).view(-1)[at], w.view(-1)[at])


@backends
def test_the_type_of_the_source_is_the_default(backend):
    for dtype in DTYPES:
        q = quantize(heavy(4, 16, dtype).view(2, 2, 16))
        back = ops.block_dequantize(q, backend=backend)
        assert back.dtype == dtype and back.shape == (2, 2, 16)
        assert torch.equal(back, q.dequantize())


@backends
def test_every_byte(backend):
    """Codes that quantization never writes, such as -8 and -128, have values too."""
    for code, symmetric in CODES:
        q = quantize(torch.ones(2, 256, device=DEVICE), code, symmetric, 64)
        every = torch.arange(256, dtype=torch.uint8, device=DEVICE)
        q = replace(q, codes=every.repeat(len(q.codes) // 256))
        ours = ops.block_dequantize(q, backend=backend)
        assert torch.equal(ours, ops.block_dequantize(q, backend="reference"))


@backends
def test_scales_that_are_very_large_small_or_zero(backend):
    q = quantize(torch.ones(8, 64, device=DEVICE), "int8", True, 64)
    scales = torch.tensor([0, 1e-45, 1e-40, 2.0**-126, 1, 1e30, 3e38, 2.0**127], device=DEVICE)
    q = replace(q, scales=scales)
    assert torch.equal(
        ops.block_dequantize(q, backend=backend), ops.block_dequantize(q, backend="reference")
    )


@backends
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_packed_matrix(backend, data):
    draw = data.draw
    most = 12 if interpreted(backend) else 70
    D, H = draw(st.integers(0, most)), draw(st.integers(0, most))
    block = draw(
        st.one_of(
            st.integers(1, 200),
            st.tuples(st.integers(1, 40), st.integers(1, 40)),
            st.sampled_from(["row", "channel", "tensor"]),
        )
    )
    code, symmetric = draw(st.sampled_from(CODES))
    w = heavy(D, H, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    count, scale_dtype = draw(st.integers(0, 16)), draw(st.sampled_from(SCALE_DTYPES))
    q = quantize(w, code, symmetric, block, None, scale_dtype, largest=count, backend="reference")
    dtype = draw(st.sampled_from(DTYPES))
    exact = ops.block_dequantize(q, torch.float32, backend="reference")
    ours = ops.block_dequantize(q, dtype, backend=backend)
    assert torch.equal(ours, exact.to(dtype))
    assert torch.equal(ours.view(-1)[q.positions.long()], q.values.to(dtype))


@backends
def test_one_pass_and_nothing_left_unwritten(backend):
    q = quantize(heavy(64, 130), "int4", False, (8, 8), largest=9)
    with Allocations() as made:
        first = ops.block_dequantize(q, torch.float32, backend=backend)
    if backend == "cpu":
        assert sum(made.sizes) == 64 * 130  # the result, and nothing else
    assert torch.equal(first, ops.block_dequantize(q, torch.float32, backend=backend))


def test_opcheck_and_compile():
    from swkernels.ops.block_dequantize import as_arguments

    op = torch.ops.swkernels.block_dequantize.default
    for (code, symmetric), backend in zip(CODES[:4:3], (None, "reference")):
        q = quantize(heavy(5, 18), code, symmetric, 7, None, "float16", largest=2)
        held = q.codes, q.scales, q.zero_points, q.positions, q.values
        torch.library.opcheck(op, (*held, *as_arguments(q.plan), torch.bfloat16, backend))
    nested = quantize(heavy(5, 18), "int4", False, 7, None, "int8", largest=2)
    compiled = torch.compile(lambda: nested.dequantize() * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), nested.dequantize() * 2)


def test_bad_arguments():
    q = quantize(normal(2, 8))
    for bad in (q.codes, None, {"codes": q.codes}):
        with pytest.raises(InvalidInput, match="expected a QuantizedTensor of block_quantize, got"):
            ops.block_dequantize(bad)
    for dtype in (torch.int8, torch.bool, "float32", torch.complex64):
        with pytest.raises(InvalidInput, match="dtype must be float32, bfloat16, float16 or"):
            ops.block_dequantize(q, dtype)
    with pytest.raises(BackendUnavailable, match="cuda"):
        ops.block_dequantize(q, backend="cuda")
