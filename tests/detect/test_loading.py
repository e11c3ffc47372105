"""Loading: every kind of checkpoint that is taken, and every one that is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from swkernels.detect import loading
from swkernels.errors import InvalidInput
from tests.cli.checkpoints import make_model, make_tokenizer, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(make_model(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def refused(*args, **kwargs) -> str:
    with pytest.raises(InvalidInput) as caught:
        loading.load_model(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_was_saved_is_loaded(checkpoint):
    model, tokenizer, fingerprint = loading.load_model(checkpoint, device="cpu")
    saved = make_model().state_dict()
    loaded = model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert not model.training
    assert tokenizer("the")["input_ids"] == make_tokenizer()("the")["input_ids"]
    assert fingerprint == loading.fingerprint(checkpoint)


def test_a_path_below_home(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    _, _, fingerprint = loading.load_model(f"~/{checkpoint.name}", device="cpu")
    assert fingerprint == loading.fingerprint(checkpoint)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(checkpoint, dtype):
    model, _, _ = loading.load_model(checkpoint, device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_auto_keeps_the_dtype_of_the_checkpoint(tmp_path):
    save(make_model().to(torch.bfloat16), tmp_path)
    for dtype in (None, "auto"):
        model, _, _ = loading.load_model(tmp_path, device="cpu", dtype=dtype)
        assert next(model.parameters()).dtype == torch.bfloat16


def test_sharded(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    loaded, _, before = loading.load_model(tmp_path, device="cpu")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    shards[-1].unlink()
    assert loading.fingerprint(tmp_path) != before
    assert f"{shards[-1].name} is missing" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "index.json is unreadable" in refused(tmp_path)


def test_encoder_decoder(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    save(T5ForConditionalGeneration(config), tmp_path)
    model, _, _ = loading.load_model(tmp_path, device="cpu")
    assert type(model) is T5ForConditionalGeneration


def test_fingerprint_covers_headers_and_sizes_not_values(checkpoint, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "values")
    assert loading.fingerprint(tmp_path / "values") == loading.fingerprint(checkpoint)
    make_model(intermediate_size=40).save_pretrained(tmp_path / "shapes")
    assert loading.fingerprint(tmp_path / "shapes") != loading.fingerprint(checkpoint)
    with pytest.raises(InvalidInput, match="holds no"):
        loading.fingerprint(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
def test_truncated(copy, kept):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refused(copy)
    assert str(file) in message and "download it again" in message


@pytest.mark.parametrize("damage", [b"\xff" * 8, (2).to_bytes(8, "little") + b"[]"])
def test_damaged_header(copy, damage):
    file = copy / "model.safetensors"
    file.write_bytes(damage + file.read_bytes()[len(damage) :])
    assert "not a readable safetensors file" in refused(copy)


def test_too_long(copy):
    with open(copy / "model.safetensors", "ab") as file:
        file.write(b"more")
    assert "is damaged: expected" in refused(copy)


def test_pickles_are_never_loaded(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = refused(copy)
    assert "pytorch_model.bin" in message and "save_pretrained" in message


def test_missing_parts(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    assert "holds no weights" in refused(copy)
    (copy / "config.json").unlink()
    assert "no config.json" in refused(copy)
    assert "there is no model at" in refused(str(tmp_path / "gone"))
    assert "name is empty" in refused("")
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"x")
    assert "is a file" in refused(file)


def test_bad_config(copy):
    for text, reason in (
        ("{ not json", "as JSON"),
        ("[]", "expected an object"),
        ('{"model_type": 5}', "expected a text of 0 to 256 characters at model_type, got 5"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "the key 'model_type' twice"),
        ("[" * 100_000, "nested deeper than 64"),
    ):
        (copy / "config.json").write_text(text)
        message = refused(copy)
        assert reason in message and f"{copy / 'config.json'}" in message
    (copy / "config.json").write_text('{"model_type": "no-such-type"}')
    assert f"cannot load {copy}" in refused(copy)


def test_a_name_that_is_not_there():
    message = refused("swkernels-tests/no-such-model")
    assert message.startswith("cannot load swkernels-tests/no-such-model: no such directory")


def test_weights_that_are_not_there_are_not_made_up(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights of a LlamaForCausalLM, model.layers.1.mlp.down_proj" in refused(copy)


def test_remote_code_does_not_run_unless_asked(checkpoint, copy, tmp_path):
    mark = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (copy / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}'
    )
    assert "it comes with Python code of its own; --trust-remote-code runs it" in refused(copy)
    # Of a type that transformers has, its own class is taken.
    known = json.loads((checkpoint / "config.json").read_text())
    known["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(known))
    assert type(loading.load_model(copy, device="cpu")[0]).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


def test_infinity_in_a_config_is_none_of_ours(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity],', 1))
    assert loading.source_of(copy) == (str(copy), {})


def test_an_index_on_the_hub_that_names_pickles(tmp_path, monkeypatch):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}')
    monkeypatch.setattr("transformers.utils.cached_file", lambda *_, **__: str(index))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    assert "names the file 'pytorch_model.bin': expected the plain name" in refused("some/model")


@pytest.mark.parametrize("device", ["gpu9", "cuda:99", "meta", ""])
def test_bad_devices(checkpoint, device):
    assert "device" in refused(checkpoint, device=device)


def test_bad_dtype(checkpoint):
    assert "unknown dtype 'int3': expected one of auto" in refused(checkpoint, dtype="int3")


def test_auto_device_needs_accelerate(checkpoint, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "pip install accelerate" in refused(checkpoint, device="auto")


def test_quiet_and_as_it_was(checkpoint, capfd):
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        loading.load_model(checkpoint, device="cpu")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr().err == ""


def test_gguf_is_checked_first(tmp_path, monkeypatch):
    import sys

    file = tmp_path / "model.gguf"
    file.write_bytes(b"nothing")
    assert "is not a GGUF file" in refused(file)
    file.write_bytes(b"GGUF" + bytes(60))
    assert "expected version 2 or 3, got 0" in refused(file)
    file.write_bytes(b"GGUF\x03" + bytes(19))  # no tensor and no field
    assert f"cannot load {file}" in refused(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "swkernels[gguf]" in refused(file)


def write_gguf(path, model):
    """Write a tiny Llama as llama.cpp names it, float32, with a byte-pair tokenizer of letters."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"][: config.vocab_size - 1] + ["ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # rotary pairs lie side by side
            weight = weight.view(config.num_attention_heads, 2, -1, weight.shape[1])
            weight = weight.transpose(1, 2).reshape(-1, weight.shape[-1])
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    saved = make_model()
    write_gguf(tmp_path / "a.gguf", saved)
    model, tokenizer, first = loading.load_model(tmp_path / "a.gguf", device="cpu", dtype="float32")
    weights = saved.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [
        saved.config.vocab_size - 1,
        4,
    ]
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert loading.fingerprint(tmp_path / "b.gguf") == first
    with open(tmp_path / "b.gguf", "ab") as file:
        file.write(b"more")
    assert loading.fingerprint(tmp_path / "b.gguf") != first
    half = tmp_path / "half.gguf"
    half.write_bytes((tmp_path / "a.gguf").read_bytes()[:-20000])
    assert f"{half} is not a GGUF file that can be read: a tensor begins" in refused(half)
    half.write_bytes((tmp_path / "a.gguf").read_bytes()[:-2000])
    assert f"cannot load {half}" in refused(half)
