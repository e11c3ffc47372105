"""Trained deltas as a stock LoRA and as a checkpoint."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from swkernels.errors import InvalidInput
from swkernels.train import Coordinates, sparse, to_checkpoint, to_lora
from tests.models.tiny import tiny_model, token_ids

DOWN = "model.layers.1.mlp.down_proj"


def trained(arch="llama", listed=None, k=12):
    model = tiny_model(arch).eval()
    listed = Coordinates.of(listed, model) if listed else Coordinates.random(model, k, seed=1)
    handle = sparse(model, listed)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in handle.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model, handle


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize(
    ("pairs", "rank"),
    [
        ([[3, c] for c in range(20)], 1),  # one row
        ([[r, 7] for r in range(20)], 1),  # one column
        ([[r, c] for r in (4, 5, 6) for c in (9, 10, 11)], 3),
        ([[0, 0], [0, 1], [1, 5], [9, 5]], 3),
    ],
)
def test_a_lora_that_stock_peft_loads(tmp_path, pairs, rank):
    peft = pytest.importorskip("peft", reason="needs peft")
    other = "model.layers.0.self_attn.o_proj"
    model, handle = trained(listed={DOWN: pairs, other: [[2, 2]]})
    assert to_lora(handle, tmp_path / "lora") == rank
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama").eval(), tmp_path / "lora")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    delta = loaded.get_submodule(f"base_model.model.{DOWN}").get_delta_weight("default")
    exact = torch.zeros_like(delta)
    site = next(site for site in handle.values() if site.name == DOWN)
    rows, cols = handle.coordinates.weights[site].long().unbind(1)
    exact[rows, cols] = handle.values()[site].detach()
    assert torch.equal(delta, exact)


def test_a_lora_of_too_large_a_rank_is_refused(tmp_path):
    _, handle = trained(listed={DOWN: [[n, n] for n in range(9)]})
    with pytest.raises(InvalidInput, match="rank 9, more than max_rank = 8.*checkpoint instead"):
        to_lora(handle, tmp_path / "lora", max_rank=8)
    assert not list(tmp_path.iterdir())
    assert to_lora(handle, tmp_path / "lora", max_rank=9) == 9


@pytest.mark.parametrize(("arch", "kind"), [("gpt2", "transposed"), ("mixtral", "fused")])
def test_weights_that_a_lora_has_no_form_for(tmp_path, arch, kind):
    model, handle = trained(arch)
    if kind == "fused" and all(site.expert is None for site in handle.values()):
        pytest.skip("this version of transformers keeps experts as modules")
    with pytest.raises(InvalidInput, match=f"{kind}.*export a checkpoint"):
        to_lora(handle, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_a_checkpoint_that_transformers_loads(tmp_path, arch, merged):
    model, handle = trained(arch, k=60)
    want = logits(model)
    if merged:
        handle.merge()
    to_checkpoint(handle, tmp_path / "model")
    assert handle.merged is merged
    assert torch.allclose(logits(model), want, atol=1e-5)
    names = sorted(os.listdir(tmp_path / "model"))
    assert "model.safetensors" in names and not any(n.endswith((".bin", ".pt")) for n in names)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(logits(loaded.eval()), want, atol=1e-5)
    to_checkpoint(handle, tmp_path / "model")  # a model is replaced
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    _, handle = trained(listed={DOWN: [[1, 1]]})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for write in (to_lora, to_checkpoint):
        with pytest.raises(InvalidInput, match="choose another folder"):
            write(handle, tmp_path / "notes")
    assert os.listdir(tmp_path) == ["notes"] and os.listdir(tmp_path / "notes") == ["a.txt"]
    assert not handle.merged


def test_what_fails_half_way_leaves_the_old_folder(tmp_path, monkeypatch):
    _, handle = trained(listed={DOWN: [[1, 1]]})
    to_lora(handle, tmp_path / "lora")
    before = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())

    real = os.replace

    def full(source, target):
        if str(target).endswith("lora") and str(source).endswith("made"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        to_lora(handle, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text()) == before
    assert os.listdir(tmp_path) == ["lora"]
