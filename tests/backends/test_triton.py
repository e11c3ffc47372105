"""The Triton kernels against the reference: on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from swkernels import tuning
from swkernels.backends import triton as backend
from swkernels.backends.reference import column_absmax as reference
from swkernels.backends.triton import column_absmax as column
from swkernels.backends.triton import glu_absmax as glu
from swkernels.backends.triton import launch
from swkernels.backends.triton import linear_absmax as linear
from swkernels.errors import BackendUnavailable, InvalidInput

# NumPy warns where the interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = (torch.float32, torch.float16, torch.bfloat16)
MULTIPLIED = (torch.float32, torch.float16)  # the interpreter cannot multiply bfloat16
REFERENCE_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
}


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def integers(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype).to(DEVICE)


def no_keys(channels):
    return torch.zeros(channels, dtype=torch.int64, device=DEVICE)


def index_of(values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def ragged_index(tokens, seed=0):
    """Token indices in no order, some of them shared, about a third of them negative."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-tokens // 3 - 1, tokens, (tokens,), generator=generator)
    return index.to(DEVICE)


def expected_keys(values, token_index=None, token_offset=0, keys=None):
    keys = no_keys(values.shape[1]) if keys is None else keys.clone()
    reference.column_absmax(values, keys, token_index, token_offset)
    return keys


def error(ours, exact):
    return (ours.double() - exact).abs().max().item()


# --- column_absmax ---


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (63, 17), (130, 33), (257, 1)], ids=str)
def test_column_absmax_equals_the_reference(shape, dtype):
    x = normal(*shape, dtype=dtype)
    keys = no_keys(shape[1])
    column.column_absmax(x, keys, None, 0)
    assert torch.equal(keys, expected_keys(x))


def test_column_absmax_by_hand():
    """Keys written out with struct, for every value that a float32 can surprise with."""
    tiny, nan, negative_nan = 1e-45, 0x7FC00000, 0xFFA00001

    def floats(*patterns):
        raw = [
            p if isinstance(p, int) else struct.unpack("<I", struct.pack("<f", p))[0]
            for p in patterns
        ]
        signed = torch.tensor(raw, dtype=torch.int64).to(torch.int32)
        return signed.view(torch.float32)

    columns = [
        (floats(1.0, -2.0, 2.0, 0.5), 0x40000000, 1),  # a tie goes to the earliest
        (floats(0.0, -0.0, 0.0, -0.0), 0, 0),
        (floats(-0.0, 0.0, -tiny, tiny), 1, 2),  # subnormal numbers count
        (floats(3.0, float("-inf"), float("inf"), 9e37), 0x7F800000, 1),
        (floats(float("inf"), 1.0, negative_nan, nan), 0x7FC00000, 2),  # NaN wins, made canonical
        (floats(nan, 0x7FFFFFFF, 0.0, 0.0), 0x7FC00000, 0),  # whatever its payload
    ]
    x = torch.stack([values for values, _, _ in columns], 1).to(DEVICE)
    keys = no_keys(len(columns))
    column.column_absmax(x, keys, None, 7)
    expected = [(bits << 32) | (0xFFFFFFFF - 7 - token) for _, bits, token in columns]
    assert keys.tolist() == expected


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_column_absmax_of_extreme_half_values(dtype):
    limits = torch.finfo(dtype)
    special = [float("nan"), float("inf"), -float("inf"), limits.max, limits.tiny, 0.0, -0.0]
    special.append(limits.smallest_normal / 4)
    x = torch.tensor([special, special[::-1], [1.0] * 8], dtype=dtype, device=DEVICE)
    keys = no_keys(8)
    column.column_absmax(x, keys, None, 0)
    assert torch.equal(keys, expected_keys(x))


def test_column_absmax_leaves_out_negative_rows_even_if_they_are_nan():
    x = normal(37, 40)
    index = ragged_index(37)
    x[index < 0] = float("nan")
    keys = no_keys(40)
    column.column_absmax(x, keys, index, 11)
    assert torch.equal(keys, expected_keys(x, index, 11))
    assert (keys >> 32 < 0x7F800000).all()


def test_column_absmax_with_no_row_that_counts_changes_nothing():
    keys = torch.arange(5, device=DEVICE)  # 0: nothing seen, and it must stay so
    column.column_absmax(normal(9, 5), keys, index_of([-1, -7, -2] * 3), 11)
    column.column_absmax(normal(0, 5), keys, None, 0)
    column.column_absmax(normal(3, 0), no_keys(0), None, 0)
    assert torch.equal(keys, torch.arange(5, device=DEVICE))


@pytest.mark.parametrize("offset", [0, 2**31 - 20, 2**31 + 7, 2**32 - 30])
def test_column_absmax_with_large_offsets(offset):
    x, index = integers(30, 19), torch.arange(30, device=DEVICE)
    for token_index in (None, index):
        keys = no_keys(19)
        column.column_absmax(x, keys, token_index, offset)
        assert torch.equal(keys, expected_keys(x, token_index, offset))


