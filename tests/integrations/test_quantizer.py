"""Models that transformers quantizes while it loads them; their files; PEFT on them."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import swkernels
from swkernels import QuantConfig, ScanReport, SuperWeightQuantConfig, quantize
from swkernels.errors import InvalidInput
from swkernels.integrations.transformers.quantizer import SuperWeightQuantizer
from swkernels.nn import QuantLinear
from swkernels.nn.packed import PackedModule
from swkernels.train import Coordinates, sparse
from tests.detect import fake_report
from tests.models.tiny import run, tiny_model, token_ids

ARCHS = ["llama", "qwen2", "phi", "gpt2", "mixtral", "gpt_oss"]  # untied, biases, tied, experts
DOWN = "model.layers.1.mlp.down_proj"
LISTED = {DOWN: [[3, 4], [5, 70]], "model.layers.0.self_attn.q_proj": [[0, 1]]}
FIELDS = {"block_size": 48, "largest": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are faster on one thread than threads are woken."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dense(tmp_path):
    """The folder of a tiny model in full precision."""
    return saved(tiny_model("llama"), tmp_path / "dense")


@pytest.fixture
def files(dense, tmp_path):
    """The folder of a tiny quantized model."""
    config = SuperWeightQuantConfig(super_weights=LISTED, **FIELDS)
    return saved(load(dense, config), tmp_path / "q")


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def load(folder, config=None, **options):
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model):
    with torch.no_grad():
        return run(model, token_ids()).logits


def assert_equal(a, b):
    """Equal buffers and parameters, bit for bit."""
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def rewrite(folder, change):
    """Change the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- quantized while it is loaded, saved, loaded again ---


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("embeddings", [None, "int8"])
def test_loading_quantizes_like_quantize_and_files_are_bit_equal(arch, embeddings, tmp_path):
    dense = saved(tiny_model(arch), tmp_path / "dense")
    fields = FIELDS | {"embeddings": embeddings}
    model = load(dense, SuperWeightQuantConfig(**fields))
    other = load(dense)
    report = quantize(other, QuantConfig(**fields), progress=False)
    assert_equal(model, other)
    by_name = {(layer.name, layer.expert): layer for layer in report.layers}
    found = model.hf_quantizer.reports  # in the order of the files
    assert {(layer.name, layer.expert): layer for layer in found} == by_name
    want = logits(other)
    assert torch.equal(logits(model), want)
    for number, one in enumerate((model, other)):
        folder = saved(one, tmp_path / str(number))
        again = load(folder)
        assert_equal(again, model)
        assert torch.equal(logits(again), want)
        saved(again, tmp_path / f"again {number}")
    names = [tmp_path / name for name in ("0", "1", "again 0", "again 1")]
    assert len({(name / "model.safetensors").read_bytes() for name in names}) == 1
    assert len({(name / "config.json").read_text() for name in names}) == 1
    if embeddings is None:
        return
    held = [key for key in model.state_dict() if key.startswith("lm_head")]
    assert bool(held) != (arch == "gpt2")  # a tied head has nothing of its own


@pytest.mark.parametrize("code", ["int4", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "int8"])
def test_every_form_goes_through_files(code, scale_dtype, dense, tmp_path):
    for symmetric in {True, code in ("nf4", "fp4")}:
        for block in (16, (8, 16), "row", "channel", "tensor"):
            config = QuantConfig(
                code=code, symmetric=symmetric, scale_dtype=scale_dtype, block_size=block,
                include=("layers.0.*",),
            )  # fmt: skip
            model = load(dense, SuperWeightQuantConfig(config), dtype=torch.bfloat16)
            again = load(saved(model, tmp_path / "q"))
            assert_equal(model, again)
            assert torch.equal(logits(model), logits(again))


