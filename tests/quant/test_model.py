"""Whole models: what is packed, what it computes, what is refused."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

import swkernels
from swkernels import QuantConfig, ops, quantize
from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections
from swkernels.nn import QuantEmbedding, QuantLinear, TiedQuantLinear
from swkernels.nn.quant_experts import QuantExperts
from swkernels.train import Coordinates, Site
from tests.detect import fake_report
from tests.models.tiny import (
    ARCHITECTURES,
    MIXTURES,
    MORE_ARCHITECTURES,
    run,
    tiny_model,
    token_ids,
)
from tests.ops.listed import Allocations

from .dense import packed_modules, unpacked

DOWN = "model.layers.1.mlp.down_proj"


def logits(model, ids=None):
    with torch.no_grad():
        return run(model, token_ids() if ids is None else ids).logits


def in_double(model):
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    return model.double()


def quantized(arch="llama", super_weights=None, **fields):
    model = tiny_model(arch)
    return model, quantize(model, QuantConfig(**fields), super_weights, progress=False)


# --- what it computes ---


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_a_quantized_model_computes_with_its_packed_values(arch):
    model, _ = quantized(arch, block_size=24)
    # In float64 the order of the sums does not matter, and routers choose alike.
    want = logits(in_double(dense := unpacked(model, tiny_model(arch))))
    assert torch.allclose(logits(model.double()), want, rtol=1e-9, atol=1e-9 * want.abs().max())
    assert not torch.equal(want, logits(in_double(tiny_model(arch))))
    assert len(list(dense.parameters())) > len(list(model.parameters()))


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_down_projections_are_found_as_before(arch):
    before = find_down_projections(tiny_model(arch))
    model, report = quantized(arch)
    after = find_down_projections(model)
    fields = ("name", "layer", "rows", "columns", "expert", "experts", "block_name")
    for b, a in zip(before, after, strict=True):
        assert [getattr(a, f) for f in fields] == [getattr(b, f) for f in fields]
    packed = packed_modules(model).keys()
    assert {p.name if p.experts is None else f"{p.name}.{p.parameter}" for p in before} <= packed
    assert {layer.name for layer in report.layers} <= packed


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mpt", "t5", "bloom", "opt"])
def test_embeddings_and_head(arch):
    model, _ = quantized(arch, embeddings="int8", block_size="row")
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding) and embedding.packed.plan.code.name == "int8"
    tied = (
        tiny_model(arch).get_output_embeddings().weight
        is (tiny_model(arch).get_input_embeddings().weight)
        or tiny_model(arch).config.tie_word_embeddings
    )
    assert isinstance(head, TiedQuantLinear if tied else QuantLinear)
    dense = unpacked(model, tiny_model(arch))
    want = logits(dense)
    exact = logits(copy.deepcopy(dense).double())
    allowed = 2 * (want - exact).abs().max() + 1e-9
    assert (logits(model) - exact).abs().max() <= allowed


def test_embeddings_with_a_forward_of_their_own_stay():
    model, report = quantized("gemma3", embeddings="int8")
    assert dict(report.left_out)["lm_head"] == "tied to embeddings that stay"
    assert "forward of its own" in dict(report.left_out)["model.embed_tokens"]
    assert isinstance(model.lm_head, nn.Linear) and not isinstance(model.lm_head, QuantLinear)


def test_generation_and_a_cast_keep_what_is_packed():
    model, _ = quantized(super_weights={DOWN: [[3, 5]]})
    q = copy.deepcopy(model.get_submodule(DOWN).packed)
    model.to(torch.bfloat16)
    now = model.get_submodule(DOWN).packed
    assert all(torch.equal(a, now.tensors()[n]) for n, a in q.tensors().items())
    out = model.generate(token_ids(1, 4), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 9)


# --- what is selected ---


def test_what_is_packed_by_default():
    model, report = quantized()
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = {layer.name for layer in report.layers}
    assert {name.rpartition(".")[2] for name in names} == set(parts)
    assert len(names) == 3 * len(parts) == len(packed_modules(model))
    left = dict(report.left_out)
    assert left == {"model.embed_tokens": "an embedding", "lm_head": "outside the text blocks"}


@pytest.mark.parametrize("arch", MIXTURES)
def test_routers_stay(arch):
    model, _ = quantized(arch)
    for name in packed_modules(model):
        assert "router" not in name and not name.endswith(".gate"), name
    assert any(isinstance(module, QuantExperts) for module in model.modules())


def test_include_and_exclude():
    _, report = quantized(include=("down_proj",), exclude=("layers.0.*",))
    names = [layer.name for layer in report.layers]
    assert names == [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    left = dict(report.left_out)
    assert left["model.layers.0.mlp.down_proj"] == "excluded"
    assert left["model.layers.1.mlp.up_proj"] == "not included"
    model, report = quantized("mixtral", exclude="experts.gate_up_proj")
    assert [type(m).__name__ for n, m in packed_modules(model).items() if "experts" in n] == [
        "QuantExperts"
    ] * 3
    assert logits(model).isfinite().all()


def test_a_head_by_name():
    model, _ = quantized(include=["lm_head"])
    assert list(packed_modules(model)) == ["lm_head"]


def test_a_module_in_two_places_is_replaced_in_both():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared)})
    quantize(model, QuantConfig(include="*"), progress=False)
    assert model["a"][0] is model["b"][0] and isinstance(model["a"][0], QuantLinear)


def test_a_weight_of_two_layers_is_packed_once():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    report = quantize(model, QuantConfig(include="*"), progress=False)
    assert len(report.layers) == 1
    assert model[0].packed.codes.data_ptr() == model[2].packed.codes.data_ptr()
    assert model[0].bias is not model[2].bias


# --- super weights ---


@pytest.mark.parametrize("code", ["int4", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "gpt_oss", "dbrx", "jetmoe"])
def test_super_weights_are_kept_bit_for_bit(arch, code):
    dense = tiny_model(arch)
    coordinates = Coordinates.random(dense, 30, seed=2)
    projections = {p.name: p for p in find_down_projections(dense)}
    model, report = quantized(arch, coordinates, code=code, block_size="tensor")
    assert report.super_weights == 30
    after = {p.name: p for p in find_down_projections(model)}
    for site, pairs in coordinates.weights.items():
        rows, cols = pairs.long().unbind(1)
        want = projections[site.name].matrix(site.expert)[rows, cols]
        p = after[site.name]
        module = p.module if p.experts is None else p.weight.expert(site.expert)
        assert torch.equal(module.dequantize()[rows, cols], want)
        # A one-hot input reads the value back through the product.
        one_hot = torch.eye(p.columns)[cols]
        y = ops.quant_linear(one_hot, module.packed)
        assert torch.equal(y[torch.arange(len(rows)), rows], want)


def sources(tmp_path):
    """The same super weight in every form that is taken."""
    pairs = {DOWN: [[3, 5]]}
    coordinates = Coordinates.of(pairs, tiny_model("llama"))
    coordinates.save(tmp_path / "c.json")
    coordinates.save(tmp_path / "c.safetensors")
    yield from (pairs, {DOWN: torch.tensor([[3, 5]])}, coordinates)
    yield from (tmp_path / "c.json", str(tmp_path / "c.safetensors"))


def test_every_source_of_super_weights(tmp_path):
    for source in sources(tmp_path):
        _, report = quantized(super_weights=source)
        (layer,) = [layer for layer in report.layers if layer.super_weights]
        value = float(tiny_model("llama").get_submodule(DOWN).weight.detach()[3, 5])
        assert (layer.name, layer.super_weights) == (DOWN, ((3, 5, value),)), source


def test_a_report_of_a_scan(tmp_path):
    listed = [fake_report.candidate(0, 1, 3, 5, "super weight", 40.0)]
    document = fake_report.report(listed, shape=(32, 80))
    report = ScanReport(document)
    report.save(tmp_path / "report.json")
    for source in (document, report, tmp_path / "report.json"):
        _, made = quantized(super_weights=source)
        assert made.super_weights == 1


def test_a_super_weight_in_a_layer_that_stays_needs_nothing():
    model, report = quantized(super_weights={DOWN: [[3, 5]]}, exclude=DOWN)
    assert report.super_weights == 0
    assert type(model.get_submodule(DOWN)) is nn.Linear


def test_of_a_tied_head():
    model, report = quantized(
        "gpt2", super_weights={"lm_head": [[7, 1]]}, embeddings="int4", block_size="tensor"
    )
    assert report.super_weights == 1
    want = tiny_model("gpt2").lm_head.weight[7, 1]
    assert torch.equal(model.transformer.wte(torch.tensor(7))[1], want)


# --- memory ---


class Holding(nn.Module):
    """Blocks of one linear layer."""

    def __init__(self, layers=6, width=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(layers))


def test_each_layer_is_freed_as_it_goes():
    model = Holding()
    weights = [weakref.ref(block[0].weight) for block in model.layers]
    alive = []

    def watch(stage, done, total):
        if stage not in ("checking", "done"):
            alive.append(sum(weight() is not None for weight in weights))

    kept = {f"layers.{i}.0": [[1, 2]] for i in (1, 4)}
    quantize(model, QuantConfig(include="*"), kept, progress=watch)
    assert alive == [6, 5, 4, 3, 2, 1]
    assert not any(weight() for weight in weights)


def test_no_tensor_is_larger_than_a_layer():
    model = Holding()
    with Allocations() as made:
        quantize(model, QuantConfig(include="*"), progress=False)
    assert max(made.sizes) <= 64 * 64


# --- what is refused, before anything is changed ---


def with_(model, change):
    change(model)
    return model


def poison(value, row=2, col=3):
    def change(model):
        with torch.no_grad():
            model.get_submodule(DOWN).weight[row, col] = value

    return change


def adapted(model):
    swkernels.train.sparse(model, Coordinates.of({DOWN: [[0, 0]]}, model))


def tracked(model):
    swkernels.track(model)


def already(model):
    quantize(model, progress=False)


def others(model):
    model.config.quantization_config = {"quant_method": "fancy"}


def integers(model):
    layer = model.get_submodule(DOWN)
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


MODELS = {
    "nan": (poison(float("nan")), rf"{DOWN} holds nan at \[2, 3\]: a weight must be finite"),
    "infinity": (poison(float("-inf"), 0, 7), rf"{DOWN} holds -inf at \[0, 7\]"),
    "quantized": (already, "model.layers.0.self_attn.q_proj is quantized already"),
    "of another library": (others, r"quantized already \(fancy\).*quantization_config"),
    "integers": (integers, rf"{DOWN} is quantized already \(Linear\)"),
    "adapted": (adapted, "is an adapter: quantize first"),
    "tracked": (tracked, "the forward of model.layers.0.mlp.down_proj is replaced"),
    "hooked": (
        lambda m: m.get_submodule(DOWN).register_forward_hook(lambda *a: None),
        f"{DOWN} has hooks, which would be lost",
    ),
    "meta": (lambda m: m.get_submodule(DOWN).to("meta"), f"{DOWN} is on the meta device"),
    "float64": (lambda m: m.double(), "q_proj must be float32, bfloat16 or float16"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_refused(name):
    change, message = MODELS[name]
    model = with_(tiny_model("llama"), change)
    before = list(model.modules())
    with pytest.raises(InvalidInput, match=message):
        quantize(model, progress=False)
    assert list(model.modules()) == before


def test_layers_of_bitsandbytes_are_refused():
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    for kind in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt):
        model = tiny_model("llama")
        model.model.layers[1].mlp.down_proj = kind(80, 32, bias=False).to("cpu")
        with pytest.raises(InvalidInput, match=f"{DOWN} is quantized already .{kind.__name__}"):
            quantize(model, progress=False)


def test_wrapped_weights_are_refused():
    class Wrapped(torch.Tensor):  # as FSDP2's and torchao's are
        def __tensor_flatten__(self):
            return [], None

    model = tiny_model("llama")
    layer = model.get_submodule(DOWN)
    wrapped = layer.weight.detach().as_subclass(Wrapped)
    layer._parameters["weight"] = nn.Parameter(wrapped, requires_grad=False)
    with pytest.raises(InvalidInput, match=rf"{DOWN} is packed or sharded .Wrapped"):
        quantize(model, progress=False)


ARGUMENTS = {
    "no such layer": ({}, {"model.layers.9.mlp.down_proj": [[0, 0]]}, "has no module .*nearest"),
    "no linear layer": ({}, {"model.norm": [[0, 0]]}, "expected a linear layer"),
    "outside": ({}, {DOWN: [[32, 0]]}, r"\[32, 0\] lies outside"),
    "twice": ({}, {DOWN: [[1, 1], [1, 1]]}, "listed more than once"),
    "another type": ({}, 7, "super_weights must be a ScanReport"),
    "no file": ({}, "nowhere.json", "cannot read nowhere.json"),
    "an expert": ({}, {(DOWN, 0): [[0, 0]]}, "no fused experts"),
    "a pattern": ({"include": "down_porj"}, None, "include pattern 'down_porj' matches no layer"),
    "an exclusion": ({"exclude": ["q"]}, None, "exclude pattern 'q' matches no layer"),
    "nothing": ({"exclude": ["*"]}, None, "no layer of LlamaForCausalLM is to be quantized"),
    "too many": ({"largest": 20, "largest_per": "block"}, None, "q_proj: .*outliers of 1024"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_refused(name):
    fields, super_weights, message = ARGUMENTS[name]
    model = tiny_model("llama")
    before = list(model.modules())
    with pytest.raises(InvalidInput, match=message):
        quantize(model, QuantConfig(**fields), super_weights, progress=False)
    assert list(model.modules()) == before


def test_nan_of_an_expert_and_of_a_transposed_layer():
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 5, 3] = float("inf")
    with pytest.raises(InvalidInput, match=r"experts.down_proj expert 2 holds inf at \[3, 5\]"):
        quantize(model, progress=False)
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[5, 3] = float("inf")
    with pytest.raises(InvalidInput, match=r"c_proj holds inf at \[3, 5\]"):
        quantize(model, progress=False)


def test_a_sum_that_overflows_is_no_error():
    model = Holding(1)
    with torch.no_grad():
        model.layers[0][0].weight.fill_(3e38)
    quantize(model, QuantConfig(include="*"), progress=False)


def test_a_config_of_another_type():
    with pytest.raises(InvalidInput, match="config must be a QuantConfig, got dict"):
        quantize(tiny_model("llama"), {"code": "int4"}, progress=False)


def test_embeddings_that_are_not_named():
    with pytest.raises(InvalidInput, match="get_input_embeddings"):
        quantize(Holding(), QuantConfig(include="*", embeddings="int4"), progress=False)


# --- interruptions ---


def stopping(at, error):
    def progress(stage, done, total):
        if stage != "checking" and done == at:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory")])
def test_an_interruption_leaves_whole_layers_and_says_so(error):
    model = tiny_model("llama")
    with pytest.raises(type(error), match="4 of the 21 layers are quantized.*load the model again"):
        quantize(model, progress=stopping(4, error))
    assert len(packed_modules(model)) == 4
    assert logits(model).isfinite().all()  # each layer is one or the other
    with pytest.raises(InvalidInput, match="interrupted.*loaded again"):
        quantize(model, progress=False)


def test_an_interruption_before_the_first_layer_changes_nothing():
    model = tiny_model("llama")
    want = logits(model)
    with pytest.raises(KeyboardInterrupt) as caught:
        quantize(model, progress=stopping(0, KeyboardInterrupt()))
    assert not caught.value.args
    assert torch.equal(logits(model), want)
    quantize(model, progress=False)


def test_the_bar_goes_to_standard_error(capsys):
    quantize(tiny_model("llama"))
    assert not capsys.readouterr().out


# --- fused experts ---


def test_only_experts_with_tokens_run(monkeypatch):
    model, _ = quantized("mixtral")
    reached = set()
    original = QuantExperts.expert
    monkeypatch.setattr(
        QuantExperts, "expert", lambda self, index: reached.add(index) or original(self, index)
    )
    experts = model.model.layers[0].mlp.experts
    index = torch.tensor([[1, 3]])
    experts(torch.randn(1, 32), index, torch.ones(1, 2))
    assert reached == {1, 3}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_whatever_implementation_is_set(implementation):
    model, _ = quantized("mixtral")
    want = logits(model)
    model.set_experts_implementation(implementation)
    assert torch.equal(logits(model), want)


def test_a_copy_of_a_model_with_experts_is_its_own():
    model, _ = quantized("mixtral")
    other = copy.deepcopy(model)
    want = logits(model)
    experts = model.model.layers[0].mlp.experts.down_proj
    q = experts.expert(0).packed
    experts.expert(0).set_packed(q.with_tensors(q.tensors() | {"scales": q.scales * 3}))
    assert torch.equal(logits(other), want)
    assert not torch.equal(logits(model), want)


def test_tracking_sees_packed_experts():
    for arch in ("mixtral", "gpt_oss", "dbrx", "llama4", "jetmoe", "llama", "gpt2"):
        model, _ = quantized(arch)
        dense = unpacked(model, tiny_model(arch))
        found = []
        for each in (model, dense):
            with swkernels.track(each) as handle:
                logits(each)
            found.append([site.outputs.values for site in handle.peaks()])
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), arch


def test_a_site_is_a_name_and_an_expert():
    _, report = quantized("mixtral", {("model.layers.0.mlp.experts", 2): [[1, 4]]})
    (layer,) = [layer for layer in report.layers if layer.super_weights]
    assert (layer.name, layer.expert) == ("model.layers.0.mlp.experts.down_proj", 2)
    assert Site("model.layers.0.mlp.experts", 2)