def test_column_absmax_continues_running_keys_in_any_split():
    x = integers(90, 21)  # few values, many ties
    whole = expected_keys(x)
    keys = no_keys(21)
    for start, stop in ((64, 90), (0, 1), (1, 64), (0, 90)):
        column.column_absmax(x[start:stop], keys, None, start)
    assert torch.equal(keys, whole)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x[:, 3:40],
        lambda x: x.t(),
        lambda x: x[:, ::3],
        lambda x: x[:1].expand(25, -1),
        lambda x: x.flip(0)[5:],
    ],
)
def test_column_absmax_takes_any_strides(view):
    x = view(normal(60, 60))
    keys = no_keys(x.shape[1])
    column.column_absmax(x, keys, None, 0)
    assert torch.equal(keys, expected_keys(x))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_column_absmax_property(data):
    T, C = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(ALL))
    seed = data.draw(st.integers(0, 99))
    x = integers(T, C, dtype=dtype, seed=seed)
    index = ragged_index(T, seed) if T and data.draw(st.booleans()) else None
    offset = data.draw(st.integers(0, 2**32 - 1 - T))
    keys = expected_keys(integers(4, C, seed=seed + 1), None, 0)
    expected = expected_keys(x, index, offset, keys)
    column.column_absmax(x, keys, index, offset)
    assert torch.equal(keys, expected)


# --- linear_absmax ---


def run_linear(x, weight, bias=None, token_index=None, token_offset=0, **options):
    in_keys, out_keys = no_keys(x.shape[1]), no_keys(weight.shape[0])
    function = linear.fused_linear_absmax if "descriptors" in options else linear.linear_absmax
    y = function(x, weight, bias, in_keys, out_keys, token_index, token_offset, **options)
    return y, in_keys, out_keys


def check_linear(x, weight, bias=None, token_index=None, token_offset=0, **options):
    y, in_keys, out_keys = run_linear(x, weight, bias, token_index, token_offset, **options)
    assert y.dtype == x.dtype and y.shape == (x.shape[0], weight.shape[0])
    assert torch.equal(in_keys, expected_keys(x, token_index, token_offset))
    assert torch.equal(out_keys, expected_keys(y, token_index, token_offset))
    return y


SHAPES = [(1, 1, 1), (1, 17, 100), (63, 40, 72), (17, 1, 33), (50, 72, 24), (33, 16, 1)]


@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_fused_linear_on_integers_equals_pytorch(shape, dtype, biased):
    T, D, H = shape
    x, weight = integers(T, H, dtype=dtype), integers(D, H, dtype=dtype, seed=1)
    bias = integers(D, dtype=dtype, seed=2) if biased else None
    y = check_linear(x, weight, bias, fused=True)
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
@pytest.mark.parametrize("descriptors", [False, True])
def test_fused_linear_is_as_exact_as_pytorch(dtype, descriptors):
    if descriptors and DEVICE == "cuda" and not linear._has_descriptors(torch.device("cuda", 0)):
        pytest.skip("this GPU has no tensor memory accelerator")
    x, weight = normal(45, 120, dtype=dtype), normal(56, 120, dtype=dtype, seed=1)
    bias = normal(56, dtype=dtype, seed=2)
    exact = F.linear(x.double(), weight.double(), bias.double())
    if descriptors and dtype == torch.float32 and DEVICE == "cuda":
        pytest.skip("float32 without TF32 has no descriptor configuration")
    y = check_linear(x, weight, bias, descriptors=descriptors)
    assert error(y, exact) <= 2 * error(F.linear(x, weight, bias), exact)


@pytest.mark.parametrize("descriptors", [False, True])
def test_descriptors_and_pointers_agree_with_masked_tokens(descriptors):
    if descriptors and DEVICE == "cuda" and not linear._has_descriptors(torch.device("cuda", 0)):
        pytest.skip("this GPU has no tensor memory accelerator")
    x, weight = integers(39, 64, dtype=torch.float16), integers(24, 64, dtype=torch.float16)
    index = ragged_index(39)
    x[index < 0] = float("nan")
    y = check_linear(x, weight, None, index, 2**31 + 5, descriptors=descriptors)
    assert torch.equal(y.isnan().all(1), index < 0)


def test_rows_past_the_end_do_not_count():
    """Behind a short tile stand zeros (descriptors) or repeats; with a bias they are not 0."""
    x, weight, bias = torch.zeros(3, 16), torch.zeros(8, 16), torch.full((8,), 5.0)
    x, weight, bias = (tensor.to(DEVICE) for tensor in (x, weight, bias))
    _, _, out_keys = run_linear(x, weight, bias, index_of([-1, -1, -1]), fused=True)
    assert torch.equal(out_keys, no_keys(8))
    _, _, out_keys = run_linear(x, weight, bias, index_of([4, 3, 4]), fused=True)
    assert ((0xFFFFFFFF - (out_keys & 0xFFFFFFFF)) == 3).all()


