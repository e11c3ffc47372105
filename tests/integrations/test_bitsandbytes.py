"""Super weights in bitsandbytes' layers, and its formats, with its own layers on the CPU."""

from __future__ import annotations

import copy
import logging

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from swkernels import ops
from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput
from swkernels.integrations.bitsandbytes import (
    from_bitsandbytes,
    restore_super_weights,
    to_bitsandbytes,
)
from swkernels.integrations.bitsandbytes.layers import in_cpu_form
from swkernels.nn import QuantLinear
from swkernels.train import Coordinates, sparse
from tests.detect import fake_report
from tests.models.tiny import tiny_model, token_ids

D, H = 64, 128  # bitsandbytes' kernel for CPUs takes rows in groups of 32, and whole blocks
LISTED = [[3, 5], [3, 6], [3, 127], [40, 0], [63, 127]]  # the first is the largest of its block
ROWS, COLUMNS = torch.tensor(LISTED).T
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def quiet_and_eager():
    """bitsandbytes logs casts, and compiles how it dequantizes blocks of 2048 and more."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with torch.compiler.set_stance("force_eager"):
        yield


def matrix(seed: int = 0, shape=(D, H)) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[3, 5] = 2.0003
    return w


def four_bit(w, code="nf4", *, nested=False, block_size=64, bias=None, storage=torch.uint8):
    """A Linear4bit of the weight, in training mode: evaluated it may repack its weight."""
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=bias is not None, quant_storage=storage)
    layer.weight = bnb.nn.Params4bit(
        w.clone(), requires_grad=False, compress_statistics=nested, quant_type=code,
        blocksize=block_size, quant_storage=storage, module=layer,
    )  # fmt: skip
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer.to("cpu").train()


def eight_bit(w, threshold: float = 0.0):
    layer = bnb.nn.Linear8bitLt(
        w.shape[1], w.shape[0], bias=False, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False)
    return layer.to("cpu").train()


def restored(layer, w, listed=LISTED):
    """The layer in a model, with its super weights restored, and the handle."""
    model = nn.Sequential(layer)
    return model, restore_super_weights(model, {"0": listed}, values={"0": w})


def read_back(model, dtype=torch.float32) -> torch.Tensor:
    """What a layer multiplies by, [D, H], seen through one-hot inputs."""
    with torch.no_grad():
        return model(torch.eye(H, dtype=dtype)).T.float()


# --- what is restored ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_one_hot_inputs_read_the_exact_values(code, nested, training):
    w, layer = matrix(), four_bit(matrix(), code, nested=nested)
    layer.train(training)
    before = read_back(layer)
    model, handle = restored(layer, w)
    after = read_back(model)
    exact = w[ROWS, COLUMNS]
    # Sums of the dequantized value and what is missing, in float32.
    assert ((after[ROWS, COLUMNS] - exact).abs() <= 2.0**-23 * exact.abs()).all()
    assert not torch.equal(before[ROWS, COLUMNS], exact)
    after[ROWS, COLUMNS] = before[ROWS, COLUMNS]
    assert torch.equal(after, before)
    handle.remove()
    assert torch.equal(read_back(model), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_reads_them_to_its_rounding(dtype, training):
    w, layer = matrix(), four_bit(matrix(), nested=True)
    model, _ = restored(layer.train(training), w)
    exact, got = w[ROWS, COLUMNS], read_back(model, dtype)[ROWS, COLUMNS]
    base = from_bitsandbytes(four_bit(matrix(), nested=True)).dequantize(torch.float32)
    # The layer rounds its own product, then the sum is rounded.
    unit = torch.finfo(torch.bfloat16 if in_cpu_form(layer.weight.quant_state) else dtype).eps
    assert ((got - exact).abs() <= unit * (base[ROWS, COLUMNS].abs() + exact.abs())).all()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bits(threshold):
    w = matrix().half().float()
    model, handle = restored(eight_bit(w, threshold), w)
    exact = w[ROWS, COLUMNS]
    assert torch.allclose(read_back(model)[ROWS, COLUMNS], exact, rtol=2.0**-22, atol=0)
    # Evaluated, bitsandbytes multiplies by 6.200124e-05 where 1 / 127^2 is 6.200012e-05.
    model.eval()
    error = (read_back(model)[ROWS, COLUMNS] - exact).abs()
    base = torch.tensor([r.before for r in handle.report])
    assert (error <= 1.81e-5 * base.abs() + 2.0**-22 * exact.abs()).all()
    assert not torch.equal(base, exact)


def test_the_report():
    w, layer = matrix(), four_bit(matrix())
    before = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    _, handle = restored(layer, w)
    assert str(handle) == "5 super weights restored in 1 layers"
    assert [(r.module, r.row, r.column) for r in handle.report] == [("0", *p) for p in LISTED]
    assert [r.before for r in handle.report] == before[ROWS, COLUMNS].tolist()
    assert [r.after for r in handle.report] == w[ROWS, COLUMNS].tolist()


def test_the_gradient_of_x_sees_the_exact_values():
    w, layer = matrix(), four_bit(matrix(), nested=True)
    effective = read_back(restored(layer, w)[0])
    x = torch.randn(2, 7, H, requires_grad=True)
    dy = torch.randn(2, 7, D)
    layer(x).backward(dy)
    plain = x.detach().clone().requires_grad_(True)
    linear(plain, effective).backward(dy)
    exact = dy.double() @ effective.double()
    assert (x.grad - exact).norm() <= 2 * (plain.grad - exact).norm()


def test_bias_and_other_hooks():
    w, bias = matrix(), torch.randn(D)
    layer = four_bit(w, bias=bias)
    seen = []
    layer.register_forward_hook(lambda module, x, y: seen.append((y, y.clone())))
    model, _ = restored(layer, w)
    assert torch.allclose(read_back(model)[ROWS, COLUMNS], w[ROWS, COLUMNS] + bias[ROWS])
    assert all(torch.equal(kept, copied) for kept, copied in seen) and seen


def test_nothing_of_the_model_changes():
    layer = four_bit(matrix(), nested=True)
    model = nn.Sequential(layer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = list(dict(model.named_modules())), list(dict(model.named_parameters()))
    x = torch.randn(3, H)
    y = model(x)
    handle = restore_super_weights(model, {"0": LISTED}, values={"0": matrix()})
    assert not torch.equal(model(x), y)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert names == (list(dict(model.named_modules())), list(dict(model.named_parameters())))
    handle.remove()
    handle.remove()
    assert torch.equal(model(x), y) and not layer._forward_hooks
    restore_super_weights(model, {"0": LISTED}, values={"0": matrix()})


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_compiles(make):
    model, _ = restored(make(matrix()), matrix())
    x = torch.randn(3, H)
    with torch.compiler.set_stance("default"), torch.no_grad():
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(y, model(x))


def test_a_copy_is_a_model_of_its_own():
    model, handle = restored(four_bit(matrix()), matrix())
    twin, want = copy.deepcopy(model), read_back(model)
    handle.remove()
    assert torch.equal(read_back(twin), want)


def test_inference_mode_leaves_nothing_behind():
    model, _ = restored(four_bit(matrix()), matrix())
    with torch.inference_mode():
        model(torch.randn(2, H))
    x = torch.randn(2, H, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("adapt", ["restored", "trained"])
def test_evaluated_eight_bits_pass_the_gradient(adapt):
    """The output of the layer is then a view that must not be changed in place."""
    w = matrix()
    model, handle = restored(eight_bit(w), w)
    if adapt == "trained":
        handle.remove()
        sparse(model, Coordinates.of({"0": LISTED}, model))
    x, dy = torch.randn(2, 7, H, requires_grad=True), torch.randn(2, 7, D)
    model.eval()(x).backward(dy)
    want = dy @ read_back(model.train())
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)


def test_sparse_training_on_top():
    w = matrix()
    model, _ = restored(four_bit(w), w)
    adapter = sparse(model, Coordinates.of({"0": LISTED[:2]}, model))
    (values,) = adapter.parameters()
    with torch.no_grad():
        values += 0.5
    got = read_back(model)[ROWS, COLUMNS]
    want = w[ROWS, COLUMNS] + torch.tensor([0.5, 0.5, 0, 0, 0])
    assert torch.allclose(got, want)


# --- where the values come from ---


def test_sources_of_values():
    w = matrix()
    original = nn.Sequential(nn.Linear(H, D, bias=False))
    original[0].weight.data = w
    want = read_back(restored(four_bit(w), w)[0])
    coordinates = Coordinates.of({"0": LISTED}, original)
    for super_weights in ({"0": LISTED[::-1]}, coordinates):
        for values in ({"0": w}, original.state_dict(), original):
            model = nn.Sequential(four_bit(w))
            restore_super_weights(model, super_weights, values=values)
            assert torch.equal(read_back(model), want)


def packed_llama(code="nf4", **changes):
    """A tiny model and its packed twin."""
    model = tiny_model("llama", hidden_size=D, intermediate_size=H, **changes)
    packed = copy.deepcopy(model)
    for layer in packed.model.layers:
        layer.mlp.down_proj = four_bit(layer.mlp.down_proj.weight.data, code)
    return model, packed.train()


def scan_of(model) -> ScanReport:
    """A report of two super weights of layer 1 and an inert one of layer 0."""
    weight = model.get_submodule(DOWN).weight.detach()
    data = fake_report.report(
        [
            fake_report.candidate(0, 1, 3, 5, "super weight", 30.0, weight=float(weight[3, 5])),
            fake_report.candidate(1, 1, 9, 100, "super weight", 9.0, weight=float(weight[9, 100])),
            fake_report.candidate(2, 0, 4, 4, "inert", 1.0),
        ],
        layers=3,
        shape=(D, H),
    )
    return ScanReport(data)


def test_a_report_has_the_values(tmp_path):
    model, packed = packed_llama()
    report, path = scan_of(model), tmp_path / "report.json"
    report.save(path)
    weight = model.get_submodule(DOWN).weight
    for source in (report, path, str(path)):
        handle = restore_super_weights(packed, source)
        places = [(r.module, r.row, r.column, r.after) for r in handle.report]
        assert places == [(DOWN, r, c, float(weight[r, c])) for r, c in ((3, 5), (9, 100))]
        got = read_back(packed.get_submodule(DOWN))
        assert torch.equal(got[[3, 9], [5, 100]], weight[[3, 9], [5, 100]])
        handle.remove()


# --- what is refused ---


def refused(model, super_weights, match, **options):
    with pytest.raises(InvalidInput, match=match) as caught:
        restore_super_weights(model, super_weights, **options)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("super_weights", "match"),
    [
        ({"packed": [[0, 0]], "plain": [[0, 0]]}, "plain is a Linear: expected bitsandbytes"),
        ({"packed": [[0, 0]], "unquantized": [[0, 0]]}, "unquantized is not quantized yet"),
        ({"packed": [[0, 0]], "sixteen": [[0, 0]]}, "sixteen keeps its weight in 16 bits"),
        ({"packed": [[0, 0]], "absent": [[0, 0]]}, "no module 'absent'"),
        ({"packed": [[0, H]]}, r"coordinate \[0, 128\] lies outside packed"),
        ({"packed": [[0, 0], [0, 0]]}, "listed more than once"),
        ({"packed": []}, "no coordinate of packed"),
        ({}, "no coordinate"),
        (7, "must be a report or its path"),
    ],
)
def test_what_cannot_be_restored(super_weights, match):
    model = nn.ModuleDict(
        {
            "packed": four_bit(matrix()),
            "plain": nn.Linear(H, D, bias=False),
            "unquantized": bnb.nn.Linear4bit(H, D, bias=False),
            "sixteen": bnb.nn.Linear8bitLt(H, D, bias=False, has_fp16_weights=True),
        }
    )
    refused(model, super_weights, match, values=dict.fromkeys(model, matrix()))


def test_values_that_are_not_there():
    model, listed = nn.Sequential(four_bit(matrix())), {"0": [[3, 5]]}
    refused(model, listed, "pass values=")
    refused(model, Coordinates.of(listed, model), "pass values=")
    refused(model, listed, "neither '0' nor its weight", values={"1": matrix()})
    refused(model, listed, "must be floating-point", values={"0": matrix()[:, :-1]})
    refused(model, listed, "must be floating-point", values=model.state_dict())
    refused(model, listed, "packed, sharded", values=model)
    refused(model, listed, "must be the original model", values=[matrix()])
    broken = matrix()
    broken[3, 5] = float("nan")
    refused(model, listed, r"\[3, 5\] of 0 is not finite", values={"0": broken})


def test_another_model_is_refused():
    model, packed = packed_llama()
    report = scan_of(model)
    report.data["layers"][1]["rows"] = 2 * D
    refused(packed, report, "the coordinates are for")
    report.data["candidates"] = report.data["candidates"][2:]
    refused(packed, report, "found no candidate")
    refused(packed, "nowhere.json", "cannot read the report")


def test_twice_is_refused():
    model, _ = restored(four_bit(matrix()), matrix())
    want = read_back(model)
    with pytest.raises(InvalidInput, match="restored super weights already"):
        restore_super_weights(model, {"0": [[9, 9]]}, values={"0": matrix()})
    assert torch.equal(read_back(model), want)


# --- formats ---


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_from_four_bits(code, block_size):
    layer = four_bit(matrix().bfloat16(), code, block_size=block_size)
    q = from_bitsandbytes(layer)
    assert torch.equal(q.codes, layer.weight.data.view(-1))
    assert torch.equal(q.scales, layer.weight.quant_state.absmax)
    assert (q.shape, q.dtype, q.plan.code.name) == ((D, H), torch.bfloat16, code)
    assert torch.equal(q.dequantize(), dequantize_4bit(layer.weight, layer.weight.quant_state))
    assert torch.equal(from_bitsandbytes(layer.weight).codes, q.codes)
    ours = ops.block_quantize(matrix().bfloat16(), code=code, block_size=block_size)
    assert torch.equal(ours.codes, q.codes) and torch.equal(ours.scales, q.scales)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_from_nested_scales_and_other_storage(storage):
    layer = four_bit(matrix(), nested=True, storage=storage)
    assert layer.weight.quant_state.nested
    want = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(from_bitsandbytes(layer).dequantize(), want)


def test_from_the_form_for_cpus():
    """Made by the function that layers call on a CPU with AVX-512 bf16, whatever this CPU is."""
    w = matrix()
    layer = four_bit(w, nested=True)
    plain = from_bitsandbytes(layer)
    convert = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = convert(
        layer.weight.data, layer.weight.quant_state
    )
    q = from_bitsandbytes(layer)
    assert torch.equal(q.codes, plain.codes) and q.dtype == torch.float32
    assert torch.equal(q.scales, plain.scales.bfloat16().float())
    _, handle = restored(layer, w)
    # The kernel rounds the table, too, and each product.
    blocks = (ROWS * H + COLUMNS) // 64
    table = (plain.dequantize()[ROWS, COLUMNS] / plain.scales[blocks]).bfloat16()
    want = (table * q.scales[blocks].bfloat16()).tolist()
    assert [r.before for r in handle.report] == want


def test_from_eight_bits():
    layer = eight_bit(matrix())
    codes, largest = layer.weight.CB.clone(), layer.weight.SCB.clone()
    for _ in range(2):  # the first forward moves them
        q = from_bitsandbytes(layer)
        assert torch.equal(q.codes.view(torch.int8).view(D, H), codes)
        assert torch.equal(q.dequantize(torch.float32), codes * (largest * (1 / 127))[:, None])
        assert (q.plan.block, q.dtype) == ((0, H), torch.float16)
        assert torch.equal(read_back(layer), q.dequantize(torch.float32))
    x = ops.quantize_activation(torch.randn(5, H))
    assert ops.quant_linear(x, q).shape == (5, D)


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_restored_weights_are_outliers_of_our_format(make, tmp_path):
    w = matrix().half().float()
    model, _ = restored(make(w), w)
    q = from_bitsandbytes(model[0])
    assert torch.equal(q.dequantize(torch.float32)[ROWS, COLUMNS], w[ROWS, COLUMNS])
    kept = QuantLinear.from_packed(q)
    state = kept.state_dict()
    torch.testing.assert_close(kept(torch.eye(H)).T, read_back(model), rtol=2.0**-22, atol=0)
    again = QuantLinear.from_packed(from_bitsandbytes(restored(make(w), w)[0][0]))
    again.load_state_dict(state)
    assert torch.equal(again.dequantize(), kept.dequantize())
    # Positions without a code of their own, as everywhere in our format.
    codes = ops.block_quantize(w, code="int8", block_size="row", outliers=torch.tensor(LISTED))
    if make is eight_bit:
        assert codes.codes.view(D, H)[ROWS, COLUMNS].eq(0).all()
        assert q.codes.view(D, H)[ROWS, COLUMNS].eq(0).all()


@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_bitsandbytes(code, block_size, dtype):
    w, bias = matrix().to(dtype), torch.randn(D).to(dtype)
    q = ops.block_quantize(w, code=code, block_size=block_size)
    layer = to_bitsandbytes(q, bias=bias).train()
    native = four_bit(w, code, block_size=block_size, bias=bias)
    assert list(layer.state_dict()) == list(native.state_dict())
    for key, value in native.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key
    x = torch.randn(3, H, dtype=dtype)
    assert torch.equal(layer(x), native(x))
    back = from_bitsandbytes(layer)
    assert back.plan == q.plan and back.dtype == q.dtype
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)
    moved = copy.deepcopy(layer).to("cpu")
    assert torch.equal(moved(x), native(x))


def test_a_matrix_of_one_short_block():
    w = torch.randn(4, 10)
    q = ops.block_quantize(w, code="nf4", block_size="tensor")
    layer = to_bitsandbytes(q)
    assert layer.weight.quant_state.blocksize == 64
    assert torch.equal(layer.train()(torch.eye(10)).T, q.dequantize())


@pytest.mark.parametrize("scale_dtype", ["float16", "int8"])
def test_scales_of_other_types(scale_dtype):
    q = ops.block_quantize(matrix(), code="nf4", scale_dtype=scale_dtype)
    assert torch.equal(read_back(to_bitsandbytes(q).train()), q.dequantize())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"code": "int4"}, "packs nf4 and fp4, got int4"),
        ({"block_size": 48}, "got blocks of 48 elements"),
        ({"block_size": 8192, "shape": (128, 128)}, "got blocks of 8192 elements"),
        ({"block_size": (8, 8)}, "got tiles of 8 x 8"),
        ({"shape": (2, 32, 64)}, r"has a matrix \[D, H\], got \[2, 32, 64\]"),
        ({"outliers": torch.tensor([[0, 0]])}, "no place for the 1 outliers"),
    ],
)
def test_what_has_no_form_in_bitsandbytes(options, match):
    w = torch.randn(options.pop("shape", (D, H)))
    q = ops.block_quantize(w, **({"code": "nf4"} | options))
    with pytest.raises(InvalidInput, match=match):
        to_bitsandbytes(q)


def test_what_is_no_packed_weight():
    with pytest.raises(InvalidInput, match="expected a QuantizedTensor"):
        to_bitsandbytes(matrix())
    with pytest.raises(InvalidInput, match=r"bias must be \[64\]"):
        to_bitsandbytes(ops.block_quantize(matrix(), code="nf4"), bias=torch.zeros(H))
    with pytest.raises(InvalidInput, match="got Tensor"):
        from_bitsandbytes(matrix())
    with pytest.raises(InvalidInput, match="the layer is a Linear"):
        from_bitsandbytes(nn.Linear(4, 4))
    with pytest.raises(InvalidInput, match="not quantized yet"):
        from_bitsandbytes(bnb.nn.Params4bit(matrix(), requires_grad=False))
    with pytest.raises(InvalidInput, match=r"holds a weight \[128, 64\], expected \[64, 128\]"):
        layer = bnb.nn.Linear4bit(H, D, bias=False)
        layer.weight = four_bit(matrix().T).weight
        from_bitsandbytes(layer)
    layer = four_bit(matrix())
    layer.weight.data = layer.weight.data[:100]
    with pytest.raises(InvalidInput, match="100 bytes of codes, expected 4096"):
        from_bitsandbytes(layer)


def test_outliers_are_dropped_and_restored():
    w = matrix()
    plain = ops.block_quantize(w, code="nf4", block_size=4096)
    q = ops.block_quantize(w, code="nf4", block_size=4096, outliers=torch.tensor(LISTED))
    model = nn.Sequential(to_bitsandbytes(q, drop_outliers=True).train())
    assert read_back(model)[ROWS, COLUMNS].eq(0).all()
    handle = restore_super_weights(model, {"0": q})
    assert torch.equal(read_back(model), q.dequantize())
    assert [r.before for r in handle.report] == [0.0] * 5
    # The other weights of the block have steps of their own size.
    error, harmed = (((p.dequantize() - w)[:32]).norm() for p in (q, plain))
    assert error < harmed / 5


# --- with transformers and PEFT ---


def quantized_folder(tmp_path):
    model = tiny_model("llama", hidden_size=D, intermediate_size=H)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def load(path, **options):
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
)
def test_a_model_that_transformers_quantized(options, tmp_path):
    model, path = quantized_folder(tmp_path)
    packed, ids = load(path, **options), token_ids()
    before = packed(input_ids=ids).logits
    keys = list(packed.state_dict())
    packed = load(path, **options)
    handle = restore_super_weights(packed, scan_of(model))
    assert not torch.equal(packed(input_ids=ids).logits, before)
    assert list(packed.state_dict()) == keys
    handle.remove()


def test_saved_models_have_no_super_weights_in_them(tmp_path):
    model, path = quantized_folder(tmp_path)
    packed = load(path, load_in_4bit=True).train()
    plain = read_back(packed.get_submodule(DOWN))
    restore_super_weights(packed, scan_of(model))
    packed.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").train()
    assert torch.equal(read_back(again.get_submodule(DOWN)), plain)
    restore_super_weights(again, scan_of(model))
    assert torch.equal(
        read_back(again.get_submodule(DOWN)), read_back(packed.get_submodule(DOWN))
    )


def test_qlora_trains_on_top(tmp_path):
    model, path = quantized_folder(tmp_path)
    ids = token_ids()
    results = {}
    for wanted in (False, True):
        packed = load(path, load_in_4bit=True, bnb_4bit_quant_type="nf4").train()
        if wanted:
            restore_super_weights(packed, scan_of(model))
        torch.manual_seed(0)
        lora = get_peft_model(packed, LoraConfig(r=4, target_modules=["down_proj"]))
        trained = [p for p in lora.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(5):
            loss = lora(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        results[wanted] = losses
    assert results[False] != results[True]
    lora.save_pretrained(tmp_path / "adapter")
    packed = load(path, load_in_4bit=True, bnb_4bit_quant_type="nf4").train()
    restore_super_weights(packed, scan_of(model))
    again = PeftModel.from_pretrained(packed, tmp_path / "adapter").train()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, lora(input_ids=ids).logits)
    # And in a model that PEFT has wrapped already.
    packed = load(path, load_in_4bit=True, bnb_4bit_quant_type="nf4").train()
    again = PeftModel.from_pretrained(packed, tmp_path / "adapter").train()
    name = f"base_model.model.{DOWN}"
    restore_super_weights(
        again, {name: [[3, 5], [9, 100]]}, values={name: model.get_submodule(DOWN).weight}
    )
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, lora(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_merged_layers_have_the_exact_values_again(tmp_path):
    """Merging quantizes the layer anew: its scales are others, and the hook follows."""
    model, path = quantized_folder(tmp_path)
    packed = load(path, load_in_4bit=True, bnb_4bit_quant_type="nf4").train()
    handle = restore_super_weights(packed, scan_of(model))
    lora = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    layer = get_peft_model(packed, lora).merge_and_unload().train().get_submodule(DOWN)
    exact = torch.tensor([restored.after for restored in handle.report])
    got = read_back(layer)
    # LoRA's part, which the sum takes away, is large against them.
    assert ((got[[3, 9], [5, 100]] - exact).abs() <= 2.0**-23 * got.abs().max()).all()


# --- a real model ---

CRITICAL = {"model.layers.11.mlp.down_proj": [[507, 1229], [507, 1487]]}


def test_smollm2_as_transformers_quantizes_it(smollm2, smollm2_path):
    original, _ = smollm2
    packed = load(
        smollm2_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ).train()
    handle = restore_super_weights(packed, CRITICAL, values=original)
    (name,) = CRITICAL
    columns = torch.tensor([1229, 1487])
    one_hot = torch.zeros(2, 1536).scatter_(1, columns[:, None], 1.0)
    with torch.no_grad():
        got = packed.get_submodule(name)(one_hot)[:, 507]
    exact = original.get_submodule(name).weight[507, columns]
    assert torch.equal(got, exact)
    assert any(r.before != r.after for r in handle.report)


def test_smollm2_without_and_with_its_super_weights(smollm2):
    """The same codes: what bitsandbytes has no place for ruins the model, and comes back."""
    original, tokenizer = smollm2
    text = "Paris is the capital of France, and Rome is the capital of Italy. " * 4
    ids = tokenizer(text, return_tensors="pt").input_ids
    model = copy.deepcopy(original).train()
    (name,) = CRITICAL
    layer = model.get_submodule(name)
    q = ops.block_quantize(
        layer.weight, code="nf4", block_size=4096, outliers=torch.tensor(CRITICAL[name])
    )
    model.set_submodule(name, to_bitsandbytes(q, drop_outliers=True).train())
    with torch.no_grad():
        intact, dropped = (m(input_ids=ids, labels=ids).loss.item() for m in (original, model))
        restore_super_weights(model, {name: q})
        kept = model(input_ids=ids, labels=ids).loss.item()
    assert dropped > intact + 3 and abs(kept - intact) < 0.2
