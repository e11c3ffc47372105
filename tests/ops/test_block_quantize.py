from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.backends.plan import FP4, NF4
from swkernels.errors import BackendUnavailable, InvalidInput

from . import quant_oracle as oracle
from .backends_here import DEVICE, DTYPES, runnable
from .listed import normal
from .packed import (
    BLOCKS,
    CLIPS,
    CODE_NAMES,
    CODES,
    SCALE_DTYPES,
    assert_packed,
    assert_same,
    expected,
    heavy,
    interpreted,
    quantize,
    some_of,
    values_of,
)  # fmt: skip

BACKENDS = runnable("block_quantize")
REFERENCE = "reference"
codes = pytest.mark.parametrize("code, symmetric", CODES, ids=CODE_NAMES)
backends = pytest.mark.parametrize("backend", BACKENDS)

# NumPy warns where Triton's interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


# Against the oracle: the reference in every combination, the other backends in fewer.


@codes
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_definition_is_the_oracles(code, symmetric, block):
    w, apart = heavy(13, 37), [0, 241, 480]
    outliers = torch.tensor([divmod(place, 37) for place in apart], device=DEVICE)
    for clip, scale_dtype in itertools.product(CLIPS, SCALE_DTYPES):
        if clip and (scale_dtype == "int8" or block == 1):
            continue  # the clip is over before scales are quantized; one element has no outliers
        arguments = code, symmetric, block, clip, scale_dtype
        q = quantize(w, *arguments, outliers=outliers, backend=REFERENCE)
        wanted = expected(w, *arguments, apart)
        assert_packed(q, wanted, code)
        assert torch.equal(q.dequantize(), values_of(wanted, w, code, symmetric, apart))


@codes
@backends
def test_codes_scales_and_packing(backend, code, symmetric):
    for dtype, block in some_of(backend, zip(itertools.cycle(DTYPES), BLOCKS), 4):
        w = heavy(13, 37, dtype)
        q = quantize(w, code, symmetric, block, backend=backend)
        assert_packed(q, expected(w, code, symmetric, block), code)
        assert q.dtype == dtype and q.shape == (13, 37) and len(q.positions) == 0


@backends
@pytest.mark.parametrize("clip", CLIPS[1:], ids=str)
def test_clips(backend, clip):
    blocks = (64, 7, (8, 16), "row", "channel", "tensor")
    cases = zip(CODES, blocks, itertools.cycle(SCALE_DTYPES[:2]))
    for (code, symmetric), block, dtype in some_of(backend, cases, 3):
        w = heavy(13, 37)
        q = quantize(w, code, symmetric, block, clip, dtype, backend=backend)
        assert_packed(q, expected(w, code, symmetric, block, clip, dtype), code)


@backends
def test_scales_that_are_quantized_themselves(backend):
    rows = 8 if interpreted(backend) else 60
    w = heavy(rows, 70) * torch.linspace(0.1, 3, rows, device=DEVICE)[:, None]
    for (code, symmetric), block in some_of(backend, itertools.product(CODES, (7, 64, (4, 4))), 4):
        q = quantize(w, code, symmetric, block, None, "int8", backend=backend)
        assert_packed(q, expected(w, code, symmetric, block, None, "int8"), code)
        inner = q.scales
        assert inner.plan.code.name == "int8" and not inner.plan.code.symmetric
        assert inner.codes.numel() == q.plan.blocks  # a byte a block


@backends
@pytest.mark.parametrize("by", ["zscore", "zscore_signed"])
@pytest.mark.parametrize("z", [0.5, 2.0, 3.0])
def test_zscore_bounds_are_mean_and_standard_deviation(backend, by, z):
    """By NumPy on the side: nothing but the integer units' 16 bits between them."""
    w = heavy(40, 64)
    q = quantize(w, "int8", True, 256, (by, z), backend=backend)
    for block, scale in zip(w.double().cpu().numpy().reshape(-1, 256), q.scales.tolist()):
        counted = np.abs(block) if by == "zscore" else block
        mean, reach = counted.mean(), z * counted.std(ddof=1)
        if by == "zscore":
            bound = min(mean + reach, np.abs(block).max())
        else:
            bound = max(min(mean + reach, block.max()), min(reach - mean, -block.min()))
        assert abs(scale * 127 - bound) <= 2.0**-15 * np.abs(block).max()


