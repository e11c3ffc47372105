"""The C++ backend: every instruction set of this machine, against definitions of its own."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.backends import cpu, native
from swkernels.errors import BackendUnavailable, InvalidInput

from .oracle import expected_keys, special_values

if cpu.available() is not None and not native.build_record().get("cpu", {}).get("command"):
    pytest.skip(f"no CPU library: {cpu.available()}", allow_module_level=True)

from swkernels.backends.cpu.column_absmax import column_absmax, supports
from swkernels.backends.cpu.glu_absmax import ACTIVATIONS, glu_absmax
from swkernels.backends.cpu.linear_absmax import linear_absmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = [name for name in cpu.ISAS[1:] if cpu.library().swk_cpu_isa(cpu.ISAS.index(name))]
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("SWKERNELS_CPU_ISA", request.param)
    assert cpu.isa() == request.param
    return request.param


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(x, keys=None, token_index=None, token_offset=0):
    keys = torch.zeros(x.shape[1], dtype=torch.int64) if keys is None else keys.clone()
    column_absmax(x, keys, token_index, token_offset)
    return keys


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_library_is_as_new_as_its_source():
    sys.path.insert(0, str(ROOT))
    try:
        import setup
    finally:
        sys.path.remove(str(ROOT))
    assert native.build_record()["sources"] == setup.source_digest(), (
        "csrc has changed since the libraries were built: python setup.py build_native --inplace"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 31, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 63, 1000])
def test_column_absmax(tokens, channels, dtype, isa):
    x = random(tokens, channels, dtype=dtype)
    assert torch.equal(run(x), expected_keys(x))


def test_no_channels(isa):
    assert run(torch.zeros(5, 0)).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_rows_and_columns(dtype, isa, threads):
    for shape in ((4000, 300), (9, 70_001), (3, 200_000)):
        x = random(*shape, dtype=dtype)
        assert torch.equal(run(x), expected_keys(x)), shape
        assert torch.equal(run(x), run(x)), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_is_a_record(dtype, isa, threads):
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    rising = torch.arange(20_000, dtype=bits)[:, None].expand(-1, 67).contiguous().view(dtype)
    for x in (rising, rising.flip(0)):
        assert torch.equal(run(x), expected_keys(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_earliest_token(dtype, isa, threads):
    x = random(3000, 129, dtype=dtype).sign()  # every magnitude is 1
    tokens = 0xFFFFFFFF - (run(x) & 0xFFFFFFFF)
    assert torch.equal(tokens, torch.zeros(129, dtype=torch.int64))
    assert torch.equal(run(x), expected_keys(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, isa, threads):
    values = special_values(dtype)
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 8, 30, 2000):
        x = values[torch.randint(len(values), (tokens, 333), generator=generator)]
        assert torch.equal(run(x), expected_keys(x))
        quiet = torch.where(x.isnan(), torch.zeros((), dtype=dtype), x)
        assert torch.equal(run(quiet), expected_keys(quiet))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_nan_counts_whatever_its_payload(dtype, isa):
    values = special_values(dtype)
    nans = values[values.isnan()]
    for first in nans:
        for second in nans:
            x = random(40, 70, dtype=dtype)
            x[3], x[4], x[20] = first, second, second
            assert torch.equal(run(x), torch.full((70,), 0x7FC00000 << 32 | 0xFFFFFFFF - 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_magnitude_of_16_bits_has_its_float32(dtype, isa):
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31 - 1, (65536,)).to(torch.int32)
    else:
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(dtype)[None]
    assert torch.equal(run(x), expected_keys(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_keys(dtype, isa):
    x = random(900, 150, dtype=dtype)
    x[5, 7] = x[700, 7] = 9.0  # a tie across calls, the earlier token coming later
    x[800, 9] = float("nan")
    keys = torch.zeros(150, dtype=torch.int64)
    for start, end in ((600, 900), (0, 250), (250, 600), (600, 900)):
        column_absmax(x[start:end], keys, None, start)
    assert torch.equal(keys, expected_keys(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_known_keys_of_any_magnitude(dtype, isa):
    """Where the state starts from keys, the start must not hide an equal or an earlier peak."""
    values = special_values(dtype).abs()
    known = special_values(torch.float32)
    known = known[~known.isnan()].abs()
    near = torch.cat([values.float(), torch.nextafter(values.float(), torch.tensor(0.0)), known])
    near = near[~near.isnan()]
    bits = torch.cat([near.view(torch.int32).long(), torch.tensor([0x7FC00000])])
    for late in (0, 50, 4_000_000_000):
        keys = bits << 32 | 0xFFFFFFFF - late
        for value in values:
            x = value.expand(3, len(keys)).contiguous()
            assert torch.equal(run(x, keys, None, 10), expected_keys(x, keys, None, 10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_strides_and_alignment(dtype, isa):
    storage = random(70 * 301 + 5, dtype=dtype)
    padded = storage[: 70 * 301].view(70, 301)
    for x in (
        padded[:, :200],
        padded[:, 1:300],
        padded[::3],
        storage[3:].as_strided((60, 90), (17, 1)),
        storage.as_strided((50, 65), (0, 1)),
        padded[:, :1],
        padded.t()[:1].t(),
    ):
        assert torch.equal(run(x), expected_keys(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_index(dtype, isa, threads):
    tokens = 1200
    generator = torch.Generator().manual_seed(2)
    x = (random(tokens, 130, dtype=dtype) * 3).round()  # many ties
    x[17, 3] = x[900, 3] = float("nan")
    kept = torch.rand(tokens, generator=generator) < 0.7
    in_order = torch.where(kept, kept.cumsum(0) - 1, -1)
    shuffled = torch.randperm(tokens, generator=generator) - 100
    repeated = torch.randint(-3, 40, (tokens,), generator=generator)
    nothing = torch.full((tokens,), -1)
    for index in (in_order, shuffled, repeated, nothing, in_order.flip(0).contiguous()):
        for offset in (0, 12345):
            assert torch.equal(run(x, None, index, offset), expected_keys(x, None, index, offset))


def test_padding_does_not_change_keys(isa):
    x = random(500, 96)
    padded = torch.full((900, 96), 1e9)
    mask = torch.zeros(900, dtype=torch.bool)
    mask[torch.randperm(900, generator=torch.Generator().manual_seed(3))[:500]] = True
    padded[mask] = x
    index = torch.where(mask, mask.cumsum(0) - 1, -1)
    assert torch.equal(run(padded, None, index), run(x))


def test_the_last_tokens(isa):
    x = random(9, 40)
    last = 0xFFFFFFFE
    assert torch.equal(run(x, None, None, last - 8), expected_keys(x, None, None, last - 8))
    index = torch.tensor([last, -1, 0, -5, 7, 7, 7, last, last])
    assert torch.equal(run(x, None, index), expected_keys(x, None, index))
    keys = torch.zeros(40, dtype=torch.int64)
    for bad_index, offset in ((None, last - 7), (None, -1), (index, 1), (index, last + 1)):
        with pytest.raises(InvalidInput, match="token index"):
            column_absmax(x, keys, bad_index, offset)
    assert not keys.any()


def test_denormals_survive_flush_to_zero(isa):
    values = special_values(torch.float16)
    x = values.view(torch.int16).abs().clamp(max=0x3FF).view(torch.float16)[None].contiguous()
    expected = expected_keys(x)
    tiny = special_values(torch.float32)[None].contiguous()
    expected_tiny = expected_keys(tiny)
    assert torch.set_flush_denormal(True)
    try:
        keys, tiny_keys = run(x), run(tiny)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(keys, expected)
    assert torch.equal(tiny_keys, expected_tiny)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_column_absmax_anywhere(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    tokens, channels = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 200))
    stride = data.draw(st.integers(0, 300))
    start = data.draw(st.integers(0, 9))
    storage = random(
        start + tokens * stride + channels, dtype=dtype, seed=data.draw(st.integers(0, 9))
    )
    if data.draw(st.booleans()):
        storage = (storage * 2).round()
    x = storage[start:].as_strided((tokens, channels), (stride, 1))
    offset = data.draw(st.integers(0, 2**32 - 1000))
    index = None
    if data.draw(st.booleans()):
        index = torch.tensor(
            data.draw(st.lists(st.integers(-2, 100), min_size=tokens, max_size=tokens)),
            dtype=torch.int64,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWKERNELS_CPU_ISA", data.draw(st.sampled_from(ISAS)))
        keys = run(x, None, index, offset)
    assert torch.equal(keys, expected_keys(x, None, index, offset))


def test_addresses_past_2_to_the_31(isa):
    """Four rows 2^31 bytes apart in memory of which only the pages read exist."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    stride, rows, channels = 2**31 + 64, 4, 130  # elements of 2 bytes
    size = (stride * (rows - 1) + channels) * 2
    no_reserve = 0x4000 | 0x22
    address = libc.mmap(None, size, 3, no_reserve, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    try:
        x = random(rows, channels, dtype=torch.bfloat16)
        for row in range(rows):
            place = address + row * stride * 2
            ctypes.memmove(place, x[row].data_ptr(), channels * 2)
        keys = torch.zeros(channels, dtype=torch.int64)
        cpu.call("column_absmax", address, 1, rows, channels, stride, keys.data_ptr(), None, 0)
    finally:
        libc.munmap(address, size)
    assert torch.equal(keys, expected_keys(x))


# glu_absmax

EAGER = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu_is_as_exact_as_pytorch(dtype, activation, isa):
    """The largest and the root mean square error against float64: at most twice PyTorch's."""
    for scale in (0.01, 0.3, 1.0, 4.0, 20.0):
        gate = (random(64, 700, seed=1) * scale).to(dtype)
        up = random(64, 700, dtype=dtype, seed=2)
        exact = EAGER[activation](gate.double()) * up.double()
        theirs = (EAGER[activation](gate) * up).double() - exact
        ours = glu_absmax(gate, up, activation, None, None, 0).double() - exact
        assert ours.abs().max() <= 2 * theirs.abs().max(), scale
        assert ours.square().mean() <= 4 * theirs.square().mean(), scale


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu_special_values(dtype, activation, isa):
    """NaN, infinities and zeros come out as in float64 arithmetic on PyTorch's own formulas."""
    values = torch.cat(
        [special_values(dtype), torch.tensor([-1e4, 1e4, -90.0, 90.0, -40.0], dtype=dtype)]
    )
    values = torch.cat([values, values[values.isfinite()].new_tensor([-3e38, 3e38, -1e20, 1e20])])
    gate, up = (grid.contiguous() for grid in torch.meshgrid(values, values, indexing="ij"))
    h = glu_absmax(gate, up, activation, None, None, 0)
    act = EAGER[activation](gate.double())
    if activation.startswith("gelu"):  # in float64 too, erf and tanh reach -1: -inf * 0
        act = torch.where(gate == -float("inf"), float("nan"), act)
    expected = act * up.double()
    # act(gate) underflows in float32, to 0 of its sign.
    small = (expected.abs() < 1e-30) | (act.abs() < 1e-30)
    assert torch.equal(h.isnan()[~small], expected.isnan()[~small])
    rounded = expected.float().to(dtype)
    known = ~small & ~expected.isnan()
    assert torch.equal(h.isinf()[known], rounded.isinf()[known])
    assert torch.equal(h.signbit()[known], rounded.signbit()[known])
    zero = (gate.double() == 0) & up.isfinite()
    assert torch.equal(h[zero], (gate * up)[zero])
    assert torch.equal(h.signbit()[zero], (gate * up).signbit()[zero])


@pytest.mark.parametrize("keys_wanted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu_peaks_are_those_of_h(dtype, keys_wanted, isa, threads):
    for tokens, channels in ((0, 5), (1, 64), (63, 700), (1000, 130), (5, 20_000)):
        gate, up = random(tokens, channels, dtype=dtype, seed=4), random(tokens, channels, seed=5)
        up = up.to(dtype)
        index = torch.arange(tokens).flip(0) - tokens // 4 if tokens else None
        for token_index in (None, index, torch.arange(tokens) - tokens // 2):
            keys = torch.zeros(channels, dtype=torch.int64) if keys_wanted else None
            h = glu_absmax(gate, up, "silu", keys, token_index, 3)
            assert torch.equal(h, glu_absmax(gate, up, "silu", None, None, 0))
            if keys_wanted:
                assert torch.equal(keys, expected_keys(h, None, token_index, 3))
                assert torch.equal(keys, run(h, None, token_index, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu_takes_halves_of_one_projection(dtype, isa):
    both = random(90, 2 * 333, dtype=dtype)
    gate, up = both.chunk(2, dim=1)
    keys = torch.zeros(333, dtype=torch.int64)
    h = glu_absmax(gate, up, "gelu_tanh", keys, None, 0)
    assert torch.equal(
        h, glu_absmax(gate.contiguous(), up.contiguous(), "gelu_tanh", None, None, 0)
    )
    assert torch.equal(keys, expected_keys(h))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu_writes_all_of_h_and_nothing_else(dtype, isa):
    channels = 333
    frame = torch.full((12, 400), -7.0, dtype=dtype)
    gate, up = random(10, channels, dtype=dtype), random(10, channels, dtype=dtype, seed=1)
    inside = frame[1:11, 20 : 20 + channels]
    code = native.DTYPES[str(dtype)]
    cpu.call(
        "glu_absmax", gate.data_ptr(), channels, up.data_ptr(), channels, inside.data_ptr(), 400,
        code, 0, 10, channels, None, None, 0,
    )  # fmt: skip
    assert torch.equal(inside, glu_absmax(gate, up, "silu", None, None, 0))
    inside.fill_(-7.0)
    assert (frame == -7.0).all()


def test_float16_conversions_are_exact(isa):
    """relu(x) * 1 rounds a float16 through float32 and back; products round as PyTorch's do."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)[None]
    x = x[:, ~x.isnan()[0]].contiguous()
    h = glu_absmax(x, torch.ones_like(x), "relu", None, None, 0)
    assert torch.equal(h, F.relu(x))
    generator = torch.Generator().manual_seed(6)
    bits = torch.randint(0, 0x7C00, (2, 1, 200_000), generator=generator).to(torch.int16)
    a, b = bits.view(torch.float16)
    for dtype in (torch.float16, torch.bfloat16):
        p, q = a.to(dtype), b.to(dtype)
        exact = (p.float() * q.float()).to(dtype)
        assert torch.equal(glu_absmax(p, q, "relu", None, None, 0), exact)


# linear_absmax


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_absmax(dtype, bias, isa):
    x, weight = random(77, 60, dtype=dtype), random(90, 60, dtype=dtype, seed=1)
    b = random(90, dtype=dtype, seed=2) if bias else None
    index = torch.arange(77) - 5
    in_keys, out_keys = torch.zeros(60, dtype=torch.int64), torch.zeros(90, dtype=torch.int64)
    y = linear_absmax(x, weight, b, in_keys, out_keys, index, 9)
    assert torch.equal(y, F.linear(x, weight, b))
    assert torch.equal(in_keys, expected_keys(x, None, index, 9))
    assert torch.equal(out_keys, expected_keys(y, None, index, 9))
    assert torch.equal(linear_absmax(x, weight, b, None, None, None, 0), y)


# Packed matrices, against the reference, which tests/ops hold against an oracle.

PACKED_CODES = [
    ("int4", True), ("int4", False), ("int8", True), ("int8", False), ("nf4", True), ("fp4", True),
]  # fmt: skip
packed_codes = pytest.mark.parametrize("code, symmetric", PACKED_CODES, ids=str)
# One element and many; multiples of 8 and not; within a row, across rows, wider than a task.
PACKED_BLOCKS = [1, 7, 32, 64, 4096, 100_000, (8, 16), (3, 5), (64, 64), "row", "channel", "tensor"]
PACKED_CLIPS = [
    None, ("zscore", 2), ("zscore_signed", 1.5), ("percentile", 97), ("count", 3), ("search", 0.6),
]  # fmt: skip


def packed(w, code, symmetric, block, clip=None, scale_dtype="float32", largest=0, backend="cpu"):
    return ops.block_quantize(
        w, code=code, symmetric=symmetric, block_size=block, clip=clip and ops.Clip(*clip),
        scale_dtype=scale_dtype, largest=largest, backend=backend,
    )  # fmt: skip


@cache  # every instruction set is held against the same
def by_reference(shape, dtype, seed, *arguments):
    w = (random(*shape, seed=seed) ** 3).to(dtype)
    return w, packed(w, *arguments, backend="reference")


def assert_packed_alike(ours, wanted):
    for name, tensor in wanted.tensors().items():
        assert torch.equal(ours.tensors()[name], tensor), (name, wanted.plan)


@packed_codes
def test_packed_codes_are_the_references(code, symmetric, isa, threads):
    for i, block in enumerate(PACKED_BLOCKS):
        clip, dtype = PACKED_CLIPS[i % 6], DTYPES[i % 3]
        scale_dtype = ("float32", "float16", "float32", "int8")[i % 4]
        arguments = code, symmetric, block, clip, scale_dtype, i
        w, wanted = by_reference((37, 203), dtype, i, *arguments)
        assert_packed_alike(packed(w, *arguments), wanted)


@pytest.mark.parametrize("clip", PACKED_CLIPS, ids=str)
def test_threads_share_a_block(clip, isa, threads):
    for (code, symmetric), block in zip(PACKED_CODES[1::2], ("tensor", 200_003, (333, 500))):
        arguments = code, symmetric, block, clip, "float32", 3
        w, wanted = by_reference((333, 1001), torch.float32, 0, *arguments)
        assert_packed_alike(packed(w, *arguments), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_special_values(dtype, isa):
    """Denormals, the largest numbers, both zeros, ties, in lanes and in what is left of them."""
    values = special_values(dtype)
    values = values[values.isfinite() & (values.abs() <= torch.finfo(dtype).max / 4)]
    generator = torch.Generator().manual_seed(4)
    w = values[torch.randint(len(values), (40, 77), generator=generator)]
    small = w.float().clamp(-1e-38, 1e-38).to(dtype)
    ties = ((random(40, 77) * 16).round() / 2).to(dtype)
    for matrix in (w, small, ties):
        for (code, symmetric), block in zip(PACKED_CODES, PACKED_BLOCKS[::2]):
            wanted = packed(matrix, code, symmetric, block, backend="reference")
            assert_packed_alike(packed(matrix, code, symmetric, block), wanted)


@packed_codes
def test_packed_values_are_the_references(code, symmetric, isa, threads):
    for i, block in enumerate(PACKED_BLOCKS):
        scale_dtype = ("float32", "float16", "int8")[i % 3]
        arguments = code, symmetric, block, None, scale_dtype, 40
        _, q = by_reference((37, 203), DTYPES[i % 3], i, *arguments)
        exact = ops.block_dequantize(q, torch.float32, backend="reference")
        for dtype in DTYPES:
            assert torch.equal(ops.block_dequantize(q, dtype, backend="cpu"), exact.to(dtype))


@packed_codes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_tokens_read_the_packed_weight(dtype, code, symmetric, isa):
    for i, block in enumerate(PACKED_BLOCKS):
        H = (203, 256, 392)[i % 3]
        arguments = code, symmetric, block, None, ("float32", "float16")[i % 2], 60
        _, q = by_reference((21, H), torch.float32, i, *arguments)
        wanted = ops.block_dequantize(q, torch.float32, backend="reference").to(dtype)
        for T in (1, 2, 3, 4, 9, 16, 17, 32):
            columns = torch.randperm(H, generator=torch.Generator().manual_seed(T))[:T]
            y = ops.quant_linear(F.one_hot(columns, H).to(dtype), q, backend="cpu")
            assert torch.equal(y, wanted[:, columns].T), (block, T)


@pytest.mark.parametrize("tokens", [33, 100, 300])
def test_many_tokens_and_many_rows(tokens, isa, threads):
    """More rows than are dequantized at once, in float32."""
    for (code, symmetric), dtype in zip(PACKED_CODES[1::2], DTYPES):
        rows = 3600 if dtype == torch.float32 else 100
        q = packed(random(rows, 600), code, symmetric, 64, None, "float32", 99)
        columns = torch.arange(tokens) * 7 % 600
        y = ops.quant_linear(F.one_hot(columns, 600).to(dtype), q, backend="cpu")
        assert torch.equal(y, q.dequantize(dtype)[:, columns].T)


@packed_codes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_products_are_as_exact_as_pytorchs(dtype, code, symmetric, isa):
    for H, block in ((512, 64), (203, 7)):
        arguments = code, symmetric, block, None, "float32", 50
        _, q = by_reference((150, H), torch.float32, 0, *arguments)
        bias, weight = random(150, dtype=dtype, seed=2), q.dequantize(dtype)
        for T in (1, 3, 16):
            x = random(48, H + 3, dtype=dtype, seed=T)[:, 3:]
            exact = F.linear(x.double(), q.dequantize().double(), bias.double())
            theirs = torch.cat([F.linear(part, weight, bias) for part in x.split(T)]) - exact
            ours = [ops.quant_linear(part, q, bias, backend="cpu") for part in x.split(T)]
            ours = torch.cat(ours) - exact
            assert ours.square().mean() <= 4 * theirs.square().mean(), (H, block, T)
            assert ours.abs().max() <= 2 * theirs.abs().max(), (H, block, T)


def test_packed_products_do_not_depend_on_threads(isa):
    q = packed(random(700, 512), "int4", False, 64, None, "float16", 100)
    before = torch.get_num_threads()
    try:
        for T in (1, 5, 20):
            x, results = random(T, 512, dtype=torch.bfloat16, seed=1), []
            for count in (1, 2, 3, 1):
                torch.set_num_threads(count)
                results.append(ops.quant_linear(x, q, backend="cpu"))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


def test_packed_status_codes():
    lib, w = cpu.library(), torch.ones(2, 8)
    q = packed(w, "int4", False, 8, None, "float32", 1)
    out = torch.zeros(2, 8)
    held = [t.data_ptr() for t in (q.codes, q.scales, q.zero_points, q.positions, q.values)]

    def status(D=2, c=8, code=0, symmetric=0, dtype=0, zero_bytes=4, k=1, positions=held[3],
               begin=0, end=16):  # fmt: skip
        return lib.swk_cpu_block_dequantize(
            held[0], D, 8, 0, c, code, symmetric, held[1], dtype, held[2], zero_bytes, positions,
            held[4], 0, k, begin, end, out.data_ptr(), 0, 1, 0,
        )  # fmt: skip

    assert status() == 0 and torch.equal(out, w)
    assert status(begin=5, end=5) == 0
    outside, descending = torch.tensor([16], dtype=torch.int32), torch.tensor([3, 2]).int()
    for wrong, word in (
        (status(D=-1), "size"),
        (status(c=0), "size"),
        (status(code=4), "size"),
        (status(code=2), "size"),
        (status(dtype=3), "type of elements"),
        (status(dtype=1), "type of elements"),
        (status(zero_bytes=1), "type of elements"),
        (status(positions=outside.data_ptr()), "outside"),
        (status(positions=descending.data_ptr(), k=2), "outside"),
        (status(end=17), "outside"),
        (status(begin=-1), "outside"),
    ):
        assert wrong and word in native.status_text(lib, wrong)


# topk_abs


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_topk_abs(dtype, isa, threads):
    """Runs of every length and alignment, ties, lists that are cut, columns walked as lines."""
    wide = random(300, 1000).to(dtype)
    tensors = [
        *(wide[i : i + 2, i : 64 * i + i % 7] for i in range(1, 9)),
        *(wide[:, 3:], wide.T, wide[:, ::2], random(1, 70_000, seed=1).to(dtype)),
    ]
    values = torch.cat([tensor.float().flatten() for tensor in tensors])
    order = values.abs().sort(descending=True, stable=True).indices
    ends = torch.tensor([tensor.numel() for tensor in tensors]).cumsum(0)
    for k in (1, 50, 5000, len(order)):
        found = ops.topk_abs(tensors, k, backend="cpu")
        owner = torch.searchsorted(ends, order[:k], right=True)
        place = order[:k] - (ends - torch.tensor([t.numel() for t in tensors]))[owner]
        width = torch.tensor([tensor.shape[1] for tensor in tensors])[owner]
        assert torch.equal(found.values, values[order[:k]])
        assert torch.equal(found.tensor, owner)
        assert torch.equal(found.row * width + found.column, place)


def test_topk_abs_where_denormals_are_flushed(isa):
    halves = special_values(torch.float16).view(torch.int16).abs().clamp(max=0x3FF)
    bytes = torch.arange(8, dtype=torch.uint8)
    tensors = [
        halves.view(torch.float16),
        bytes.view(torch.float8_e4m3fn),
        bytes[:4].view(torch.float8_e5m2),
    ]
    expected = ops.topk_abs(tensors, 100, backend="reference")
    assert expected.values[0] > 0
    assert torch.set_flush_denormal(True)
    try:
        found = ops.topk_abs(tensors, 100, backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


def test_topk_abs_status_codes():
    lib, x = cpu.library(), torch.tensor([[1.0, -3.0, 2.0]])
    values, place, which = torch.zeros(2), *(torch.zeros(2, dtype=torch.int64) for _ in range(2))
    nan = torch.zeros(2, dtype=torch.int64)
    address, written = x.data_ptr(), values.data_ptr()

    def status(dtype=0, D=1, H=3, count=1, k=2, data=address, out=written, isa=0):
        given = [torch.tensor([number]) for number in (data, D, H)]
        kind, strides = torch.tensor([dtype], dtype=torch.int32), torch.tensor([3, 1])
        return lib.swk_cpu_topk_abs(
            given[0].data_ptr(), kind.data_ptr(), given[1].data_ptr(), given[2].data_ptr(),
            strides.data_ptr(), count, k, out, place.data_ptr(), which.data_ptr(), nan.data_ptr(),
            1, isa,
        )  # fmt: skip

    assert status() == 0 and values.tolist() == [-3, 2] and place.tolist() == [1, 2]
    assert status(k=0, out=None) == 0 and status(count=0, k=0) == 0
    for code, word in (
        (status(dtype=5), "type"),
        (status(dtype=-1), "type"),
        (status(D=-1), "size"),
        (status(H=-1), "size"),
        (status(D=2**40, H=2**40), "size"),
        (status(count=-1), "size"),
        (status(k=-1), "size"),
        (status(k=4), "size"),
        (status(data=0), "null"),
        (status(out=None), "null"),
        (status(isa=4), "instruction set"),
    ):
        assert word in native.status_text(lib, code)
    x[0, 2] = float("nan")
    assert "NaN" in native.status_text(lib, status(k=1)) and nan.tolist() == [0, 2]


# What it refuses, and how it is found.


def test_supports():
    assert supports(torch.zeros(3, 4)) is None
    assert supports(torch.zeros(4, 3).t()[:, :1]) is None
    assert "float64" in supports(torch.zeros(3, 4, dtype=torch.float64))
    assert "meta" in supports(torch.zeros(3, 4, device="meta"))
    assert "strides" in supports(torch.zeros(4, 3).t())
    assert "sparse" in supports(torch.zeros(3, 4).to_sparse())


def test_isa_is_checked(monkeypatch):
    monkeypatch.delenv("SWKERNELS_CPU_ISA", raising=False)
    assert cpu.isa() == ISAS[-1]
    monkeypatch.setenv("SWKERNELS_CPU_ISA", "neon")
    with pytest.raises(BackendUnavailable, match="scalar, avx2 or avx512, got 'neon'"):
        cpu.isa()
    with pytest.raises(BackendUnavailable, match="neon"):
        run(torch.zeros(1, 1))


def test_status_codes():
    lib, x = cpu.library(), torch.zeros(2, 3)
    keys = torch.zeros(3, dtype=torch.int64)

    address = x.data_ptr()

    def status(dtype=0, tokens=2, channels=3, data=address, isa=0):
        arguments = (data, dtype, tokens, channels, 3, keys.data_ptr(), None, 0, 1, isa)
        return lib.swk_cpu_column_absmax(*arguments)

    assert status() == 0
    for code, word in (
        (status(dtype=3), "type of elements"),
        (status(tokens=-1), "size"),
        (status(channels=-1), "size"),
        (status(data=None), "null"),
        (status(isa=4), "instruction set"),
    ):
        assert word in native.status_text(lib, code)
    assert status(tokens=0, data=None) == 0
    glu = (x.data_ptr(), 3, x.data_ptr(), 3, torch.empty(2, 3).data_ptr(), 3, 0, 4, 2, 3)
    code = lib.swk_cpu_glu_absmax(*glu, None, None, 0, 1, 0)
    assert "silu" in native.status_text(lib, code)


def test_header_and_package_agree():
    header = (ROOT / "csrc" / "swkernels.h").read_text()
    assert f"#define SWK_INTERFACE_VERSION {native.INTERFACE_VERSION}\n" in header


LOAD_FROM_COPY = """
import json, shutil, sys
from swkernels.backends import native
from pathlib import Path
directory = Path(sys.argv[1])
native.DIRECTORY = directory
from swkernels.backends import cpu
print(json.dumps(cpu.available()))
"""


@pytest.mark.parametrize(
    "record, library, words",
    [
        ({"cpu": {"reason": "no C++ compiler was found"}}, None, "no C++ compiler was found"),
        (None, None, "no record of a build"),
        (None, b"not a library", "does not load"),
    ],
)
def test_available_says_what_is_missing(tmp_path, record, library, words):
    if record is not None:
        (tmp_path / "build.json").write_text(json.dumps(record))
    if library is not None:
        (tmp_path / f"libswkernels_cpu{native.SUFFIX}").write_bytes(library)
    result = subprocess.run(
        [sys.executable, "-c", LOAD_FROM_COPY, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert words in json.loads(result.stdout)


def test_one_thread_pool(tmp_path):
    """Work runs on the OpenMP runtime that libtorch_cpu is linked to, and no other is loaded."""
    code = (
        "import torch, os\n"
        "torch.set_num_threads(2); torch.randn(600, 600) @ torch.randn(600, 600)\n"
        "from swkernels.backends import cpu\n"
        "from swkernels.backends.cpu.column_absmax import column_absmax\n"
        "def runtimes(): return {line.split()[-1] for line in open('/proc/self/maps')"
        " if 'gomp' in line or 'iomp' in line or 'libomp' in line}\n"
        "before, tasks = runtimes(), len(os.listdir('/proc/self/task'))\n"
        "column_absmax(torch.randn(4000, 500), torch.zeros(500, dtype=torch.int64), None, 0)\n"
        "assert cpu._torch_thread_pool() is not None\n"
        "print(before == runtimes(), len(os.listdir('/proc/self/task')) - tasks)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "0"]