def test_fused_linear_takes_any_strides():
    x = integers(80, 70)[::2, 4:]
    weight = integers(66, 30, seed=1).t()
    y = check_linear(x, weight, fused=True)
    assert torch.equal(y, F.linear(x, weight))


def test_linear_with_only_the_peaks_that_are_wanted():
    x, weight = integers(20, 40), integers(24, 40, seed=1)
    for wanted_in, wanted_out in ((True, False), (False, True), (False, False)):
        in_keys = no_keys(40) if wanted_in else None
        out_keys = no_keys(24) if wanted_out else None
        for fused in (True, False):
            y = linear.linear_absmax(x, weight, None, in_keys, out_keys, None, 0, fused=fused)
            assert torch.equal(y, F.linear(x, weight))
        assert not wanted_in or torch.equal(in_keys, expected_keys(x))
        assert not wanted_out or torch.equal(out_keys, expected_keys(y))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(0, 8, 16), (5, 8, 0), (5, 0, 16)], ids=str)
def test_linear_of_nothing(shape, fused):
    T, D, H = shape
    bias = integers(D)
    y = check_linear(integers(T, H), integers(D, H), bias, fused=fused)
    assert torch.equal(y, bias.expand(T, D))


def test_infinite_and_nan_products_reach_the_peaks():
    x, weight = integers(5, 16), torch.eye(16, device=DEVICE)
    x[2, 3], x[3, 3], x[1, 4] = float("inf"), 1e38, float("nan")
    weight = weight * 2
    y, in_keys, out_keys = run_linear(x, weight, fused=True)
    assert torch.equal(in_keys, expected_keys(x))
    assert torch.equal(out_keys, expected_keys(y))
    assert out_keys[4].item() >> 32 == 0x7FC00000  # NaN times 2
    assert out_keys[0].item() >> 32 == 0x7FC00000  # infinity times 0


def test_two_pass_takes_bfloat16_and_is_the_default_without_a_record(monkeypatch, tmp_path):
    monkeypatch.setenv("SWKERNELS_TUNING", str(tmp_path))
    monkeypatch.setattr(linear, "linear_absmax_kernel", None)
    x, weight = normal(20, 30, dtype=torch.bfloat16), normal(18, 30, dtype=torch.bfloat16, seed=1)
    y = check_linear(x, weight)
    assert torch.equal(y, F.linear(x, weight))


def test_a_measured_record_decides_for_its_shape(monkeypatch, tmp_path):
    """A record of this device takes the fused kernel at its shape and bucket, nowhere else."""
    config = {"BLOCK_T": 16, "BLOCK_D": 32, "BLOCK_H": 16, "GROUP_T": 1}
    record = {"op": "linear_absmax", "dtypes": ["float32"], "rows": 40, "columns": 48}
    record |= {"tokens": 64, "variant": "pointers", "config": config}
    device_name = launch.names(
        torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    )[0]
    content = {
        "schema": tuning.SCHEMA,
        "device": device_name,
        "measured": True,
        "records": [record],
    }
    (tmp_path / "mine.json").write_text(json.dumps(content))
    monkeypatch.setenv("SWKERNELS_TUNING", str(tmp_path))
    launched = []
    monkeypatch.setattr(linear, "fused_linear_absmax", lambda *a, **o: launched.append(o))
    weight = integers(40, 48)
    for tokens in (17, 64):
        linear.linear_absmax(integers(tokens, 48), weight, None, None, None, None, 0)
    assert launched == [{"descriptors": False}] * 2
    for tokens in (16, 65):
        y = linear.linear_absmax(integers(tokens, 48), weight, None, None, None, None, 0)
        assert torch.equal(y, F.linear(integers(tokens, 48), weight))
    assert len(launched) == 2


def test_fused_and_two_pass_agree_on_integers():
    x, weight = integers(37, 48, dtype=torch.float16), integers(40, 48, dtype=torch.float16)
    fused = run_linear(x, weight, token_index=ragged_index(37), token_offset=3, fused=True)
    again = run_linear(x, weight, token_index=ragged_index(37), token_offset=3, fused=True)
    two_pass = run_linear(x, weight, token_index=ragged_index(37), token_offset=3, fused=False)
    for one, same, other in zip(fused, again, two_pass, strict=True):
        assert torch.equal(one, same)
        assert torch.equal(one, other)


