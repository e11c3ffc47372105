"""Sparse adapters on quantized models: training, and merging without rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open

import swkernels
from swkernels import QuantConfig, ops, quantize
from swkernels.errors import InvalidInput
from swkernels.train import Coordinates, sparse
from swkernels.train.export import to_checkpoint
from swkernels.train.weights import find_weights
from tests.models.tiny import run, tiny_model, token_ids

from .dense import unpacked

DOWN = "model.layers.1.mlp.down_proj"
ARCHITECTURES = ("llama", "gpt2", "mixtral", "gpt_oss", "dbrx", "llama4")


def logits(model):
    with torch.no_grad():
        return run(model, token_ids()).logits


def quantized(arch="llama", super_weights=None, dtype=torch.float32, **fields):
    model = tiny_model(arch).to(dtype)
    quantize(model, QuantConfig(**fields), super_weights, progress=False)
    return model


def with_random_values(model, k=60, name="default", seed=1):
    handle = sparse(model, Coordinates.random(model, k, seed=seed), name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in handle.parameters():
            values.copy_(torch.randn(len(values), generator=generator) * 0.1)
    return handle


def packed(model):
    """Every tensor of every packed matrix, as it is now."""
    held = {name: buffer.clone() for name, buffer in model.named_buffers() if "packed" in name}
    # Filled in when a state dict is made, and only then.
    return {name: buffer for name, buffer in held.items() if "checksum" not in name}


# --- training ---


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_those_of_the_dense_model(arch):
    model = quantized(arch)
    dense = unpacked(model, tiny_model(arch)).double()
    dense.set_experts_implementation("eager")
    model.double()
    coordinates = Coordinates.random(model, 100, seed=1)
    assert coordinates == Coordinates.random(dense, 100, seed=1)
    found = []
    for each in (model, dense):
        handle = sparse(each, coordinates)
        ids = token_ids()
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({site: value.grad for site, value in handle.values().items()})
    for site, grad in found[0].items():
        if grad is None or found[1][site] is None:
            assert grad is None and found[1][site] is None, site
        else:
            assert torch.allclose(grad, found[1][site], rtol=1e-6, atol=1e-9), site


def test_training_lowers_the_loss():
    model = quantized()
    handle = sparse(model, Coordinates.random(model, 2000))
    optimizer = torch.optim.Adam(handle.parameters(), 0.05)
    losses = []
    for _ in range(12):
        loss = model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_coordinates_by_magnitude_read_the_packed_values():
    model = quantized()
    dense = unpacked(model, tiny_model("llama"))
    assert Coordinates.from_magnitude(model, 50) == Coordinates.from_magnitude(dense, 50)


def test_a_packed_weight_can_be_read_but_not_written():
    model = quantized()
    (weight,) = find_weights(model, [DOWN])
    assert torch.equal(weight.read(), model.get_submodule(DOWN).dequantize())
    with pytest.raises(InvalidInput, match=f"{DOWN} is packed .int4.: expected a plain"):
        weight.matrix()
    with pytest.raises(InvalidInput, match="is packed"):
        swkernels.train.freeze(model, Coordinates.of({DOWN: [[0, 0]]}, model))


# --- merging ---


@pytest.mark.parametrize("code", ["int4", "int8", "nf4"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_merge_rounds_nothing(arch, code):
    dense = tiny_model(arch)
    model = quantized(arch, Coordinates.random(dense, 20, seed=9), code=code)
    handle = with_random_values(model)
    before = {site: handle.target(site).read() for site in handle.values()}
    want = logits(model)
    double = logits(copy.deepcopy(model).double())
    handle.merge()
    for site, values in handle.values().items():
        rows, cols = handle.coordinates.weights[site].long().unbind(1)
        expected = before[site].clone()
        expected[rows, cols] += values.detach()  # float32(packed value + delta)
        assert torch.equal(handle.target(site).read(), expected), site
    merged = logits(model)
    # As near to exact arithmetic as the model that is not merged.
    assert (merged - double).abs().max() <= 2 * (want - double).abs().max() + 1e-7
    handle.remove()
    assert torch.equal(logits(model), merged)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_brings_every_byte_back(arch, dtype):
    model = quantized(arch, Coordinates.random(tiny_model(arch), 20, seed=9), dtype)
    handle = with_random_values(model)
    before, want = packed(model), logits(model)
    handle.merge()
    assert any(not torch.equal(a, before[n]) for n, a in packed(model).items())
    with pytest.raises(InvalidInput, match="merged already"):
        handle.merge()
    handle.unmerge()
    after = packed(model)
    assert after.keys() == before.keys()
    for name, buffer in before.items():
        assert buffer.dtype == after[name].dtype and torch.equal(buffer, after[name]), name
    assert torch.equal(logits(model), want)


def test_two_adapters_come_out_in_any_order():
    model = quantized(super_weights={DOWN: [[3, 5]]})
    before = packed(model)
    a, b = with_random_values(model, name="a"), with_random_values(model, name="b", seed=2)
    both = logits(model)
    a.merge()
    b.merge()
    assert torch.allclose(logits(model), both, rtol=1e-4, atol=1e-5)
    a.unmerge()
    b.unmerge()
    after = packed(model)
    assert all(torch.equal(buffer, after[name]) for name, buffer in before.items())


def test_an_outlier_is_updated_and_widens():
    model = quantized(super_weights={DOWN: [[3, 5]]}, dtype=torch.bfloat16)
    layer = model.get_submodule(DOWN)
    value = layer.packed.values[0].float()
    handle = sparse(model, Coordinates.of({DOWN: [[3, 5]]}, model))
    with torch.no_grad():
        handle.parameters()[0].fill_(1e-5)  # less than half a step of bfloat16
    handle.merge()
    q = layer.packed
    assert q.values.dtype == torch.float32 and q.positions.tolist() == [3 * 80 + 5]
    assert torch.equal(q.values[0], value + torch.tensor(1e-5))


def test_integer_products_see_a_merge():
    model = quantized(code="int8", block_size="row")
    handle = with_random_values(model)
    handle.merge()
    layer = model.get_submodule(DOWN)
    x = torch.randn(6, 80)
    q = ops.quantize_activation(x)
    want = q.dequantize().double() @ layer.dequantize().double().T
    assert torch.allclose(ops.quant_linear(q, layer.packed).double(), want, rtol=1e-5, atol=1e-6)


def test_too_many_are_refused_before_anything_changes():
    model = quantized()
    handle = with_random_values(model, 2000)
    before = packed(model)
    with pytest.raises(InvalidInput, match=r"is packed, and with those merged \d+ outliers of"):
        handle.merge()
    assert not handle.merged
    after = packed(model)
    assert all(torch.equal(buffer, after[name]) for name, buffer in before.items())


def test_a_file_of_a_merged_adapter(tmp_path):
    model = quantized()
    handle = with_random_values(model)
    handle.save(tmp_path / "a.safetensors")
    handle.merge()
    handle.save(tmp_path / "b.safetensors")
    files = [safe_open(tmp_path / name, "pt") for name in ("a.safetensors", "b.safetensors")]
    assert files[0].metadata() == files[1].metadata()
    for key in files[0].keys():
        assert torch.equal(files[0].get_tensor(key), files[1].get_tensor(key))
    handle.load(tmp_path / "a.safetensors")


def test_peft():
    peft = pytest.importorskip("peft")
    from swkernels.integrations.peft import SparseCoordinateConfig

    for arch in ("llama", "mixtral"):
        model = quantized(arch, Coordinates.random(tiny_model(arch), 20, seed=9))
        before = packed(model)
        config = SparseCoordinateConfig(coordinates=Coordinates.random(model, 50, seed=3))
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        want = logits(adapted)
        adapted.merge_adapter(safe_merge=True)
        assert torch.allclose(logits(adapted), want, rtol=1e-4, atol=1e-5)
        adapted.unmerge_adapter()
        after = {name.replace("base_layer.", ""): b for name, b in packed(adapted.model).items()}
        assert all(torch.equal(buffer, after[name]) for name, buffer in before.items())
        merged = adapted.merge_and_unload()
        assert torch.allclose(logits(merged), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_a_checkpoint_holds_the_merged_outliers(arch, tmp_path):
    from transformers import AutoModelForCausalLM

    import swkernels.integrations.transformers  # noqa: F401  # it knows the method

    kept = Coordinates.random(tiny_model(arch), 20, seed=9)
    model = quantized(arch, kept, outlier_dtype="bfloat16")  # which the merge widens
    handle = with_random_values(model)
    before = packed(model)
    to_checkpoint(handle, tmp_path / "merged")
    assert all(torch.equal(b, before[name]) for name, b in packed(model).items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    handle.merge()
    want = packed(model)
    assert all(torch.equal(b, want[name]) for name, b in packed(loaded).items())
    assert torch.equal(logits(loaded), logits(model))
