"""``swkernels eval``: the figures are those of three models measured by hand."""

from __future__ import annotations

import json
import math
import random
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import swkernels
from swkernels.backends.plan import Clip
from swkernels.cli import inputs, main
from swkernels.detect import loading
from swkernels.detect.perplexity import perplexity, tokens_of
from swkernels.detect.text import DEFAULT_SOURCE
from swkernels.evidence.choices import RULES, score_choices
from swkernels.evidence.evaluate import interval
from swkernels.evidence.tasks import read_task
from swkernels.quant import QuantConfig
from swkernels.train import Coordinates
from tests.cli.checkpoints import BOS, TEXT, WORDS, make_model, make_tokenizer, plant, save

NAME = "model.layers.1.mlp.down_proj"
SETTINGS = ["--block", "tensor", "--clip", "zscore=5", "--largest", "2"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    model = make_model(initializer_range=0.3)
    plant(model)
    return save(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def out(original, tmp_path_factory):
    """The model quantized with its planted weight kept."""
    folder = tmp_path_factory.mktemp("quantized")
    path = folder / "c.json"
    Coordinates.of({NAME: [[5, 7]]}, {NAME: (32, 48)}).save(path)
    options = [*SETTINGS, "--super-weights", path, "-o", folder / "out", "--device", "cpu"]
    assert main(["quantize", str(original), *map(str, options)]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT * 20, encoding="utf-8")
    return path


@pytest.fixture
def go(out, text):
    def go(*options, model=out):
        options = ("--device", "cpu", *options)
        options += () if "--text" in options else ("--text", text)
        return main(["eval", str(model), *map(str, options)])

    return go


@pytest.fixture
def fail(go, capfd, tmp_path):
    """Run what must fail in one line, with code 2 and nothing written; return the line."""

    def run(*options, **changes) -> str:
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        assert go(*options, "-o", tmp_path / "deep" / "e.json", **changes) == 2
        assert sorted(tmp_path.rglob("*")) == before
        error = capfd.readouterr().err
        assert error.startswith("swkernels: error: ") and error.count("\n") == 1, error
        return error

    return run


def document(path) -> dict:
    return json.loads(path.read_text())


def models(original, out):
    """The three models, made without the command."""
    plain = AutoModelForCausalLM.from_pretrained(original)
    swkernels.quantize(plain, QuantConfig(block_size="tensor"))
    return {
        "quantized": inputs.load_model(str(out), device="cpu")[0],
        "original": AutoModelForCausalLM.from_pretrained(original),
        "round to nearest": plain,
    }


def test_side_by_side(go, out, original, text, tmp_path, capfd):
    path = tmp_path / "a" / "e.json"
    assert go("--window", 64, "-o", path) == 0
    found = document(path)
    printed, error = capfd.readouterr()
    ids = tokens_of(TEXT * 20, make_tokenizer())
    expected = {n: perplexity(m, ids, window=64) for n, m in models(original, out).items()}
    assert [entry["which"] for entry in found["results"]] == list(expected)
    for entry, one in zip(found["results"], expected.values()):
        assert entry["losses"] == list(one.losses) and entry["tokens"] == list(one.tokens)
        assert (entry["perplexity"], entry["error"]) == (one.value, one.error)
        assert entry["interval"] == list(interval(one))
        assert entry["ratio_interval"] == list(interval(one, expected["original"]))
        assert [entry["ratio"], entry["ratio_error"]] == list(one.ratio(expected["original"]))
    assert len({entry["perplexity"] for entry in found["results"]}) == 3
    sizes = [entry["bytes"] for entry in found["results"]]
    assert sizes[2] < sizes[0] < sizes[1]

    assert found["schema"] == "swkernels.eval/2"
    assert (found["model"], found["original"]) == (str(out), str(original))
    config = QuantConfig(block_size="tensor", clip=Clip("zscore", 5), largest=2)
    assert QuantConfig.from_dict(found["config"]) == config
    assert found["text"] == str(text) and found["tokens"] == len(ids)
    assert found["against"] == "original" and found["prefix"] is None

    assert error == "" and printed.endswith(f"{path}\n")
    for name, one in expected.items():
        assert name in printed and f"{one.value:.5g} ± {one.error:.2g}" in printed
    predicted = sum(expected["original"].tokens)
    windows = len(expected["original"].tokens)
    assert f"{predicted} predicted tokens of {text}, in {windows} windows of 64" in printed
    assert "under-reports" not in printed and "alone" not in printed


def test_twice_gives_the_same_file(go, tmp_path):
    for name in ("a", "b"):
        assert go("-o", tmp_path / name) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_options_reach_the_measurement(go, tmp_path):
    options = ["--tokens", 100, "--window", 32, "--stride", 16, "--batch-size", 3, "--alone"]
    assert go(*options, "-o", tmp_path / "e.json") == 0
    found = document(tmp_path / "e.json")
    [entry] = found["results"]
    assert found["tokens"] == 100 and sum(entry["tokens"]) == 99
    assert (entry["window"], entry["stride"]) == (32, 16)
    assert entry["which"] == "quantized" and entry["ratio"] is None and found["original"] is None


def test_no_files_without_output(go, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert go("--alone") == 0
    assert not list(tmp_path.iterdir())


def test_the_built_in_text(out, capfd, tmp_path):
    options = ["--tokens", "300", "--alone", "--device", "cpu", "-o", str(tmp_path / "e.json")]
    assert main(["eval", str(out), *options]) == 0
    assert "The built-in text under-reports damage" in capfd.readouterr().out
    assert document(tmp_path / "e.json")["text"] == DEFAULT_SOURCE


def test_the_original_that_is_named(go, original, tmp_path, capfd):
    other = save(make_model(initializer_range=0.2), tmp_path / "other")
    assert go("--against", other, "-o", tmp_path / "e.json") == 0
    found = document(tmp_path / "e.json")
    ids = tokens_of(TEXT * 20, make_tokenizer())
    expected = perplexity(AutoModelForCausalLM.from_pretrained(other), ids)
    assert found["results"][1]["perplexity"] == expected.value
    assert found["original"] == str(other)


def moved(out, folder, change=lambda source: None):
    """A copy of OUT whose report says something else of the original."""
    import shutil

    shutil.copytree(out, folder)
    path = folder / "quantize_report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    return folder


def test_an_original_that_is_gone(go, out, tmp_path, capfd):
    gone = str(tmp_path / "gone")
    folder = moved(out, tmp_path / "out", lambda r: r["source"].update(model=gone))
    assert go(model=folder) == 0
    printed = capfd.readouterr().out
    assert "--against names it" in printed and "round to nearest" not in printed
    (folder / "quantize_report.json").unlink()
    assert go(model=folder) == 0
    assert "--against names it" in capfd.readouterr().out


def test_an_original_that_changed(fail, go, out, original, tmp_path, unloaded):
    other = save(make_model(num_hidden_layers=1), tmp_path / "other")
    folder = moved(out, tmp_path / "out", lambda r: r["source"].update(model=str(other)))
    assert "is not the model any more that was quantized" in fail(model=folder)


def test_a_damaged_report(fail, out, tmp_path, unloaded):
    folder = moved(out, tmp_path / "out", lambda r: r.pop("source"))
    assert "does not say what was quantized" in fail(model=folder)
    (folder / "quantize_report.json").write_text("{")
    assert "cannot read" in fail(model=folder)


def test_a_model_that_is_not_quantized(go, original, tmp_path, capfd):
    assert go(model=original) == 0
    printed = capfd.readouterr().out
    assert "model" in printed and "x original" not in printed and "against" not in printed
    assert go("--against", original, "-o", tmp_path / "e.json", model=original) == 0
    results = document(tmp_path / "e.json")["results"]
    assert [entry["which"] for entry in results] == ["model", "original"]
    assert (results[0]["ratio"], results[0]["ratio_error"]) == (1.0, 0.0)


def test_one_window_has_no_error(go, tmp_path, capfd):
    assert go("--tokens", 20, "-o", tmp_path / "e.json") == 0
    assert document(tmp_path / "e.json")["results"][0]["error"] is None
    assert "±" not in capfd.readouterr().out


@pytest.fixture
def unloaded(monkeypatch):
    """Fail where a model is loaded."""
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", 1], "--tokens must be at least 2, got 1"),
        (["--window", 1], "--window must be at least 2, got 1"),
        (["--stride", 0], "--stride must be at least 1, got 0"),
        (["--window", 8, "--stride", 9], "--stride must be at most the window of 8, got 9"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--alone", "--against", "x"], "exclude each other"),
        (["--rolling", "--no-text"], "exclude each other"),
        (["--limit", 0], "--limit must be at least 1, got 0"),
        (["--task", "gone.jsonl"], "cannot read the task gone.jsonl"),
        (["--against", "./gone"], "there is no model"),
        (["--device", "gpu9"], "unknown device 'gpu9'"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--text", "gone.txt"], "cannot read the text gone.txt"),
        (["--bogus"], "No such option"),
    ],
)
def test_bad_options_are_refused_before_a_model_loads(fail, unloaded, options, message):
    assert message in fail(*options)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Questions of random words."""
    draw, path = random.Random(1), tmp_path_factory.mktemp("task") / "words.jsonl"
    rows = [
        {
            "context": " ".join(draw.choices(WORDS, k=4)),
            "choices": [" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(3)],
            "answer": draw.randrange(3),
        }
        for _ in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tasks(go, out, original, task, tmp_path, capfd):
    assert go("--task", task, "--window", 64, "-o", tmp_path / "e.json") == 0
    printed, found = capfd.readouterr().out, document(tmp_path / "e.json")
    read = read_task(task)
    expected = {
        name: score_choices(model, make_tokenizer(), read)
        for name, model in models(original, out).items()
    }
    assert [entry["which"] for entry in found["results"]] == list(expected)
    for entry, one in zip(found["results"], expected.values()):
        scores = entry["choices"]["words"]
        assert scores["log_likelihoods"] == [list(sums) for sums in one.log_likelihoods]
        assert scores["accuracy"] == one.accuracy and scores["interval"] == list(one.interval)
        assert scores["accuracies"] == {rule: one.accuracy_by(rule) for rule in RULES}
        compared = one.compare(expected["original"])
        assert scores["compared"]["difference"] == compared.difference
        assert scores["compared"]["interval"] == list(compared.interval)
    accuracies = {entry["choices"]["words"]["accuracy"] for entry in found["results"]}
    assert len(accuracies) > 1, "the models cannot be told apart"
    low, high = expected["quantized"].interval
    row = f"quantized +{expected['quantized'].accuracy:.2%} +\\[{low:.2%}, {high:.2%}\\]"
    assert re.search(rf"words +perplexity +{row}", printed)
    assert found["tasks"] == [{"name": "words", "source": str(task), "items": 24}]


def test_tasks_alone(go, task, tmp_path, capfd, original):
    options = ["eval", str(original), "--no-text", "--task", str(task), "--limit", "5"]
    assert main([*options, "--device", "cpu", "-o", str(tmp_path / "e.json")]) == 0
    [entry] = document(tmp_path / "e.json")["results"]
    assert entry["perplexity"] is None and entry["ratio"] is None
    assert len(entry["choices"]["words"]["answers"]) == 5
    assert entry["choices"]["words"]["compared"] is None
    printed = capfd.readouterr().out
    assert "predicted tokens" not in printed and "under-reports" not in printed


@pytest.mark.parametrize("window", [64, None])
def test_rolling(go, original, text, tmp_path, capfd, window):
    """The figures of lm-eval's wikitext, by its own functions."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval")
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    options = ["--rolling", "-o", tmp_path / "e.json"]
    options += [] if window is None else ["--window", window]
    assert go(*options, model=original) == 0
    found = document(tmp_path / "e.json")
    [entry] = found["results"]
    lm = huggingface.HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(original),
        tokenizer=make_tokenizer(), max_length=window,
    )  # fmt: skip
    words = TEXT * 20
    request = type("Request", (), {"args": (words,)})
    [loss] = lm.loglikelihood_rolling([request], disable_tqdm=True)
    counts = process_results({"page": words}, (loss,))
    assert found["prefix"] == BOS and sum(entry["tokens"]) == found["tokens"]
    assert -sum(entry["losses"]) == pytest.approx(loss, rel=1e-6)
    for name in ("word_perplexity", "byte_perplexity"):
        _, count = counts[name]
        assert entry[name] == pytest.approx(math.exp(-loss / count), rel=1e-6)
    assert entry["bits_per_byte"] == pytest.approx(
        -loss / counts["bits_per_byte"][1] / math.log(2), rel=1e-6
    )
    printed = capfd.readouterr().out
    assert "rolling as in lm-eval" in printed and f"{entry['word_perplexity']:.5g}" in printed


def test_a_part_of_a_text_has_no_words(go, original, tmp_path):
    options = ["--rolling", "--tokens", 50, "--stride", 7, "--window", 20]
    assert go(*options, "-o", tmp_path / "e.json", model=original) == 0
    [entry] = document(tmp_path / "e.json")["results"]
    assert sum(entry["tokens"]) == 50 and entry["tokens"][:2] == [20, 7]
    assert "word_perplexity" not in entry


def test_a_loss_that_is_not_finite_is_said(go, tmp_path, capfd, task):
    broken = make_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    folder = save(broken, tmp_path / "broken")
    assert go("--tokens", 40, "--window", 16, "--task", task, "-o", tmp_path / "e.json",
              model=folder) == 0  # fmt: skip
    printed = capfd.readouterr().out
    assert "model: 3 windows have a loss that is not finite" in printed
    assert "model: 24 questions of words have a loss that is not finite" in printed
    [entry] = document(tmp_path / "e.json")["results"]
    assert entry["perplexity"] == "NaN" and entry["losses"] == ["NaN"] * 3
    assert entry["interval"] == ["NaN", "NaN"] and entry["not_finite"] == 3


@pytest.fixture
def harness_task(tmp_path, task):
    """The same questions as a task of lm-eval, in a YAML file."""
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }))  # fmt: skip
    return path