def test_descriptors_are_refused_with_the_reason():
    x, weight = normal(8, 17), normal(16, 17)
    with pytest.raises(BackendUnavailable, match=r"16 bytes.*\(17, 1\).*descriptors=False"):
        run_linear(x, weight, descriptors=True)
    assert linear._describable(normal(8, 16), normal(4, 16))
    assert not linear._describable(normal(8, 16), normal(3, 16))  # rows of y
    assert not linear._describable(normal(8, 20)[:, 1:17], normal(4, 16))  # base
    assert not linear._describable(normal(16, 8).t(), normal(4, 16))
    assert not linear._describable(normal(1, 16).expand(8, 16), normal(4, 16))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU multiplies bfloat16")
def test_the_interpreter_refuses_to_multiply_bfloat16():
    x = normal(4, 16, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match="interpreter cannot multiply bfloat16"):
        run_linear(x, x, fused=True)


def test_float32_is_multiplied_as_tf32_only_if_pytorch_does():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        assert linear._multiplied(torch.float32) == "tfloat32"
        assert linear._multiplied(torch.float16) == "float16"
        matmul.allow_tf32 = False
        assert linear._multiplied(torch.float32) == "float32"
    finally:
        matmul.allow_tf32 = before


# --- glu_absmax ---


@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
def test_glu_absmax_is_as_exact_as_pytorch(activation, dtype):
    gate, up = 3 * normal(37, 45, dtype=dtype), normal(37, 45, dtype=dtype, seed=1)
    act = REFERENCE_ACTIVATIONS[activation]
    exact = act(gate.double()) * up.double()
    keys = no_keys(45)
    h = glu.glu_absmax(gate, up, activation, keys, None, 5)
    assert h.dtype == dtype and h.is_contiguous()
    assert error(h, exact) <= 2 * error(act(gate) * up, exact)
    assert torch.equal(keys, expected_keys(h, None, 5))


def test_glu_absmax_rounds_once():
    """relu is exact, so h is the rounded product, which rounding twice would miss."""
    gate, up = normal(40, 64, dtype=torch.float16).abs(), normal(40, 64, dtype=torch.float16)
    h = glu.glu_absmax(gate, up, "relu", None, None, 0)
    assert torch.equal(h, (gate.float() * up.float()).half())


def test_glu_absmax_of_both_halves_of_a_fused_projection():
    both, index = normal(50, 66), ragged_index(50)
    gate, up = both.chunk(2, dim=1)
    keys = expected_keys(normal(3, 33, seed=9))
    expected = keys.clone()
    h = glu.glu_absmax(gate, up, "silu", keys, index, 2)
    assert torch.equal(h, glu.glu_absmax(gate.contiguous(), up.contiguous(), "silu", None, None, 0))
    assert torch.equal(keys, expected_keys(h, index, 2, expected))


@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
def test_glu_absmax_of_special_values(activation):
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 88.0, -200.0, 1e-45]
    gate = torch.tensor(special, device=DEVICE).repeat_interleave(8)[None].expand(3, -1)
    up = torch.tensor(special, device=DEVICE).repeat(8)[None].expand(3, -1)
    keys = no_keys(64)
    h = glu.glu_absmax(gate, up, activation, keys, None, 0)
    expected = REFERENCE_ACTIVATIONS[activation](gate) * up
    assert torch.equal(h.isnan(), expected.isnan())
    assert torch.equal(h.isinf(), expected.isinf())
    assert torch.equal(keys, expected_keys(h))


def test_glu_absmax_of_nothing_and_of_an_unknown_activation():
    keys = no_keys(4)
    assert glu.glu_absmax(normal(0, 4), normal(0, 4), "silu", keys, None, 0).shape == (0, 4)
    assert torch.equal(keys, no_keys(4))
    with pytest.raises(InvalidInput, match="silu, gelu, gelu_tanh, relu, got 'mish'"):
        glu.glu_absmax(normal(2, 4), normal(2, 4), "mish", None, None, 0)


# --- what the backend says of itself ---


def test_supports_says_why_not():
    x = normal(2, 3)
    assert column.supports(x) is None
    assert linear.supports(x, normal(4, 3), None) is None
    assert glu.supports(x, x, "silu") is None
    assert "got torch.float64" in column.supports(x.double())
    assert "torch.float16" in linear.supports(x, normal(4, 3, dtype=torch.float16), None)
    assert "CUDA" in column.supports(torch.empty(2, 3, device="meta"))


def run_python(code, **environment):
    keep = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=keep | environment, capture_output=True, text=True
    )


def test_the_package_imports_without_triton_and_says_what_is_missing():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'triton' else find(name)\n"
        "from swkernels.backends import triton as backend\n"
        "print(backend.available())"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "pip install triton" in result.stdout


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_backend_asks_for_the_interpreter(monkeypatch):
    assert backend.available() is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in backend.available()
    assert "got one on cpu" in column.supports(normal(2, 3))
