"""Packed experts in the place of a parameter: what a model can do with them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from swkernels import ops
from swkernels.errors import InvalidInput
from swkernels.nn.quant_experts import LAYOUTS, QuantExperts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_multiplied_as_its_parameter_would_be(layout):
    E, D, H = 3, 8, 16
    w = torch.randn(E, D, H)
    stack = QuantExperts.from_packed([ops.block_quantize(m, block_size=7) for m in w], layout)
    shape = {"eoi": (E, D, H), "eio": (E, H, D), "ei_o": (E * H, D), "eo_i": (E * D, H)}[layout]
    parameter = stack.dequantize()
    assert parameter.shape == shape == stack.shape
    transposed = layout in ("eio", "ei_o")
    sizes = (-1, H, D) if transposed else (-1, D, H)
    x = torch.randn(5, H, dtype=torch.float64)
    for e in range(E):
        seen, dense = stack.view(sizes)[e], parameter.view(sizes)[e].double()
        assert seen.shape == dense.shape and seen.dtype == torch.float32
        want = x @ dense if transposed else F.linear(x, dense)
        got = x @ seen if transposed else F.linear(x, seen)
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
        assert torch.allclose(x @ (seen if transposed else seen.T), want, rtol=1e-12, atol=1e-12)
        bias = torch.randn(D, dtype=torch.float64)
        with_bias = F.linear(x, seen.T if transposed else seen, bias)
        assert torch.allclose(with_bias, want + bias, rtol=1e-12, atol=1e-12)


def test_other_functions_get_the_values_of_an_expert():
    w = torch.randn(3, 8, 16)
    stack = QuantExperts.from_packed([ops.block_quantize(m) for m in w], "eoi")
    dense = stack.dequantize()
    assert stack.shape == w.shape and stack.size(1) == 8
    assert torch.equal(torch.abs(stack[1]), dense[1].abs())
    assert torch.equal(torch.cat([stack[1].T, stack[1].mT]), torch.cat([dense[1].T] * 2))
    assert torch.equal(stack[torch.tensor([2, 0])], dense[[2, 0]])
    x = torch.randn(3, 5, 8)
    assert torch.allclose(torch.bmm(x, stack), torch.bmm(x, dense), rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidInput, match=r"can be seen as \[3, 8, 16\], got \[4, -1\]"):
        stack.view(4, -1)


BAD_STACKS = {
    "shapes": (lambda q: ([q, ops.block_quantize(torch.ones(2, 4))], "eoi"), "of one shape"),
    "none": (lambda q: ([], "eoi"), "of one shape"),
    "layout": (lambda q: ([q], "xyz"), "layout must be one of eoi"),
    "type": (lambda q: ([torch.ones(2, 2)], "eoi"), "expected a QuantizedTensor"),
}


@pytest.mark.parametrize("name", BAD_STACKS)
def test_stacks_that_are_refused(name):
    make, message = BAD_STACKS[name]
    experts, layout = make(ops.block_quantize(torch.ones(4, 4)))
    with pytest.raises(InvalidInput, match=message):
        QuantExperts.from_packed(experts, layout)
