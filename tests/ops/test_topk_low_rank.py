from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.backends import cpu
from swkernels.errors import BackendUnavailable, InvalidInput

from .backends_here import DEVICE, runnable
from .listed import Allocations, normal

BACKENDS = runnable("topk_low_rank")
ISAS = (
    [name for name in cpu.ISAS[1:] if cpu.library().swk_cpu_isa(cpu.ISAS.index(name))]
    if cpu.available() is None
    else []
)
on_cpu = pytest.mark.skipif(DEVICE != "cpu" or not ISAS, reason="no CPU library here")

# NumPy warns where Triton's interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def whole(*shape, seed=0, most=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float().to(DEVICE)


def with_specials():
    B = normal(30, 4)
    B[3, 1], B[7, 2], B[9] = math.nan, math.inf, -math.inf
    return [(B, normal(4, 90, seed=1))]


FACTORS = {
    "random": [
        (normal(33, 8), normal(8, 70, seed=1)),
        (normal(5, 3, seed=2), normal(3, 129, seed=3)),
    ],
    "ties": [(whole(40, 4), whole(4, 90, seed=1)), (whole(7, 2, seed=2), whole(2, 65, seed=3))],
    "equal": [(torch.ones(9, 4, device=DEVICE), torch.ones(4, 90, device=DEVICE))] * 2,
    "zeros": [(torch.zeros(9, 4, device=DEVICE), normal(4, 90))] * 2,
    "a row": [
        (normal(9, 4) * (torch.arange(9, device=DEVICE) == 5)[:, None], normal(4, 90, seed=1))
    ],
    "tiny": [(normal(9, 4) * 1e-38, normal(4, 90, seed=1))],
    "underflowing": [(normal(9, 4) * 1e-30, normal(4, 90, seed=1) * 1e-30)],
    "overflowing": [(normal(9, 4) * 1e30, normal(4, 90, seed=1) * 1e30)],
    "cancelling": [
        (torch.cat([normal(20, 4), -normal(20, 4)], 1), normal(4, 90, seed=1).repeat(2, 1))
    ],
    "specials": with_specials(),
    "one entry": [(normal(1, 1), normal(1, 1, seed=1))],
    "empty": [
        (normal(0, 3), normal(3, 5)),
        (normal(4, 3), normal(3, 0)),
        (normal(2, 3), normal(3, 2)),
    ],
}


def expected(factors, k):
    """(value, tensor, row, column) of each entry in order, from Python's own numbers."""
    entries = []
    for number, (B, A) in enumerate(factors):
        columns = A.double().T.tolist()
        for row, left in enumerate(B.double().tolist()):
            for column, right in enumerate(columns):
                total = 0.0
                for a, b in zip(left, right):
                    total += a * b
                entries.append((total, number, row, column))

    def order(entry):
        nan = math.isnan(entry[0])
        return (not nan, 0.0 if nan else -abs(entry[0]), *entry[1:])

    return sorted(entries, key=order)[:k]


def check(factors, k, backend):
    found = ops.topk_low_rank(factors, k, backend=backend)
    want = expected(factors, k)
    places = list(zip(found.tensor.tolist(), found.row.tolist(), found.column.tolist()))
    assert places == [entry[1:] for entry in want]
    exact = torch.tensor([entry[0] for entry in want], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(
        found.values, exact.to(found.values.dtype), rtol=0, atol=0, equal_nan=True
    )
    return found


@pytest.mark.parametrize("k", [0, 1, 7, 100, 10000])
@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_dense_answer(backend, name, k):
    check(FACTORS[name], k, backend)


@on_cpu
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, threads, monkeypatch):
    monkeypatch.setenv("SWKERNELS_CPU_ISA", isa)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for factors in FACTORS.values():
            check(factors, 37, "cpu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes_and_strides(backend):
    low = [(normal(30, 4, dtype=torch.bfloat16), normal(4, 90, dtype=torch.float16, seed=1))]
    if backend == "triton":
        low = [(low[0][0].half(), low[0][1])]
    assert check(low, 20, backend).values.dtype == torch.float32
    strided = [(normal(4, 60).T[::2], normal(90, 8, seed=1)[:, ::2].T)]
    check(strided, 20, backend)


def test_float64():
    wide = [
        (normal(30, 4, dtype=torch.float64) / 3, normal(4, 90, dtype=torch.float64, seed=1) / 7)
    ]
    assert check(wide, 20, None).values.dtype == torch.float64
    with pytest.raises(BackendUnavailable, match="float64"):
        ops.topk_low_rank(wide, 20, backend="cpu")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] != "triton"])
def test_many_rows_panels_and_modules(backend):
    """More rows than a task has, more columns than a panel, and lists that are cut."""
    factors = [(normal(150, 3, seed=i), normal(3, 1100, seed=i + 9)) for i in range(3)]
    found = ops.topk_low_rank(factors, 600, backend=backend)
    dense = torch.stack(
        [(B.double()[:, :, None] * A.double()).cumsum(1)[:, -1] for B, A in factors]
    )
    order = dense.abs().flatten().sort(descending=True, stable=True).indices[:600]
    assert torch.equal(found.tensor * 150 * 1100 + found.row * 1100 + found.column, order)


def test_memory_is_that_of_k():
    factors = [(normal(2000, 4), normal(4, 3000, seed=1))]
    with Allocations() as made:
        ops.topk_low_rank(factors, 100)
    assert max(made.sizes) <= 4 * 3000  # A itself at most
    with Allocations() as made:
        factors[0][0] @ factors[0][1]
    assert max(made.sizes) >= 2000 * 3000


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 5), st.integers(1, 3), st.integers(1, 99)
)
def test_any_shape(D, H, r, most, k):
    check([(whole(D, r, most=most), whole(r, H, seed=1, most=most))], k, None)


def test_opens_no_gradient():
    B, A = normal(5, 2).requires_grad_(), normal(2, 7, seed=1).requires_grad_()
    assert not ops.topk_low_rank([(B, A)], 3).values.requires_grad


@pytest.mark.parametrize(
    "factors, k, says",
    [
        ([], 1, "there are no factors"),
        ([(normal(5, 2), normal(3, 7))], 1, r"got \[5, 2\] and \[3, 7\]"),
        ([(normal(5, 0), normal(0, 7))], 1, "r from 1"),
        ([(normal(5), normal(2, 7))], 1, "factors 0 must be"),
        ([(normal(5, 2), normal(2, 7))], -1, "k must be an integer from 0, got -1"),
        ([(normal(5, 2), normal(2, 7))], 1.0, "k must be"),
        ([(normal(5, 2), normal(2, 7))], True, "k must be"),
        ([(normal(5, 2), torch.zeros(2, 7, dtype=torch.int32))], 1, "A of factors 0 .*int32"),
        ([(normal(5, 2), [[1.0]])], 1, "got list"),
        ([(normal(5, 2).to("meta"), normal(2, 7).to("meta"))], 1, "holds values"),
    ],
)
def test_bad_arguments(factors, k, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        ops.topk_low_rank(factors, k)
    assert "\n" not in str(caught.value)


def test_breaks_the_graph_of_a_compiler():
    B, A = normal(64, 4), normal(4, 64, seed=1)
    compiled = torch.compile(lambda b: ops.topk_low_rank([(b, A)], 5).values * 2, backend="eager")
    assert torch.equal(compiled(B), ops.topk_low_rank([(B, A)], 5).values * 2)
