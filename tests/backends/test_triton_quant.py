"""The Triton kernels on packed matrices: what the tests of the operations cannot see from outside.

Those compare every backend with an oracle (tests/ops). Here each kernel is taken by itself, over
every way that its launch may go, and held against the reference.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from swkernels import tuning
from swkernels.backends.plan import Clip, Code, Plan, plan_of
from swkernels.backends.reference import block_dequantize as exact_values
from swkernels.backends.reference import block_quantize as reference
from swkernels.backends.triton import block_dequantize as dequantize
from swkernels.backends.triton import block_quantize as quantize
from swkernels.backends.triton import packed
from swkernels.backends.triton import quant_linear as linear
from tests.ops.backends_here import DEVICE, DTYPES
from tests.ops.listed import normal
from tests.ops.packed import CODE_NAMES, CODES

# NumPy warns where the interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

codes = pytest.mark.parametrize("code", [Code(*code) for code in CODES], ids=CODE_NAMES)
MULTIPLIED = [torch.float32, torch.float16]  # the interpreter cannot multiply bfloat16


def planned(shape, code, block, clip=None, scale_dtype="float32") -> Plan:
    return plan_of(
        shape, code=code.name, symmetric=code.symmetric, block_size=block, clip=clip,
        scale_dtype=scale_dtype,
    )  # fmt: skip


def places(*flat) -> torch.Tensor:
    return torch.tensor(sorted(flat), dtype=torch.int32, device=DEVICE)


def check_quantized(w, plan, positions, scale_dtype=torch.float32):
    found = quantize.block_quantize(w, plan, positions, scale_dtype)
    expected = reference.block_quantize(w, plan, positions, scale_dtype)
    for name, ours, theirs in zip(("codes", "scales", "zero points"), found, expected):
        if theirs is None:
            assert ours is None
        else:
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    return found


def pack(D, H, code, block, positions=(), scale_dtype="float32", seed=0):
    """The arguments of block_dequantize: a packed matrix, its outliers in bfloat16."""
    w = normal(D, H, seed=seed)
    plan, listed = planned((D, H), code, block, None, scale_dtype), places(*positions)
    scales = torch.float16 if scale_dtype == "float16" else torch.float32
    values = w.view(-1)[listed.long()].bfloat16()
    return *reference.block_quantize(w, plan, listed, scales), listed, values, plan


# --- block_quantize ---


@codes
@pytest.mark.parametrize("block", [64, 34, (1, 32), 2], ids=str)
def test_one_pass_and_two_give_the_same(monkeypatch, code, block):
    w = normal(7, 96, dtype=torch.bfloat16)
    plan = planned(w.shape, code, block, None, "float16")
    positions = places(0, 5, 95, 96, 640, 671)
    assert quantize._fused(w, plan) is not None
    one = check_quantized(w, plan, positions, torch.float16)
    monkeypatch.setattr(quantize, "_fused", lambda w, plan: None)
    two = check_quantized(w, plan, positions, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(one, two) if a is not None)


@codes
def test_blocks_that_share_bytes_do_not_go_in_one_pass(code):
    w = normal(5, 33)
    for block, alone in ((33, False), (11, False), ("tensor", True), ((2, 8), False), (512, True)):
        plan = planned(w.shape, code, block)
        applies = alone or code.bits == 8 and block != (2, 8)
        assert (quantize._fused(w, plan) is not None) == applies
        check_quantized(w, plan, places(1, 32, 33, 164))


CLIPS = [None, Clip("zscore", 1.5), Clip("zscore_signed", 0.7)]


@pytest.mark.parametrize("clip", CLIPS, ids=["none", "zscore", "zscore_signed"])
@pytest.mark.parametrize("block", ["tensor", "channel", (20, 11), 500, 9], ids=str)
def test_a_block_over_several_programs_or_several_in_one(block, clip):
    w = normal(29, 31, dtype=torch.float16) * 3 + 0.5
    plan = planned(w.shape, Code("int8", False), block, clip)
    positions = places(0, 30, 31, 500, 501, 502, 898)
    w.view(-1)[positions.long()] *= 50  # they must not count
    record = {"op": "block_quantize", "config": {"BLOCK": 128, "waves": 100}}
    with tuning.use(*(record | {"variant": variant} for variant in ("ranges", "sums"))):
        check_quantized(w, plan, positions)
        grid, _, launch = quantize._statistics(w, plan, places(), "ranges")
    assert launch["BLOCKS"] > 1 or grid[1] > 1
    assert (launch["BLOCKS"] > 1) == (block in ("channel", 9))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@codes
def test_zeros_denormals_and_constants(code, scale_dtype):
    smallest = 2.0**-149
    rows = [
        torch.zeros(32),
        torch.arange(32) * smallest,
        torch.arange(-16, 16) * 2.0**-130,
        torch.full((32,), -3e-39),
        torch.arange(32) * 2.0**-127,  # scales on either side of the smallest normal number
        torch.full((32,), 7.0),
        1000 + torch.arange(32) * 2.0**-14,
        torch.arange(-16, 16) * 1e36,
    ]
    w = torch.stack(rows).float().to(DEVICE)
    name = str(scale_dtype).removeprefix("torch.")
    if name == "float16":
        w = w[:-1]  # which no float16 can scale
    for block in ("row", (1, 8), (8, 1)):
        check_quantized(w, planned(w.shape, code, block, None, name), places(3, 70), scale_dtype)


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("block", [32, "tensor", (2, 8)], ids=str)
def test_what_is_not_finite_reaches_the_scales(wrong, block):
    for code, clip in itertools.product((Code("nf4"), Code("int4", False)), CLIPS[:2]):
        w = normal(4, 96)
        w[2, 50] = wrong
        plan = planned(w.shape, code, block, clip)
        _, scales, _ = quantize.block_quantize(w, plan, places(), torch.float32)
        assert not scales.isfinite().all()
        position = places(2 * 96 + 50)  # unless it is kept aside
        _, scales, _ = quantize.block_quantize(w, plan, position, torch.float32)
        assert scales.isfinite().all()


def test_a_block_of_outliers_alone():
    w = normal(2, 64)
    for code, block in itertools.product((Code("int4"), Code("int8", False)), (32, (1, 32), 7)):
        check_quantized(w, planned(w.shape, code, block), places(*range(32, 64), 100))


# --- block_dequantize ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@codes
def test_values_equal_the_reference(code, dtype):
    """For each run of elements that share a block: 1, 2, 4, ... 64."""
    for D, H, block in ((7, 13, 3), (6, 36, 12), (9, 80, (2, 40)), (5, 128, 64), (3, 50, "tensor")):
        N = D * H
        for positions in ((), (0, 1, N // 2, N - 1), range(0, N, 3)):
            arguments = *pack(D, H, code, block, positions), dtype
            found = dequantize.block_dequantize(*arguments)
            assert torch.equal(found, exact_values.block_dequantize(*arguments))


@pytest.mark.parametrize(
    ("shape", "block", "run"),
    [
        ((4, 96), 64, 64), ((4, 96), 48, 16), ((4, 96), 7, 1), ((4, 96), "tensor", 64),
        ((4, 96), (2, 8), 8), ((4, 90), (2, 8), 2), ((4, 90), (1, 45), 1), ((4, 96), (2, 96), 64),
        ((4, 96), "channel", 1), ((1, 90), 1000, 64),
    ],
)  # fmt: skip
def test_runs_that_share_a_block(shape, block, run):
    plan = planned(shape, Code("int4"), block)
    assert packed.shared_run(plan, 64) == run
    if plan.blocks > 1:
        from swkernels.backends.blocks import spread

        blocks = spread(torch.arange(plan.blocks), plan).reshape(-1)
        groups = blocks[: len(blocks) // run * run].view(-1, run)
        assert (groups == groups[:, :1]).all()


# --- quant_linear ---


def product(x, arguments, bias=None, **options):
    *packed_weight, plan = arguments
    return linear.quant_linear(x, *packed_weight, bias, plan, **options)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that run, by name."""
    names = []
    for name in ("_vector", "_dot"):
        kernel = getattr(linear, name)

        def watch(*arguments, kernel=kernel, name=name):
            names.append(name[1:])
            return kernel(*arguments)

        monkeypatch.setattr(linear, name, watch)
    return names


