"""A scan layer by layer gives the report of the scan in memory, whatever the architecture."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import swkernels
from swkernels.detect import streamed
from swkernels.detect.loading import load_model, quiet
from swkernels.detect.streamed import scan_stream
from swkernels.errors import InvalidInput, NonFiniteActivation, SwkernelsError
from swkernels.models import streaming
from tests.cli.checkpoints import TEXT, files, make_model
from tests.cli.checkpoints import plant as plant_in_checkpoint
from tests.cli.checkpoints import save as save_checkpoint
from tests.detect.planting import plant, positions
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids

# Low thresholds: random models have candidates, sets and verdicts too.
LOOSE = dict(
    prominence=1.5, share=0.01, batch_size=2, max_candidates=4, methods=("dominance", "outlier"),
    outlier_gamma=2.0, eval_tokens=60, eval_length=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    model = make_model(initializer_range=0.3)
    plant_in_checkpoint(model)
    return save_checkpoint(model, tmp_path_factory.mktemp("planted"))


def saved(model, folder):
    with quiet():
        model.save_pretrained(folder)
    return folder


def loaded(folder):
    with quiet():
        config = AutoConfig.from_pretrained(folder)
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return loader.from_pretrained(folder)


def comparable(report) -> dict:
    data = dict(report.to_dict())
    del data["created"], data["model"]
    return data


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_report_is_the_one_of_a_scan_in_memory(name, tmp_path):
    folder = saved(tiny_model(name), tmp_path)
    expected = swkernels.scan(loaded(folder), token_ids(5, 24), **LOOSE)
    found = scan_stream(folder, token_ids(5, 24), device="cpu", budget=0, spill=tmp_path, **LOOSE)
    assert comparable(found) == comparable(expected)
    assert name == "phi3" or found.candidates  # phi3's spikes are not by one weight
    assert found.data["model"]["streamed"]["hidden_spilled"] > 0


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_planted_set_is_found_and_proven(name, tmp_path):
    model = tiny_model(name)
    truth = plant(model, layer=1, rows=3, columns=2, seed=3)
    folder = saved(model, tmp_path)
    ids = token_ids(4, 48, seed=5)
    found = scan_stream(folder, ids, device="cpu", eval_length=48)
    assert positions(found.candidates) == truth
    assert comparable(found) == comparable(swkernels.scan(loaded(folder), ids, eval_length=48))


def test_samples_of_several_lengths(tmp_path):
    folder = saved(tiny_model("llama"), tmp_path)
    samples = [row[:length] for row, length in zip(token_ids(5, 24), (24, 24, 7, 7, 24))]
    found = scan_stream(folder, samples, device="cpu", **LOOSE)
    assert comparable(found) == comparable(swkernels.scan(loaded(folder), samples, **LOOSE))


def test_the_model_as_the_command_loads_it_and_its_text(planted):
    settings = dict(samples=3, length=20, eval_tokens=40, eval_length=20)
    model, tokenizer, fingerprint = load_model(planted, device="cpu")
    expected = swkernels.scan(model, TEXT * 6, tokenizer=tokenizer, **settings)
    found = scan_stream(planted, TEXT * 6, device="cpu", **settings)
    assert comparable(found) == comparable(expected)
    assert found.candidates and found.data["model"]["fingerprint"] == fingerprint
    assert found.data["model"]["dtype"] == expected.data["model"]["dtype"]
    assert found.data["model"]["device"] == "cpu"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(planted, dtype):
    settings = dict(samples=3, length=20, verify=False)
    model, tokenizer, _ = load_model(planted, device="cpu", dtype=dtype)
    expected = swkernels.scan(model, TEXT * 6, tokenizer=tokenizer, **settings)
    found = scan_stream(planted, TEXT * 6, device="cpu", dtype=dtype, **settings)
    assert comparable(found) == comparable(expected)


def test_each_weight_is_read_once_however_many_samples(tmp_path):
    folder = saved(tiny_model("mistral"), tmp_path)
    places = streaming.stored_places(folder)
    size = sum(place.bytes for name, place in places.items() if name != "lm_head.weight")
    for samples in (1, 6):
        found = scan_stream(folder, token_ids(samples, 24), device="cpu", verify=False)
        assert found.data["model"]["streamed"]["bytes_read"] == size


def test_verification_reads_the_weights_once_a_round(tmp_path, monkeypatch):
    model = tiny_model("llama")
    plant(model, layer=1, rows=2, columns=2, seed=3)
    folder = saved(model, tmp_path)
    size = sum(place.bytes for place in streaming.stored_places(folder).values())
    rounds = []
    fill = streamed.StreamedEvaluator._fill

    def counted(self, sets, progress):
        before = self._stream.bytes_read
        fill(self, sets, progress)
        rounds.append((len(sets), self._stream.bytes_read - before))

    monkeypatch.setattr(streamed.StreamedEvaluator, "_fill", counted)
    scan_stream(folder, token_ids(4, 48, seed=5), device="cpu", eval_length=48)
    assert max(count for count, _ in rounds) >= 8
    assert all(read <= size for _, read in rounds)


def test_blocks_that_talk_behind_the_model_are_run_in_full(tmp_path, monkeypatch):
    """A run that starts late would miss what the earlier blocks have left elsewhere."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def talking(self, hidden_states, *args, **kwargs):
        note = kwargs["position_embeddings"][0]  # one object in all of a forward
        note.passed = getattr(note, "passed", set()) | {id(self)}
        return forward(self, hidden_states + 0.01 * len(note.passed), *args, **kwargs)

    model = tiny_model("llama", num_hidden_layers=4)
    plant(model, layer=2, seed=3)
    folder = saved(model, tmp_path)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", talking)
    ids, settings = token_ids(4, 48, seed=5), dict(eval_length=48)
    expected = swkernels.scan(loaded(folder), ids, **settings)
    assert expected.candidates
    found = scan_stream(folder, ids, device="cpu", **settings)
    assert comparable(found) == comparable(expected)


