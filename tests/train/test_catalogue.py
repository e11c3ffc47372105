"""The catalogue of published super weights, and its look-up."""

from __future__ import annotations

import pytest
import torch

from swkernels.errors import InvalidInput
from swkernels.train import Coordinates, Site, catalogue, published
from tests.models.tiny import H, I, tiny_model


def points(coordinates: Coordinates) -> set:
    return {(site.name, site.expert, *p) for site, rc in coordinates.weights.items()
            for p in rc.tolist()}  # fmt: skip


def test_every_entry_is_sound():
    entries = catalogue()
    assert len(entries) == 20 and len({e.model for e in entries}) == 20
    for entry in entries:
        c = Coordinates.from_catalogue(entry.model)  # inside the weights, and none twice
        assert len(c) == len(entry.positions)
        assert entry.source and entry.tier in ("A", "B", "C", "measured")
        assert entry.model.count("/") == 1 and "{layer}" in entry.module


def test_known_entries():
    c = Coordinates.from_catalogue("huggyllama/llama-7b")
    assert points(c) == {("model.layers.2.mlp.down_proj", None, 3968, 7003)}
    assert set(c.shapes.values()) == {(4096, 11008)}
    c = Coordinates.from_catalogue("microsoft/Phi-3-mini-4k-instruct")
    assert points(c) == {
        (f"model.layers.{layer}.mlp.down_proj", None, row, column)
        for layer, column in ((2, 808), (4, 2723))
        for row in (525, 1113, 1693)
    }
    c = Coordinates.from_catalogue("Qwen/Qwen3-30B-A3B")
    assert ("model.layers.1.mlp.experts", 68, 940, 711) in points(c) and len(c) == 3
    entry = published.find_entry("smollm2-135m-instruct")
    assert entry.tier == "measured" and "GGUF" in entry.variant


@pytest.mark.parametrize(
    "name", ["mistralai/Mistral-7B-v0.1", "Mistral-7B-v0.1", " MISTRALAI/mistral-7b-V0.1 "]
)
def test_tolerant_names(name):
    assert published.find_entry(name).model == "mistralai/Mistral-7B-v0.1"


@pytest.mark.parametrize(
    "name, near",
    [
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("someone/llama-7b", "huggyllama/llama-7b"),  # of another owner: not the same weights
        ("phi3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("", "no ''"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, near):
    with pytest.raises(InvalidInput, match="catalogue") as error:
        Coordinates.from_catalogue(name)
    assert near in str(error.value) and "\n" not in str(error.value)


def test_no_name():
    with pytest.raises(InvalidInput, match="id of a model"):
        Coordinates.from_catalogue(None)


def test_ambiguous_names(monkeypatch):
    first = catalogue()[0]
    twin = published.CatalogueEntry(**(vars(first) | {"model": "other/Llama-7B"}))
    monkeypatch.setattr(published, "_entries", lambda: (first, twin))
    with pytest.raises(InvalidInput, match=r"several.*huggyllama/llama-7b, other/Llama-7B"):
        published.find_entry("llama-7b")
    assert published.find_entry("Other/llama-7b") is twin


@pytest.fixture
def tiny_entry(monkeypatch):
    """The catalogue has one entry, of the size of the tiny models."""

    def install(positions):
        entry = published.CatalogueEntry("a/b", "x.{layer}", (H, I), positions, "C", "nobody")
        monkeypatch.setattr(published, "_entries", lambda: (entry,))

    return install


def test_with_a_model_the_names_are_its_own(tiny_entry):
    tiny_entry(((1, None, 3, 4), (1, None, 3, 5), (2, None, 0, 0)))
    c = Coordinates.from_catalogue("b", tiny_model("falcon").to("meta"))
    names = [f"transformer.h.{i}.mlp.dense_4h_to_h" for i in (1, 1, 2)]
    assert points(c) == {(names[0], None, 3, 4), (names[1], None, 3, 5), (names[2], None, 0, 0)}
    c = Coordinates.from_catalogue("b")
    assert Site("x.1") in c.weights and len(c) == 3


def test_experts_fused_or_modules(tiny_entry):
    tiny_entry(((1, 2, 3, 4),))
    c = Coordinates.from_catalogue("b", tiny_model("mixtral"))
    assert points(c) == {("model.layers.1.mlp.experts", 2, 3, 4)}
    c = Coordinates.from_catalogue("b", tiny_model("switch_transformers"))
    assert points(c) == {("encoder.block.1.layer.1.mlp.experts.expert_2.wo", None, 3, 4)}


def test_another_model(tiny_entry):
    tiny_entry(((1, None, 3, 4),))
    with pytest.raises(InvalidInput, match=rf"\[{H}, 96\].*a/b.*\[{H}, {I}\]"):
        Coordinates.from_catalogue("b", tiny_model("llama", intermediate_size=96))
    with pytest.raises(InvalidInput, match="layer 1"):
        Coordinates.from_catalogue("b", tiny_model("llama", num_hidden_layers=1))
    with pytest.raises(InvalidInput, match="layer 1"):
        Coordinates.from_catalogue("b", tiny_model("mixtral"))
    tiny_entry(((1, 4, 3, 4),))
    with pytest.raises(InvalidInput, match="layer 1 expert 4"):
        Coordinates.from_catalogue("b", tiny_model("mixtral"))


def test_the_published_weights_of_the_real_model_are_large(smollm2):
    """SmolLM2-135M-Instruct: two weights of layer 11, 5.876 and 6.066 after de-quantization."""
    model, _ = smollm2
    c = Coordinates.from_catalogue("HuggingFaceTB/SmolLM2-135M-Instruct", model)
    (site,) = c.weights
    rows, cols = c.weights[site].long().unbind(1)
    values = model.get_submodule(site.name).weight[rows, cols].detach()
    assert torch.allclose(values.abs(), torch.tensor([5.876, 6.066]), atol=1e-3)
    assert len(Coordinates.from_magnitude(model, 100) | c) == 100  # both are of the largest 100
