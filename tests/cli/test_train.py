"""``swkernels train``, from the command line to the adapter."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from swkernels.cli import app, main
from swkernels.detect import loading
from swkernels.train import Coordinates, loop, sparse
from tests.cli.checkpoints import TEXT, VOCABULARY, make_model, make_tokenizer, save
from tests.detect import fake_report

FILES = ["adapter.safetensors", "coordinates.json", "loss.png", "train.json"]
SMALL = ["--length", "16", "--batch-size", "2", "--steps", "6", "--lr", "0.01", "--device", "cpu"]
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save(make_model(), tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT * 20, encoding="utf-8")
    return str(path)


@pytest.fixture
def go(checkpoint, text):
    def go(output, *more, choice=("--random", "40"), data=text, model=checkpoint):
        given = ["train", model, "--data", data, *choice, *SMALL, "--output", output, *more]
        return main([str(word) for word in given])

    return go


def document(output) -> dict:
    return json.loads((output / "train.json").read_text())


def test_from_a_name_to_an_adapter(go, checkpoint, tmp_path, text, capfd):
    out = tmp_path / "deep" / "out"
    assert go(out, "--eval-data", text, "--export", "lora", "--export", "checkpoint") == 0
    assert {p.name for p in out.iterdir()} == {*FILES, "checkpoint", "lora"}
    found = document(out)
    assert found["coordinates"] == 40 and found["settings"]["steps"] == 6
    assert len(found["losses"]) == 6
    before, after = found["evaluation"]
    assert after < before and found["largest_delta"] > 0
    assert found["seconds"] >= 6 * found["seconds_per_step"] > 0
    assert {"swkernels", "python", "torch", "transformers"} == set(found["versions"])
    printed, progress = capfd.readouterr()
    assert "step 6 of 6: loss" in progress and "step" not in printed.split("\n")[1]
    assert printed.startswith("loss ") and "40 values in 2 weight matrices" in printed
    assert f"largest |delta| {found['largest_delta']:.3g}" in printed
    assert "seconds per step" in printed
    assert f"loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f} in 6 steps" in printed
    assert str(out / "adapter.safetensors") in printed and str(out / "lora") in printed

    ids = torch.arange(12)[None]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    handle = sparse(model, Coordinates.load(out / "coordinates.json"))
    handle.load(out / "adapter.safetensors")
    trained = model(ids).logits
    exported = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert torch.allclose(exported(ids).logits, trained, atol=1e-5)
    peft = pytest.importorskip("peft", reason="needs peft")
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = peft.PeftModel.from_pretrained(base, out / "lora")
    assert torch.allclose(adapted(ids).logits, trained, atol=1e-5)


def coordinates() -> Coordinates:
    return Coordinates.of({NAME: [[3, 4], [5, 6]]}, {NAME: (32, 48)})


def test_coordinates_of_a_file_and_their_neighbourhood(go, tmp_path):
    path = tmp_path / "c.json"
    coordinates().save(path)
    assert go(tmp_path / "a", choice=("--coordinates", path)) == 0
    assert Coordinates.load(tmp_path / "a" / "coordinates.json") == coordinates()
    path = tmp_path / "c.safetensors"
    coordinates().save(path)
    assert go(tmp_path / "b", "--neighborhood", "1", choice=("--coordinates", path)) == 0
    found = Coordinates.load(tmp_path / "b" / "coordinates.json")
    assert found == coordinates().neighborhood(1)


def test_the_largest_weights(go, checkpoint, tmp_path):
    assert go(tmp_path / "a", choice=("--magnitude", "9")) == 0
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    found = Coordinates.load(tmp_path / "a" / "coordinates.json")
    assert found == Coordinates.from_magnitude(model, 9)


def test_a_report_names_them(go, tmp_path, capfd):
    found = fake_report.candidate(0, 1, 3, 4, "super weight", 9.0)
    report = fake_report.report([found], layers=2, shape=(32, 48))
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert go(tmp_path / "a", choice=("--coordinates", path)) == 0
    found = Coordinates.load(tmp_path / "a" / "coordinates.json")
    assert found == Coordinates.of({NAME: [[3, 4]]}, {NAME: (32, 48)})
    path.write_text('{"schema": "of another time"}')
    assert go(tmp_path / "b", choice=("--coordinates", path)) == 2
    assert "of another time" in capfd.readouterr().err


def test_the_catalogue_names_them(go, tmp_path, monkeypatch):
    def from_catalogue(name, model):
        assert name == "a-model" and isinstance(model, torch.nn.Module)
        return coordinates()

    monkeypatch.setattr(Coordinates, "from_catalogue", from_catalogue)
    assert go(tmp_path / "a", choice=("--catalogue", "a-model")) == 0
    assert Coordinates.load(tmp_path / "a" / "coordinates.json") == coordinates()


def test_prompts_and_completions(go, tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "the weight of", "completion": "a model"}
    path.write_text("\n".join([json.dumps(pair)] * 5))
    assert go(tmp_path / "a", data=path) == 0
    assert document(tmp_path / "a")["sequences"] == 5


def interrupt(monkeypatch, after: int):
    real = loop._step
    calls = []

    def step(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "_step", step)


def test_interrupted_it_goes_on_bit_for_bit(go, tmp_path, monkeypatch, capfd):
    assert go(tmp_path / "whole") == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        assert go(out) == 130
    assert [p.name for p in out.iterdir()] == ["state.safetensors"]
    before = (out / "state.safetensors").read_bytes()
    assert f"{out / 'state.safetensors'} keeps every step done" in capfd.readouterr().err
    assert go(out) == 2
    assert "give --resume" in capfd.readouterr().err
    assert go(out, "--resume", "--lr", "0.02") == 2
    assert "another learning_rate" in capfd.readouterr().err
    assert (out / "state.safetensors").read_bytes() == before
    assert go(out, "--resume") == 0
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert document(out)["losses"] == document(tmp_path / "whole")["losses"]
    whole = load_file(tmp_path / "whole" / "adapter.safetensors")
    resumed = load_file(out / "adapter.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_what_fails_after_training_is_not_trained_again(go, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    (out / "checkpoint").mkdir(parents=True)
    (out / "checkpoint" / "mine.txt").write_text("not a model")
    assert go(out, "--export", "checkpoint") == 2
    assert "choose another folder" in capfd.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint", "state.safetensors"]
    monkeypatch.setattr(loop, "_step", None)
    assert go(out, "--resume") == 0
    assert len(document(out)["losses"]) == 6 and document(out)["seconds_per_step"] is None
    assert not (out / "state.safetensors").exists()


def gpt2(positions: int = 64):
    sizes = dict(n_positions=positions, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes))


def t5():
    sizes = dict(d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))


@pytest.mark.parametrize(
    ("make", "more", "message"),
    [
        (lambda: gpt2(positions=8), (), "16 tokens do not fit the 8 positions of GPT2LMHeadModel"),
        (t5, (), "T5ForConditionalGeneration is an encoder and a decoder"),
        (lambda: make_model(vocab_size=5), (), "outside the model's vocabulary of 5"),
        (gpt2, ("--export", "lora"), "transposed (Conv1D): export a checkpoint instead"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_a_step(
    tmp_path, go, make, more, message, capfd, monkeypatch
):
    monkeypatch.setattr(loop, "fit", None)
    assert go(tmp_path / "out", *more, model=save(make(), tmp_path / "model")) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_lora_of_too_large_a_rank_is_refused_before_a_step(tmp_path, go, capfd, monkeypatch):
    monkeypatch.setattr(loop, "fit", None)
    model = save(make_model(hidden_size=80, intermediate_size=96), tmp_path / "model")
    assert go(tmp_path / "out", "--export", "lora", model=model, choice=("--random", 6000)) == 2
    assert "more than max_rank = 64" in capfd.readouterr().err


def test_a_model_without_checkpointing(tmp_path, go, capfd, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    assert go(tmp_path / "out", "--checkpointing") == 2
    assert "leave out --checkpointing" in capfd.readouterr().err


def test_memory_can_be_saved(go, tmp_path, monkeypatch):
    calls, real = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *args: (calls.append(1), real(*args))[1])
    assert go(tmp_path / "a") == 0
    once = len(calls)
    assert go(tmp_path / "b", "--checkpointing") == 0
    assert len(calls) - once == 2 * once  # computed again in the backward
    assert document(tmp_path / "b")["losses"] == pytest.approx(document(tmp_path / "a")["losses"])


@pytest.mark.parametrize(
    ("choice", "more", "message"),
    [
        (("--random", "4"), ("--epochs", "2"), "--steps and --epochs exclude each other"),
        (("--random", "4"), ("--neighborhood", "-1"), "at least 0, got -1"),
        (("--random", "4"), ("--data", "gone.txt"), "gone.txt"),
        ((), (), "expected one of --coordinates, --catalogue, --magnitude, --random"),
        (("--random", "4", "--magnitude", "4"), (), "got --magnitude, --random"),
        (("--random", "4"), ("--resume",), "no interrupted run"),
        (("--random", "4"), ("--export", "gguf"), "lora or checkpoint, got gguf"),
        (("--random", "4"), ("--optimizer", "sgd"), "adamw, adafactor"),
        (("--random", "4"), ("--length", "1"), "at least 2"),
        (("--random", "4"), ("--eval-data", "gone.txt"), "gone.txt"),
        (("--coordinates", "gone.json"), (), "gone.json"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(
    go, tmp_path, capfd, monkeypatch, choice, more, message
):
    monkeypatch.setattr(loading, "load_model", None)
    assert go(tmp_path / "out", *more, choice=choice) == 2
    error = capfd.readouterr().err
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1
    assert message in error.replace("\n", " ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("--random", "0"), "expected k from 1"),
        (("--catalogue", "tiny-model-of-nobody"), "tiny-model-of-nobody"),
    ],
)
def test_wrong_choices_write_nothing(go, tmp_path, capfd, choice, message):
    assert go(tmp_path / "out", choice=choice) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("swkernels: error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_shown_defaults_are_those_of_the_loop():
    options = typer.main.get_command(app).commands["train"].params
    shown = {option.name: option.show_default for option in options}
    defaults = vars(loop.Settings())
    for name in defaults.keys() - {"steps", "optimizer"}:
        assert float(shown[name]) == defaults[name], name
    assert shown["optimizer"] == defaults["optimizer"] and defaults["steps"] is None
    assert shown["steps"] == "what --epochs takes"


def test_a_tokenizer_without_eos(text, tmp_path):
    folder = save(make_model(), tmp_path / "model", make_tokenizer(eos=False))
    given = ["train", folder, "--data", text, "--random", "4", *SMALL, "-o", tmp_path / "out"]
    assert main([str(word) for word in given]) == 0