def test_the_dtype_is_that_of_the_rest(dense, tmp_path):
    model = load(dense, SuperWeightQuantConfig(embeddings="int8"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16
    other = load(dense, dtype=torch.bfloat16)
    quantize(other, QuantConfig(embeddings="int8"), progress=False)
    assert_equal(model, other)
    again = load(saved(model, tmp_path / "q"), dtype=torch.float32)
    assert again.dtype == torch.float32 and logits(again).dtype == torch.float32
    for name, tensor in model.state_dict().items():
        if "packed_" in name:
            assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(logits(other.float()), logits(again))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map, dense, tmp_path):
    pytest.importorskip("accelerate")
    config = SuperWeightQuantConfig(**FIELDS)
    model = load(dense, config, device_map=device_map)
    assert_equal(model, load(dense, config))
    assert_equal(load(saved(model, tmp_path / "q"), device_map=device_map), model)


def test_shards_are_packed_one_weight_after_the_other(dense, tmp_path, monkeypatch):
    shards = saved(tiny_model("llama"), tmp_path / "shards", max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    waiting = []
    original = SuperWeightQuantizer.pack

    def pack(self, name, weight, missing_keys):
        layers = {id(layer): layer for listed in self._layers.values() for layer in listed}
        waiting.append([layer.weight.is_meta for layer in layers.values()])
        return original(self, name, weight, missing_keys)

    monkeypatch.setattr(SuperWeightQuantizer, "pack", pack)
    model = load(shards, SuperWeightQuantConfig(**FIELDS))
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    # Whatever waits is not in memory yet, and gets less by one each time.
    assert [len(listed) for listed in waiting] == list(range(len(packed), 0, -1))
    assert all(all(listed) for listed in waiting)
    monkeypatch.undo()
    assert_equal(model, load(dense, SuperWeightQuantConfig(**FIELDS)))
    small = saved(model, tmp_path / "small", max_shard_size="10KB")
    assert len(list(small.glob("*.safetensors"))) > 3
    assert_equal(load(small), model)


def test_a_base_model_of_a_quantized_one(files):
    whole, base = load(files), AutoModel.from_pretrained(files)
    with torch.no_grad():
        hidden = base(token_ids()).last_hidden_state
        assert torch.equal(whole.lm_head(hidden), logits(whole))


def test_the_untied_output_head_alone(tmp_path):
    tied = saved(tiny_model("llama", tie_word_embeddings=True), tmp_path / "tied")
    model = load(tied, SuperWeightQuantConfig(include=["lm_head"], block_size=16))
    dense = load(tied)
    q = swkernels.ops.block_quantize(dense.model.embed_tokens.weight, block_size=16)
    assert torch.equal(model.lm_head.dequantize(), q.dequantize())
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert_equal(load(saved(model, tmp_path / "q")), model)


# --- super weights ---


def test_super_weights_are_exact_after_loading(dense, files):
    model, plain = load(files), load(dense)
    for name, pairs in LISTED.items():
        rows, cols = torch.tensor(pairs).unbind(1)
        want = plain.get_submodule(name).weight[rows, cols]
        assert torch.equal(model.get_submodule(name).dequantize()[rows, cols], want)
    assert config_of(files)["super_weights"] == LISTED
    # The two largest come on top.
    assert len(model.get_submodule(DOWN).packed.positions) in (3, 4)


def test_super_weights_of_a_report_and_of_a_file(dense, tmp_path):
    document = fake_report.report([fake_report.candidate(0, 1, 3, 4, "super weight", 40.0)])
    document["layers"] = [fake_report.layer(1, shape=(32, 80)) | {"module": DOWN}]
    report = ScanReport(document)
    coordinates = Coordinates.from_report(report)
    coordinates.save(tmp_path / "listed.json")
    report.save(tmp_path / "report.json")
    want = load(dense, SuperWeightQuantConfig(super_weights={DOWN: [[3, 4]]}))
    sources = [report, document, coordinates]
    sources += [tmp_path / "report.json", str(tmp_path / "listed.json")]
    for source in sources:
        model = load(dense, SuperWeightQuantConfig(super_weights=source))
        assert_equal(model, want)
        assert model.config.quantization_config.to_dict()["super_weights"] == {DOWN: [[3, 4]]}


def test_super_weights_of_experts(tmp_path):
    dense = saved(tiny_model("mixtral"), tmp_path / "dense")
    name = "model.layers.1.mlp.experts"
    model = load(dense, SuperWeightQuantConfig(super_weights={(name, 2): [[3, 4]]}))
    weight = load(dense).get_submodule(name).down_proj
    assert model.get_submodule(name).down_proj[2].dequantize()[3, 4] == weight[2, 3, 4]
    folder = saved(model, tmp_path / "q")
    assert config_of(folder)["super_weights"] == {name: {"2": [[3, 4]]}}
    assert_equal(load(folder), model)


def test_a_merged_delta_is_saved(files, tmp_path):
    model = load(files)
    coordinates = Coordinates.of({DOWN: [[0, 0], [3, 4]]}, model)
    handle = sparse(model, coordinates)
    handle.parameters()[0].data = torch.tensor([0.25, 1e-3])
    handle.merge()
    handle.remove()
    again = load(saved(model, tmp_path / "merged"))
    assert_equal(again, model)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(load(files)))


# --- what is refused ---


def test_a_quantized_model_is_not_quantized_again(files):
    with pytest.raises(InvalidInput, match="quantized already"):
        quantize(load(files), progress=False)
    with pytest.raises(ValueError, match="is quantized with QuantizedModelConfig"):
        load(files, SuperWeightQuantConfig())


def test_the_config_of_a_quantized_model_is_for_that_model(dense, files):
    with pytest.raises(InvalidInput, match="expected a SuperWeightQuantConfig"):
        load(dense, load(files).config.quantization_config)


def test_what_cannot_be_quantized_is_named(dense):
    with pytest.raises(InvalidInput, match="pattern 'nothing' matches no layer"):
        load(dense, SuperWeightQuantConfig(include=["nothing"]))
    with pytest.raises(InvalidInput, match="outside"):
        load(dense, SuperWeightQuantConfig(super_weights={DOWN: [[0, 5000]]}))
    with pytest.raises(InvalidInput, match="no.such"):
        load(dense, SuperWeightQuantConfig(super_weights={"no.such": [[0, 0]]}))
    with pytest.raises(InvalidInput, match="unknown field 'bits'"):
        SuperWeightQuantConfig(bits=4)
    with pytest.raises(InvalidInput, match="expected a QuantConfig or its fields"):
        SuperWeightQuantConfig(QuantConfig(), code="int8")
    with pytest.raises(InvalidInput, match="cannot lie on a disk"):
        load(dense, SuperWeightQuantConfig(), device_map={"": "disk"}, offload_folder="x")


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(value, dense):
    rewrite(dense, lambda tensors: tensors[f"{DOWN}.weight"][3].fill_(value))
    with pytest.raises(InvalidInput, match=rf"{DOWN}.*{value} at \[3, 0\]"):
        load(dense, SuperWeightQuantConfig())


def test_a_weight_that_is_missing_is_named(dense):
    rewrite(dense, lambda tensors: tensors.pop(f"{DOWN}.weight"))
    with pytest.raises(InvalidInput, match=f"no weight for {DOWN}"):
        load(dense, SuperWeightQuantConfig())


def _flip(tensors):
    tensors[f"{DOWN}.packed_codes"][5] ^= 1


def _cut(tensors):
    tensors[f"{DOWN}.packed_codes"] = tensors[f"{DOWN}.packed_codes"][:-1].clone()


def _cut_outliers(tensors):
    tensors[f"{DOWN}.packed_positions"] = tensors[f"{DOWN}.packed_positions"][:-1].clone()


def _drop(tensors):
    del tensors[f"{DOWN}.packed_scales"]


def _move(tensors):
    tensors[f"{DOWN}.packed_positions"][-1] = 10**6


def _swap(tensors):
    other = "model.layers.0.mlp.down_proj"
    for key in ("packed_codes", "packed_scales"):
        tensors[f"{DOWN}.{key}"] = tensors[f"{other}.{key}"].clone()


@pytest.mark.parametrize("damage", [_flip, _cut, _cut_outliers, _drop, _move, _swap])
def test_a_damaged_file_is_refused(damage, files):
    rewrite(files, damage)
    with pytest.raises(InvalidInput, match=f"packed_[a-z]+ of {DOWN} "):
        load(files)


def test_a_truncated_file_is_refused(files):
    path = files / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="[Ii]ncomplete|invalid|buffer"):  # of safetensors
        load(files)


