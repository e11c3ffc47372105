"""topk_abs in CUDA C++: the passes on the CPU's threads (see cuda_on_host/cuda_runtime.h), and the
search that they serve, which is the same on both. On a GPU where there is one."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch

from swkernels.backends import cuda
from swkernels.backends.cuda import topk_abs as topk
from swkernels.errors import InvalidInput

from .oracle import special_values

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (*FLOATS, *EIGHTS)
TILE = 16 << 10  # bytes that a block reads at a time

needs_gpu = pytest.mark.skipif(cuda.available() is not None, reason=str(cuda.available()))


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (scale * x).to(dtype)


def expected(tensors, k):
    """The definition in NumPy: values, places in their matrix, numbers of the matrices."""
    values = np.concatenate([t.float().contiguous().numpy().ravel() for t in tensors])
    place = np.concatenate([np.arange(t.numel()) for t in tensors])
    which = np.repeat(np.arange(len(tensors)), [t.numel() for t in tensors])
    order = np.lexsort((place, which, -np.abs(values.astype(np.float64))))[:k]
    return values[order], place[order], which[order]


def same(found, tensors, k):
    for ours, theirs in zip(found, expected(tensors, k), strict=True):
        assert np.array_equal(ours.cpu().numpy(), theirs)
    assert found[0].dtype == torch.float32
    assert np.array_equal(np.signbit(found[0].cpu().numpy()), np.signbit(expected(tensors, k)[0]))


class Recorder:
    """The library, and how often it counted a sample, counted all, and gathered."""

    def __init__(self, library):
        self.library, self.calls = library, Counter()

    def __getattr__(self, name):
        function = getattr(self.library, name)

        def called(*arguments):
            kind = name.removeprefix("swk_cuda_topk_abs_")
            if kind == "count":
                kind = "sample" if arguments[2] > 1 else "ties" if arguments[4] else "keys"
            self.calls[kind] += 1
            return function(*arguments)

        return called if name.startswith("swk_cuda_topk") else function


@pytest.fixture
def passes(host_library, monkeypatch):
    """The search takes the library for CPU threads; how often it made each pass."""
    recorder = Recorder(host_library)
    for module in (cuda, topk):
        monkeypatch.setattr(module, "library", lambda: recorder)
    return recorder.calls


@pytest.fixture
def small(monkeypatch):
    """Limits that small matrices reach: every second piece is sampled, and there is no room."""
    monkeypatch.setattr(topk, "_SAMPLED_FROM", 1)
    monkeypatch.setattr(topk, "_STEP", 2)
    monkeypatch.setattr(topk, "_ROOM", 0)


def search(tensors, k):
    return topk.search(tensors, k, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random(passes, dtype):
    columns = TILE // dtype.itemsize + 77  # two tiles a row where rows do not adjoin
    wide = random(3, columns + 40, dtype=dtype, scale=9.0)
    tensors = [wide[:, 5 : columns + 5], random(1, 3, dtype=dtype, seed=1), wide[1:, :9]]
    for k in (1, 100, sum(t.numel() for t in tensors)):
        same(search(tensors, k), tensors, k)
    assert passes == {"keys": 3, "gather": 3}  # too small for a sample, and nothing else is needed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_finds_the_bound(passes, small, dtype):
    tensors = [random(8, TILE // dtype.itemsize, dtype=dtype, seed=n) for n in range(2)]
    k = 300 if dtype in FLOATS else 2000  # types of 8 bits have many ties
    same(search(tensors, k), tensors, k)
    assert passes == {"sample": 1, "gather": 1}


def test_a_sample_with_all_the_small_ones(passes, small):
    """More lies above the guess than there is room for."""
    x = 100 * random(8, TILE // 2, dtype=torch.bfloat16, seed=1)
    x[::2] = random(4, TILE // 2, dtype=torch.bfloat16)  # what is sampled
    same(search([x], 500), [x], 500)
    assert passes == {"sample": 1, "gather": 2, "keys": 1}


def test_a_sample_with_all_the_large_ones(passes, small):
    """Fewer than k lie above the guess; those that fill up are zeros."""
    x = torch.zeros(8, TILE // 2, dtype=torch.bfloat16)
    x[::2, :100] = random(4, 100, dtype=torch.bfloat16)
    same(search([x], 500), [x], 500)
    assert passes == {"sample": 1, "gather": 2, "keys": 2, "ties": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 700])
def test_all_equal(passes, small, dtype, k):
    """O(k) memory, though every entry reaches the bound."""
    tensors = [torch.full((3, TILE // dtype.itemsize + 9), -1.5).to(dtype) for _ in range(2)]
    tensors[0][1] = 0.5
    same(search(tensors, k), tensors, k)
    assert passes["ties"] > 0 and passes["gather"] == 2


def test_equal_but_for_the_last_bits(passes, small):
    """float32 needs all three digits of a key, then the places."""
    bits = torch.full((4, 5000), 0x3F800000, dtype=torch.int32)
    bits += torch.randint(4, bits.shape, generator=torch.Generator().manual_seed(3)).int()
    x = bits.view(torch.float32)
    for k in (9, 600):
        same(search([x], k), [x], k)
    assert passes["keys"] == 6 and passes["ties"] > 0


@pytest.mark.parametrize("k", [1, 40, 9999, 55_555])
def test_without_any_room_the_bound_is_exact(passes, k):
    """Values a few bits apart, in bins that adjoin at each of the three digits of a key."""
    steps = torch.tensor([0, 1, 511, 512, 513, 1024, 1 << 19, 1 << 20, 1 << 21], dtype=torch.int32)
    picks = torch.randint(len(steps), (3, 30_000), generator=torch.Generator().manual_seed(5))
    bits = 0x3F800000 + steps[picks]
    low, last = topk._bound(topk._Passes([bits.view(torch.float32)], None), k, k)
    keys = bits.flatten().tolist()
    reached = {i for i, key in enumerate(keys) if key > low or (key == low and i <= last)}
    assert reached == set(sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:k])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values(passes, small, dtype):
    values = special_values(dtype)
    values = values[~values.isnan()]
    picks = torch.randint(len(values), (40, 130), generator=torch.Generator().manual_seed(4))
    x = values[picks]
    for k in (3, 2000, x.numel()):
        same(search([x], k), [x], k)
    assert search([x], 1)[0].isinf()


@pytest.mark.parametrize("dtype", EIGHTS, ids=str)
def test_every_value_of_8_bits(passes, dtype):
    x = torch.arange(256, dtype=torch.uint8).view(dtype)
    x = x[~x.float().isnan()][None]
    assert x.shape[1] == (254 if dtype == torch.float8_e4m3fn else 250)
    same(search([x], x.shape[1]), [x], x.shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_nan_is_named(passes, dtype):
    clean = random(5, 70, dtype=dtype)
    for bad, said in (
        ([(2, 69), (4, 0)], "tensor 2 holds NaN at [2, 69]: NaN cannot be ranked"),
        ([(0, 0)], "tensor 2 holds NaN at [0, 0]: NaN cannot be ranked"),
    ):
        x = clean.clone()
        for row, column in bad:
            x[row, column] = float("nan")
        with pytest.raises(InvalidInput, match=re.escape(said)):
            search([clean, clean[:0], x, x], 3)
    with pytest.raises(InvalidInput, match=r"tensor 0 .*\[0, 0\]"):
        search([torch.full((9, 999), -float("nan")).to(dtype)], 3)


def test_a_nan_of_the_sample_need_not_be_the_first(passes, small):
    x = random(8, TILE // 2, dtype=torch.bfloat16)
    x[3, 5] = x[4, 0] = float("nan")  # even rows are sampled
    with pytest.raises(InvalidInput, match=r"\[3, 5\]"):
        search([x], 300)
    assert passes == {"sample": 1, "gather": 1}


def test_a_nan_of_a_pass_that_ends_early_need_not_be_the_first(passes, small):
    """Of four blocks the first fills what room there is; one of its threads, which looks at zeros,
    goes on to its second row."""
    x = torch.ones(8, TILE // 2, dtype=torch.bfloat16)
    x.view(-1, 2048)[:, :8] = 0
    x[3, 9] = x[4, 0] = float("nan")
    with pytest.raises(InvalidInput, match=r"\[3, 9\]"):
        search([x], 1)
    assert passes == {"sample": 1, "gather": 1, "keys": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_start_any_stride_any_width(passes, dtype):
    data = random(4000, dtype=torch.float32, scale=3.0).to(dtype)
    tensors = [data[start : start + 99].view(3, 33) for start in range(0, 33)]
    tensors += [data.as_strided((5, width), (37, 1), width) for width in range(1, 20)]
    tensors += [data[:40][:, None], data[:60].view(20, 3)[:, 1:2], data[:9].expand(4, 9)]
    tensors += [data[:0].view(0, 7), data[:0].view(7, 0)]
    tensors += [data[5 : 5 + 7 * n].view(n, 7)[:, : 7 - n % 3].t() for n in (1, 2, 7, 33)]
    tensors += [data[:40].view(4, 10)[:, 3][None], data[:40].view(4, 10).t()[3:4]]
    for k in (50, 2500):
        same(search(tensors, k), tensors, k)


def test_types_together_and_more_matrices_than_a_launch_takes(passes):
    tensors = [random(2, 50, dtype=DTYPES[n % 5], seed=n) for n in range(5 * 66)]
    same(search(tensors, 777), tensors, 777)


def test_what_lies_around_the_rows_is_not_read(passes):
    padded = torch.full((6, 64), float("nan"), dtype=torch.float16)
    inner = padded[1:5, 3:50]
    inner.copy_(random(4, 47))
    same(search([inner], 20), [inner], 20)


def test_statuses(host_library):
    x = torch.ones(2, 3)
    state = torch.zeros(9, dtype=torch.int64)
    values, places = torch.zeros(9), torch.zeros(9, dtype=torch.int64)

    address, counts, found = x.data_ptr(), state.data_ptr(), values.data_ptr()

    def rows(dtype=0, D=2, H=3, data=address, strides=(3, 1)):
        return torch.tensor([[data, dtype, D, H, *strides]])

    good = rows()

    def count(given=good, n=1, step=1, low=0, first=0, shift=20, bins=8, out=counts):
        return host_library.swk_cuda_topk_abs_count(
            given.data_ptr(), n, step, low, 0, first, shift, bins, out, state[8:].data_ptr(), None
        )

    def gather(low=0, last=0, capacity=9, out=found, number=counts):
        return host_library.swk_cuda_topk_abs_gather(
            good.data_ptr(), 1, low, last, capacity, out, places.data_ptr(), number,
            state[8:].data_ptr(), None,
        )  # fmt: skip

    assert [count(), count(n=0), count(rows(D=0, data=0)), gather(capacity=0, out=None)] == [0] * 4
    assert [count(rows(dtype=5)), count(rows(dtype=-1))] == [1, 1]
    bad = [rows(D=-1), rows(H=-1), rows(data=0), rows(D=2**40, H=2**40),
           rows(strides=(2, 2))]  # fmt: skip
    assert [count(given) for given in bad] == [3] * len(bad)
    bad = [{"n": -1}, {"step": 0}, {"low": -1}, {"low": 0x7F800001}, {"first": -1},
           {"shift": -1}, {"shift": 63}, {"bins": 0}, {"bins": 2049}, {"out": None}]  # fmt: skip
    assert [count(**arguments) for arguments in bad] == [3] * len(bad)
    bad = [{"low": -1}, {"last": -1}, {"capacity": -1}, {"out": None}, {"number": None}]
    assert [gather(**arguments) for arguments in bad] == [3] * len(bad)


def test_a_launch_that_fails_is_named(passes, host_library):
    host_library.fail_next_launch()
    with pytest.raises(RuntimeError) as caught:
        search([torch.ones(3, 4)], 1)
    assert str(caught.value) == (
        "topk_abs of 1 matrices, 12 entries on CUDA: topk_abs_count<<<(1, 1, 1), (256, 1, 1)>>>: "
        "invalid configuration argument (cudaErrorInvalidConfiguration)"
    )


def test_supports():
    assert "got cpu" in topk.supports(torch.zeros(3, 4))


@pytest.mark.parametrize(
    "shape, strides, taken",
    [((2, 3), (3, 1), True), ((2, 3), (1, 2), True), ((2, 3), (6, 2), False),
     ((1, 3), (9, 2), True), ((3, 1), (2, 5), True), ((0, 3), (6, 2), True)],
)  # fmt: skip
def test_supported_strides(shape, strides, taken):
    class OnGpu:
        device, dtype = torch.device("cuda"), torch.float16

        def __getattr__(self, name):
            return getattr(torch.zeros(40).as_strided(shape, strides), name)

    assert (topk.supports(OnGpu()) is None) == taken


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype):
    tensors = [random(999, 4097, dtype=dtype, seed=n, scale=4.0) for n in range(5)]
    tensors += [tensors[0][:, 3:1000], torch.ones(4096, 4096).to(dtype)]  # sampled, from 2^24 on
    on_device = [tensors[0].cuda()] + [t.cuda() for t in tensors[1:5]]
    on_device += [on_device[0][:, 3:1000], tensors[6].cuda()]
    for k in (1, 1000, 100_000):
        same(topk.topk_abs(on_device, k), tensors, k)
    equal = on_device[-1:] * 2
    same(topk.topk_abs(equal, 5000), tensors[-1:] * 2, 5000)
