from __future__ import annotations

import pytest
import torch
from torch import nn

from swkernels import find_down_projections
from swkernels.errors import InvalidInput
from swkernels.models import ProjectionNotFound

from .tiny import ARCHITECTURES, H, I, run, tiny_model, token_ids

LAYERS = 3
# Of every layer: what follows the block's name, layout, columns, experts.
EXPECTED = {
    "llama": [("mlp.down_proj", "oi", I, None)],
    "mistral": [("mlp.down_proj", "oi", I, None)],
    "qwen2": [("mlp.down_proj", "oi", I, None)],
    "qwen3": [("mlp.down_proj", "oi", I, None)],
    "gemma2": [("mlp.down_proj", "oi", I, None)],
    "olmo": [("mlp.down_proj", "oi", I, None)],
    "olmo2": [("mlp.down_proj", "oi", I, None)],
    "phi3": [("mlp.down_proj", "oi", I, None)],
    "stablelm": [("mlp.down_proj", "oi", I, None)],
    "granite": [("mlp.down_proj", "oi", I, None)],
    "phi": [("mlp.fc2", "oi", I, None)],
    "starcoder2": [("mlp.c_proj", "oi", I, None)],
    "gpt_neox": [("mlp.dense_4h_to_h", "oi", I, None)],
    "persimmon": [("mlp.dense_4h_to_h", "oi", I, None)],
    "opt": [("fc2", "oi", I, None)],
    "gpt2": [("mlp.c_proj", "io", I, None)],
    "gpt_bigcode": [("mlp.c_proj", "oi", I, None)],
    "gptj": [("mlp.fc_out", "oi", I, None)],
    "codegen": [("mlp.fc_out", "oi", I, None)],
    "gpt_neo": [("mlp.c_proj", "oi", I, None)],
    "falcon": [("mlp.dense_4h_to_h", "oi", I, None)],
    "bloom": [("mlp.dense_4h_to_h", "oi", 4 * H, None)],
    "mpt": [("ffn.down_proj", "oi", 4 * H, None)],
    "lfm2": [("feed_forward.w2", "oi", I, None)],
    "mixtral": [("mlp.experts", "eoi", I, 4)],
    "qwen2_moe": [("mlp.experts", "eoi", 48, 4), ("mlp.shared_expert.down_proj", "oi", 64, None)],
    "qwen3_moe": [("mlp.experts", "eoi", 48, 4)],
    "olmoe": [("mlp.experts", "eoi", I, 4)],
    "granitemoe": [("block_sparse_moe.experts", "eoi", I, 4)],
    "gpt_oss": [("mlp.experts", "eio", I, 4)],
    "jetmoe": [("mlp.output_linear", "eoi", 48, 4)],
    "dbrx": [("ffn.experts.mlp", "ei_o", 48, 4)],
}
DENSE_FIRST = [("mlp.down_proj", "oi", I, None)]
ROUTED = [("mlp.experts", "eoi", 48, 4), ("mlp.shared_experts.down_proj", "oi", 48, None)]
DENSE_LLAMA4 = [("feed_forward.down_proj", "oi", I, None)]
ROUTED_LLAMA4 = [
    ("feed_forward.experts", "eio", I, 4),
    ("feed_forward.shared_expert.down_proj", "oi", I, None),
]
PER_LAYER = {name: [rows] * LAYERS for name, rows in EXPECTED.items()} | {
    "deepseek_v3": [DENSE_FIRST, ROUTED, ROUTED],
    "llama4": [DENSE_LLAMA4, ROUTED_LLAMA4, DENSE_LLAMA4],
}


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"t5"}))
def test_finds_exactly_the_down_projections(name):
    found = find_down_projections(tiny_model(name))
    expected = [(layer, *row) for layer, rows in enumerate(PER_LAYER[name]) for row in sorted(rows)]
    actual = [
        (p.layer, p.name.removeprefix(f"{p.block_name}."), p.layout, p.columns, p.experts)
        for p in sorted(found, key=lambda p: (p.layer, p.name))
    ]
    assert actual == expected
    assert all(p.rows == H and p.expert is None for p in found)
    assert all(f".{p.layer}" == p.block_name[-2:] for p in found)


def test_encoder_and_decoder_of_t5():
    found = [(p.name, p.layer) for p in find_down_projections(tiny_model("t5"))]
    assert found == [
        (f"{side}.block.{i}.layer.{place}.DenseReluDense.wo", i)
        for side, place in (("encoder", 1), ("decoder", 2))
        for i in range(LAYERS)
    ]


