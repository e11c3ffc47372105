"""Models with packed weights are scanned to what their plain twins are, and stay as they were."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers

import swkernels
from swkernels.detect import verify
from swkernels.detect.evaluate import zeroed
from swkernels.detect.packed import zeroed_packed
from swkernels.models import find_down_projections
from swkernels.models.rows import packed_rows
from swkernels.nn.quant_experts import QuantExpert, QuantExperts
from swkernels.ops import block_quantize
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


def plain_product(kind: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, H] times weight [D, H] as a few lines of PyTorch compute it in the module's types."""
    if kind == "llm.int8":
        scale = x.abs().amax(1, keepdim=True) / 127
        return ((x / scale).round() * scale) @ weight.T
    if kind in ("int4", "int8"):
        return x @ weight.T
    return (x.bfloat16() @ weight.bfloat16().T).float()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "experts"])
def test_the_values_are_those_that_the_module_computes_with(kind):
    model, _ = packed(kind)
    projection = find_down_projections(model)[2]
    x = torch.randn(64, projection.columns, generator=torch.Generator().manual_seed(0))
    fresh = projection.packed()
    with torch.no_grad():
        y = projection.module(x)  # bitsandbytes may rearrange a weight here
        each = projection.module(torch.eye(projection.columns)).T
    for values in (fresh, projection.packed()):
        exact = x.double() @ values.double().T
        rounding = (plain_product(kind, x, values) - exact).norm()
        assert (y - exact).norm() <= 2 * rounding
    if kind in ("int4", "int8"):
        assert torch.equal(each, values)


def library_values(projection, expert=None) -> torch.Tensor:
    """The whole matrix as the library that packed it dequantizes it, in float32."""
    if getattr(projection.weight, "is_expert_stack", False):
        return projection.weight.expert(expert).packed.dequantize(torch.float32)
    module = projection.module
    if hasattr(module, "packed"):
        return module.packed.dequantize(torch.float32)
    functional = pytest.importorskip("bitsandbytes").functional
    if hasattr(module.weight, "quant_state") and module.weight.quant_state is not None:
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_library_bit_for_bit(kind):
    model, _ = packed(kind)
    projection = find_down_projections(model)[1]
    expert = 1 if kind == "experts" else None
    whole = library_values(projection, expert)
    assert projection.is_packed
    assert torch.equal(projection.packed(expert), whole)
    for row in range(projection.rows):
        assert torch.equal(projection.row(row, expert), whole[row])
    assert torch.equal(projection.packed_rows(3, 29, expert), whole[3:29])


@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize("kind", ("nf4", "fp4"))
def test_rows_in_the_layout_for_cpus(kind, double):
    functional = pytest.importorskip("bitsandbytes").functional
    model, _ = packed(kind + " double" * double)
    projection = find_down_projections(model)[1]
    weight, state = projection.module.weight, projection.module.weight.quant_state
    scales = state.absmax
    if double:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    rounded = scales.bfloat16().float().view(-1)
    whole = functional.dequantize_4bit(
        weight.data.clone(),
        functional.QuantState(
            rounded, state.shape, state.code, state.blocksize, kind, torch.float32
        ),
    )
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, state)
    for row in range(projection.rows):
        assert torch.equal(projection.row(row), whole[row])


@pytest.mark.parametrize("block", (64, 48, 7, "row", "channel", "tensor", (4, 16), (3, 5)))
@pytest.mark.parametrize("code, symmetric", (("int4", True), ("int8", False), ("nf4", True)))
@pytest.mark.parametrize("scales", ("float32", "float16", "int8"))
def test_rows_of_every_block_layout(block, code, symmetric, scales):
    w = torch.randn(9, 37, generator=torch.Generator().manual_seed(2))
    outliers = torch.tensor([[0, 0], [3, 36], [4, 0], [8, 36]])
    q = block_quantize(
        w, code=code, symmetric=symmetric, block_size=block, scale_dtype=scales, outliers=outliers
    )
    layer = torch.nn.Module()
    layer.packed = q
    whole = q.dequantize(torch.float32)
    for start, stop in [*((i, i + 1) for i in range(9)), (2, 7), (0, 9)]:
        assert torch.equal(packed_rows(layer, None, None, start, stop), whole[start:stop])


def test_null_draws_do_not_depend_on_the_block_of_rows(monkeypatch):
    model, _ = packed("int4")
    projection = find_down_projections(model)[1]
    values = projection.packed()
    candidate = SimpleNamespace(
        projection=projection, expert=None, row=2, column=5, weight=float(values[2, 5])
    )
    distance = (values.abs() - abs(candidate.weight)).abs()
    distance[2, 5] = torch.inf
    nearest = distance.flatten().argsort(stable=True)[:100]
    whole = verify._nearest_packed(candidate, [candidate])
    monkeypatch.setattr(verify, "BLOCK_BYTES", 4 * projection.columns * 7)
    blocks = verify._nearest_packed(candidate, [candidate])
    for positions_, weights in (whole, blocks):
        assert torch.equal(positions_, nearest)
        assert torch.equal(weights, values.flatten()[nearest])


