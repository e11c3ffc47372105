from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.backends import cpu
from swkernels.errors import BackendUnavailable, InvalidInput

from .listed import Allocations

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)
missing = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
BACKENDS = ["reference", pytest.param("cpu", marks=missing)]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(*shape, dtype=torch.float32, seed=0, most=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def expected(tensors, k):
    """The definition in NumPy: (values, tensor, row, column) of the k first of all, sorted."""
    rows = [tensor if tensor.dim() == 2 else tensor[None] for tensor in tensors]
    values = np.concatenate([t.double().contiguous().numpy().ravel() for t in rows])
    tensor = np.repeat(np.arange(len(rows)), [t.numel() for t in rows])
    row = np.concatenate([np.arange(t.numel()) // max(1, t.shape[1]) for t in rows])
    column = np.concatenate([np.arange(t.numel()) % max(1, t.shape[1]) for t in rows])
    # The lists are in the order of tensor, row, column, and the sort is stable.
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    return [torch.from_numpy(found[order]) for found in (values, tensor, row, column)]


def check(tensors, k, backend=None, dtype=torch.float32, want=None):
    """`want`: what is ``expected`` of at least k, where it is known."""
    found = ops.topk_abs(tensors, k, backend=backend)
    want = [theirs[:k] for theirs in want or expected(tensors, k)]
    for name, ours, theirs in zip(found._fields, found, want, strict=True):
        assert torch.equal(ours.to(theirs.dtype), theirs), name
    assert found.values.dtype == dtype
    assert torch.equal(found.values.signbit(), want[0].signbit())  # of zeros too
    assert all(t.is_contiguous() for t in found)
    return found


def specials(dtype):
    """Zeros of both signs, denormals, the largest numbers and, where there are, infinities."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    values = [0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 2, info.max, info.min, 1.0, -1.0]
    if dtype != torch.float8_e4m3fn:
        values += [math.inf, -math.inf]
    values = torch.tensor(values, dtype=torch.float64).to(dtype)
    index = torch.randint(len(values), (13, 77), generator=torch.Generator().manual_seed(1))
    return values.view(torch.uint8).view(len(values), -1)[index].flatten(1).view(dtype)


TENSORS = {
    "random": [normal(33, 70), normal(5, 129, seed=1), normal(1, 1, seed=2)],
    "ties": [whole(40, 90), whole(7, 65, seed=1), whole(40, 90)],
    "equal": [torch.ones(9, 70), -torch.ones(9, 90)],
    "zeros": [torch.zeros(9, 70), -torch.zeros(3, 90)],
    "every type": [
        *(normal(20, 70, dtype=dtype, seed=i) for i, dtype in enumerate((*FLOATS, *EIGHTS))),
        *(whole(20, 70, dtype=dtype, seed=i) for i, dtype in enumerate((*EIGHTS, *FLOATS))),
    ],
    **{f"specials of {dtype}": [specials(dtype)] for dtype in (*FLOATS, *EIGHTS)},
    "specials of all": [specials(dtype) for dtype in (*FLOATS, *EIGHTS)],
    "vectors": [normal(100), normal(3, 4, seed=1), normal(1, seed=2), normal(0)],
    "empty": [normal(0, 5), normal(4, 0), normal(2, 3), normal(0, 0), normal(3, 5, seed=1)],
    "transposed": [whole(70, 33).T, whole(33, 70, seed=1), whole(130, 90, dtype=EIGHTS[1]).T],
    "strided": [
        whole(60, 90)[::2, 1::3],
        whole(60, 90, seed=1).T[::2],
        whole(50, 90, seed=2)[:, 3:70],
        whole(90, 5, seed=3).T[:, ::2],
        whole(9, 1, seed=4).expand(9, 80),
        whole(1, 80, seed=5).expand(9, 80),
        whole(301, seed=6)[3::4],
        whole(4, 90, 4, seed=7)[:, :, 1],
    ],
}  # fmt: skip


@pytest.fixture
def threads():
    """Sets how many threads compute; they are as before in the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("k", [0, 1, 7, 100, 2310, 10**6])
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_definition(backend, name, k):
    check(TENSORS[name], k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_entries_and_one_less(backend):
    total = sum(t.numel() for t in TENSORS["ties"])
    for k in (total - 1, total, total + 1):
        assert len(check(TENSORS["ties"], k, backend).values) == min(k, total)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_those_of_torch_topk(backend):
    w = normal(700, 900)
    found = ops.topk_abs(w, 1000, backend=backend)
    assert torch.equal(found.values.abs(), w.abs().flatten().topk(1000).values)
    assert torch.equal(w[found.row, found.column], found.values)
    assert not found.tensor.any()


@pytest.mark.parametrize("dtype", EIGHTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_of_8_bits(backend, dtype):
    x = torch.arange(256, dtype=torch.uint8).view(dtype)
    x = x[~x.float().isnan()][None]
    check([x], 256, backend)
    # Beside float32, to which they compare.
    near = torch.nextafter(x.float(), torch.tensor(0.0))
    check([x, x.float(), near], 700, backend)


def test_float64_and_other_types_have_the_reference():
    wide = [normal(30, 4, dtype=torch.float64) / 3, normal(4, 90, seed=1)]
    check(wide, 20, dtype=torch.float64)
    assert ops.topk_abs(wide, 0).values.dtype == torch.float64
    for dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        check([normal(30, 70).to(dtype), normal(5, 5)], 50)
    for tensor in (wide[0], normal(3, 3).to(torch.float8_e5m2fnuz)):
        with pytest.raises(BackendUnavailable, match=r"cannot run topk_abs: .*float"):
            ops.topk_abs([normal(2, 2), tensor], 3, backend="cpu")


def test_the_reference_in_pieces(monkeypatch):
    """A row that is cut, rows that are not, and pieces beyond those that fill the list."""
    monkeypatch.setattr("swkernels.backends.reference.topk_abs._CHUNK", 64)
    for name in ("ties", "strided", "vectors", "empty", "every type"):
        check(TENSORS[name], 37, "reference")
    hurt = [whole(9, 100), whole(9, 30)]
    hurt[1][4, 29] = math.nan
    with pytest.raises(InvalidInput, match=r"tensor 1 holds NaN at \[4, 29\]"):
        ops.topk_abs(hurt, 5, backend="reference")


# Large inputs: a sample, several tasks and threads, lists that are cut.

LARGE = 700, 1200  # more than the 262,144 entries below which nothing is sampled
RISING = torch.arange(LARGE[0] * LARGE[1]).view(LARGE).float()


MADE = {
    "random": lambda: [normal(*LARGE)],
    "rising": lambda: [RISING],
    "falling": lambda: [RISING.flip(0, 1).contiguous()],
    "constant": lambda: [torch.full(LARGE, -2.0)],
    "few values": lambda: [whole(*LARGE, dtype=torch.bfloat16)],
    "float8": lambda: [normal(*LARGE).to(EIGHTS[0]), normal(*LARGE, seed=1).to(EIGHTS[1])],
    "transposed": lambda: [normal(*LARGE).T, RISING.T, torch.ones(LARGE).T],
    "transposed ties": lambda: [whole(*LARGE).T],
    "columns": lambda: [normal(LARGE[0], 2 * LARGE[1])[:, ::2]],
    "narrow": lambda: [whole(400_000, 2), whole(2, 400_000, seed=1).T],
    "one row": lambda: [normal(700_001)],
    "many": lambda: [normal(30, 50 + i, seed=i) for i in range(250)],
    "heavy": lambda: [normal(*LARGE) * (torch.arange(LARGE[0]) % 97 == 5)[:, None]],
    "infinite": lambda: [normal(*LARGE).div(0), normal(*LARGE, dtype=torch.float16)],
}


@missing
@pytest.mark.parametrize("name", MADE)
def test_large(name, threads):
    tensors = MADE[name]()
    want = expected(tensors, 60_000)
    for k in (3, 1000, 60_000):
        for count in (1, 2, 5):
            threads(count)
            check(tensors, k, "cpu", want=want)


@missing
@pytest.mark.parametrize("offset", range(0, 4096, 128))
def test_a_sample_that_misleads(offset):
    """128 large entries side by side: where a sample meets them it expects far more of them."""
    x = normal(1, 1 << 18)
    x[:, 4096 + offset : 4096 + offset + 128] += 100
    check([x], 1000, "cpu")


@missing
def test_two_runs_are_equal(threads):
    threads(4)
    tensors = [whole(*LARGE, dtype=torch.float16), normal(*LARGE)]
    first = ops.topk_abs(tensors, 5000)
    for _ in range(5):
        again = ops.topk_abs(tensors, 5000)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@missing
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_with_ties(data):
    tensors = []
    for seed in range(data.draw(st.integers(1, 4))):
        D, H = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 200))
        dtype = data.draw(st.sampled_from((*FLOATS, *EIGHTS)))
        tensor = whole(D, H, dtype=dtype, seed=seed, most=data.draw(st.integers(0, 9)))
        kind = data.draw(st.sampled_from(["plain", "transposed", "columns", "rows"]))
        views = {"transposed": tensor.T, "columns": tensor[:, ::2], "rows": tensor[1::2]}
        tensors.append(views.get(kind, tensor))
    k = data.draw(st.integers(0, 3000))
    with pytest.MonkeyPatch.context() as patch:
        isas = [name for name in cpu.ISAS[1:] if cpu.library().swk_cpu_isa(cpu.ISAS.index(name))]
        patch.setenv("SWKERNELS_CPU_ISA", data.draw(st.sampled_from(isas)))
        check(tensors, k, "cpu")


@missing
def test_places_beyond_2_to_the_31():
    """Element (r, c) of 2^32 is that of r + c in memory."""
    base = torch.zeros(2**17 - 1, dtype=EIGHTS[1])
    base[-1], base[-2] = 3, -2
    last, small = 2**16 - 1, normal(4, 5) / 100
    found = ops.topk_abs([base.as_strided((2**16, 2**16), (1, 1)), small], 4, backend="cpu")
    assert found.values[:3].tolist() == [3, -2, -2]
    assert found.row[:3].tolist() == [last, last - 1, last]
    assert found.column[:3].tolist() == [last, last, last - 1]
    of_small = [part.item() for part in expected([small], 1)]
    assert [part[3].item() for part in found] == [of_small[0], 1, *of_small[2:]]


# NaN


@pytest.mark.parametrize("dtype", [*FLOATS, *EIGHTS], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_nan_is_named(backend, sign, dtype):
    tensors = [specials(dtype), normal(20, 90).to(dtype), normal(90, 20, seed=1).to(dtype).T]
    for number, row, column in ((2, 19, 89), (2, 0, 3), (1, 15, 0), (1, 3, 64), (0, 12, 76)):
        tensors[number][row, column] = sign * math.nan
        for k in (1, 5000):
            with pytest.raises(InvalidInput) as caught:
                ops.topk_abs(tensors, k, backend=backend)
            assert f"tensor {number} holds NaN at [{row}, {column}]" in str(caught.value)


@missing
@pytest.mark.parametrize("transposed", [False, True])
def test_the_first_nan_of_many(transposed, threads):
    x = normal(*LARGE)
    x[500:] = math.nan
    x[499, 1100:] = math.nan
    w = x.T.contiguous().T if transposed else x
    for count in (1, 2, 5):
        threads(count)
        with pytest.raises(InvalidInput, match=r"tensor 1 holds NaN at \[499, 1100\]"):
            ops.topk_abs([normal(*LARGE), w, w], 9, backend="cpu")


# What it takes and what it gives back.


def test_opens_no_gradient_and_takes_parameters():
    w = torch.nn.Parameter(normal(5, 7))
    assert not check([w.detach()], 3).values.requires_grad
    assert not ops.topk_abs([w], 3).values.requires_grad


def test_takes_an_iterator_and_negated_views():
    tensors = [normal(5, 7), normal(3, 2, seed=1)]
    found = ops.topk_abs(iter(tensors), 9)
    assert torch.equal(found.values, expected(tensors, 9)[0].float())
    negative = torch.view_as_complex(normal(5, 7, 2)).conj().imag
    assert negative.is_neg()
    assert torch.equal(ops.topk_abs(negative, 9).values, check([negative.clone()], 9).values)


@missing
def test_memory_is_that_of_k():
    tensors = [normal(1000, 2000), normal(1000, 2000).T]
    with Allocations() as made:
        ops.topk_abs(tensors, 100)
    assert max(made.sizes) <= 2 * 100


def test_breaks_the_graph_of_a_compiler():
    w = normal(64, 64)
    compiled = torch.compile(lambda x: ops.topk_abs(x, 5).values * 2, backend="eager")
    assert torch.equal(compiled(w), expected([w], 5)[0].float() * 2)


@pytest.mark.parametrize(
    "tensors, k, says",
    [
        ([], 1, "there are no tensors"),
        (normal(5, 7), -1, "k must be an integer from 0, got -1"),
        (normal(5, 7), 1.0, "k must be"),
        (normal(5, 7), True, "k must be"),
        ([normal(5, 7), [[1.0]]], 1, "tensor 1 must be a tensor, got list"),
        ([normal(5, 7), normal(2, 5, 7)], 1, r"tensor 1 .*got \[2, 5, 7\]; pass one matrix"),
        ([torch.tensor(1.0)], 1, r"got \[\]"),
        (torch.zeros(2, 7, dtype=torch.int8), 1, "tensor 0 .*got torch.int8; dequantize"),
        (torch.zeros(2, 7, dtype=torch.complex64), 1, "complex64"),
        ([normal(5, 7), normal(5, 7).to("meta")], 1, "tensor 1 is on meta, the first on cpu"),
        (normal(5, 7).to("meta"), 1, "holds values"),
        (normal(5, 7).to_sparse(), 1, "sparse_coo: expected a plain dense tensor"),
        (torch.zeros(2, 7, dtype=torch.uint8).view(torch.float8_e8m0fnu), 1, "float8_e8m0fnu"),
    ],
)  # fmt: skip
def test_bad_arguments(tensors, k, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        ops.topk_abs(tensors, k)
    assert "\n" not in str(caught.value)


def test_a_subclass_that_holds_codes_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(InvalidInput, match="tensor 1 is TwoTensor .*dequantize"):
        ops.topk_abs([normal(2, 2), TwoTensor(normal(2, 2), normal(2, 2))], 1)