def _change(folder, change):
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document["quantization_config"])
    path.write_text(json.dumps(document))


CONFIGS = {
    "no packed": (lambda c: c.pop("packed"), "does not say where the model is packed"),
    "no fields": (lambda c: [c.pop(key) for key in list(c) if key != "quant_method"], "anew"),
    "version": (lambda c: c.update(version=99), "version 99, expected 1"),
    "no group": (lambda c: c.update(packed=[]), "names no layer"),
    "no list": (lambda c: c.update(packed=3), "is damaged"),
    "no code": (lambda c: c["packed"][0].pop("code"), "is damaged"),
    "another dtype": (lambda c: c["packed"][0].update(dtype="float33"), "is damaged"),
    "another code": (lambda c: c["packed"][0].update(code="nf4"), "packed_plan of "),
    "another block": (lambda c: c["packed"][0].update(block_size=64), "packed_plan of "),
    "other names": (lambda c: c["packed"][0].update(linear=["a.b"]), "names no layer"),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_damaged_config_is_refused(change, message, files):
    _change(files, change)
    with pytest.raises(InvalidInput, match=message):
        load(files)


# --- configs and registration ---


def test_the_config_goes_through_json_and_copies():
    config = SuperWeightQuantConfig(
        code="int8", block_size=(8, 16), clip=swkernels.ops.Clip("zscore", 9), exclude=["q_proj"],
        super_weights={"a.b": [[1, 2]]},
    )  # fmt: skip
    document = json.loads(config.to_json_string())
    assert document["quant_method"] == "swkernels" and document["block_size"] == [8, 16]
    again = SuperWeightQuantConfig.from_dict(document)
    assert again.config == config.config and again.super_weights == config.super_weights
    assert copy.deepcopy(config).to_dict() == config.to_dict() == dict(config)


def test_a_quantized_model_can_be_copied_and_pickled(files, tmp_path):
    in_memory = tiny_model("llama")
    quantize(in_memory, progress=False)
    for number, model in enumerate((in_memory, load(files))):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_equal(other, model)
            assert torch.equal(logits(other), logits(model))
            assert_equal(load(saved(other, tmp_path / str(number))), model)


def test_models_of_one_configuration_do_not_share_what_is_written_to_it():
    first = tiny_model("llama")
    second = type(first)(first.config)
    quantize(first, progress=False)
    assert not hasattr(second.config, "quantization_config")
    assert first.model.config is first.config
    quantize(second, progress=False)


def test_importing_swkernels_is_light_and_the_config_registers_the_method():
    code = """
import sys, swkernels
assert not [name for name in ("transformers", "peft", "triton") if name in sys.modules]
swkernels.SuperWeightQuantConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "swkernels" in AUTO_QUANTIZER_MAPPING
assert "swkernels.integrations.transformers.peaks" not in sys.modules
from swkernels.integrations.transformers import log_peaks
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(("arch", "include"), [("llama", None), ("mixtral", ["experts.*"])])
@pytest.mark.parametrize("in_memory", [True, False])
def test_files_stop_who_does_not_know_the_method(arch, include, in_memory, tmp_path, monkeypatch):
    model = tiny_model(arch)
    config = QuantConfig(include=include)
    if in_memory:
        quantize(model, config, progress=False)
    else:
        model = load(saved(model, tmp_path / "dense"), SuperWeightQuantConfig(config))
    folder = saved(copy.deepcopy(model), tmp_path / "q")
    assert_equal(load(folder), model)
    auto = pytest.importorskip("transformers.quantizers.auto")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "swkernels")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "swkernels")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)


def test_loading_warns_of_nothing(files, caplog):
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        load(files)
        AutoModel.from_pretrained(files)
    finally:
        logger.removeHandler(caplog.handler)
    texts = [record.message for record in caplog.records if record.levelname != "INFO"]
    assert not [text for text in texts if "packed_" in text or "MISSING" in text], texts


# --- PEFT ---


def lora_config(**changes):
    peft = pytest.importorskip("peft")
    arguments = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**arguments | changes)


def train(model, steps, folder, rate=1e-2):
    ids = token_ids(1)[0].tolist()
    rows = [{"input_ids": ids, "labels": ids}] * 4
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=rate, report_to=[], use_cpu=True,
        logging_steps=1, save_strategy="no", per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_lora_trains_and_its_adapter_is_saved_and_loaded(targets, files, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(files), lora_config(target_modules=targets))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    losses = train(model, 6, tmp_path / "run")
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    want, base = logits(model.eval()), logits(load(files))
    assert not torch.equal(want, base)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(files), tmp_path / "adapter")
    assert torch.equal(logits(again), want)
    again.load_adapter(tmp_path / "adapter", "second")
    again.set_adapter("second")
    assert torch.equal(logits(again), want)
    with again.disable_adapter():
        assert torch.equal(logits(again), base)
    assert torch.equal(logits(again.unload()), base)


@pytest.mark.parametrize("safe", [False, True])
def test_lora_is_not_merged_into_packed_weights(safe, files):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(files), lora_config(init_lora_weights=False)).eval()
    want = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AttributeError, match="no dense weight.*merge adapters into the model"):
            merge(safe_merge=safe)
    assert torch.equal(logits(model), want)


def other_methods() -> dict:
    peft = pytest.importorskip("peft")
    return {
        "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "loha": peft.LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False),
        "embeddings": lora_config(target_modules=["embed_tokens"], init_lora_weights=False),
        "head": lora_config(modules_to_save=["lm_head"]),
    }


@pytest.mark.parametrize("method", ["ia3", "loha", "embeddings", "head"])
@pytest.mark.parametrize("kbit", [False, True])
def test_other_methods_of_peft_train_on_it(method, kbit):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama").bfloat16()
    quantize(model, QuantConfig(embeddings="int8" if method == "embeddings" else None),
             progress=False)  # fmt: skip
    if kbit:
        model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, other_methods()[method]).train()
    model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert trained and all(gradient is not None for gradient in trained)
    assert any(bool(gradient.any()) for gradient in trained)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_methods_that_read_the_dense_weight_say_so(changes, files):
    peft = pytest.importorskip("peft")
    with pytest.raises((TypeError, AttributeError), match="PackedWeight|no dense weight"):
        peft.get_peft_model(load(files), lora_config(**changes))


def test_masked_lora_accelerated_lora_and_sparse_coordinates(files):
    peft = pytest.importorskip("peft")
    from swkernels.integrations.peft import (
        MaskedLoraConfig,
        SparseCoordinateConfig,
        accelerate_lora,
    )

    model = peft.get_peft_model(load(files), lora_config(init_lora_weights=False)).eval()
    want = logits(model)
    report = accelerate_lora(model, strict=True)
    assert len(report.taken) == 6 and not report.left
    assert torch.allclose(logits(model), want, rtol=1e-4, atol=1e-4)
    masked = MaskedLoraConfig(
        r=4, target_modules=["down_proj"], coordinates={1: [[3, 4]]}, mask="rows",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    coordinates = SparseCoordinateConfig(coordinates=LISTED, task_type="CAUSAL_LM")
    for config in (masked, coordinates):
        model = peft.get_peft_model(load(files), config)
        assert torch.equal(logits(model), logits(load(files)))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        assert not torch.equal(logits(model), logits(load(files)))


def test_reentrant_checkpoints_and_generation(files):
    peft = pytest.importorskip("peft")
    model = load(files)
    out = model.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)
    model = peft.get_peft_model(model, lora_config(init_lora_weights=False)).train()
    ids = token_ids()
    gradients = []
    for kind in (None, True, False):
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
            model.enable_input_require_grads()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other))


# --- a real model ---


def test_smollm2(smollm2_path, tmp_path):
    """Quantized while loading, saved, loaded with equal logits, trained with LoRA, damaged."""
    peft = pytest.importorskip("peft")
    torch.set_num_threads(2)
    name = "model.layers.11.mlp.down_proj"
    config = SuperWeightQuantConfig(block_size=1024, super_weights={name: [[507, 1229]]})
    model = load(smollm2_path, config, dtype=torch.float32)
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == 210
    ids = torch.arange(100, 116)[None]
    with torch.no_grad():
        want = model(ids).logits
    folder = saved(model, tmp_path / "q")
    again = load(folder)
    assert_equal(again, model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want)
    kept = again.get_submodule(name).packed
    assert kept.positions.tolist() == [507 * 1536 + 1229]
    del model
    lora = peft.get_peft_model(again, lora_config(target_modules=["q_proj", "v_proj"]))
    losses = train(lora, 3, tmp_path / "run", rate=1e-3)
    assert losses[-1] < losses[0]
    rewrite(folder, lambda tensors: tensors[f"{name}.packed_values"].add_(1))
    with pytest.raises(InvalidInput, match=f"packed_checksum of {name} is not that"):
        load(folder)
