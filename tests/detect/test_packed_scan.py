"""Models with packed weights are scanned to what their plain twins are, and stay as they were."""

from __future__ import annotations

import pytest
import torch

import swkernels
from swkernels.detect.evaluate import zeroed
from swkernels.models import find_down_projections
from swkernels.quant import QuantConfig, quantize
from tests.models.tiny import run, tiny_model, token_ids

from .planting import plant, positions

KINDS = ("nf4", "fp4", "nf4 double", "llm.int8", "int4", "int8", "experts")


def packed(kind: str):
    """A planted model in float32 with its down projections packed, and the planted truth."""
    model = tiny_model(
        "mixtral" if kind == "experts" else "llama",
        intermediate_size=128,  # bitsandbytes on a CPU takes whole blocks of 64
    )
    truth = plant(model, layer=1, seed=3)
    if kind in ("int4", "int8", "experts"):
        quantize(model, QuantConfig(code="int4" if kind == "experts" else kind))
        return model, truth
    bnb = pytest.importorskip("bitsandbytes")
    for projection in find_down_projections(model):
        weight, (D, H) = projection.matrix().detach(), (projection.rows, projection.columns)
        if kind == "llm.int8":
            layer = bnb.nn.Linear8bitLt(H, D, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(H, D, bias=False, compute_dtype=torch.float32)
            layer.weight = bnb.nn.Params4bit(
                weight, quant_type=kind[:3], compress_statistics="double" in kind
            )
        parent, _, name = projection.name.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.to("cpu"))
    return model.eval(), truth  # bitsandbytes rearranges no weight that trains


def stored(model) -> dict[str, bytes]:
    """The bytes of every tensor; a state dict of bitsandbytes rearranges what it saves."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors[f"{name}.absmax"] = state.absmax
    return {
        name: bytes(t.detach().contiguous().view(-1).view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_weight_is_found_and_judged(kind):
    model, truth = packed(kind)
    with torch.no_grad():
        run(model, token_ids(1, 8))  # bitsandbytes rearranges weights in its first forward
    before = stored(model)
    report = swkernels.scan(model, token_ids(4, 48, seed=5), eval_length=48)
    assert truth <= positions(report.candidates)
    (planted,) = (c for c in report.candidates if positions([c]) == truth)
    assert planted["verdict"] in ("super weight", "mild"), planted["reason"]
    assert stored(model) == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "experts"])
def test_the_values_are_those_that_the_module_computes_with(kind):
    model, _ = packed(kind)
    projection = find_down_projections(model)[2]
    x = torch.randn(64, projection.columns, generator=torch.Generator().manual_seed(0))
    fresh = projection.packed()
    y = projection.module(x)  # bitsandbytes may rearrange a weight here
    for values in (fresh, projection.packed()):
        off = (y - x @ values.T).norm() / y.norm()
        assert off < 0.02  # bfloat16 products, or activations in int8


@pytest.mark.parametrize("kind", ("nf4", "llm.int8", "int4"))
def test_zeroing_computes_with_the_row_without_the_columns(kind):
    model, _ = packed(kind)
    projection = find_down_projections(model)[1]
    x = torch.randn(5, projection.columns, generator=torch.Generator().manual_seed(0))
    plain = projection.module(x)
    weight = projection.packed()
    weight[3, [1, 4]] = 0
    weight[7, 2] = 0
    with pytest.raises(KeyboardInterrupt):
        with zeroed([(projection, None, 3, 1), (projection, None, 3, 4), (projection, None, 7, 2)]):
            y = projection.module(x)
            raise KeyboardInterrupt
    torch.testing.assert_close(y[:, [3, 7]], (x @ weight.T)[:, [3, 7]])
    others = [c for c in range(projection.rows) if c not in (3, 7)]
    assert torch.equal(y[:, others], plain[:, others])
    assert torch.equal(projection.module(x), plain)
    assert "forward" not in projection.module.__dict__