@backends
def test_search_finds_the_least_error(backend):
    w = heavy(4, 32)
    for code, symmetric in some_of(backend, CODES, 6):
        found = quantize(w, code, symmetric, "tensor", ("search", 0.3), backend=backend)
        error = (found.dequantize() - w).square().sum()
        for factor in torch.arange(0.3, 1.0001, 0.025).tolist():
            cut = w.clamp(float(w.min()) * factor, float(w.max()) * factor)
            other = quantize(cut, code, symmetric, "tensor", backend=backend)
            assert error <= (other.dequantize() - w).square().sum() * (1 + 1e-4)


# Any matrix: equal to the reference, which is equal to the oracle.


def matrix(kind, D, H, dtype, seed):
    w = normal(D, H, seed=seed)
    if kind == "heavy":
        w = w**3
        w.view(-1)[::50] *= 100
    if kind == "halves":  # on and between the codes
        w = (w * 8).round() / 2
    if kind == "table":  # values of NF4 and FP4, and the middles between them
        table = torch.tensor(sorted(NF4 + FP4), device=DEVICE)
        table = torch.cat([table, (table[1:] + table[:-1]) / 2])
        w = table[(w.abs() * 1000).long() % len(table)]
    if kind == "zeros":
        w = torch.where(w > 0, 0.0, -0.0)
    if kind == "constant":
        w = torch.full_like(w, float(w.view(-1)[0]) if w.numel() else 0.0)
    if kind == "positive":
        w = w.abs() * 0.01 + 5
    if kind == "denormal":
        w = w * {torch.float32: 1e-40, torch.bfloat16: 1e-39, torch.float16: 1e-6}[dtype]
    if kind == "huge":
        most = torch.finfo(dtype).max
        w = (w * most / 8).clamp(-most / 2.1, most / 2.1)
    return w.to(dtype)


KINDS = ["heavy", "halves", "table", "zeros", "constant", "positive", "denormal", "huge"]
EVERY_CLIP = st.one_of(
    st.none(),
    st.tuples(st.sampled_from(["zscore", "zscore_signed"]), st.sampled_from([0, 0.7, 3.0])),
    st.tuples(st.just("percentile"), st.integers(1, 200).map(lambda half: half / 2)),
    st.tuples(st.just("count"), st.integers(0, 30)),
    st.tuples(st.just("search"), st.sampled_from([0.9, 0.5])),
)
EVERY_BLOCK = st.one_of(
    st.integers(1, 200),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(["row", "channel", "tensor"]),
)


@backends
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_matrix(backend, data):
    draw = data.draw
    most = 24 if backend == REFERENCE else 8 if interpreted(backend) else 70
    D, H = draw(st.integers(0, most)), draw(st.integers(0, most))
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    w = matrix(kind, D, H, dtype, draw(st.integers(0, 9)))
    code, symmetric = draw(st.sampled_from(CODES))
    scale_dtypes = SCALE_DTYPES[::2] if kind == "huge" else SCALE_DTYPES
    arguments = (
        code, symmetric, draw(EVERY_BLOCK), draw(EVERY_CLIP), draw(st.sampled_from(scale_dtypes))
    )  # fmt: skip
    limit = max(D * H // 16, D, 16)
    apart = draw(st.sets(st.integers(0, D * H - 1), max_size=min(limit, 20))) if D * H else set()
    apart = sorted(apart)
    outliers = torch.tensor([divmod(p, max(H, 1)) for p in apart], device=DEVICE).view(-1, 2).long()
    given_ = w.T.contiguous().T if draw(st.booleans()) else w
    q = quantize(given_, *arguments, outliers=outliers, backend=backend)
    assert q.positions.tolist() == apart
    assert torch.equal(q.values, w.view(-1)[apart]) and q.values.dtype == dtype
    if backend == REFERENCE:
        wanted = expected(w, *arguments, apart)
        assert_packed(q, wanted, code)
    else:
        assert_same(q, quantize(w, *arguments, outliers=outliers, backend=REFERENCE))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] != REFERENCE])
