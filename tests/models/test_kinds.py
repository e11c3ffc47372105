"""Which projection a tensor is, and where its matrices are, on every tiny architecture."""

from __future__ import annotations

import pytest
import torch

from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections
from swkernels.models.checkpoint import open_checkpoint
from swkernels.models.kinds import KINDS, projection_kind, why_left_out
from swkernels.models.stored import stored_projections
from tests.models.tiny import ARCHITECTURES, MORE_ARCHITECTURES, H, tiny_model

# Some blocks of these have no attention, or one of another kind.
MIXED = {"lfm2", "bamba", "jamba", "minimax", "qwen3_5", "qwen3_next", "qwen3_5_moe", "lfm2_moe",
         "nemotron_h", "zamba2", "recurrent_gemma"}  # fmt: skip
QKV = ({"q", "k", "v"}, {"qkv"}, {"q", "kv"}, {"q", "k", "v", "qkv"})


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def down_of(projections) -> dict[tuple, tuple]:
    """The down projections that are found by modules, one entry for each expert."""
    return {
        (p.name, p.expert if p.experts is None else expert): (p, expert)
        for p in projections
        for expert in ([None] if p.experts is None else range(p.experts))
    }


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_down_projections_are_those_of_the_modules(name):
    model = tiny_model(name)
    stored = [p for p in stored_projections(shapes_of(model)) if p.kind == "down"]
    expected = down_of(find_down_projections(model))
    if name == "zamba2":  # its blocks share one, under several names
        expected = {k: v for k, v in expected.items() if k[0] in {p.module for p in stored}}
    assert {(p.module, p.expert) for p in stored} == expected.keys()
    assert len(stored) == len(expected)
    parameters = dict(model.named_parameters())
    for p in stored:
        projection, expert = expected[p.module, p.expert]
        matrix, view = projection.matrix(expert), p.view(parameters[p.name])
        assert p.layer == projection.layer and p.shape == (projection.rows, projection.columns)
        assert view.data_ptr() == matrix.data_ptr() and torch.equal(view, matrix)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_every_block_has_each_of_its_projections(name, tmp_path):
    """In the files as they are saved: whole sets, with outputs and inputs on the right side."""
    tiny_model(name).save_pretrained(tmp_path)
    blocks: dict[str, list] = {}
    with open_checkpoint(tmp_path) as checkpoint:
        for p in stored_projections(checkpoint.shapes()):
            blocks.setdefault(p.block, []).append(p)
            assert p.view(checkpoint[p.name]).shape == p.shape
            if p.kind in ("gate", "up", "gate_up") and "transformer.self" not in p.name:
                assert p.shape[1] == H, p
            if p.kind == "down":
                assert p.shape[0] == H, p
    for found in blocks.values():
        kinds = {p.kind for p in found}
        assert kinds <= set(KINDS)
        if name not in MIXED:
            assert kinds & {"q", "k", "v", "kv", "qkv"} in QKV and "o" in kinds
            assert "down" in kinds and kinds & {"up", "gate_up"}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("model.layers.3.self_attn.q_proj.weight", "q"),
        ("layers.3.attention.wq.weight", "q"),
        ("layers.3.attention.wo.weight", "o"),
        ("transformer.h.0.attn.c_proj.weight", "o"),
        ("transformer.h.0.mlp.c_proj.weight", "down"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "o"),
        ("bert.encoder.layer.0.output.dense.weight", "down"),
        ("bert.encoder.layer.0.attention.self.query.weight", "q"),
        ("model.layers.0.self_attn.W_pack.weight", "qkv"),
        ("decoder.block.0.layer.2.DenseReluDense.wo.weight", "down"),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", "down"),
        ("model.layers.0.mlp.experts.gate_up_proj", "gate_up"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "up"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", None),
        ("model.layers.0.mlp.down_proj.bias", None),
        ("model.layers.0.mlp.experts.down_proj_bias", None),
        ("model.layers.0.mamba.out_proj.weight", None),
        ("model.layers.0.linear_attn.out_proj.weight", None),
        ("vision_tower.layers.0.mlp.fc1.weight", None),
        ("mlp.down_proj.weight", None),
    ],
)
def test_names(name, kind):
    assert projection_kind(name) == kind


@pytest.mark.parametrize(
    "name, shape, reason",
    [
        ("model.embed_tokens.weight", (9, 4), "embedding"),
        ("transformer.wpe.weight", (9, 4), "embedding"),
        ("lm_head.weight", (9, 4), "head"),
        ("embed_out.weight", (9, 4), "head"),
        ("model.layers.0.input_layernorm.weight", (4,), "vector"),
        ("model.layers.0.mlp.experts.down_proj_bias", (4, 4), "vector"),
        ("model.layers.0.mlp.gate.weight", (4, 4), "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 4), "router"),
        ("vision_tower.layers.0.mlp.fc1.weight", (4, 4), "vision tower"),
        ("model.layers.0.mamba.out_proj.weight", (4, 4), "other"),
    ],
)
def test_reasons(name, shape, reason):
    assert projection_kind(name) is None and why_left_out(name, shape) == reason


def test_square_experts_are_told_by_what_stands_beside_them_or_by_the_caller():
    shapes = shapes_of(tiny_model("gpt_oss", intermediate_size=H))
    down = "model.layers.0.mlp.experts.down_proj"
    found = {p.name: p.layout for p in stored_projections(shapes)}
    assert found[down] == "eio"  # [E, 32, 64] beside it reads the residual stream first
    only = {key: shape for key, shape in shapes.items() if "gate_up" not in key}
    with pytest.raises(InvalidInput, match="cannot be told from its shape; give the model"):
        stored_projections(only)
    told = {key: True for key in only if key.endswith("experts.down_proj")}
    assert {p.name: p.layout for p in stored_projections(only, told)}[down] == "eio"


def test_stacked_experts_without_a_router():
    shapes = shapes_of(tiny_model("dbrx"))
    with pytest.raises(InvalidInput, match="how many experts"):
        stored_projections({key: s for key, s in shapes.items() if "router" not in key})