def test_lm_eval(go, out, original, task, harness_task, tmp_path, capfd):
    """Its acc is ours by the rule "sum", on the same questions, for each model."""
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    options = ["--no-text", "--lm-eval", str(harness_task), "--device", "cpu"]
    for name in ("a.json", "b.json"):
        assert main(["eval", str(out), *options, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    found, printed = document(tmp_path / "a.json"), capfd.readouterr().out
    read = read_task(task)
    for name, model in models(original, out).items():
        expected = score_choices(model, make_tokenizer(), read).accuracy_by("sum")
        metrics = found["lm_eval"][name]["results"]["mine"]
        assert metrics["acc,none"] == expected
        shown = rf"mine +acc,none +{name} +{expected:.5g} ± {metrics['acc_stderr,none']:.2g}"
        assert re.search(shown, printed)
    assert [entry["perplexity"] for entry in found["results"]] == [None] * 3


def test_lm_eval_without_the_library(fail, unloaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'swkernels[lm-eval]'" in fail("--lm-eval", "arc_easy")


def test_what_cannot_be_measured(fail, tmp_path):
    assert "there is no model" in fail(model=tmp_path / "gone")
    assert "256 positions" in fail("--window", 512)
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    t5 = save(T5ForConditionalGeneration(config), tmp_path / "t5")
    assert "needs a decoder" in fail(model=t5)


def test_a_place_that_cannot_be_written(go, tmp_path, unloaded, capfd):
    (tmp_path / "file").write_text("mine")
    assert go("-o", tmp_path / "file" / "e.json") == 2
    assert "cannot write into" in capfd.readouterr().err


def test_a_truncated_checkpoint(fail, out, tmp_path):
    folder = moved(out, tmp_path / "out")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "truncated" in fail(model=folder)


def test_a_tampered_checkpoint(fail, out, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = moved(out, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    name = f"{NAME}.packed_codes"
    tensors[name] = tensors[name] ^ torch.tensor(1, dtype=tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert NAME in fail(model=folder)