def test_larger_matrices_equal_the_reference(backend):
    """More than one task, thread or program has to do with a block."""
    D, H = (24, 130) if interpreted(backend) else (300, 1001)
    w = heavy(D, H)
    cases = [(16_384, clip) for clip in (None, *CLIPS[1::3])] + [("tensor", clip) for clip in CLIPS]
    cases += [("channel", None), ((64, 64), ("zscore", 3.0)), (32, ("percentile", 99.5))]
    for (block, clip), (code, symmetric) in some_of(backend, zip(cases, itertools.cycle(CODES)), 4):
        given_ = dict(code=code, symmetric=symmetric, block=block, clip=clip, largest=5)
        ours = quantize(w, **given_, backend=backend)
        assert_same(ours, quantize(w, **given_, backend=REFERENCE))


# What the published form promises.


@codes
@backends
def test_preserved_weights_are_exact_and_clipping_bounds_only_the_others(backend, code, symmetric):
    w = heavy(8, 64)
    w[3, 5], w[7, 60] = 30.0, -40.0
    outliers = torch.tensor([[7, 60], [3, 5]], device=DEVICE)
    for block, z in some_of(backend, itertools.product((128, (4, 32), "tensor"), (1.0, 3.0)), 4):
        q = quantize(w, code, symmetric, block, ("zscore", z), outliers=outliers, backend=backend)
        assert q.positions.tolist() == [3 * 64 + 5, 7 * 64 + 60]
        back = ops.block_dequantize(q, backend=backend)
        assert back[3, 5] == 30.0 and back[7, 60] == -40.0
        rest = w.clone()
        rest[3, 5] = rest[7, 60] = 0
        back[3, 5] = back[7, 60] = 0
        scales = q.scales.max()
        for index in oracle.blocks_of((8, 64), block):
            values = rest.view(-1)[index].double().cpu().numpy()
            kept = [i for i, place in enumerate(index) if place not in q.positions.tolist()]
            magnitudes = np.abs(values[kept])
            bound = magnitudes.mean() + z * magnitudes.std(ddof=1)
            slack = 2.0**-14 * magnitudes.max() + (0 if symmetric else float(scales))
            assert back.view(-1)[index].abs().max() <= bound + slack


@codes
@backends
def test_error_is_at_most_half_a_step(backend, code, symmetric):
    w = normal(16, 96) * 0.1
    for block in some_of(backend, ("row", 7, (8, 16), 32, "tensor"), 4):
        q = quantize(w, code, symmetric, block, backend=backend)
        back, wide = q.dequantize().double().view(-1), w.double().view(-1)
        for i, index in enumerate(oracle.blocks_of((16, 96), block)):
            scale, error = float(q.scales[i]), (back[index] - wide[index]).abs()
            table = oracle.table_of(code)
            if table:  # the nearest value of the table
                values = torch.tensor(table, device=DEVICE).double() * scale
                nearest = (wide[index, None] - values).abs().amin(1)
                assert (error <= nearest + 1e-6 * scale).all()
            elif symmetric:
                assert error.max() <= scale * (0.5 + 1e-5)
            else:
                low = -int(q.zero_points[i]) * scale
                high = low + oracle.steps_of(code, False) * scale
                inside = (wide[index] >= low) & (wide[index] <= high)
                assert error[inside].max() <= scale * (0.5 + 1e-5)
                assert error.max() <= scale * (1 + 1e-5)


