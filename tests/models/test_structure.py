"""Models that no list of names knows, wrappers, packed weights, towers, models without any."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from swkernels import find_down_projections
from swkernels.errors import InvalidInput
from swkernels.models import ProjectionNotFound, skipped_towers

from .tiny import H, I, tiny_model


def names(model, **keywords):
    return [p.name for p in find_down_projections(model, **keywords)]


def blocks(make, count=2, width=16):
    """A model of ``count`` blocks and an embedding, which tells the residual width."""
    model = nn.Module()
    model.embed = nn.Embedding(50, width)
    model.trunk = nn.ModuleList(make() for _ in range(count))
    return model


def block(**children):
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def test_attention_is_told_by_its_heads_whatever_it_is_called():
    def mix():
        module = block(a=nn.Linear(16, 24), b=nn.Linear(24, 16))
        module.n_heads = 4
        return module

    model = blocks(lambda: block(mix=mix(), think=block(a=nn.Linear(16, 24), b=nn.Linear(24, 16))))
    assert names(model) == ["trunk.0.think.b", "trunk.1.think.b"]


@pytest.mark.parametrize("inner", [16, 40])
def test_attention_and_mlp_in_one_flat_block(inner):
    model = blocks(
        lambda: block(
            to_q=nn.Linear(16, 16), to_k=nn.Linear(16, 16), to_v=nn.Linear(16, 16),
            expand=nn.Linear(16, inner), contract=nn.Linear(inner, 16), mixed=nn.Linear(16, 16),
        )
    )  # fmt: skip
    assert names(model) == ["trunk.0.contract", "trunk.1.contract"]


def test_attention_inside_a_flat_block_is_told_by_the_names_of_its_inputs():
    square = {name: nn.Linear(16, 16) for name in ("grow", "shrink", "w_q", "w_k", "w_v")}
    assert names(blocks(lambda: block(**square), count=1)) == ["trunk.0.shrink"]


def test_the_output_of_attention_in_a_module_of_its_own():
    def apart():
        return block(dense=nn.Linear(16, 16))

    mix = block(query=nn.Linear(16, 16), value=nn.Linear(16, 16), out=apart())
    model = blocks(lambda: block(one=apart(), two=apart(), mix=mix), count=1)
    assert names(model) == ["trunk.0.two.dense"]


def test_grouped_query_attention_is_no_gated_mlp():
    """A fused q, k and v is twice as wide as the output's input: the shapes of gate, up, down."""
    mlp = dict(gate=nn.Linear(16, 40), up=nn.Linear(16, 40), back=nn.Linear(40, 16))
    model = blocks(
        lambda: block(mix=block(qkv=nn.Linear(16, 32), out=nn.Linear(16, 16)), mlp=block(**mlp))
    )
    assert names(model) == ["trunk.0.mlp.back"]  # the two blocks share their MLP


def test_linear_layers_of_a_class_of_their_own():
    class Affine(nn.Module):
        def __init__(self, into, out):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(out, into))

        def forward(self, x):
            return x @ self.weight.T

    found = find_down_projections(blocks(lambda: block(up=Affine(16, 40), back=Affine(40, 16))))
    assert [(p.name, p.rows, p.columns) for p in found] == [
        ("trunk.0.back", 16, 40),
        ("trunk.1.back", 16, 40),
    ]


def test_a_narrow_pair_is_an_adapter_beside_an_mlp_and_an_mlp_alone():
    narrow = dict(first=nn.Linear(16, 4), second=nn.Linear(4, 16))
    alone = blocks(lambda: block(**narrow), count=1)
    assert names(alone) == ["trunk.0.second"]
    mlp = block(up=nn.Linear(16, 40), back=nn.Linear(40, 16))
    assert names(blocks(lambda: block(**narrow, mlp=mlp), count=1)) == ["trunk.0.mlp.back"]


def test_halves_in_modules_of_their_own_and_layers_in_one_sequential():
    halves = nn.Sequential(
        nn.Embedding(50, 16),
        *[
            nn.Sequential(nn.Sequential(nn.Linear(16, 40), nn.ReLU()), nn.Linear(40, 16))
            for _ in range(2)
        ],
        nn.Linear(16, 50),
    )
    found = find_down_projections(halves)
    assert [(p.layer, p.name) for p in found] == [(1, "1.1"), (2, "2.1")]
    assert halves(torch.arange(3)).shape == (3, 50)


def test_stages_of_a_block_are_no_experts():
    stages = blocks(
        lambda: block(
            mlps=nn.ModuleList(
                block(up=nn.Linear(16, 40), back=nn.Linear(40, 16)) for _ in range(2)
            )
        )
    )
    assert [p.expert for p in find_down_projections(stages)] == [None] * 4
    for layer in stages.trunk:
        layer.route = nn.Linear(16, 2)
    found = find_down_projections(stages)
    assert [p.expert for p in found] == [0, 1, 0, 1]
    assert all(p.scope is p.block for p in found)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inner", [16, 24])