@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
@pytest.mark.parametrize("variant", ["vector", "dot"])
@codes
def test_one_hot_tokens_read_the_weight(launched, code, variant, dtype):
    """Blocks that are runs, tiles, rows, and runs that rows cut; rows of outliers too."""
    D, H = 11, 192
    for i, block in enumerate((64, (4, 32), "row", 128 * 5, "tensor")):
        positions = [(), range(0, D * H, 31), (0, 70, H - 1, H, D * H - 1, *range(500, 560))][i % 3]
        arguments = pack(D, H, code, block, positions, ("float32", "float16")[i % 2], seed=i)
        wanted = exact_values.block_dequantize(*arguments, dtype)
        columns = torch.tensor([0, 1, 31, 32, 69, 70, 127, 128, 135, 155, 190, 191])
        for some in columns.split(4 if variant == "vector" else 12):
            x = F.one_hot(some, H).to(dtype).to(DEVICE)
            assert torch.equal(product(x, arguments, variant=variant), wanted[:, some].T)
    assert set(launched) == {variant}


@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
@pytest.mark.parametrize(("variant", "tokens"), [("vector", 1), ("vector", 3), ("dot", 21)])
@codes
def test_error_is_at_most_twice_that_of_linear(launched, code, variant, tokens, dtype):
    arguments = pack(40, 256, code, 64, range(3, 40 * 256, 511))
    x = normal(tokens, 256, dtype=dtype, seed=1)
    bias = normal(40, dtype=dtype, seed=2)
    exact = exact_values.block_dequantize(*arguments, torch.float32).double()
    exact = F.linear(x.double(), exact, bias.double())
    theirs = F.linear(x, exact_values.block_dequantize(*arguments, dtype), bias)
    ours = product(x, arguments, bias, variant=variant)
    assert ours.dtype == dtype and launched == [variant]
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