@pytest.mark.parametrize("weight", (0.25, float("inf"), float("nan")))
def test_null_draws_leave_what_is_no_number_for_last(monkeypatch, weight):
    """Also where a block of rows has fewer than 100 numbers."""
    values = torch.linspace(-1, 1, 24 * 16).view(24, 16).clone()
    values[::2, 1:] = torch.nan
    values[5] = torch.inf
    projection = SimpleNamespace(
        rows=24, columns=16, packed_rows=lambda start, stop, expert: values[start:stop]
    )
    candidate = SimpleNamespace(projection=projection, expert=None, row=3, column=5, weight=weight)
    distance = (values.double().abs() - abs(weight)).abs().flatten()
    distance[3 * 16 + 5] = torch.inf
    distance[distance.isnan()] = torch.inf
    nearest = distance.argsort(stable=True)[:100]
    for rows in (1, 7, 24):
        monkeypatch.setattr(verify, "BLOCK_BYTES", 4 * 16 * rows)
        found, weights = verify._nearest_packed(candidate, [candidate])
        assert torch.equal(found, nearest)
        torch.testing.assert_close(
            weights, values.flatten()[nearest], rtol=0, atol=0, equal_nan=True
        )


def test_patched_rows_are_as_exact_as_zeroing_in_place():
    model = tiny_model("llama", intermediate_size=128)
    projection = find_down_projections(model)[1]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    at = [(projection, None, 3, 1), (projection, None, 3, 4), (projection, None, 7, 2)]
    with torch.no_grad():
        with zeroed(at):
            y = projection.module(x)
            exact = x.double() @ projection.matrix().double().T
        with zeroed_packed(at):
            patched = projection.module(x)
    rounding = (y - exact).abs().max()
    assert 0 < rounding and (patched - exact).abs().max() <= 2 * rounding


def plain_twin(model, original):
    """``original`` with the values of ``model``, which was packed, as ordinary weights."""
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            original.get_parameter(name).data = module.dequantize()
        elif hasattr(module, "packed") and not isinstance(module, QuantExpert):
            original.get_submodule(name).weight.data = module.packed.dequantize(torch.float32)
    return original


@pytest.mark.parametrize("bias", (False, True))
def test_zeroing_inside_packed_experts(bias):
    """The model with weights zeroed is a plain one of the same values that has zeros there."""
    model = tiny_model("gpt_oss" if bias else "mixtral", intermediate_size=64)
    projection = find_down_projections(model)[0]
    if bias:
        torch.nn.init.normal_(getattr(projection.module, f"{projection.parameter}_bias"))
    original = copy.deepcopy(model)
    quantize(model, QuantConfig(code="int4"))
    ids = token_ids(2, 16, seed=1)
    projection = find_down_projections(model)[0]
    at = [(projection, e, r, c) for e in range(projection.experts) for r, c in ((3, 1), (3, 4))]
    twin = plain_twin(model, original)
    twin.set_experts_implementation("eager")  # the others take no float64
    there = find_down_projections(twin)[0]
    with torch.no_grad():
        with zeroed(at):
            y = run(model, ids).logits
        intact = run(twin, ids).logits
        for expert in range(there.experts):
            there.matrix(expert)[3, [1, 4]] = 0
        plain = run(twin, ids).logits
        exact = run(twin.double(), ids).logits
    rounding = (plain - exact).norm()
    assert (y - exact).norm() <= 2 * rounding
    assert (intact - exact).norm() > 100 * rounding  # what is zeroed can be seen


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
    exact = (x.double() @ weight.double().T)[:, [3, 7]]
    rounding = ((x @ weight.T)[:, [3, 7]] - exact).norm()
    assert (y[:, [3, 7]] - exact).norm() <= 2 * rounding
    others = [c for c in range(projection.rows) if c not in (3, 7)]
    assert torch.equal(y[:, others], plain[:, others])
    assert torch.equal(projection.module(x), plain)
    assert "forward" not in projection.module.__dict__


DOWN = "model.layers.{}.mlp.down_proj"
CRITICAL_PAIR = {(11, DOWN.format(11), None, 507, c) for c in (1229, 1487)}  # see test_smollm2.py


@pytest.mark.long
@pytest.mark.parametrize("kind", ("nf4", "int4"))
def test_a_packed_smollm2_shows_its_critical_pair(smollm2_path, kind):
    options = {}
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path, dtype=torch.float32, **options
    ).eval()
    if kind == "int4":
        quantize(model, QuantConfig(code="int4"))
    report = swkernels.scan(
        model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(smollm2_path),
        samples=2,
        length=512,
        eval_tokens=512,
        eval_length=256,
        null_draws=2,
    )
    for candidate in report.candidates:
        print(kind, positions([candidate]), candidate["ratio"], candidate["verdict"])
    for found in report.sets:
        members = [report.candidates[i] for i in found["members"]]
        print(kind, positions(members), found["ratio"], found["verdict"])
    assert CRITICAL_PAIR <= positions(report.candidates)
    assert any(
        positions([report.candidates[i] for i in found["members"]]) == CRITICAL_PAIR
        and found["verdict"] == "critical set"
        for found in report.sets
    )
