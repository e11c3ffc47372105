from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.errors import InvalidInput
from swkernels.ops.quantize_activation import _int_mm

from .backends_here import DEVICE, DTYPES, runnable
from .listed import integers, normal
from .packed import assert_packed, expected, heavy, quantize

backends = pytest.mark.parametrize("backend", runnable("block_quantize"))
SIZES = [(1, 64, 32), (17, 37, 13), (40, 130, 24), (16, 8, 8)]  # T, H, D

# NumPy warns where Triton's interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def activation(T, H, dtype=torch.float32, seed=0, channel=3):
    """Activations with a channel that is far beyond the others."""
    x = normal(T, H, seed=seed)
    x[:, channel] *= 300
    return x.to(dtype)


def signed_codes(packed):
    return packed.codes.view(torch.int8).view(packed.plan.rows, packed.plan.columns)


@backends
@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales(backend, dtype, per):
    block = {"token": "row", "tensor": "tensor"}[per]
    for T, H, _ in SIZES:
        x = activation(T, H, dtype)
        packed = ops.quantize_activation(x, per=per, backend=backend)
        assert_packed(packed, expected(x, "int8", True, block), "int8")
        # By the word: one scale a token or one, the largest magnitude over 127.
        most = x.float().abs().amax(1) if per == "token" else x.float().abs().max()[None]
        assert torch.equal(packed.scales, most / 127)
        steps = x.double() / packed.scales.double()[:, None]
        assert (signed_codes(packed) - steps).abs().max() <= 0.5 + 1e-5


@backends
@pytest.mark.parametrize("per", ["token", "tensor"])
def test_the_super_activation_comes_back_exactly_and_widens_no_range(backend, per):
    for dtype, shape in itertools.product(DTYPES, ((1, 64), (17, 37), (2, 3, 40))):
        x = activation(1, shape[-1], dtype).expand(*shape).contiguous()
        x = (x.float() * normal(*shape, seed=1)).to(dtype)
        packed = ops.quantize_activation(x, super_activation=3, per=per, backend=backend)
        back = ops.block_dequantize(packed, backend=backend)
        assert back.dtype == dtype and back.shape == shape
        assert torch.equal(back[..., 3], x[..., 3])
        others = x.float().clone()
        others[..., 3] = 0
        rows = others.reshape(-1, shape[-1])
        most = rows.abs().amax(1) if per == "token" else rows.abs().max()[None]
        assert torch.equal(packed.scales, most / 127)
        # What stands in its place meanwhile, such as the median, makes no difference.
        median = x.clone()
        median[..., 3] = x.float().median().to(dtype)
        plain = ops.quantize_activation(median, per=per, backend=backend)
        assert torch.equal(plain.scales, packed.scales)
        different = signed_codes(plain) != signed_codes(packed)
        different[:, 3] = False
        assert not different.any() and not signed_codes(packed)[:, 3].any()


@backends
def test_several_channels_and_single_places(backend):
    x = activation(20, 48)
    packed = ops.quantize_activation(x, super_activation=[40, 3, 3], backend=backend)
    wanted = sorted(48 * token + channel for token in range(20) for channel in (3, 40))
    assert packed.positions.tolist() == wanted
    places = torch.tensor([[19, 47], [2, 3]], device=DEVICE)
    packed = ops.quantize_activation(x, super_activation=places, backend=backend)
    assert packed.positions.tolist() == [2 * 48 + 3, 19 * 48 + 47]
    for nothing in (None, [], ()):
        assert not len(ops.quantize_activation(x, super_activation=nothing).positions)
    assert len(ops.quantize_activation(x[:, :8], super_activation=3).positions) == 20


def test_integer_sums_are_exact():
    for T, H, D in (*SIZES, (0, 8, 8), (8, 0, 8), (8, 8, 0), (1, 1, 1), (3, 4097, 5)):
        a, b = (
            torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(H))
            for shape in ((T, H), (D, H))
        )
        a[:1], b[:1] = -128, 127  # the largest sum
        packed = (t.to(torch.int8).view(torch.uint8).to(DEVICE) for t in (a, b))
        sums = _int_mm(*packed)
        assert sums.dtype == torch.int32 and torch.equal(sums.long().cpu(), a @ b.T)