# Special values.


@codes
@backends
@pytest.mark.parametrize("value", [5.0, -0.3, 0.0, -0.0, 1e-40, -1e-45, 3e38, -3e38, 2.0**-126])
def test_constant_blocks_come_back(backend, code, symmetric, value):
    w = torch.full((3, 50), value, device=DEVICE)
    cases = (64, None), (7, ("percentile", 50)), ("tensor", ("count", 3)), (1, None)
    for block, clip in some_of(backend, cases, 4):
        back = quantize(w, code, symmetric, block, clip, backend=backend).dequantize()
        # A third of float32's last place is lost between the step and its 7- or 127-fold.
        steps = oracle.steps_of(code, symmetric) if symmetric else 1
        atol = abs(value) * 2.0**-23 + (steps > 1) * steps * 2.0**-149
        assert (back.double() - w.double()).abs().max() <= atol
        if steps == 1 or value == 0:
            assert torch.equal(back, w)


@codes
@backends
def test_values_on_codes_stay_there_and_ties_are_decided(backend, code, symmetric):
    steps, table = oracle.steps_of(code, symmetric), oracle.table_of(code)
    if table:
        ordered = torch.tensor(sorted(table), device=DEVICE)
        values = ordered.repeat(3)
        middles = torch.cat([(ordered[1:] + ordered[:-1]) / 2, ordered[-1:]])
        lower = ordered.clone()
    else:
        first = -steps if symmetric else 0
        whole = torch.arange(first, first + (2 * steps if symmetric else steps) + 1.0)
        values = whole.to(DEVICE)
        middles = torch.cat([values[:-1] + 0.5, values[:1], values[-1:]])
        lower = torch.cat([middles[:-2].round(), middles[-2:]])
    for power in some_of(backend, (1.0, 2.0**-20, 2.0**30), 2):
        w = (values * power)[None]
        q = quantize(w, code, symmetric, "row", backend=backend)
        assert torch.equal(q.dequantize(), w) and q.scales.item() == power
        between = quantize((middles * power)[None], code, symmetric, "row", backend=backend)
        assert torch.equal(between.dequantize(), (lower * power)[None])


@backends
def test_a_block_of_zeros_beside_others(backend):
    w = heavy(6, 64)
    w[2] = 0
    w[4, ::2] = -0.0
    w[4, 1::2] = 0.0
    for (code, symmetric), dtype in some_of(backend, itertools.product(CODES, SCALE_DTYPES[:2]), 3):
        q = quantize(w, code, symmetric, "row", None, dtype, backend=backend)
        assert q.scales[2] == 0 and q.scales[4] == 0 and (q.scales > 0).sum() == 4
        back = q.dequantize()
        assert (back[[2, 4]] == 0).all() and (back[[0, 1, 3, 5]] != 0).any(1).all()


@backends
def test_no_scale_of_float16_rounds_to_zero(backend):
    w = torch.tensor([[1e-9, -1e-9], [2e-7, 4e-7], [0.0, 0.0]], device=DEVICE)
    for code, symmetric in CODES:
        q = quantize(w, code, symmetric, "row", None, "float16", backend=backend)
        assert q.scales.dtype == torch.float16 and (q.scales > 0).tolist() == [True, True, False]


@backends
def test_zero_points_fit_the_scales_that_are_stored(backend):
    """Blocks far from zero, whose scales have few bits: nothing of the range is lost."""
    generator = torch.Generator().manual_seed(0)
    w = (1 + 0.003 * torch.rand(20, 64, generator=generator)).to(DEVICE)
    for scale_dtype, most in (("float32", 0.5), ("float16", 1.0), ("int8", 1.0)):
        q = quantize(w, "int4", False, "row", None, scale_dtype, backend=backend)
        steps = q.block_scales().float()[:, None]
        assert ((q.dequantize() - w).abs() / steps).max() <= most + 0.01
    w[5] *= 100  # the other scales share what one of them makes coarse
    q = quantize(w, "int4", False, "row", None, "int8", backend=backend)
    span = 15 * q.block_scales()[:, None]
    lost = (w.amax(1) - w.amin(1) - span[:, 0]).clamp(min=0)[:, None]
    assert ((q.dequantize() - w).abs() <= lost + span / 15 * 1.01).all()