def test_the_record_and_the_tokens_choose(launched):
    arguments = pack(8, 128, Code("int4"), 64)
    matrix = exact_values.block_dequantize(*arguments, torch.float32)
    expected = {1: ["vector"], 4: ["vector"], 5: ["dot"], 16: ["dot"], 17: ["dot"], 65: []}
    if DEVICE == "cuda":  # float32 is not for its matrix units
        expected |= {5: [], 16: [], 17: []}
    for tokens, kernels in expected.items():
        x = normal(tokens, 128)
        launched.clear()
        torch.testing.assert_close(product(x, arguments), x @ matrix.T, rtol=1e-5, atol=1e-5)
        assert launched == kernels
    launched.clear()
    with tuning.use({"op": "quant_linear", "variant": "dequantize", "config": {}}):
        assert torch.equal(product(x[:1], arguments), F.linear(x[:1], matrix))
    assert launched == []


@pytest.mark.parametrize("waves", [1, 1000])
def test_columns_split_over_programs(launched, waves):
    config = {"BLOCK_D": 4, "BLOCK_W": 4, "TAKEN": 16, "waves": waves, "tokens": 4, "beyond": "dot"}
    arguments = pack(9, 136, Code("nf4"), 8, range(0, 9 * 136, 40))
    x = torch.eye(136, device=DEVICE)[[0, 31, 32, 120]]
    bias = normal(9)
    wanted = exact_values.block_dequantize(*arguments, torch.float32)[:, [0, 31, 32, 120]].T
    with tuning.use({"op": "quant_linear", "variant": "vector", "config": config}):
        assert torch.equal(product(x, arguments), wanted)
        assert torch.equal(product(x[:3], arguments, bias), wanted[:3] + bias)
    assert launched == ["vector"] * 2


def test_what_does_not_fit_the_tiles_is_dequantized(launched):
    """Odd rows, short blocks, codes that lie askew; and nothing at all."""
    for D, H, block in ((5, 67, 64), (5, 64, 7), (5, 64, (2, 3)), (5, 64, "channel")):
        arguments = pack(D, H, Code("int4"), block)
        matrix = exact_values.block_dequantize(*arguments, torch.float32)
        for tokens in (0, 1, 20):
            x = normal(tokens, H)
            assert torch.equal(product(x, arguments), F.linear(x, matrix))
    codes, *rest = pack(5, 64, Code("int4"), 64)
    askew = torch.cat([codes[:1], codes])[1:]
    assert askew.data_ptr() % 4
    matrix = exact_values.block_dequantize(codes, *rest, torch.float32)
    x = normal(1, 64)
    assert torch.equal(product(x, (askew, *rest)), F.linear(x, matrix))
    assert launched == []


def test_strided_rows_and_a_transposed_activation():
    arguments = pack(8, 64, Code("int8"), 32)
    wide, bias = normal(64, 80), normal(8, 2)[:, 1]
    for x in (wide[:3, 8:72], wide[:40:2, :64], wide.T[3:5], wide.T[:20]):
        compact = product(x.contiguous(), arguments, bias.contiguous())
        assert torch.equal(product(x, arguments, bias), compact)


# --- what the backend says of itself, and the interpreter ---


def test_supports_says_why_not():
    plan = planned((4, 16), Code("int4"), 16)
    byte = torch.zeros(1, dtype=torch.uint8, device=DEVICE)
    assert quantize.supports(normal(2, 3), plan) is None
    assert linear.supports(normal(2, 3), plan) is None
    assert all(dequantize.supports(byte, plan, dtype) is None for dtype in DTYPES)
    assert "torch.float64" in linear.supports(normal(2, 3).double(), plan)
    assert "torch.float64" in dequantize.supports(byte, plan, torch.float64)
    assert "meta" in dequantize.supports(byte.to("meta"), plan, torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU rounds by itself")
def test_the_interpreter_rounds_to_bfloat16_as_pytorch_does():
    """Every kind of number, and half way between two: what the kernel writes is rounded once."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64)
    bits[:1024] = bits[:1024] & ~0xFFFF | 0x8000
    w = bits.to(torch.int32).view(torch.float32)
    w[w.isnan()] = 1.0
    w[:4] = torch.tensor([torch.inf, -torch.inf, 3.4e38, 1e-45])
    plan = planned((64, 64), Code("int8"), 64)
    codes = torch.zeros(4096, dtype=torch.uint8)
    listed = torch.arange(4096, dtype=torch.int32)
    arguments = codes, torch.ones(64), None, listed, w, plan, torch.bfloat16
    assert torch.equal(dequantize.block_dequantize(*arguments).view(-1), w.bfloat16())
