"""Sparse coordinates as a PEFT method, with tiny models."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="needs peft")

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from swkernels.errors import InvalidInput  # noqa: E402
from swkernels.integrations.peft import (  # noqa: E402
    SparseCoordinateConfig,
    SparseCoordinateLayer,
)
from swkernels.integrations.peft.config import NAME, PREFIX  # noqa: E402
from swkernels.integrations.peft.registry import register  # noqa: E402
from swkernels.train.coordinates import Coordinates, Site  # noqa: E402
from swkernels.train.sparse import sparse  # noqa: E402
from tests.models.tiny import VOCABULARY, H, I, tiny_model, token_ids  # noqa: E402

DOWN = "model.layers.1.mlp.down_proj"
# Linear, Conv1D, and experts in each layout: [E, D, H], [E, H, D] with bias, [E * H, D]
ARCHITECTURES = ("llama", "gpt2", "mixtral", "gpt_oss", "dbrx")


def config(model, k: int = 60, seed: int = 1, **changes) -> SparseCoordinateConfig:
    return SparseCoordinateConfig(
        coordinates=Coordinates.random(model, k, seed=seed), task_type="CAUSAL_LM", **changes
    )


def values_of(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The values of an adapter by the name of the module."""
    return {
        name.removeprefix("base_model.model."): layer.values[adapter]
        for name, layer in model.named_modules()
        if isinstance(layer, SparseCoordinateLayer) and adapter in layer.values
    }


def set_random(model, adapter: str = "default", seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in values_of(model, adapter).values():
        value.data = torch.randn(value.shape, generator=generator) * 0.1


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def adapted(arch: str = "llama", **changes):
    """A model with an adapter whose values are not zero."""
    model = get_peft_model(tiny_model(arch), config(tiny_model(arch), **changes))
    set_random(model)
    return model


# --- the same numbers as plain swkernels.train.sparse ---


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trains_as_plain_sparse_does(arch):
    ids = token_ids()
    plain, wrapped = tiny_model(arch), tiny_model(arch)
    coordinates = Coordinates.random(plain, 60, seed=1)
    before = logits(wrapped)
    handle = sparse(plain, coordinates)
    wrapped = get_peft_model(wrapped, SparseCoordinateConfig(coordinates=coordinates))
    assert torch.equal(logits(wrapped), before)
    losses = {}
    for name, model in (("plain", plain), ("peft", wrapped)):
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trainable) == len(coordinates)
        optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
        losses[name] = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["peft"] == losses["plain"]
    assert losses["plain"][2] < losses["plain"][0]
    ours = values_of(wrapped)
    for name, value in ours.items():
        parts = [part for site, part in sorted(handle.values().items()) if site.name == name]
        assert torch.equal(value, torch.cat(parts))
        assert value.abs().max() > 0


def test_checkpointing_and_autocast():
    ids = token_ids()
    grads = {}
    for kind in ("none", "reentrant", "non-reentrant"):
        model = adapted()
        model.train()
        if kind != "none":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        grads[kind] = torch.cat([value.grad for value in values_of(model).values()])
        assert grads[kind].dtype == torch.float32 and grads[kind].abs().max() > 0
    torch.testing.assert_close(grads["reentrant"], grads["none"])
    torch.testing.assert_close(grads["non-reentrant"], grads["none"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_stay_float32_on_a_half_precision_base(dtype, tmp_path):
    model = get_peft_model(tiny_model("llama").to(dtype), config(tiny_model("llama")))
    set_random(model)
    expected = {name: value.detach().clone() for name, value in values_of(model).items()}
    out = logits(model)
    assert out.dtype == dtype
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama").to(dtype), tmp_path)
    spare = PeftModel.from_pretrained(
        tiny_model("llama").to(dtype),
        tmp_path,
        low_cpu_mem_usage=True,
        autocast_adapter_dtype=False,
    )
    native = tiny_model("llama").to(dtype)
    native.load_adapter(tmp_path)
    for other in (again, spare, native, again.to(dtype)):
        for name, value in values_of(other).items():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name])
        assert torch.equal(logits(other), out)


def test_compiles():
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))


# --- files ---