def check_outputs(model, projections, forward) -> None:
    """Run, and compare each module's own output with x @ matrix.T + bias."""
    seen = {}
    hooks = [
        p.module.register_forward_hook(
            lambda module, args, y, p=p: seen.update({p: (args[0], y.clone())})
        )
        for p in projections
    ]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    for p, (x, y) in seen.items():
        expected = x @ p.matrix().T
        if getattr(p.module, "bias", None) is not None:
            expected = expected + p.module.bias
        torch.testing.assert_close(y, expected)
    # An expert that no token chose does not run; everything else does.
    assert {p for p in projections if p.expert is None} <= set(seen)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matrix_is_what_the_module_computes_with(name):
    model = tiny_model(name)
    dense = [p for p in find_down_projections(model) if p.experts is None]
    check_outputs(model, dense, lambda: run(model, token_ids()))


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mixtral", "gpt_oss", "llama4", "dbrx", "jetmoe"]
)
def test_writing_to_the_matrix_reaches_the_model_and_one_weight_only(name):
    model = tiny_model(name)
    p = find_down_projections(model)[-1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expert = None if p.experts is None else 2
    with torch.no_grad():
        p.matrix(expert)[3, 5] = 123.0
    changed = {k: (v != before[k]).sum().item() for k, v in model.state_dict().items()}
    assert sum(changed.values()) == 1
    assert (p.weight == 123.0).sum() == 1


class Block(nn.Module):
    """Hand-written, with names of its own."""

    def __init__(self, width, inner):
        super().__init__()
        self.mixing = nn.MultiheadAttention(width, 2, batch_first=True)
        self.expand = nn.Linear(width, inner)
        self.contract = nn.Linear(inner, width)

    def forward(self, h):
        h = h + self.mixing(h, h, h, need_weights=False)[0]
        return h + self.contract(torch.relu(self.expand(h)))


class HandWritten(nn.Module):
    def __init__(self, width=16, inner=40, list_of=nn.ModuleList):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        blocks = [Block(width, inner) for _ in range(2)]
        self.trunk = list_of(blocks) if list_of is nn.ModuleList else list_of(*blocks)
        self.unembed = nn.Linear(width, 50)

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.trunk:
            h = block(h)
        return self.unembed(h)


@pytest.mark.parametrize("list_of", [nn.ModuleList, nn.Sequential])
@pytest.mark.parametrize("inner", [40, 16])
def test_a_hand_written_model_also_where_the_widths_are_equal(list_of, inner):
    found = find_down_projections(HandWritten(16, inner, list_of))
    assert [p.name for p in found] == ["trunk.0.contract", "trunk.1.contract"]
    assert all((p.rows, p.columns) == (16, inner) for p in found)


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gpt2", "opt"])
def test_intermediate_width_equal_to_the_residual_width(name):
    change = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(name, "intermediate_size")
    found = find_down_projections(tiny_model(name, **{change: H}))
    wanted = EXPECTED[name][0][0]
    assert [p.name.removeprefix(f"{p.block_name}.") for p in found] == [wanted] * LAYERS


class MoE(nn.Module):
    """Experts as modules of their own, the older way."""

    def __init__(self, width=16, inner=24, experts=3):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(experts))

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        output = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, place = (chosen == e).nonzero(as_tuple=True)
            output.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return output.view_as(hidden)


class Expert(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class MoEBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = MoE()

    def forward(self, hidden):
        return hidden + self.moe(hidden)


class UnfusedMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(MoEBlock() for _ in range(2))
        self.head = nn.Linear(16, 50)

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def test_experts_that_are_modules_of_their_own():
    found = find_down_projections(UnfusedMoE())
    assert [(p.layer, p.expert, p.name) for p in found] == [
        (layer, e, f"layers.{layer}.moe.experts.{e}.w2") for layer in range(2) for e in range(3)
    ]


def test_an_adapter_is_looked_through():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    weights = [p.weight for p in find_down_projections(model)]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj", "up_proj"]))
    found = find_down_projections(adapted)
    assert [p.weight for p in found] == weights
    assert [p.parameter for p in found] == ["base_layer.weight"] * LAYERS


def test_a_compiled_model_and_its_parts():
    model = tiny_model("llama")
    names = [p.name for p in find_down_projections(model)]
    assert [p.name for p in find_down_projections(torch.compile(model))] == names
    inner = [p.name for p in find_down_projections(model.model)]
    assert [f"model.{name}" for name in inner] == names


def test_nothing_found_says_what_was_looked_for():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

    with pytest.raises(ProjectionNotFound, match="no down projection in Encoder.*Linear") as error:
        find_down_projections(Encoder())
    assert "\n" not in str(error.value)


def test_weights_that_have_no_matrix():
    model = tiny_model("llama").to("meta")
    with pytest.raises(InvalidInput, match="meta device"):
        find_down_projections(model)[0].matrix()
    model = tiny_model("llama")
    p = find_down_projections(model)[0]
    p.module.weight = nn.Parameter(torch.zeros(H * I // 2, 1, dtype=torch.uint8), False)
    found = find_down_projections(model)
    assert found[0].name == p.name  # found by its features all the same
    with pytest.raises(InvalidInput, match="packed.*uint8"):
        found[0].matrix()
    with pytest.raises(InvalidInput, match="experts 0 to 3"):
        find_down_projections(tiny_model("mixtral"))[0].matrix()
