from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.errors import BackendUnavailable, InvalidInput, SwkernelsError

from . import oracle
from .backends_here import DEVICE, DTYPES, runnable

BACKENDS = runnable("column_absmax")


def random(tokens, channels, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=generator).to(dtype).to(DEVICE)


def takes(backend, dtype):
    """The Triton interpreter and the native backends take these; the reference takes all."""
    return not (backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 63, 200])
@pytest.mark.parametrize("channels", [1, 17, 64])
def test_equals_the_oracle(backend, dtype, tokens, channels):
    x = random(tokens, channels, dtype)
    keys = ops.column_absmax(x, backend=backend)
    assert torch.equal(keys.cpu(), oracle.column_absmax(x.cpu()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaks_read_back_values_and_first_tokens(backend):
    x = torch.tensor([[1.0, -3.0, 0.0], [-2.0, 3.0, 0.0], [2.0, 1.0, 0.0]], device=DEVICE)
    values, tokens = ops.peaks(ops.column_absmax(x, backend=backend))
    assert values.tolist() == [2.0, 3.0, 0.0]
    assert tokens.tolist() == [1, 0, 0]


def test_a_state_that_has_seen_nothing():
    values, tokens = ops.peaks(ops.empty_keys(2))
    assert values.tolist() == [0.0, 0.0] and tokens.tolist() == [-1, -1]


@pytest.mark.parametrize("repeats", [1, 30])  # C++ has two ways, for few rows and for many
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_beats_infinity_beats_numbers_and_the_first_nan_wins(backend, repeats):
    quiet, payload, negative = (
        torch.tensor([bits], dtype=torch.int32).view(torch.float32).item()
        for bits in (0x7FC00000, 0x7FFFFFFF, -1)
    )
    x = torch.tensor(
        [
            [1.0, math.inf, quiet],
            [quiet, 3.0e38, payload],
            [payload, -math.inf, negative],
            [math.inf, 1.0, math.inf],
        ],
        device=DEVICE,
    ).repeat(repeats, 1)
    keys = ops.column_absmax(x, backend=backend)
    values, tokens = ops.peaks(keys)
    assert values[0].isnan() and values[1].isinf() and values[2].isnan()
    assert tokens.tolist() == [1, 0, 0]
    assert torch.equal(keys.cpu(), oracle.column_absmax(x.cpu()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_splits_orders_and_padding_give_the_same_keys(backend):
    x = random(96, 33, seed=1)
    x[5] = x[70]  # a tie between two tokens
    whole = ops.column_absmax(x, backend=backend)
    split = None
    for start, stop in ((50, 96), (0, 13), (13, 50)):
        split = ops.column_absmax(x[start:stop], split, token_offset=start, backend=backend)
    assert torch.equal(split, whole)
    for left in (0, 7):
        padded = torch.full((2, 60, 33), 1e9, device=DEVICE)
        mask = torch.zeros(2, 60, dtype=torch.bool, device=DEVICE)
        for row, part in enumerate((x[:48], x[48:])):
            padded[row, left : left + 48] = part
            mask[row, left : left + 48] = True
        keys = ops.column_absmax(padded, token_mask=mask, backend=backend)
        assert torch.equal(keys, whole)


@pytest.mark.parametrize("tokens", [40, 150])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_indices_of_the_callers_own(backend, tokens):
    x = random(tokens, 9, seed=2)
    x[30] = x[3]
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(-2, 20, (tokens,), generator=generator).to(DEVICE)
    index[3], index[30] = 9, 4  # the later row is the earlier token
    keys = ops.column_absmax(x, token_mask=index, token_offset=5, backend=backend)
    assert torch.equal(keys.cpu(), oracle.column_absmax(x.cpu(), index.cpu(), 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_as_they_lie(backend):
    base = random(64, 80, seed=4)
    for view in (base[:, 3:40], base[::3], base.T, base[10:11, ::2]):
        keys = ops.column_absmax(view, backend=backend)
        assert torch.equal(keys.cpu(), oracle.column_absmax(view.cpu()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_gives_the_same_bits_and_the_input_stays(backend):
    x = random(1000, 130, seed=5)
    before = x.clone()
    keys = [ops.column_absmax(x, backend=backend) for _ in range(2)]
    assert torch.equal(*keys) and torch.equal(x, before)


def test_all_backends_agree_on_bits():
    x = random(1000, 130, seed=6)
    names = [p.values[0] for p in BACKENDS if not p.marks]
    keys = {name: ops.column_absmax(x, backend=name) for name in names}
    assert {"reference", "cpu", "triton"} <= set(keys) or DEVICE == "cuda"
    for name, value in keys.items():
        assert torch.equal(value, keys["reference"]), name


def test_float64_is_rounded_to_float32():
    x = torch.tensor([[1.0 + 1e-12], [1.0]], dtype=torch.float64, device=DEVICE)
    values, tokens = ops.peaks(ops.column_absmax(x))
    assert values.item() == 1.0 and tokens.item() == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_split_and_mask(data):
    tokens = data.draw(st.integers(0, 40))
    channels = data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    backend = data.draw(st.sampled_from([p.values[0] for p in BACKENDS if not p.marks]))
    repeats = data.draw(st.sampled_from([1, 7]))
    pad = data.draw(st.integers(0, 5))
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 65504.0, 1e-7, math.inf, math.nan, 0.1])
    x = torch.tensor(
        data.draw(st.lists(values, min_size=tokens * channels, max_size=tokens * channels)),
    ).reshape(tokens, channels)
    x = torch.cat([x, torch.zeros(tokens, pad)], 1).to(dtype).to(DEVICE)
    x = x.repeat(repeats, 1)[:, :channels]
    mask = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    mask = torch.tensor(mask, dtype=torch.bool, device=DEVICE).repeat(repeats)
    offset = data.draw(st.integers(0, 2**31))
    keys = ops.column_absmax(x, token_mask=mask, token_offset=offset, backend=backend)
    expected = oracle.column_absmax(x.cpu(), ops.token_index(mask).cpu(), offset)
    assert torch.equal(keys.cpu(), expected)


def test_the_last_token_index():
    x = torch.ones(1, 3, device=DEVICE)
    keys = ops.column_absmax(x, token_offset=2**32 - 2)
    assert ops.peaks(keys).tokens.tolist() == [2**32 - 2] * 3
    with pytest.raises(InvalidInput, match="below 2\\^32"):
        ops.column_absmax(x, token_offset=2**32 - 1)


BAD = [
    (dict(x=torch.ones(2, 3, dtype=torch.int32)), "float32, bfloat16"),
    (dict(x=torch.tensor(1.0)), "scalar"),
    (dict(x=[1.0]), "must be a tensor"),
    (dict(x=torch.ones(2, 3, device="meta")), "meta"),
    (dict(x=torch.ones(2, 3), keys=torch.zeros(3)), "int64"),
    (dict(x=torch.ones(2, 3), keys=torch.zeros(4, dtype=torch.int64)), r"\[3\]"),
    (dict(x=torch.ones(2, 3), keys=torch.zeros(6, dtype=torch.int64)[::2]), "contiguous"),
    (dict(x=torch.ones(2, 3), token_mask=torch.ones(3, dtype=torch.bool)), r"\[2\]"),
    (dict(x=torch.ones(2, 3), token_mask=torch.ones(2)), "bool"),
    (dict(x=torch.ones(2, 3), token_offset=-1), "token_offset"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_arguments_change_nothing(arguments, message):
    keys = arguments.get("keys")
    before = None if keys is None else keys.clone()
    with pytest.raises(InvalidInput, match=message) as error:
        ops.column_absmax(arguments.pop("x"), **arguments)
    assert "\n" not in str(error.value)
    assert keys is None or torch.equal(keys, before)


def test_an_explicit_backend_must_succeed_or_say_why(monkeypatch):
    x = torch.ones(2, 3)
    with pytest.raises(BackendUnavailable, match="unknown backend 'fast'.*reference, cpu"):
        ops.column_absmax(x, backend="fast")
    monkeypatch.setenv("SWKERNELS_BACKEND", "quick")
    with pytest.raises(SwkernelsError, match="SWKERNELS_BACKEND"):
        ops.column_absmax(x)
    if DEVICE == "cpu":
        monkeypatch.setenv("SWKERNELS_BACKEND", "cuda")
        with pytest.raises(BackendUnavailable, match="cannot run column_absmax"):
            ops.column_absmax(x)


def test_opcheck():
    op = torch.ops.swkernels.column_absmax.default
    x, keys = random(7, 5), ops.empty_keys(5, DEVICE)
    index = torch.tensor([0, -1, 1, 2, 3, 4, 5], device=DEVICE)
    for arguments in ((x, None, None, 0, None), (x, keys, index, 3, "reference")):
        torch.library.opcheck(op, arguments)


def test_compiles_without_a_break_and_gives_the_same_bits():
    def step(x, keys):
        return ops.column_absmax(x, keys, token_offset=0)

    x, keys, compiled_keys = random(50, 20), ops.empty_keys(20, DEVICE), ops.empty_keys(20, DEVICE)
    step(x, keys)
    torch.compile(step, fullgraph=True, backend="aot_eager")(x, compiled_keys)
    assert torch.equal(keys, compiled_keys)


def test_more_than_2_to_the_31_elements():
    """One row repeated by a zero stride: 2^31 + elements without their memory."""
    channels = 4096
    row = random(1, channels, torch.float16, seed=7)
    x = row.expand(2**31 // channels + 5, channels).view(-1, channels)
    assert x.numel() > 2**31
    keys = ops.column_absmax(x)
    values, tokens = ops.peaks(keys)
    assert torch.equal(values, row[0].abs().float()) and int(tokens.max()) == 0
