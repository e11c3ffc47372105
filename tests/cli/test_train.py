"""``swkernels train``, from the command line to the adapter."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swkernels.cli import main
from swkernels.cli.train import train
from swkernels.train import Coordinates, loop, sparse
from tests.cli.checkpoints import TEXT, make_model, make_tokenizer, save

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
    def go(output, *more, choice=("--random", "40"), data=text):
        given = ["train", checkpoint, "--data", data, *choice, *SMALL, "--output", output, *more]
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
    printed = capfd.readouterr().out
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


def test_a_report_names_them(go, tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"schema": "of another time"}')
    assert go(tmp_path / "a", choice=("--coordinates", path)) == 2


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
    capfd.readouterr()
    assert go(out) == 2
    assert "give --resume" in capfd.readouterr().err
    assert go(out, "--resume", "--lr", "0.02") == 2
    assert "learning_rate differ" in capfd.readouterr().err
    assert (out / "state.safetensors").read_bytes() == before
    assert go(out, "--resume") == 0
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert document(out)["losses"] == document(tmp_path / "whole")["losses"]
    whole = load_file(tmp_path / "whole" / "adapter.safetensors")
    resumed = load_file(out / "adapter.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_memory_can_be_saved(go, tmp_path):
    assert go(tmp_path / "a") == 0 and go(tmp_path / "b", "--checkpointing") == 0
    assert document(tmp_path / "b")["losses"] == pytest.approx(document(tmp_path / "a")["losses"])


@pytest.mark.parametrize(
    ("choice", "more", "message"),
    [
        ((), (), "expected one of --coordinates, --catalogue, --magnitude, --random"),
        (("--random", "4", "--magnitude", "4"), (), "got --magnitude, --random"),
        (("--random", "0"), (), "expected k from 1"),
        (("--random", "4"), ("--resume",), "no interrupted run"),
        (("--random", "4"), ("--export", "gguf"), "lora or checkpoint, got gguf"),
        (("--random", "4"), ("--optimizer", "sgd"), "adamw, adafactor"),
        (("--random", "4"), ("--length", "1"), "at least 2"),
        (("--random", "4"), ("--eval-data", "gone.txt"), "gone.txt"),
        (("--coordinates", "gone.json"), (), "gone.json"),
        (("--catalogue", "tiny-model-of-nobody"), (), "tiny-model-of-nobody"),
    ],
)
def test_wrong_options_write_nothing(go, tmp_path, capfd, choice, more, message):
    assert go(tmp_path / "out", *more, choice=choice) == 2
    error = capfd.readouterr().err
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1
    assert message in error.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_the_defaults_that_help_shows_are_those_that_are_used():
    parameters = inspect.signature(train).parameters
    for name, value in vars(loop.Settings()).items():
        parameter = parameters[name]
        assert parameter.default is None
        shown = parameter.annotation.__metadata__[0].show_default if hasattr(
            parameter.annotation, "__metadata__") else None  # fmt: skip
        if value is not None and shown is not None:
            assert float(shown) == value if shown[0].isdigit() else shown == value


def test_a_tokenizer_without_eos(text, tmp_path):
    folder = save(make_model(), tmp_path / "model", make_tokenizer(eos=False))
    given = ["train", folder, "--data", text, "--random", "4", *SMALL, "-o", tmp_path / "out"]
    assert main([str(word) for word in given]) == 0