def test_nothing_is_left_behind_after_an_error(tmp_path):
    folder = saved(tiny_model("llama"), tmp_path / "model")
    spill = tmp_path / "spill"
    spill.mkdir()
    before, threads = files(folder), threading.active_count()

    def stop(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_stream(folder, token_ids(3, 24), device="cpu", budget=0, spill=spill, progress=stop)
    assert files(folder) == before and list(spill.iterdir()) == []
    assert threading.active_count() == threads


def test_infinite_activations_are_named(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    folder = saved(model, tmp_path)
    with pytest.raises(NonFiniteActivation, match="layer 1"):
        scan_stream(folder, token_ids(2, 24), device="cpu", verify=False)


def test_a_missing_weight(tmp_path):
    folder = saved(tiny_model("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match="model.layers.1.mlp.up_proj.weight"):
        scan_stream(folder, token_ids(2, 24), device="cpu", verify=False)
    for name in list(tensors):
        if ".layers.1." in name:
            del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match="no weights of model.layers.1"):
        scan_stream(folder, token_ids(2, 24), device="cpu", verify=False)


def test_another_shape_than_the_configuration_says(tmp_path):
    folder = saved(tiny_model("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="do not belong together"):
        scan_stream(folder, token_ids(2, 24), device="cpu", verify=False)


def test_a_shard_that_is_cut_or_removed_while_it_is_read(tmp_path):
    for change in ("cut", "removed"):
        folder = tmp_path / change
        with quiet():
            tiny_model("llama").save_pretrained(folder, max_shard_size="30KB")
        shard = sorted(folder.glob("*.safetensors"))[-2]

        def spoil(stage, done, total, shard=shard, change=change):
            if change == "cut":
                with open(shard, "r+b") as file:
                    file.truncate(shard.stat().st_size // 2)
            else:
                shard.unlink(missing_ok=True)

        with pytest.raises(InvalidInput, match=shard.name):
            scan_stream(
                folder, token_ids(2, 24), device="cpu", eval_length=24, progress=spoil, **NAMED
            )


NAMED = dict(prominence=1.5, share=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "auto"}, "one device"),
        ({"device": "cpu", "budget": -1}, "budget"),
        ({"device": "cpu", "spill": "/nowhere"}, "no folder /nowhere"),
        ({"device": "cpu", "dtype": "int3"}, "unknown dtype"),
    ],
)
def test_options_that_cannot_be(planted, options, message):
    with pytest.raises(InvalidInput, match=message):
        scan_stream(planted, token_ids(1, 8), **options)


def test_sources_that_cannot_be(planted, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(InvalidInput, match="in memory"):
        scan_stream(gguf, token_ids(1, 8), device="cpu")
    with pytest.raises(InvalidInput, match="no such file or folder"):
        scan_stream(tmp_path / "nothing", token_ids(1, 8), device="cpu")
    folder = saved(tiny_model("llama"), tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="quantized"):
        scan_stream(folder, token_ids(1, 8), device="cpu")
    plain = saved(tiny_model("llama"), tmp_path / "plain")
    with pytest.raises(InvalidInput, match="tokenizer"):
        scan_stream(plain, "a text without a tokenizer", device="cpu")


@pytest.mark.parametrize("library", ["accelerate", "greenlet"])
def test_a_library_that_is_not_there(planted, monkeypatch, library):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(SwkernelsError, match=rf"{library}.*swkernels\[stream\]"):
        scan_stream(planted, token_ids(1, 8, seed=1).clamp(max=10), device="cpu")
