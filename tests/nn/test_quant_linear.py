"""QuantLinear, QuantEmbedding, TiedQuantLinear: packed matrices in modules."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.utils.checkpoint import checkpoint

from swkernels import ops
from swkernels.errors import InvalidInput, NoDenseWeight
from swkernels.nn import QuantEmbedding, QuantLinear, TiedQuantLinear
from swkernels.nn.packed import empty_packed

D, H = 20, 24
FORMS = {
    "int4": {},
    "int4 asymmetric, tensor": {"symmetric": False, "block_size": "tensor"},
    "int4, rows": {"block_size": "row", "scale_dtype": "float16"},
    "int8 asymmetric, int8 scales": {
        "code": "int8", "symmetric": False, "scale_dtype": "int8", "block_size": 16
    },
    "int8, channels": {"code": "int8", "block_size": "channel"},
    "nf4, tiles": {"code": "nf4", "block_size": (8, 5)},
    "fp4, odd blocks": {"code": "fp4", "block_size": 7},
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def matrix(dtype=torch.float32, seed=0, shape=(D, H)):
    torch.manual_seed(seed)
    w = torch.randn(shape)
    w[3, 5], w[7, 0] = 40.0, -30.0
    return w.to(dtype)


def packed(dtype=torch.float32, *, outliers=((3, 5), (7, 0)), seed=0, shape=(D, H), **form):
    pairs = torch.tensor(outliers, dtype=torch.int64).view(-1, 2)
    return ops.block_quantize(matrix(dtype, seed, shape), outliers=pairs, **form)


def layer(dtype=torch.float32, **form) -> QuantLinear:
    return QuantLinear.from_packed(packed(dtype, **form), torch.arange(D).to(dtype))


def empty(outliers=0, device="cpu", dtype=torch.float32, **form) -> QuantLinear:
    return QuantLinear.empty(
        H, D, dtype=dtype, bias=True, outliers=outliers, device=device, **form
    )


def assert_same(a: nn.Module, b: nn.Module):
    x = torch.randn(3, H)
    assert torch.equal(a(x), b(x)) and torch.equal(a.dequantize(), b.dequantize())


# --- what it computes ---


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_quant_linear(form, dtype):
    q, x = packed(dtype, **form), torch.randn(2, 3, H, dtype=dtype)
    bias = torch.randn(D, dtype=dtype)
    module = QuantLinear.from_packed(q, bias)
    assert torch.equal(module(x), ops.quant_linear(x, q, bias))
    assert torch.equal(QuantLinear.from_packed(q)(x), ops.quant_linear(x, q))
    # In float64 it is the plain product with what is packed.
    w = module.dequantize(torch.float64)
    want = F.linear(x.double(), w, bias.double())
    assert torch.allclose(module(x.double()), want, rtol=1e-12)
    assert w[3, 5] == 40 and w[7, 0] == -30


@every_form
def test_an_embedding_unpacks_the_rows_that_are_asked_for(form):
    q = packed(**form)
    module, indices = QuantEmbedding.from_packed(q), torch.tensor([[3, 7, 3], [0, 19, 7]])
    assert torch.equal(module(indices), q.dequantize()[indices])
    assert torch.equal(module(indices.int()), q.dequantize()[indices])
    assert module(torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, H)


def test_an_embedding_of_odd_width_without_outliers():
    q = packed(outliers=(), shape=(9, 15), block_size=4)
    assert torch.equal(QuantEmbedding.from_packed(q)(torch.arange(9)), q.dequantize())


def test_an_embedding_returns_the_type_that_the_model_was_cast_to():
    module = QuantEmbedding.from_packed(packed(torch.bfloat16))
    indices = torch.tensor([3, 4])
    assert module(indices).dtype == torch.bfloat16
    got = module.float()(indices)
    assert got.dtype == torch.float32
    assert torch.equal(got, module.dequantize(torch.float32)[indices])


def test_a_tied_head_shares_the_embedding_and_is_saved_with_it_once():
    model = nn.Module()
    model.embedding = QuantEmbedding.from_packed(packed())
    model.head = TiedQuantLinear(model.embedding)
    x = torch.randn(3, H)
    assert torch.equal(model.head(x), ops.quant_linear(x, packed()))
    assert not [key for key in model.state_dict() if key.startswith("head")]
    other = copy.deepcopy(model)
    other.embedding.set_packed(packed(seed=1))
    assert torch.equal(other.head(x), ops.quant_linear(x, packed(seed=1)))
    assert torch.equal(model.head(x), ops.quant_linear(x, packed()))


def test_gradients_reach_x_and_a_checkpoint_recomputes():
    module, x = layer(), torch.randn(3, H, dtype=torch.float64, requires_grad=True)
    module(x).square().sum().backward()
    want = x.detach().clone().requires_grad_()
    F.linear(want, module.dequantize(x.dtype), module.bias.double()).square().sum().backward()
    assert torch.allclose(x.grad, want.grad, rtol=1e-12)
    again = x.detach().clone().requires_grad_()
    checkpoint(module, again, use_reentrant=False).square().sum().backward()
    assert torch.equal(again.grad, x.grad)
    assert module.bias.grad is None and not module.bias.requires_grad


@every_form
def test_torch_compile_takes_it_as_one_graph(form):
    module, x = layer(**form), torch.randn(3, H, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert torch.equal(compiled(x), module(x)) and x.grad is not None
    embedding, indices = QuantEmbedding.from_packed(packed(**form)), torch.tensor([3, 4])
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices), embedding(indices))


def test_autocast_is_that_of_a_linear_layer():
    module, dense = layer(), nn.Linear(H, D)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(3, H, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            got = module(x)
            if dtype != torch.float64:  # nn.Linear does not take it
                assert got.dtype == dense(x).dtype == torch.bfloat16
        assert torch.equal(got, module(x if dtype == torch.float64 else x.bfloat16()))


# --- what it holds ---


@every_form
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_changes_nothing_that_is_packed(form, cast):
    module = layer(**form)
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    w = module.dequantize()
    module.to(cast)
    assert module.bias.dtype == cast
    for name, tensor in module.named_buffers():
        assert not tensor.is_floating_point() and torch.equal(tensor, before[name]), name
    assert torch.equal(module.dequantize(), w)


def test_it_is_a_linear_layer_without_a_weight():
    module = layer(torch.bfloat16)
    assert isinstance(module, nn.Linear) and (module.in_features, module.out_features) == (H, D)
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert "weight" not in module.state_dict()
    weight = module.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((D, H), torch.bfloat16, "cpu")
    with pytest.raises(NoDenseWeight, match="no 'data' of it"):
        weight.data += 1
    assert not hasattr(weight, "numel") and not isinstance(weight, torch.Tensor)
    for tensor in (torch.zeros(D, H), nn.Parameter(torch.zeros(D, H))):
        with pytest.raises((AttributeError, KeyError), match="weight"):
            module.weight = tensor
    assert "int4" in repr(module) and "kept=2" in repr(module)


def test_it_shares_the_memory_of_what_it_was_made_of():
    q = packed()
    module = QuantLinear.from_packed(q)
    for name, tensor in module.packed.tensors().items():
        assert tensor.data_ptr() == q.tensors()[name].data_ptr(), name
    assert module.packed is module.packed  # nothing is made anew in a forward


def test_set_packed_takes_more_outliers_and_no_other_shape():
    module, x = layer(torch.bfloat16), torch.randn(3, H)
    wider = packed(torch.bfloat16, outliers=[(0, 0), (3, 5), (7, 0)], outlier_dtype=torch.float32)
    module.set_packed(wider)
    assert torch.equal(module(x), ops.quant_linear(x, wider, module.bias))
    before = module.state_dict()
    with pytest.raises(InvalidInput, match=r"\[20, 24\], got \[24, 20\]"):
        module.set_packed(packed(shape=(H, D)))
    with pytest.raises(InvalidInput, match="QuantizedTensor"):
        module.set_packed(torch.zeros(D, H))
    assert all(torch.equal(module.state_dict()[key], before[key]) for key in before)


def test_what_cannot_be_a_layer_is_refused():
    with pytest.raises(InvalidInput, match="expected a QuantizedTensor"):
        QuantLinear.from_packed(matrix())
    with pytest.raises(InvalidInput, match=r"bias must be \[20\]"):
        QuantLinear.from_packed(packed(), torch.zeros(H))
    with pytest.raises(InvalidInput, match=r"\[D, H\], got \[2, 3, 4\]"):
        QuantLinear.from_packed(ops.block_quantize(torch.ones(2, 3, 4)))
    with pytest.raises(InvalidInput, match=r"\[V, H\], got \[2, 3, 4\]"):
        QuantEmbedding.from_packed(ops.block_quantize(torch.ones(2, 3, 4)))


# --- copies and files ---


@every_form
def test_a_deep_copy_is_independent(form):
    module = layer(**form)
    module(torch.randn(1, H))
    other = copy.deepcopy(module)
    assert_same(module, other)
    assert other.packed.codes.data_ptr() != module.packed.codes.data_ptr()
    assert other.packed.codes.data_ptr() == other.packed_codes.data_ptr()


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_goes_through_safetensors_into_an_empty_layer(form, dtype, assign):
    module = layer(dtype, **form)
    state = load(save(module.state_dict()))
    for device in ("cpu", "meta") if assign else ("cpu",):
        other = empty(outliers=5, device=device, dtype=dtype, **form)
        other.load_state_dict(state, assign=assign)
        other.verify()
        assert_same(module, other)
        assert all(torch.equal(other.state_dict()[key], state[key]) for key in state)


def test_a_file_with_wider_outliers_is_taken():
    module = layer(torch.bfloat16)
    module.set_packed(packed(torch.bfloat16, outliers=[(1, 1)], outlier_dtype=torch.float32))
    other = empty(outliers=2, dtype=torch.bfloat16)
    other.load_state_dict(module.state_dict())
    assert other.packed.values.dtype == torch.float32
    assert_same(module, other)


def test_bytes_that_lie_anywhere_are_read():
    module = layer()
    state = module.state_dict()
    values = state["packed_values"]
    room = torch.zeros(len(values) + 1, dtype=torch.uint8)
    room[1:] = values
    other = empty(outliers=2)
    other.load_state_dict(state | {"packed_values": room[1:]}, assign=True)
    assert_same(module, other)


def test_a_state_dict_survives_torch_save_without_pickled_objects():
    module, file = layer(), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = empty(outliers=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(module, other)


def _flip(name, at=0):
    def damage(state):
        state[name].view(torch.uint8).view(-1)[at] ^= 1

    return damage


def _set(name, value, at=0, dtype=None):
    def damage(state):
        tensor = state[name] if dtype is None else state[name].view(dtype)
        tensor[at] = value

    return damage


def _cut(name):
    def damage(state):
        state[name] = state[name][:-1].clone()

    return damage


def _cast(name, dtype):
    def damage(state):
        state[name] = state[name].to(dtype)

    return damage


DAMAGES = {
    "truncated codes": (_cut("packed_codes"), "packed_codes of the_layer is torch.uint8"),
    "truncated scales": (_cut("packed_scales"), "packed_scales of the_layer is torch.int32"),
    "truncated positions": (_cut("packed_positions"), "packed_values of the_layer is"),
    "truncated values": (_cut("packed_values"), "packed_values of the_layer is"),
    "truncated plan": (_cut("packed_plan"), "packed_plan of the_layer is"),
    "truncated checksum": (_cut("packed_checksum"), "packed_checksum of the_layer is"),
    "scales as floats": (_cast("packed_scales", torch.float32), "expected torch.int32"),
    "positions as int64": (_cast("packed_positions", torch.int64), "expected torch.int32"),
    "a code": (_flip("packed_codes", 7), "packed_checksum of the_layer is not that"),
    "a scale": (_flip("packed_scales"), "packed_checksum"),
    "a value": (_flip("packed_values"), "packed_checksum"),
    "the checksum": (_flip("packed_checksum"), "packed_checksum"),
    "another code": (_set("packed_plan", 1, 3), "packed_plan of the_layer is"),
    "another shape": (_set("packed_plan", 21, 8), "packed_plan of the_layer is"),
    "another version": (_set("packed_plan", 2), "packed_plan of the_layer is"),
    "an unknown outlier type": (_set("packed_plan", 9, 7), "packed_plan of the_layer is"),
    "a negative scale": (
        _set("packed_scales", -1.0, dtype=torch.float32), "packed_scales of the_layer holds a scale"
    ),
    "NaN for a scale": (
        _set("packed_scales", torch.nan, dtype=torch.float32), "packed_scales of the_layer holds"
    ),
    "an infinite scale": (
        _set("packed_scales", torch.inf, dtype=torch.float32), "holds NaN or infinity"
    ),
    "NaN for an outlier": (
        _set("packed_values", torch.nan, dtype=torch.float32),
        "packed_values of the_layer holds NaN or infinity",
    ),
    "a position outside": (_set("packed_positions", D * H, 1), "outside of the 480 elements"),
    "a negative position": (_set("packed_positions", -1), "outside of the 480 elements"),
    "positions in no order": (_set("packed_positions", 0, 1), "is not ascending"),
    "a far zero point": (
        _set("packed_zero_points", -(2**20) - 1), "zero point beyond 2\\^20"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_state_dict_is_refused_and_nothing_is_changed(damage, message):
    form = {"symmetric": False, "block_size": 32}
    state = {name: tensor.clone() for name, tensor in layer(**form).state_dict().items()}
    damage(state)
    model = nn.ModuleDict({"the_layer": layer(**form)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InvalidInput, match=message) as caught:
        model.load_state_dict({f"the_layer.{name}": tensor for name, tensor in state.items()})
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_nested_scales_are_checked():
    form = {"scale_dtype": "int8", "block_size": 4, "code": "int8", "symmetric": False}
    state = layer(**form).state_dict()
    state["packed_scales_codes"][3] ^= 1
    with pytest.raises(InvalidInput, match="checksum"):
        empty(outliers=2, **form).load_state_dict(state)
    state = layer(**form).state_dict()
    state["packed_scales_scales"].view(torch.float32)[0] = -1
    with pytest.raises(InvalidInput, match="packed_scales_scales"):
        empty(outliers=2, **form).load_state_dict(state)


def test_what_is_missing_is_reported_as_pytorch_does():
    state = layer().state_dict()
    del state["packed_codes"]
    with pytest.raises(RuntimeError, match='Missing key.*"packed_codes"'):
        empty(outliers=2).load_state_dict(state)


def test_verify_finds_what_was_changed_in_memory():
    module = layer()
    module.verify("model.head")
    module.packed_codes[0] ^= 1
    with pytest.raises(InvalidInput, match="packed_checksum of model.head"):
        module.verify("model.head")


def test_empty_packed_has_the_form_of_a_packed_matrix():
    for form in FORMS.values():
        q = packed(torch.bfloat16, **form)
        e = empty_packed((D, H), dtype=torch.bfloat16, outliers=2, **form)
        for name, tensor in q.tensors().items():
            made = e.tensors()[name]
            assert (made.dtype, made.shape) == (tensor.dtype, tensor.shape), name
            assert made.is_meta
        assert e.plan == q.plan and e.shape == q.shape and e.dtype == q.dtype