def test_fused_experts_with_names_of_their_own(transposed, inner):
    """Without a known name the class says which way round the weights are."""

    class Many(nn.Module):
        is_transposed = transposed

        def __init__(self):
            super().__init__()
            up, back = (inner, 16), (16, inner)
            shapes = {"one": up, "two": up, "three": back}
            for name, shape in shapes.items():
                shape = shape[::-1] if transposed else shape
                setattr(self, name, nn.Parameter(torch.randn(4, *shape)))

    found = find_down_projections(blocks(lambda: block(many=Many()), count=1))
    (p,) = found
    assert (p.layout, p.rows, p.columns) == ("eio" if transposed else "eoi", 16, inner)
    if inner != 16:
        assert p.parameter == "three"


def test_a_known_name_goes_before_the_convention():
    """Without a gate and without a class that says so, both readings of the shapes are whole."""
    many = nn.Module()
    many.up = nn.Parameter(torch.randn(4, 16, 24))
    many.down = nn.Parameter(torch.randn(4, 24, 16))
    (p,) = find_down_projections(blocks(lambda: block(many=many), count=1))
    assert (p.parameter, p.layout, p.columns) == ("down", "eio", 24)


def test_a_module_for_each_stack_of_experts():
    """[experts, in, out] with the features of a linear layer, as aria had in transformers 5.0."""

    class Grouped(nn.Module):
        def __init__(self, into, out):
            super().__init__()
            self.in_features, self.out_features = into, out
            self.weight = nn.Parameter(torch.randn(4, into, out))

        def forward(self, rows, sizes):
            return torch.cat([x @ w for x, w in zip(rows.split(sizes), self.weight)])

    model = blocks(lambda: block(moe=block(one=Grouped(16, 48), two=Grouped(24, 16))), count=1)
    (p,) = find_down_projections(model)
    assert (p.name, p.layout, p.columns, p.experts) == ("trunk.0.moe.two", "eio", 24, 4)
    assert p.matrix(3).shape == (16, 24) and p.scope is model.trunk[0]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "qwen2_moe", "jetmoe", "dbrx"])
@pytest.mark.parametrize("half", [False, True])
def test_fused_experts_where_widths_coincide(name, half):
    """Inner width = residual width, or gate and up together = residual width."""
    inner = H // 2 if half else H
    key = {"qwen2_moe": "moe_intermediate_size"}.get(name, "intermediate_size")
    changes = {key: inner}
    if name == "dbrx":
        changes = {"ffn_config": dict(ffn_hidden_size=inner, moe_num_experts=4, moe_top_k=2)}
    reference = [
        (p.name, p.layout, p.parameter)
        for p in find_down_projections(tiny_model(name))
        if p.experts
    ]
    found = [p for p in find_down_projections(tiny_model(name, **changes)) if p.experts]
    assert [(p.name, p.layout, p.parameter) for p in found] == reference
    assert all((p.rows, p.columns) == (H, inner) for p in found)


@pytest.mark.parametrize("name, target", [("gpt2", "mlp.c_proj"), ("t5", "wo")])
def test_an_adapter_keeps_the_layout(name, target):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(name)
    before = find_down_projections(model)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=[target], fan_in_fan_out=name == "gpt2")
    )
    after = find_down_projections(adapted)
    assert [(p.weight, p.layout) for p in after] == [(p.weight, p.layout) for p in before]
    assert all(p.module is not q.module for p, q in zip(after, before))
    assert [p.name for p in after] == [f"base_model.model.{p.name}" for p in before]


def test_an_adapter_on_fused_experts_is_looked_through():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("mixtral")
    weights = [p.weight for p in find_down_projections(model)]
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    found = find_down_projections(get_peft_model(model, config))
    assert [p.weight for p in found] == weights


def test_compiled_blocks_and_layers():
    model = tiny_model("gpt2")
    before = find_down_projections(model)
    model.transformer.h[0] = torch.compile(model.transformer.h[0])
    model.transformer.h[1].mlp.c_proj = torch.compile(model.transformer.h[1].mlp.c_proj)
    after = find_down_projections(model)
    assert [(p.weight, p.layout, p.layer) for p in after] == [
        (p.weight, p.layout, p.layer) for p in before
    ]


def test_a_mixture_in_a_compiled_block_keeps_its_scope():
    model = tiny_model("mixtral")
    scope = find_down_projections(model)[0].scope
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert find_down_projections(model)[0].scope is scope


def test_a_weight_that_blocks_share_is_found_once():
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[0]
    assert [p.layer for p in find_down_projections(model)] == [0, 1]


