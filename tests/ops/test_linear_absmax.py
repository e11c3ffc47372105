from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swkernels import ops
from swkernels.errors import InvalidInput

from . import oracle
from .backends_here import DEVICE, runnable

BACKENDS = runnable("linear_absmax")


def arguments(tokens, columns, rows, dtype=torch.float32, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    b = torch.randn(rows, generator=generator) if bias else None
    return [None if t is None else t.to(dtype).to(DEVICE) for t in (x, weight, b)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 63, 100])
def test_peaks_are_those_of_x_and_of_the_returned_y(backend, dtype, tokens):
    x, weight, bias = arguments(tokens, 48, 37, dtype)
    y, in_keys, out_keys = ops.linear_absmax(x, weight, bias, backend=backend)
    assert y.shape == (tokens, 37) and y.dtype == dtype
    assert torch.equal(in_keys.cpu(), oracle.column_absmax(x.cpu()))
    assert torch.equal(out_keys.cpu(), oracle.column_absmax(y.cpu()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_is_at_most_twice_pytorchs_own(backend, dtype):
    x, weight, bias = arguments(100, 96, 64, dtype, seed=1)
    exact = F.linear(x.double(), weight.double(), bias.double())
    ours = ops.linear_absmax(x, weight, bias, backend=backend)[0]
    theirs = F.linear(x, weight, bias)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_arithmetic_gives_the_same_bits_everywhere(backend):
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-8, 9, (70, 64), generator=generator).float().to(DEVICE)
    weight = torch.randint(-8, 9, (33, 64), generator=generator).float().to(DEVICE)
    whole = ops.linear_absmax(x, weight, backend="reference")
    in_keys = out_keys = None
    parts = []
    for start in (0, 31, 62):
        y, in_keys, out_keys = ops.linear_absmax(
            x[start : start + 31], weight, None, in_keys, out_keys,
            token_offset=start, backend=backend,
        )  # fmt: skip
        parts.append(y)
    assert torch.equal(torch.cat(parts), whole[0])
    assert torch.equal(in_keys, whole[1]) and torch.equal(out_keys, whole[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_does_not_count(backend):
    x, weight, bias = arguments(30, 16, 8, seed=3)
    mask = torch.rand(30, generator=torch.Generator().manual_seed(4)).to(DEVICE) > 0.4
    index = ops.token_index(mask)
    x[~mask] = 1e6
    y, in_keys, out_keys = ops.linear_absmax(x, weight, bias, token_mask=mask, backend=backend)
    assert torch.equal(in_keys.cpu(), oracle.column_absmax(x.cpu(), index.cpu()))
    assert torch.equal(out_keys.cpu(), oracle.column_absmax(y.cpu(), index.cpu()))
    assert torch.allclose(y[~mask], F.linear(x[~mask], weight, bias), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_linear(backend):
    ours = [t.requires_grad_() for t in arguments(20, 16, 8, seed=5)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    dy = torch.randn(20, 8, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    ops.linear_absmax(*ours, backend=backend)[0].backward(dy)
    F.linear(*theirs).backward(dy)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradcheck_and_opcheck():
    x, weight, bias = [t.requires_grad_() for t in arguments(5, 4, 3, torch.float64)]

    def y(x, weight, bias):
        return ops.linear_absmax(x, weight, bias, backend="reference")[0]

    assert torch.autograd.gradcheck(y, (x, weight, bias))
    keys = ops.empty_keys(4, DEVICE), ops.empty_keys(3, DEVICE)
    op = torch.ops.swkernels.linear_absmax.default
    torch.library.opcheck(op, (x, weight, bias, *keys, None, 0, None))
    torch.library.opcheck(op, (x, weight, None, None, None, None, 2, "reference"))


def test_the_backward_keeps_only_what_it_reads():
    x, weight, _ = arguments(20, 16, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear_absmax(x.requires_grad_(), weight)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


def test_autocast_casts_as_linear_does():
    x, weight, bias = arguments(20, 16, 8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = ops.linear_absmax(x, weight, bias)[0]
        expected = F.linear(x, weight, bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


def test_compiles_without_a_break():
    x, weight, bias = [t.requires_grad_() for t in arguments(20, 16, 8)]
    compiled = torch.compile(ops.linear_absmax, fullgraph=True, backend="aot_eager")
    y, in_keys, out_keys = compiled(x, weight, bias)
    y.sum().backward()
    eager = ops.linear_absmax(x, weight, bias)
    assert torch.equal(y, eager[0]) and torch.equal(in_keys, eager[1])
    assert torch.equal(out_keys, eager[2]) and weight.grad is not None


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=torch.ones(8, 15)), r"\[D, 16\]"),
        (dict(weight=torch.ones(8, 16, dtype=torch.float16)), "float32 on cpu like x"),
        (dict(bias=torch.ones(7)), r"bias must be \[8\]"),
        (dict(in_keys=torch.zeros(8, dtype=torch.int64)), r"in_keys.*\[16\]"),
        (dict(out_keys=torch.zeros(16, dtype=torch.int64)), r"out_keys.*\[8\]"),
    ],
)
def test_bad_arguments(change, message):
    given = dict(x=torch.ones(2, 16), weight=torch.ones(8, 16)) | change
    with pytest.raises(InvalidInput, match=message):
        ops.linear_absmax(**given)
