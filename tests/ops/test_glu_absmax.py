from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from swkernels import ops
from swkernels.backends.reference.glu_absmax import ACTIVATIONS
from swkernels.errors import InvalidInput

from . import oracle
from .backends_here import DEVICE, runnable

BACKENDS = runnable("glu_absmax")


def arguments(tokens, channels, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, tokens, channels, generator=generator) * 3
    return [t.to(dtype).to(DEVICE) for t in pair]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_value_error_and_peaks(backend, activation, dtype):
    gate, up = arguments(63, 70, dtype)
    h, keys = ops.glu_absmax(gate, up, activation, backend=backend)
    assert torch.equal(keys.cpu(), oracle.column_absmax(h.cpu()))
    exact = ACTIVATIONS[activation](gate.double()) * up.double()
    theirs = ACTIVATIONS[activation](gate) * up
    error, allowed = (h - exact).abs().max(), (theirs - exact).abs().max()
    assert error <= max(2 * allowed, torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_running_keys_masks_and_odd_sizes(backend, tokens):
    gate, up = arguments(tokens, 17, seed=1)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.5
    keys = ops.empty_keys(17, DEVICE)
    h, returned = ops.glu_absmax(
        gate, up, "silu", keys, token_mask=mask, token_offset=9, backend=backend
    )
    assert returned is keys
    index = ops.token_index(mask)
    assert torch.equal(keys.cpu(), oracle.column_absmax(h.cpu(), index.cpu(), 9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_are_those_of_the_formula(backend, activation):
    special = [0.0, -0.0, -math.inf, math.nan, 1e30, -1e30, 88.0, -80.0, 1e-40]
    if (backend, activation) != ("reference", "gelu"):
        special.append(math.inf)  # PyTorch's own vectorised float32 gelu gives NaN there
    gate = torch.tensor(special, device=DEVICE).repeat(3, 1)
    up = torch.tensor([[2.0], [0.0], [-1.5]], device=DEVICE).expand(3, len(special))
    h = ops.glu_absmax(gate, up.contiguous(), activation, backend=backend)[0]
    expected = (ACTIVATIONS[activation](gate.double()) * up.double()).float()
    assert torch.equal(h.isnan(), expected.isnan()) and torch.equal(h.isinf(), expected.isinf())
    torch.testing.assert_close(h, expected, equal_nan=True, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(backend, activation):
    ours = [t.requires_grad_() for t in arguments(10, 12, seed=3)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    ops.glu_absmax(*ours, activation, backend=backend)[0].sum().backward()
    (ACTIVATIONS[activation](theirs[0]) * theirs[1]).sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_opcheck(activation):
    gate, up = [t.requires_grad_() for t in arguments(4, 5, torch.float64, seed=4)]

    def h(gate, up):
        return ops.glu_absmax(gate, up, activation, backend="reference")[0]

    assert torch.autograd.gradcheck(h, (gate, up))
    op = torch.ops.swkernels.glu_absmax.default
    torch.library.opcheck(op, (gate, up, activation, ops.empty_keys(5, DEVICE), None, 0, None))


def test_compiles_without_a_break():
    gate, up = arguments(20, 16)
    compiled = torch.compile(ops.glu_absmax, fullgraph=True, backend="aot_eager")
    h, keys = compiled(gate, up)
    eager = ops.glu_absmax(gate, up)
    assert torch.equal(h, eager[0]) and torch.equal(keys, eager[1])
    torch.testing.assert_close(h, F.silu(gate) * up)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(up=torch.ones(2, 4)), "agree"),
        (dict(up=torch.ones(2, 3).half()), "agree"),
        (dict(activation="swish"), "silu, gelu, gelu_tanh, relu"),
        (dict(keys=torch.zeros(4, dtype=torch.int64)), r"\[3\]"),
    ],
)
def test_bad_arguments(change, message):
    given = dict(gate=torch.ones(2, 3), up=torch.ones(2, 3)) | change
    with pytest.raises(InvalidInput, match=message):
        ops.glu_absmax(**given)
