"""A model in memory against the manifest of its checkpoint: what changed, what cannot be said."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from swkernels import QuantConfig, quantize
from swkernels.errors import InvalidInput
from swkernels.guard import create
from swkernels.guard.live import check
from swkernels.train import Coordinates
from tests.models.tiny import tiny_model

SITE = "model.layers.1.mlp.down_proj"


def saved(model, folder, chunk: int = 256):
    """The model as transformers loads it, and the manifest of its files."""
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights = Coordinates({SITE: [(3, 5), (7, 11)]}, {SITE: (32, 80)}) if has_site(loaded) else None
    return loaded, create(folder, weights, chunk=chunk)


def has_site(model) -> bool:
    return any(name == SITE for name, _ in model.named_modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_a_loaded_model_is_what_its_files_say(name, tmp_path):
    model, manifest = saved(tiny_model(name), tmp_path)
    result = check(model, manifest)
    assert result.ok and result.findings == (), str(result)
    assert result.tensors == len(manifest.tensors) and result.bytes == manifest.size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model, manifest = saved(tiny_model("llama").to(dtype), tmp_path)
    assert check(model, manifest).ok and check(model, manifest, fast=True).ok


def test_says_which_tensor_which_chunk_which_super_weight(tmp_path):
    model, manifest = saved(tiny_model("llama"), tmp_path)
    weight = model.get_submodule(SITE).weight  # [32, 80] float32
    with torch.no_grad():
        weight[3, 5] = -weight[3, 5]
        weight[31, 79] += 1
    [first, last] = check(model, manifest).findings
    assert first.name == last.name == f"{SITE}.weight"
    assert first.chunks == (3, 3) and first.start <= 4 * (3 * 80 + 5) < first.stop
    assert first.rows == (2, 3)
    [hit] = first.super_weights
    assert (hit.weight.row, hit.weight.column) == (3, 5) and hit.value == -hit.weight.value
    assert last.chunks == (39, 39) and last.super_weights == ()
    [finding] = check(model, manifest, fast=True).findings
    assert finding.super_weights == (hit,)


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_one_bit_of_a_fused_expert(tmp_path, bit):
    model, manifest = saved(tiny_model("mixtral"), tmp_path)
    experts = model.model.layers[1].mlp.experts
    for fused, name in ((experts.down_proj, "w2"), (experts.gate_up_proj, "w3")):
        with torch.no_grad():
            fused[2].view(torch.int32)[-1, -1] ^= torch.tensor(1 << bit).to(torch.int32)
        [finding] = check(model, manifest).findings
        assert ".1." in finding.name and f"experts.2.{name}" in finding.name
        with torch.no_grad():
            fused[2].view(torch.int32)[-1, -1] ^= torch.tensor(1 << bit).to(torch.int32)
    assert check(model, manifest).ok


def test_another_dtype_is_refused_and_a_wider_one_will_do_for_super_weights(tmp_path):
    model, manifest = saved(tiny_model("llama").bfloat16(), tmp_path)
    with pytest.raises(InvalidInput, match="torch.float32, the checkpoint has torch.bfloat16"):
        check(model.float(), manifest)
    assert check(model, manifest, fast=True).ok
    with torch.no_grad():
        weight = model.get_submodule(SITE).weight
        weight[7, 11] = torch.nextafter(weight[7, 11], torch.tensor(9.0))
    [hit] = check(model, manifest, fast=True).hits
    assert (hit.weight.row, hit.weight.column) == (7, 11)
    with pytest.raises(InvalidInput, match="torch.float16, the checkpoint has torch.bfloat16"):
        check(model.half(), manifest, fast=True)


def test_what_is_packed_is_listed_and_not_intact(tmp_path):
    model, manifest = saved(tiny_model("llama"), tmp_path)
    quantize(model, QuantConfig(include=["down_proj"]))
    result = check(model, manifest)
    assert not result.ok and result.findings == ()
    assert {name for name, _ in result.not_compared} == {
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)
    }
    assert "QuantLinear" in result.not_compared[0][1] and "3 tensors not compared" in str(result)
    with pytest.raises(InvalidInput, match="QuantLinear"):
        check(model, manifest, fast=True)


def test_another_model_is_refused(tmp_path):
    _, manifest = saved(tiny_model("llama"), tmp_path)
    with pytest.raises(InvalidInput, match="cannot be compared"):
        check(torch.nn.Linear(3, 3), manifest)
    other = tiny_model("llama", hidden_size=48)
    with pytest.raises(InvalidInput, match="another model"):
        check(other, manifest)
    with pytest.raises(InvalidInput, match="meta device"):
        check(tiny_model("llama").to("meta"), manifest)


def test_a_fast_check_needs_super_weights(tmp_path):
    model, _ = saved(tiny_model("llama"), tmp_path)
    with pytest.raises(InvalidInput, match="no super weights"):
        check(model, create(tmp_path), fast=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    model, manifest = saved(tiny_model("llama"), tmp_path)
    model.to("cuda")
    assert check(model, manifest).ok and check(model, manifest, fast=True).ok
    with torch.no_grad():
        model.get_submodule(SITE).weight[3, 5] += 1
    assert len(check(model, manifest).hits) == len(check(model, manifest, fast=True).hits) == 1
