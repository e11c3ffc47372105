"""More outliers in a packed matrix, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.errors import InvalidInput
from swkernels.ops.outliers import check_keep, keep, restore


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    code=st.sampled_from(["int4", "int8", "nf4", "fp4"]),
    block=st.integers(1, 50),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_keep_changes_what_it_is_told_and_nothing_else(shape, code, block, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator).to(dtype)
    n = w.numel()
    order = torch.randperm(n, generator=generator)
    listed = order[: min(3, n)]
    pairs = torch.stack([listed // shape[1], listed % shape[1]], 1)
    q = ops.block_quantize(w, code=code, block_size=block, outliers=pairs)
    positions = torch.randperm(n, generator=generator)[: min(6, n)].sort().values
    values = torch.randn(len(positions), generator=generator)
    try:
        check_keep(q, positions)
    except InvalidInput:
        with pytest.raises(InvalidInput):
            keep(q, positions, values)
        return
    held = {name: tensor.clone() for name, tensor in q.tensors().items()}
    new, kept = keep(q, positions, values)
    expected = q.dequantize(torch.float32).view(-1)
    expected[positions] = values
    assert torch.equal(new.dequantize(torch.float32).view(-1), expected)
    # Integer products leave out what is listed: its codes are zero.
    bare = new.with_tensors(
        new.tensors() | {"positions": new.positions[:0], "values": new.values[:0]}
    )
    assert not bare.dequantize(torch.float32).view(-1)[new.positions.long()].any()
    back = restore(new, kept)
    for name, tensor in held.items():
        assert torch.equal(q.tensors()[name], tensor), name  # the first is as it was
        same = back.tensors()[name]
        assert same.dtype == tensor.dtype and torch.equal(same, tensor), name


def test_too_many_are_refused():
    q = ops.block_quantize(torch.randn(32, 64))
    most = torch.arange(32 * 64 // 16)
    check_keep(q, most)
    with pytest.raises(InvalidInput, match="129 outliers of 2048 elements"):
        keep(q, torch.arange(129), torch.zeros(129))
    # What is an outlier already does not count twice.
    full, _ = keep(q, most, torch.zeros(len(most)))
    check_keep(full, most[:5])


def test_out_of_order():
    q = ops.block_quantize(torch.randn(32, 64))
    first, one = keep(q, torch.tensor([3, 70]), torch.tensor([1.0, 2.0]))
    second, two = keep(first, torch.tensor([5, 99]), torch.tensor([3.0, 4.0]))
    left = restore(second, one)
    alone, _ = keep(q, torch.tensor([5, 99]), torch.tensor([3.0, 4.0]))
    for name, tensor in alone.tensors().items():
        assert torch.equal(left.tensors()[name], tensor), name
    for name, tensor in restore(left, two).tensors().items():
        assert torch.equal(q.tensors()[name], tensor), name