class Packed(nn.Module):
    """As GPTQ and AWQ keep a layer: no ``weight`` at all."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes = torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32)
        self.register_buffer("qweight", codes)
        self.register_buffer("scales", torch.ones(1, linear.out_features))


def packed(module):
    return Packed(module)


def float8(module):
    module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return module


def wrapped(module):
    values = module.weight.detach()
    module.weight = nn.Parameter(TwoTensor(values, values.clone()), requires_grad=False)
    return module


@pytest.mark.parametrize(
    "pack, message",
    [
        (packed, "is packed .*int32.*expected a floating-point weight of 2560 elements"),
        (float8, "is packed .*float8_e4m3fn.*load the model unquantized"),
        (wrapped, "is a wrapped tensor .*TwoTensor.*unquantized and unsharded"),
    ],
)
def test_packed_layers_are_found_and_have_no_matrix(pack, message):
    model = tiny_model("llama")
    before = names(model)
    for layer in model.model.layers:
        layer.mlp.down_proj = pack(layer.mlp.down_proj)
    found = find_down_projections(model)
    assert [p.name for p in found] == before
    assert [(p.rows, p.columns) for p in found] == [(H, I)] * 3
    with pytest.raises(InvalidInput, match=message) as error:
        found[0].matrix()
    assert found[0].name in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def llava():
    text = dict(vocab_size=128, hidden_size=H, intermediate_size=I, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    vision = dict(hidden_size=24, intermediate_size=H, num_hidden_layers=2, num_attention_heads=2,
                  image_size=8, patch_size=4, projection_dim=24)  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision),
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_text_blocks_by_default_and_all_on_demand(llava):
    text = [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(2)]
    vision = [f"model.vision_tower.encoder.layers.{i}.mlp.fc2" for i in range(2)]
    assert names(llava) == text
    assert sorted(names(llava, towers="all")) == sorted(text + vision)
    ((name, reason),) = skipped_towers(llava)
    assert name == "model.vision_tower.encoder.layers" and "vision" in reason
    assert skipped_towers(tiny_model("llama")) == []
    with pytest.raises(InvalidInput, match='expected towers "text" or "all", got "?\'?vision'):
        find_down_projections(llava, towers="vision")


def test_a_model_of_another_modality_alone_is_taken(llava):
    tower = llava.model.vision_tower
    assert names(tower) == [f"encoder.layers.{i}.mlp.fc2" for i in range(2)]
    assert {p.rows for p in find_down_projections(tower)} == {24}
    assert skipped_towers(tower) == []


def test_the_decoder_of_a_speech_model_is_text():
    config = transformers.WhisperConfig(
        vocab_size=128, d_model=H, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=I,
        decoder_ffn_dim=I, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    assert names(model) == ["model.decoder.layers.0.fc2"]
    (skipped,) = skipped_towers(model)
    assert skipped[0] == "model.encoder.layers"


@pytest.mark.parametrize(
    "modalities, main_input, reason",
    [
        (("image",), "input_ids", "Module reads image"),
        ("audio", "input_ids", "Module reads audio"),
        ("text", "input_values", "Module reads input_values"),
        (("image", "text"), "inputs_embeds", None),
    ],
)
def test_a_tower_is_told_by_what_it_reads(modalities, main_input, reason):
    def part():
        return blocks(lambda: block(up=nn.Linear(16, 40), back=nn.Linear(40, 16)), count=1)

    model = block(front=part(), back=part())
    model.front.input_modalities, model.front.main_input_name = modalities, main_input
    assert skipped_towers(model) == ([("front.trunk", reason)] if reason else [])
    front = [] if reason else ["front.trunk.0.back"]
    assert names(model) == [*front, "back.trunk.0.back"]
    assert names(model, towers="all") == ["front.trunk.0.back", "back.trunk.0.back"]


def test_state_space_models_have_none():
    config = transformers.MambaConfig(
        vocab_size=128, hidden_size=H, state_size=4, num_hidden_layers=2
    )
    with pytest.raises(ProjectionNotFound, match="outside attention and other mixers") as error:
        find_down_projections(transformers.MambaForCausalLM(config))
    message = str(error.value)
    assert "\n" not in message and "backbone.layers (width 32)" in message
    assert "2 x Linear 64->32" in message


def test_a_model_without_blocks():
    with pytest.raises(ProjectionNotFound, match="lists of blocks seen: none; .*1 x Linear 3->5"):
        find_down_projections(block(only=nn.Linear(3, 5)))


def test_meta_models_are_read_like_others():
    model = tiny_model("deepseek_v3")
    before = [(p.name, p.layout, p.rows, p.columns) for p in find_down_projections(model)]
    found = find_down_projections(model.to("meta"))
    assert [(p.name, p.layout, p.rows, p.columns) for p in found] == before