# Outliers.


@backends
def test_the_largest_are_kept(backend):
    w = heavy(13, 37)
    w[4, 4] = w[4, 5] = -w[6, 6]  # of equal ones the first
    tensor = [np.arange(13 * 37)]
    for block, n in some_of(backend, itertools.product((100, (6, 20), "tensor"), (0, 1, 3)), 4):
        blocks = oracle.blocks_of((13, 37), block)
        for per, found_in in (("tensor", tensor), ("block", blocks)):
            q = quantize(w, block=block, largest=n, largest_per=per, backend=backend)
            wanted = sorted(oracle.largest(w.cpu().numpy(), n, found_in))
            assert q.positions.tolist() == wanted
            assert torch.equal(q.values, w.view(-1)[wanted])
    listed = torch.tensor([[12, 36], [6, 18]], dtype=torch.int32, device=DEVICE)
    q = quantize(w, outliers=listed, largest=2, backend=backend)
    wanted = oracle.largest(w.cpu().numpy(), 2, tensor) | {480, 240}
    assert q.positions.tolist() == sorted(wanted) and q.positions.dtype == torch.int32


@backends
def test_ties_of_the_largest(backend):
    w = torch.ones(4, 8, device=DEVICE)
    w[1, 3] = -1
    for per, wanted in (("tensor", [0, 1]), ("block", [0, 1, 8, 9, 16, 17, 24, 25])):
        q = quantize(w, block="row", largest=2, largest_per=per, backend=backend)
        assert q.positions.tolist() == wanted


@backends
@pytest.mark.parametrize("outlier_dtype", DTYPES, ids=str)
def test_outlier_types(backend, outlier_dtype):
    w = heavy(8, 64)
    q = quantize(w, outliers=torch.tensor([[1, 2]]), outlier_dtype=outlier_dtype, backend=backend)
    assert q.values.dtype == outlier_dtype and q.values[0] == w[1, 2].to(outlier_dtype)
    assert q.dequantize()[1, 2] == w[1, 2].to(outlier_dtype).float()


@backends
def test_what_is_kept_has_no_part_in_its_block(backend):
    """Codes and scales are those of a matrix without it, but for the code of 0 in its place."""
    w = heavy(8, 64)
    for code, symmetric in some_of(backend, CODES, 4):
        few = []
        for value in (1000.0, 0.0, -7.0):
            w[2, 9] = value
            q = quantize(w, code, symmetric, outliers=torch.tensor([[2, 9]]), backend=backend)
            few.append(q)
        for q in few[1:]:
            assert torch.equal(q.codes, few[0].codes) and torch.equal(q.scales, few[0].scales)


@codes
@backends
def test_blocks_of_outliers_alone(backend, code, symmetric):
    w = heavy(4, 16)
    places = torch.tensor([[0, column] for column in range(8)], device=DEVICE)
    q = quantize(w, code, symmetric, 4, outliers=places, backend=backend)
    assert (q.scales[:2] == 0).all() and torch.equal(q.dequantize()[0, :8], w[0, :8])


# Arguments.


@backends
@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (0,), (7,), (1, 1), (2, 3, 4), (2, 0, 3)], ids=str
)
def test_shapes(backend, shape):
    w = normal(*shape)
    cases = itertools.product(CODES, (5, (2, 2), "row", "channel"))
    for (code, symmetric), block in some_of(backend, cases, 5):
        for scale_dtype in some_of(backend, SCALE_DTYPES, 2):
            q = quantize(w, code, symmetric, block, None, scale_dtype, backend=backend)
            rows = w.reshape(-1, shape[-1]) if w.numel() else w.new_empty(0, 1)
            assert_packed(q, expected(rows, code, symmetric, block, None, scale_dtype), code)
            back = ops.block_dequantize(q, backend=backend)
            assert back.shape == shape and back.dtype == torch.float32