def arguments(T, H, D, dtype=torch.float32, seed=0):
    """x, packed with a super activation, and a weight, packed with outliers."""
    x = activation(T, H, dtype, seed)
    w = heavy(D, H, seed=seed + 1)
    places = torch.tensor([[0, 3], [D - 1, H - 1], [D // 2, 5]], device=DEVICE).unique(dim=0)
    return x, w, places


def product(x, q, bias=None):
    """x W^T + bias of two packed matrices, in float64, and the sums of the magnitudes."""
    left, right = x.dequantize(torch.float32).double(), q.dequantize(torch.float32).double()
    left = left.view(-1, left.shape[-1])
    total, size = left @ right.T, left.abs() @ right.abs().T
    if bias is not None:
        total, size = total + bias.double(), size + bias.double().abs()
    return total, size


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_is_that_of_the_dequantized_operands(dtype, size):
    T, H, D = size
    x, w, places = arguments(*size, dtype)
    bias = normal(D, seed=9)
    for block, per, super_activation, scale_dtype in itertools.product(
        ("row", "tensor"), ("token", "tensor"), (None, 3, [3, 5]), ("float32", "float16")
    ):
        if H < 16 and super_activation == [3, 5]:
            continue
        qx = ops.quantize_activation(x, super_activation=super_activation, per=per)
        for outliers in (None, places):
            q = quantize(w, "int8", True, block, None, scale_dtype, outliers=outliers)
            for b in (None, bias):
                y = ops.quant_linear(qx, q, b)
                exact, magnitude = product(qx, q, b)
                assert y.shape == (T, D) and y.dtype == dtype
                unit = torch.finfo(dtype).eps if dtype != torch.float32 else 0
                bound = exact.abs() * unit + magnitude * 2.0**-21
                bound += torch.finfo(dtype).smallest_normal
                assert ((y.double() - exact).abs() <= bound).all()


def test_whole_numbers_are_exact():
    """Scales of 1: integer sums, outliers and super activations, and the bias, to the last bit."""
    x, w = integers(20, 50), integers(12, 50, seed=1)
    x[:, 0], w[:, 0] = 127, -127
    x[:, 7] = 1000
    w[3, 7], w[3, 9] = 5000, -4000
    places = torch.tensor([[3, 7], [3, 9]], device=DEVICE)
    bias = integers(12, seed=2)
    exact = x.double() @ w.double().T + bias.double()
    for per, block in itertools.product(("token", "tensor"), ("row", "tensor")):
        qx = ops.quantize_activation(x, super_activation=7, per=per)
        q = quantize(w, "int8", True, block, outliers=places)
        assert torch.equal(qx.dequantize(), x) and torch.equal(q.dequantize(), w)
        assert torch.equal(ops.quant_linear(qx, q, bias).double(), exact)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    T, H, D = draw(st.integers(0, 40)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    x, w = normal(T, H, seed=T), normal(D, H, seed=D)
    count = draw(st.integers(0, min(16, T * H)))
    flat = torch.randperm(T * H, generator=torch.Generator().manual_seed(H))[:count].to(DEVICE)
    places = torch.stack([flat // H, flat % H], 1) if count else None
    qx = ops.quantize_activation(
        x, super_activation=places, per=draw(st.sampled_from(["token", "tensor"]))
    )
    q = quantize(
        w, "int8", True, draw(st.sampled_from(["row", "tensor"])),
        largest=draw(st.integers(0, min(16, D * H))),
    )  # fmt: skip
    exact, magnitude = product(qx, q)
    y = ops.quant_linear(qx, q)
    assert y.shape == (T, D) and ((y.double() - exact).abs() <= magnitude * 2.0**-20).all()


def test_batches_and_twice_the_same():
    x, w, places = arguments(24, 40, 9)
    q = quantize(w, "int8", True, "row", outliers=places)
    flat = ops.quant_linear(ops.quantize_activation(x, super_activation=3), q)
    batched = ops.quantize_activation(x.view(2, 3, 4, 40), super_activation=3)
    y = ops.quant_linear(batched, q)
    assert y.shape == (2, 3, 4, 9) and torch.equal(y.view(24, 9), flat)
    assert torch.equal(y, ops.quant_linear(batched, q)) and not y.requires_grad


def test_autocast_changes_nothing():
    x, w, places = arguments(20, 40, 9)
    q = quantize(w, "int8", True, "row", outliers=places)
    packed = ops.quantize_activation(x, super_activation=3)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = ops.quant_linear(packed, q, normal(9))
    assert torch.equal(y, ops.quant_linear(packed, q, normal(9)))


def test_setting_a_super_activation_aside_is_worth_it():
    """One channel is 300 times the others: most of the activations' error goes with it."""
    x, w = activation(64, 256), normal(32, 256, seed=1)
    q = quantize(w, "int8", True, "row")
    exact = x.double() @ q.dequantize().double().T
    errors = [
        (ops.quant_linear(ops.quantize_activation(x, super_activation=channel), q) - exact).norm()
        for channel in (None, 3)
    ]
    assert errors[1] < errors[0] / 10


NAN = float("nan")


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(per="row"), "per must be 'token' or 'tensor', got 'row'"),
        (dict(super_activation=16), r"channels in \[0, 16\).*got 16"),
        (dict(super_activation=-1), r"channels in \[0, 16\).*got -1"),
        (dict(super_activation=[1, 2.0]), "got 2.0"),
        (dict(super_activation=True), "got True"),
        (dict(super_activation=1.5), "got 1.5"),
        (dict(super_activation="3"), "got '3'"),
        (dict(super_activation=torch.tensor([3])), r"\[k, 2\]"),
        (dict(super_activation=torch.tensor([[4, 0]])), r"\[4, 0\] lies outside .* \[4, 16\]"),
        (dict(super_activation=torch.tensor([[0, 16]])), "lies outside"),
        (dict(super_activation=torch.tensor([[0, 1], [0, 1]])), r"\[0, 1\] is listed more than"),
        (dict(super_activation=list(range(8))), "32 outliers of 64 elements"),
        (dict(x=normal(4, 16).double()), "x must be float32, bfloat16 or float16, got"),
        (dict(x=torch.zeros(4, 16, dtype=torch.int8)), "x must be"),
        (dict(x=[1.0], super_activation=0), "x must be a tensor, got list"),
        (dict(x=torch.tensor(1.0), super_activation=0), "got a scalar"),
        (dict(x=torch.full((4, 16), NAN)), r"nan at \[0, 0\]"),
        (dict(x=torch.full((4, 16), NAN), super_activation=0), r"nan at \[0, 0\]"),
    ],
)
def test_bad_activations(changes, says):
    with pytest.raises(InvalidInput, match=says) as error:
        ops.quantize_activation(**dict(x=heavy(4, 16)) | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(q=dict(code="int4")), "the weight must be symmetric int8 for a quantized activation"),
        (dict(q=dict(code="int8", symmetric=False)), "the weight must be symmetric int8"),
        (dict(q=dict(block=8)), "the weight must have block_size 'row' or 'tensor'"),
        (dict(q=dict(block=(1, 16))), "the weight must have block_size"),
        (dict(q=dict(block="channel")), "the weight must have block_size"),
        (dict(q=dict(w=heavy(3, 14), block=21)), r"the weight must have block_size .*\(0, 21\)"),
        (dict(x=dict(code="nf4")), "x must be symmetric int8"),
        (dict(x=dict(block=5)), "x must have block_size"),
        (dict(q=dict(w=heavy(3, 17))), r"x \[2, 16\] on .* does not go with a weight \[3, 17\]"),
        (dict(bias=torch.ones(4)), r"bias must be floating-point \[3\]"),
    ],
)
def test_bad_products(changes, says):
    made = [
        quantize(**dict(w=w, code="int8", block="row") | changes.get(name, {}))
        for name, w in (("x", heavy(2, 16)), ("q", heavy(3, 16)))
    ]
    with pytest.raises(InvalidInput, match=says) as error:
        ops.quant_linear(*made, changes.get("bias"))
    assert "\n" not in str(error.value)


def test_sums_that_int32_cannot_hold():
    one = torch.ones(1, 133_145, device=DEVICE)
    x, q = ops.quantize_activation(one), quantize(one, "int8", True, "row")
    with pytest.raises(InvalidInput, match="int32 sums hold 133144 columns at most, got 133145"):
        ops.quant_linear(x, q)
    within = one[:, :133_144]
    x, q = ops.quantize_activation(within), quantize(within, "int8", True, "row")
    assert abs(ops.quant_linear(x, q).item() - 133_144) < 0.05
