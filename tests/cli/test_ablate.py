"""``swkernels ablate``: a thin caller of ``swkernels.evidence.ablate``."""

from __future__ import annotations

import inspect
import json

import pytest

from swkernels.cli import ablate as command
from swkernels.cli import main
from swkernels.detect.perplexity import perplexity, tokens_of
from swkernels.evidence.ablate import ablate
from tests.cli.checkpoints import TEXT, files, make_model, make_tokenizer, plant

QUESTIONS = [
    {"context": "the weight of", "choices": ["a model", "two python", "in ."], "answer": n % 3}
    for n in range(4)
]


@pytest.fixture
def go(planted, short_text):
    def go(*options):
        options = ("--text", short_text, "--window", 32, "--device", "cpu", *options)
        return main(["ablate", str(planted), *map(str, options)])

    return go


def test_all_of_it(go, planted, tmp_path, capfd):
    before = files(planted)
    task = tmp_path / "words.jsonl"
    task.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    options = ["--weights", "1:5:7", "--weights", "1:3:4", "--restore-activation", "--controls", 2]
    options += ["--stop-words", "--task", task, "-o", tmp_path / "out"]
    assert go(*options) == 0
    assert files(planted) == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ablate.json", "ablate.png"]
    found = json.loads((tmp_path / "out" / "ablate.json").read_text())
    printed, error = capfd.readouterr()
    assert error == "" and str(tmp_path / "out" / "ablate.png") in printed
    assert found["model"] == str(planted) and found["measures"]["tasks"][0]["items"] == 4
    labels = [c["label"] for c in found["conditions"]]
    assert labels == [
        "intact", "all together", "all together, activation restored", "layer 1 [3, 4]",
        "layer 1 [5, 7]", "all but layer 1 [3, 4]", "all but layer 1 [5, 7]", "random 1",
        "random 2", "equal magnitude 1", "equal magnitude 2",
    ]  # fmt: skip
    assert all(label.split(",")[0] in printed for label in labels)
    assert found["summary"] in " ".join(printed.split())

    model = make_model(initializer_range=0.3)
    plant(model)
    tokens = tokens_of(TEXT * 6, make_tokenizer())
    intact = perplexity(model, tokens, window=32)
    model.model.layers[1].mlp.down_proj.weight.data[5, 7] = 0
    gone = found["conditions"][4]
    expected = perplexity(model, tokens, window=32)
    assert gone["scores"]["perplexity"]["losses"] == list(expected.losses)
    assert gone["ratio"] == pytest.approx(expected.value / intact.value)
    assert set(gone["changes"]) == {"words"} and "the" in gone["stop_words"]
    assert f"{expected.value:.4g}" in printed and f"{intact.value:.4g}" in printed


def test_chosen_conditions(go, tmp_path):
    options = ["--weights", "1:5:7", "--conditions", "set, random", "--controls", 1, "--tokens", 40]
    assert go(*options, "-o", tmp_path) == 0
    found = json.loads((tmp_path / "ablate.json").read_text())
    assert [c["kind"] for c in found["conditions"]] == ["intact", "set", "random"]
    assert found["measures"]["stop_words"] == [] and found["activations"] == []


def test_defaults_are_those_of_the_function():
    ours = inspect.signature(command).parameters
    for name in ("controls", "conditions", "restore_activation", "seed"):
        assert ours[name].default == inspect.signature(ablate).parameters[name].default


@pytest.mark.parametrize(
    "options, words",
    [
        (["--conditions", "set,some"], "unknown condition 'some'"),
        (["--conditions", ""], "unknown condition ''"),
        (["--controls", "-1"], "--controls must be at least 0, got -1"),
        (["--weights", "9:0:0"], "layer 9"),
        (["--weights", "1:99:0"], "outside"),
        (["--weights", "catalogue"], "the catalogue has no"),
        (["--no-text"], "exclude each other"),
        (["--no-text", "--stop-words"], "--stop-words and --no-text exclude each other"),
    ],
)
def test_errors_are_one_line_and_write_nothing(go, planted, tmp_path, capfd, options, words):
    before = files(planted)
    options = options if "--weights" in options else ["--weights", "1:5:7", *options]
    assert go(*options, "-o", tmp_path / "a" / "b") == 2
    printed, error = capfd.readouterr()
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir()) and files(planted) == before


def test_weights_are_asked_for(planted, capfd):
    assert main(["ablate", str(planted)]) == 2
    assert "--weights" in capfd.readouterr().err