@backends
def test_any_strides_and_no_gradient(backend):
    w = heavy(26, 74)
    for view in (w[:, ::2], w[::2], w[:, 3:], w.T, w[:1].expand(9, -1), w.view(2, 13, 74)[:, 1:]):
        flat = view.contiguous()
        assert_same(quantize(view, backend=backend), quantize(flat, backend=backend))
    weight = torch.nn.Parameter(w)
    q = quantize(weight, backend=backend)
    assert not any(tensor.requires_grad for tensor in q.tensors().values())
    assert torch.equal(weight, heavy(26, 74))


@backends
def test_twice_the_same(backend):
    w = heavy(12 if interpreted(backend) else 40, 100)
    for (code, symmetric), clip in some_of(backend, zip(CODES, CLIPS), 3):
        first, second = (
            quantize(w, code, symmetric, "tensor", clip, largest=9, backend=backend) for _ in "12"
        )
        assert_same(first, second)


def test_tensors_there_and_back():
    q = quantize(heavy(20, 64), "int4", False, 8, None, "int8", largest=3)
    tensors = q.tensors()
    assert "scales_zero_points" in tensors
    assert_same(q.with_tensors(tensors), q)
    assert_same(q.to(DEVICE), q)
    assert q.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert q.nbytes < 20 * 64 * 4 / 4


NAN, INF = float("nan"), float("inf")


@codes
@backends
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_refused_and_found(backend, code, symmetric, value):
    for clip, scale_dtype in some_of(backend, itertools.product(CLIPS, SCALE_DTYPES), 6):
        w = heavy(5, 30)
        w[3, 7] = value
        with pytest.raises(InvalidInput, match=r"(nan|inf) at \[3, 7\]: only finite") as error:
            quantize(w, code, symmetric, 50, clip, scale_dtype, backend=backend)
        assert "\n" not in str(error.value)
    for places in ([[3, 7]], [[3, 7], [0, 0]]):
        with pytest.raises(InvalidInput, match=r"at \[3, 7\]"):
            quantize(w, code, symmetric, outliers=torch.tensor(places), backend=backend)


@pytest.mark.parametrize("block", [0, -1, 2.5, True, "blocks", (0, 4), (4, -4), (4,) * 3, None, ()])
def test_bad_blocks(block):
    with pytest.raises(InvalidInput, match="block_size must be a positive integer.*, got") as error:
        quantize(heavy(4, 16), block=block)
    assert "\n" not in str(error.value)


