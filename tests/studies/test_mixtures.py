"""Fused experts: what cannot be studied on them is said in one line, and the rest goes on."""

from __future__ import annotations

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from swkernels.errors import InvalidInput
from swkernels.studies.adapters_lora import targets
from swkernels.studies.book import RUNS, Book
from swkernels.studies.lab import NotInModel
from swkernels.studies.recipe import Found
from swkernels.studies.recipes.lora import LORA
from swkernels.train import Coordinates
from tests.cli.checkpoints import VOCABULARY, save
from tests.studies import tiny

PLACE = ("model.layers.0.mlp.experts", 0)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        max_position_embeddings=256,
    )  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    return save(model, tmp_path_factory.mktemp("models") / "mixture"), model


def test_lora_of_fused_experts_is_refused(mixture):
    with pytest.raises(NotInModel, match="MixtralForCausalLM has no down projection that is a li"):
        targets(mixture[1], "down_proj")
    assert len(targets(mixture[1], "attention")) == 4


def test_what_can_be_studied_is(mixture, data, tmp_path):
    listed = Coordinates.of({PLACE: [(5, 7)]}, mixture[1])
    names = ["lora-down", "quantization", "lora"]
    with pytest.raises(InvalidInput, match=r"runs could not be made \(.*\); what the others found"):
        tiny.run(names, mixture[0], data, tmp_path, super_weights=listed)
    found = Found(Book(tmp_path / RUNS), tiny.PLAN)
    assert all(found(run) for run in LORA.runs(tiny.PLAN))
    assert "## lora\n" in (tmp_path / "README.md").read_text()