def test_save_and_load(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert not any(p.requires_grad for p in other.parameters())
    trainable = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert sum(p.numel() for p in trainable.parameters() if p.requires_grad) == 60
    saved = PeftConfig.from_pretrained(tmp_path)
    assert saved.coordinates == model.peft_config["default"].coordinates
    assert pickle.loads(pickle.dumps(saved)).coordinates == saved.coordinates
    other.save_pretrained(tmp_path / "again")
    written = [
        (folder / "adapter_config.json").read_text() for folder in (tmp_path, tmp_path / "again")
    ]
    assert written[0] == written[1]


def test_transformers_loads_the_adapter_itself(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(base))
    set_random(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(auto), logits(model))


def test_coordinates_are_stored_compactly():
    shapes = {Site("down"): (8192, 28672), Site("head"): (2**18, 2**14)}  # more than 2^31 entries
    coordinates = Coordinates.random(shapes, 4096, seed=3)
    stored = json.loads(json.dumps(SparseCoordinateConfig(coordinates=coordinates).to_dict()))
    assert len(json.dumps(stored)) < 8 * 4096
    del stored["peft_type"]
    assert SparseCoordinateConfig(**stored).coordinates == coordinates


def test_coordinates_from_a_file_or_a_dict(tmp_path):
    listed = {DOWN: [[3, 5], [0, 1]], "model.layers.0.self_attn.q_proj": [[2, 2]]}
    path = tmp_path / "coordinates.json"
    Coordinates.of(listed, tiny_model("llama")).save(path)
    outputs = []
    for given in (listed, path, str(path)):
        model = get_peft_model(tiny_model("llama"), SparseCoordinateConfig(coordinates=given))
        set_random(model)
        outputs.append(logits(model))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], logits(tiny_model("llama")))


# --- merging, several adapters, switching off ---


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merge_and_unmerge(arch):
    model = adapted(arch)
    base = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    out = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), out)
    assert any(not torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    model.unmerge_adapter()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert torch.equal(logits(model), out)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, SparseCoordinateLayer) for module in merged.modules())
    assert merged.state_dict().keys() == tiny_model(arch).state_dict().keys()
    torch.testing.assert_close(logits(merged), out)


def test_merge_into_other_layers_than_down_projections():
    listed = {"model.layers.0.self_attn.q_proj": [[3, 4]], DOWN: [[1, 2]]}
    model = get_peft_model(tiny_model("llama"), SparseCoordinateConfig(coordinates=listed))
    set_random(model)
    out = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), out)
    assert not torch.equal(out, logits(tiny_model("llama")))


def test_unload_gives_the_base_back():
    unloaded = adapted("mixtral").unload()
    assert torch.equal(logits(unloaded), logits(tiny_model("mixtral")))


def test_unsafe_merge_is_put_back():
    model = adapted()
    values_of(model)[DOWN].data[0] = float("nan")
    weight = model.get_submodule(f"base_model.model.{DOWN}").weight
    before = weight.clone()
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_two_adapters(arch, tmp_path):
    model = adapted(arch)
    first = logits(model)
    model.add_adapter("other", config(tiny_model(arch), k=40, seed=9))
    set_random(model, "other", seed=5)
    assert torch.equal(logits(model), first)  # not active yet
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(first, second)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 40
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    model.save_pretrained(tmp_path)

    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert not any("other" in name for name in model.state_dict())
    model.load_adapter(tmp_path / "other", "renamed")
    model.set_adapter("renamed")
    assert torch.equal(logits(model), second)


def test_merged_adapters_that_overlap_are_unmerged_exactly():
    listed = {DOWN: [[1, 1], [2, 3]]}
    model = get_peft_model(tiny_model("llama"), SparseCoordinateConfig(coordinates=listed))
    model.add_adapter("b", SparseCoordinateConfig(coordinates={DOWN: [[2, 3], [4, 5]]}))
    set_random(model)
    set_random(model, "b", seed=2)
    weight = model.get_submodule(f"base_model.model.{DOWN}").weight
    before = weight.clone()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["b"])
    assert (weight != before).sum() == 3
    model.unmerge_adapter()
    assert torch.equal(weight, before)


def test_disabled_it_is_the_base():
    model = adapted()
    out, base = logits(model), logits(tiny_model("llama"))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), out)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_status_and_copies():
    model = adapted()
    status = model.get_model_status()
    assert (status.adapter_model_type, status.trainable_params) == ("SparseCoordinateModel", 60)
    copied = copy.deepcopy(model)
    values_of(copied)[DOWN].data.zero_()
    copied.merge_adapter()
    assert not torch.equal(logits(copied), logits(model))
    assert torch.equal(logits(model), logits(adapted()))


# --- bases of other kinds ---