MANY = torch.stack([torch.arange(17), torch.zeros(17, dtype=torch.int64)], 1)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(outliers=torch.tensor([[0, 16]])), r"\[0, 16\] lies outside the matrix \[4, 16\]"),
        (dict(outliers=torch.tensor([[1, 1], [-1, 0]])), r"\[-1, 0\] lies outside"),
        (dict(outliers=torch.tensor([[0, 2**32]])), r"lies outside"),
        (dict(outliers=torch.tensor([[1, 2], [0, 0], [1, 2]])), r"\[1, 2\] is listed more than"),
        (dict(outliers=torch.tensor([[1.0, 2.0]])), "int32 or int64 .*got torch.float32"),
        (dict(outliers=torch.tensor([[True, False]])), "int32 or int64 .*got torch.bool"),
        (dict(outliers=torch.tensor([1, 2])), r"\[k, 2\].*got \[2\]"),
        (dict(outliers=torch.tensor([[1, 2, 3]])), r"\[k, 2\].*got \[1, 3\]"),
        (dict(outliers=[[1, 2]]), "int32 or int64 .*got list"),
        (dict(largest=17), "17 outliers of 64 elements are more than one in 16"),
        (dict(largest=1, largest_per="block", block=1), "64 outliers of 64"),
        (dict(w=heavy(17, 1), outliers=MANY, largest=1), "18 outliers of 17 elements"),
        (dict(largest=-1), "largest must be an integer from 0, got -1"),
        (dict(largest=1.0), "largest must be an integer from 0"),
        (dict(largest_per="row"), "'tensor' or 'block', got 'row'"),
        (dict(outlier_dtype=torch.int8), "outlier_dtype must be .*, got torch.int8"),
        (
            dict(w=heavy(4, 16) + 1e5, largest=1, outlier_dtype=torch.float16),
            "an outlier is beyond torch.float16: use",
        ),
        (dict(code="int3"), "unknown code 'int3': expected one of int4, int8, nf4, fp4"),
        (dict(code=None), "unknown code None"),
        (dict(code="nf4", symmetric=False), "nf4 is symmetric"),
        (dict(scale_dtype="bfloat16"), "unknown scale_dtype 'bfloat16': expected one of"),
        (dict(w=heavy(4, 16) + 1e6, scale_dtype="float16"), "use scale_dtype='float32'"),
        (
            dict(w=torch.tensor([[3e38, -3e38]]), symmetric=False),
            "range of a block is beyond its scale's type: divide the matrix by a constant$",
        ),
        (dict(w=heavy(4, 16).double()), "w must be float32, bfloat16 or .*got torch.float64"),
        (dict(w=torch.zeros(4, 16, dtype=torch.int8)), "got torch.int8"),
        (dict(w=[1.0]), "w must be a tensor, got list"),
        (dict(w=torch.tensor(1.0)), "got a scalar"),
        (dict(w=torch.zeros(4, 16, device="meta")), "meta device"),
        (dict(w=torch.zeros(1).expand(2**16, 2**15)), r"at most 2\^31 - 1 elements, got"),
    ],
)
def test_bad_arguments(changes, says):
    given_ = dict(w=heavy(4, 16)) | changes
    w = given_["w"]
    before = w.clone() if isinstance(w, torch.Tensor) and w.numel() < 100 else None
    with pytest.raises(InvalidInput, match=says) as error:
        quantize(**given_)
    assert "\n" not in str(error.value)
    assert before is None or w.is_meta or torch.equal(w, before)


@pytest.mark.parametrize(
    "by, value, says",
    [
        ("sigma", 3, "unknown clip 'sigma': expected one of zscore"),
        ("zscore", -1, "at least 0, got -1"),
        ("zscore", NAN, "at least 0, got nan"),
        ("zscore", INF, "got inf"),
        ("zscore", "3", "must be a number, got '3'"),
        ("zscore", True, "must be a number, got True"),
        ("percentile", 0, "above 0 and at most 100"),
        ("percentile", 100.5, "above 0 and at most 100"),
        ("count", 1.5, "an integer from 0"),
        ("count", -1, "an integer from 0"),
        ("count", 2**31, r"to 2\^31 - 1"),
        ("search", 0, "above 0 and at most 1"),
        ("search", 1.5, "above 0 and at most 1"),
    ],
)
def test_bad_clips(by, value, says):
    with pytest.raises(InvalidInput, match=says) as error:
        ops.Clip(by, value)
    assert "\n" not in str(error.value)


def test_a_clip_is_a_clip():
    with pytest.raises(InvalidInput, match="clip must be None or a Clip, got 3"):
        ops.block_quantize(heavy(4, 16), clip=3)


def test_the_backend_asked_for_runs_or_says_why_not():
    with pytest.raises(BackendUnavailable, match="cuda"):
        quantize(heavy(4, 16), backend="cuda")
    with pytest.raises(BackendUnavailable, match="unknown backend"):
        quantize(heavy(4, 16), backend="c++")
