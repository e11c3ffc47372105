"""The other families of the table in docs/models.md: exactly these are found, and they compute."""

from __future__ import annotations

import pytest
import torch

from swkernels import find_down_projections

from .test_projections import check_outputs
from .tiny import MORE_ARCHITECTURES, H, I, run, tiny_model, token_ids

MLP = ("mlp.down_proj", "oi", I, None, None)
EXPERTS = ("mlp.experts", "eoi", 48, 4, None)
WIDE_EXPERTS = ("mlp.experts", "eoi", I, 4, None)
SHARED = ("mlp.shared_experts.down_proj", "oi", 48, None, None)
QWEN_SHARED = ("mlp.shared_expert.down_proj", "oi", 64, None, None)
FEED_FORWARD = ("feed_forward.down_proj", "oi", I, None, None)


def modules_of_experts(path: str) -> list[tuple]:
    return [(path.format(e), "oi", I, None, e) for e in range(4)]


# Of each block that has any: what follows the block's name, layout, columns, experts, expert.
EXPECTED = {
    **dict.fromkeys(
        ("gemma", "gemma3", "olmo3", "qwen3_5", "glm4", "cohere2", "smollm3", "nemotron"),
        [[MLP]] * 3,
    ),
    "gemma4_moe": [[MLP, ("experts", "eoi", 48, 4, None)]] * 3,
    "bamba": [[FEED_FORWARD]] * 3,
    "jamba": [[FEED_FORWARD], [("feed_forward.experts", "eoi", I, 4, None)], [FEED_FORWARD]],
    "minimax": [[WIDE_EXPERTS]] * 3,
    "phimoe": [[WIDE_EXPERTS]] * 3,
    "qwen3_next": [[EXPERTS, QWEN_SHARED]] * 3,
    "qwen3_5_moe": [[EXPERTS, QWEN_SHARED]] * 3,
    "deepseek_v2": [[MLP], [EXPERTS, SHARED], [EXPERTS, SHARED]],
    "glm4_moe": [[MLP], [EXPERTS, SHARED], [EXPERTS, SHARED]],
    "ernie4_5_moe": [[MLP], [EXPERTS, SHARED], [EXPERTS, SHARED]],
    "lfm2_moe": [
        [("feed_forward.w2", "oi", I, None, None)],
        *[[("feed_forward.experts", "eoi", 48, 4, None)]] * 2,
    ],
    "hunyuan_moe": [[WIDE_EXPERTS, ("mlp.shared_mlp.down_proj", "oi", I, None, None)]] * 3,
    "nemotron_h": [
        [
            ("mixer.experts", "eoi", 48, 4, None),
            ("mixer.shared_experts.down_proj", "oi", 40, None, None),
        ],
        [("mixer.down_proj", "oi", I, None, None)],
    ],
    "aria": [
        [
            ("mlp.experts", "eio", I, 4, None),
            ("mlp.shared_experts.down_proj", "oi", I, None, None),
        ]
    ]
    * 3,
    "longcat_flash": [[EXPERTS, *[(f"mlps.{i}.down_proj", "oi", I, None, None) for i in (0, 1)]]]
    * 2,
    "zamba2": [[("shared_transformer.feed_forward.down_proj", "oi", I, None, None)]] * 2,
    # This configuration gives the width of the gate and up together.
    "recurrent_gemma": [[("mlp_block.down_proj", "oi", I // 2, None, None)]] * 3,
    "bert": [[("output.dense", "oi", I, None, None)]] * 3,
    "switch_transformers": [
        [("layer.1.mlp.wo", "oi", I, None, None)],
        modules_of_experts("layer.1.mlp.experts.expert_{}.wo"),
        [("layer.2.mlp.wo", "oi", I, None, None)],
        modules_of_experts("layer.2.mlp.experts.expert_{}.wo"),
    ],
    "nllb_moe": [
        [("ffn.fc2", "oi", I, None, None)],
        modules_of_experts("ffn.experts.expert_{}.fc2"),
    ]
    * 2,
}


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_finds_exactly_the_down_projections_and_they_compute(name):
    model = tiny_model(name)
    found = find_down_projections(model)
    blocks = {}
    for p in found:
        assert p.rows == H and p.block_name.endswith(f".{p.layer}")
        place = p.name.removeprefix(f"{p.block_name}.")
        blocks.setdefault(p.block_name, []).append(
            (place, p.layout, p.columns, p.experts, p.expert)
        )
    assert list(blocks.values()) == EXPECTED[name]
    check_outputs(model, [p for p in found if p.experts is None], lambda: run(model, token_ids()))


def test_a_transposed_stack_is_told_from_an_up_projection():
    """Experts without a gate: an up projection has the shape of a transposed down projection."""
    model = tiny_model("nemotron_h")
    p = next(p for p in find_down_projections(model) if p.experts is not None)
    assert p.parameter == "down_proj"
    assert torch.equal(p.matrix(1), p.module.down_proj[1])