class Linear4bit(nn.Module):
    """Stands for bitsandbytes' layer: a packed weight that only its own forward can use."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        packed = (linear.weight.detach() * 256).round().clamp(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(packed.reshape(-1, 1), requires_grad=False)

    def forward(self, x):
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype) / 256
        return nn.functional.linear(x, weight)


def packed_model():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Linear4bit(layer.mlp.down_proj)
    return model


def test_packed_base(tmp_path):
    ids = token_ids()
    model = get_peft_model(packed_model(), config(tiny_model("llama")))
    set_random(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(value.grad.abs().max() > 0 for value in values_of(model).values())
    out = logits(model)
    with pytest.raises(InvalidInput, match="packed"):
        model.merge_adapter()
    assert torch.equal(logits(model), out)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(packed_model(), tmp_path)), out)


def test_nothing_is_merged_where_one_layer_cannot_be():
    base = tiny_model("llama")
    base.model.layers[2].mlp.down_proj = Linear4bit(base.model.layers[2].mlp.down_proj)
    model = get_peft_model(base, config(base))
    set_random(model)
    weight = model.get_submodule(f"base_model.model.{DOWN}").weight
    before = weight.clone()
    with pytest.raises(InvalidInput, match="packed"):
        model.merge_and_unload()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits):
    import bitsandbytes as bnb

    ids = token_ids()
    base = tiny_model("llama")
    for layer in base.model.layers:
        dense = layer.mlp.down_proj
        if bits == 4:
            packed = bnb.nn.Linear4bit(I, H, bias=False, compute_dtype=torch.float32)
            packed.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False)
        else:
            packed = bnb.nn.Linear8bitLt(I, H, bias=False, has_fp16_weights=False)
            packed.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False)
        layer.mlp.down_proj = packed.to("cpu")
    before = logits(base)
    coordinates = Coordinates.random(tiny_model("llama"), 60, seed=1)
    model = get_peft_model(base, SparseCoordinateConfig(coordinates=coordinates))
    assert torch.equal(logits(model), before)
    set_random(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(value.grad.abs().max() > 0 for value in values_of(model).values())
    assert not torch.equal(logits(model), before)
    with pytest.raises(InvalidInput, match="packed"):
        model.merge_adapter()


def test_an_observed_output_is_not_changed():
    base = tiny_model("llama")
    seen = []
    base.get_submodule(DOWN).register_forward_hook(lambda module, x, y: seen.append((y, y.clone())))
    model = get_peft_model(base, config(base))
    set_random(model)
    logits(model)
    assert all(torch.equal(kept, copied) for kept, copied in seen) and seen


def test_head_is_trained_and_saved(tmp_path):
    source = tiny_model("llama").config
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(source).eval()
    coordinates = Coordinates.random(base, 20)
    settings = SparseCoordinateConfig(coordinates=coordinates, task_type="SEQ_CLS")
    model = get_peft_model(copy.deepcopy(base), settings)
    set_random(model)
    head = [p for name, p in model.named_parameters() if "score" in name and p.requires_grad]
    assert len(head) == 1
    head[0].data += 1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


# --- registration ---


def test_registered_beside_the_methods_of_peft():
    member = peft.PeftType[NAME]
    assert list(peft.PeftType).count(NAME) == 1 and peft.PeftType(NAME) is member
    assert member.value == NAME and isinstance(member, peft.PeftType)
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    register(NAME, object, object, PREFIX)  # a second time changes nothing
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[NAME] is SparseCoordinateConfig
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    assert lora.peft_type == peft.PeftType.LORA
    assert not any(isinstance(module, SparseCoordinateLayer) for module in lora.modules())


# --- errors: one line, and nothing is changed ---


@pytest.mark.parametrize(
    ("coordinates", "message"),
    [
        ({"model.layers.1.mlp.down": [[0, 0]]}, "no module.*nearest.*down_proj"),
        ({"model.norm": [[0, 0]]}, "expected a linear layer"),
        ({DOWN: [[0, 0], [H, 0]]}, "outside"),
        ({DOWN: [[1, 2], [1, 2]]}, "more than once"),
        ({DOWN: [[0.5, 2]]}, "integers"),
        ({DOWN: []}, "no coordinate"),
    ],
)
def test_wrong_coordinates(coordinates, message):
    model = tiny_model("llama")
    keys = model.state_dict().keys()
    with pytest.raises(InvalidInput, match=message):
        get_peft_model(model, SparseCoordinateConfig(coordinates=coordinates))
    assert model.state_dict().keys() == keys
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("coordinates", [None, {}, 3, torch.zeros(1, 2)])
def test_no_coordinates(coordinates):
    with pytest.raises(InvalidInput, match="coordinates must be"):
        SparseCoordinateConfig(coordinates=coordinates)


def test_model_of_another_shape():
    settings = config(tiny_model("llama", intermediate_size=64))
    with pytest.raises(InvalidInput, match="coordinates are for"):
        get_peft_model(tiny_model("llama"), settings)


def test_name_that_is_taken():
    model = adapted()
    out = logits(model)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", config(tiny_model("llama"), seed=4))
    with pytest.raises(InvalidInput, match="already"):
        get_peft_model(model.base_model.model, config(tiny_model("llama"), seed=4))
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_another_base(arch, tmp_path):
    adapted(arch).save_pretrained(tmp_path)
    other = tiny_model(arch, seed=7)
    keys = other.state_dict().keys()
    with pytest.raises(InvalidInput, match="trained on another base.*load the model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert other.state_dict().keys() == keys
    # rounded to another dtype the same base is no other
    PeftModel.from_pretrained(tiny_model(arch).bfloat16(), tmp_path)


def test_another_base_is_told_from_while_merged(tmp_path):
    model = adapted()
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    with pytest.warns(UserWarning, match="unmerged first"):
        model.load_adapter(tmp_path, "again")


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_values_of_something_else_are_not_loaded_into_an_adapter(arch, tmp_path):
    adapted(arch, seed=2).save_pretrained(tmp_path / "coordinates")
    base = tiny_model(arch, seed=7)
    other = get_peft_model(base, config(base))
    other.save_pretrained(tmp_path / "base")
    model = adapted(arch)
    model.save_pretrained(tmp_path / "own")
    before = logits(model)
    for folder, message in (("coordinates", "other coordinates"), ("base", "another base")):
        with pytest.raises(InvalidInput, match=message):
            model.load_adapter(tmp_path / folder, "default")
        assert torch.equal(logits(model), before)
    set_random(model, seed=8)
    model.load_adapter(tmp_path / "own", "default")
    assert torch.equal(logits(model), before)
    state = other.state_dict()  # with its base
    model.load_state_dict(state)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("damage", ["packed", "shape", "expert"])
def test_damaged_file(damage, tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    entry = stored["coordinates"][0]
    if damage == "packed":
        entry["packed"] = entry["packed"][:-8]
    elif damage == "shape":
        entry["shape"] = [1, 1]
    else:
        del entry["expert"]
    path.write_text(json.dumps(stored))
    with pytest.raises(InvalidInput, match="damaged coordinates"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


# --- trainers ---


def rows(count: int = 16) -> list[dict]:
    ids = token_ids(count, 12, seed=3)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **changes) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        weight_decay=0.1, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(**(settings | changes))


def train(model, folder, resume=None, **changes):
    """The losses and the values after a few steps of the Trainer."""
    trainer = Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows())
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fresh(**changes):
    return get_peft_model(tiny_model("llama"), config(tiny_model("llama"), **changes))


def test_trainer_as_plain_sparse(tmp_path):
    plain, model = tiny_model("llama"), fresh()
    handle = sparse(plain, model.peft_config["default"].coordinates)
    accumulated = dict(gradient_accumulation_steps=2)
    losses = train(model, tmp_path, **accumulated)
    assert train(plain, tmp_path, **accumulated) == losses and len(set(losses)) == 4
    for site, value in handle.values().items():
        assert torch.equal(values_of(model)[site.name], value)


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_with_checkpointing(reentrant, tmp_path):
    whole, checkpointed = fresh(), fresh()
    checkpointed.enable_input_require_grads()
    losses = train(whole, tmp_path)
    again = train(
        checkpointed,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert again == pytest.approx(losses)
    for name, value in values_of(whole).items():
        torch.testing.assert_close(values_of(checkpointed)[name], value)


def test_trainer_resumes_bit_equal(tmp_path):
    saving = dict(save_strategy="steps", save_steps=2)
    whole, resumed = fresh(), fresh()
    losses = train(whole, tmp_path, **saving)
    assert train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-2"), **saving) == losses
    for name, value in values_of(whole).items():
        assert torch.equal(values_of(resumed)[name], value)
        assert value.abs().max() > 0
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(whole))
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoint-4").glob("optimizer.pt")]
    assert sizes and sizes[0] < 20_000  # two moments of 60 values, not of the weights


def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = dict(pad_token="w0", eos_token="w2", unk_token="w0", bos_token="w1")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    texts = [" ".join(f"w{i}" for i in row) for row in token_ids(8, 12, seed=3).tolist()]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    base = tiny_model("llama")
    trainer = trl.SFTTrainer(
        model=base, args=settings, train_dataset=datasets.Dataset.from_dict({"text": texts}),
        peft_config=config(base), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    values = values_of(trainer.model)
    assert sum(value.numel() for value in values.values()) == 60
    assert all(value.dtype == torch.float32 and value.abs().max() > 0 for value in values.values())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))
