"""Parts of a model: which there are, what is in memory, what was read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from swkernels.detect.loading import quiet
from swkernels.errors import InvalidInput
from swkernels.models.empty import empty_model
from swkernels.models.streaming import open_stream, parts_of, stored_places
from tests.models.tiny import ARCHITECTURES, tiny_model


def streamed(folder, dtype=torch.float32):
    with quiet():
        model = empty_model(AutoConfig.from_pretrained(folder), dtype)
    return open_stream(model, stored_places(folder), "cpu", dtype)


def in_memory(model) -> set[str]:
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, weight in named if not weight.is_meta}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_part_holds_what_transformers_loads(name, tmp_path):
    with quiet():
        tiny_model(name).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        expected = loader.from_pretrained(tmp_path)
    seen = set()
    with streamed(tmp_path) as stream:
        resident = in_memory(stream.model)
        for buffer, value in stream.model.named_buffers():
            assert torch.equal(value, expected.get_buffer(buffer))
        for part, module in stream.parts.items():
            stream.use(part)
            for key, weight in module.named_parameters():
                assert torch.equal(weight, expected.get_submodule(part).get_parameter(key))
            now = in_memory(stream.model) - resident
            assert all(owner.startswith(f"{part}.") for owner in now)
            seen |= now
        stream.put_away()
        assert in_memory(stream.model) == resident
    assert seen | resident == {key for key, _ in expected.named_parameters(remove_duplicate=False)}


def test_a_cast_is_the_one_of_transformers(tmp_path):
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path)
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with streamed(tmp_path, torch.bfloat16) as stream:
        stream.use("model.layers.1")
        for key, weight in stream.parts["model.layers.1"].named_parameters():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, expected.model.layers[1].get_parameter(key))


def test_the_order_of_parts_and_the_head():
    parts, head = parts_of(tiny_model("llama"))
    assert list(parts) == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "lm_head"
    ]  # fmt: skip
    assert head == "lm_head"


def test_a_tied_head_comes_from_the_embedding(tmp_path):
    with quiet():
        model = tiny_model("llama", tie_word_embeddings=True)
        model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in stored_places(tmp_path)
    with streamed(tmp_path) as stream:
        stream.use("lm_head")
        assert torch.equal(stream.model.lm_head.weight, model.model.embed_tokens.weight)
        assert stream.model.model.embed_tokens.weight.is_meta


def test_shards_and_what_is_read_ahead(tmp_path):
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    places = stored_places(tmp_path)

    def size(prefix):
        return sum(place.bytes for name, place in places.items() if name.startswith(prefix))

    with streamed(tmp_path) as stream:
        resident = stream.bytes_read
        stream.use("model.layers.0")
        stream._ahead[1].result()
        assert stream.bytes_read - resident == size("model.layers.0.") + size("model.layers.1.")
        stream.use("model.layers.1")  # not read again
        stream._ahead[1].result()
        assert stream.bytes_read - resident == size("model.layers.")
        stream.use("model.layers.2")
        assert stream._ahead is None  # the head is read when it is called
        stream.use("model.layers.0")  # another than was read ahead
        assert torch.isfinite(stream.model.model.layers[0].mlp.down_proj.weight).all()


def test_a_tensor_in_two_files(tmp_path):
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.norm.weight"
    save_file({name: tensors[name]}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match=f"{name} twice"):
        stored_places(tmp_path)
