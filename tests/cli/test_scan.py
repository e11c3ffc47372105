"""``swkernels scan``, from the command line to its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from swkernels.cli import main
from swkernels.detect.report import ScanReport
from swkernels.detect.routing_plot import routing_png
from swkernels.detect.scan import ScanConfig
from tests.cli.checkpoints import TEXT, VOCABULARY, make_model, make_tokenizer, plant, save
from tests.models.tiny import tiny_model

FILES = ["report.html", "report.json", "spikes.png"]
SMALL = ["--samples", "2", "--length", "16", "--eval-tokens", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = make_model()
    plant(model)
    return str(save(model, tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 20, encoding="utf-8")
    return str(path)


@pytest.fixture
def fail(capfd, tmp_path):
    """Run a scan that must fail in one line, with code 2 and nothing written; return the line."""

    def run(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        output = tmp_path / "out" / "deep"
        if "--output" not in arguments:
            arguments += ("--output", str(output))
        capfd.readouterr()  # what saving a checkpoint printed
        assert main(["scan", *map(str, arguments)]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        error = capfd.readouterr().err
        assert error.startswith("swkernels: error: ") and error.count("\n") == 1, error
        return error

    return run


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "swkernels.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("verify", [True, False])
def test_end_to_end(checkpoint, text, tmp_path, capfd, verify):
    out = tmp_path / "a" / "b"
    options = [*SMALL, "--text", text, "-o", str(out)] + ["--no-verify"] * (not verify)
    assert main(["scan", checkpoint, *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    report = ScanReport.load(out / "report.json")
    found = report.candidates[0]
    assert (found["layer"], found["row"], found["column"]) == (1, 5, 7)
    assert (found["ratio"] is not None) == verify
    assert (found["verdict"] == "candidate") == (not verify)
    document = report.to_dict()
    assert document["inputs"]["source"] == text
    assert document["model"]["name"] == checkpoint
    assert len(document["model"]["fingerprint"]) == 64
    assert document["inputs"]["samples"] == 2 and document["inputs"]["length"] == 16
    assert (out / "spikes.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "1" in shown.out and "[5, 7]" in shown.out and str(out / "report.html") in shown.out


def test_of_a_mixture_there_is_a_picture_of_its_routing(text, tmp_path):
    model = tiny_model("mixtral", vocab_size=VOCABULARY, num_hidden_layers=2)
    path, out = save(model, tmp_path / "mixture"), tmp_path / "out"
    options = [*SMALL, "--text", text, "-o", str(out), "--no-verify"]
    assert main(["scan", str(path), *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "routing.png"])
    document = ScanReport.load(out / "report.json").to_dict()
    assert (out / "routing.png").read_bytes() == routing_png(document)
    assert (out / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_no_files_without_output(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["scan", checkpoint, *SMALL, "--text", text, "--no-verify"]) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_options_reach_the_scan(checkpoint, text, tmp_path):
    lines = tmp_path / "d.jsonl"
    lines.write_text(json.dumps({"text": TEXT * 9}), encoding="utf-8")
    options = [
        "--dataset", lines, "--eval-text", text, "--samples", 3, "--length", 12,
        "--batch-size", 2, "--eval-tokens", 40, "--dtype", "bfloat16", "--special-tokens", "none",
        "--method", "dominance", "--method", "outlier", "--max-candidates", 2,
        "--backend", "reference", "--seed", 7, "--device", "cpu", "-o", tmp_path / "out",
    ]  # fmt: skip
    assert main(["scan", checkpoint, *map(str, options)]) == 0
    document = ScanReport.load(tmp_path / "out" / "report.json").to_dict()
    expected = {
        "samples": 3, "length": 12, "batch_size": 2, "eval_tokens": 40, "special_tokens": "none",
        "methods": ["dominance", "outlier"], "max_candidates": 2, "backend": "reference",
        "seed": 7, "verify": True,
    }  # fmt: skip
    assert expected.items() <= document["settings"].items()
    assert document["model"]["dtype"] == "bfloat16"
    assert document["inputs"]["source"] == str(lines)


def test_shown_defaults_are_those_of_the_scan():
    import typer

    from swkernels.cli import app

    options = typer.main.get_command(app).commands["scan"].params
    shown = {option.name: option.show_default for option in options}
    defaults = ScanConfig()
    names = ("samples", "length", "batch_size", "eval_tokens", "max_candidates", "seed")
    for name in (*names, "special_tokens"):
        assert shown[name] == str(getattr(defaults, name)), name
    assert (shown["methods"],) == defaults.methods


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "samples must be at least 1"),
        (["--samples", "many"], "Invalid value for '--samples'"),
        (["--length", "-3"], "length must be at least 1"),
        (["--eval-tokens", "1"], "eval_tokens"),
        (["--max-candidates", "0"], "at least 1"),
        (["--method", "magic"], "methods must be among"),
        (["--special-tokens", "maybe"], "must be one of tokenizer, force, none"),
        (["--device", "gpu9"], "unknown device 'gpu9'"),
        (["--device", "cuda:99"], "is not there"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--backend", "magic"], "unknown backend 'magic'"),
        (["--text", "a", "--dataset", "b"], "exclude each other"),
        (["--text", "gone.txt"], "cannot read the text gone.txt"),
        (["--eval-text", "gone.txt"], "cannot read the text gone.txt"),
        (["--dataset", "gone.jsonl"], "cannot read the text gone.jsonl"),
        (["--bogus"], "No such option"),
    ],
)
def test_bad_options_are_refused_before_the_model_loads(fail, monkeypatch, options, message):
    from swkernels.detect import loading

    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert message in fail("some/model", *options)


def test_a_backend_that_is_not_there(fail, monkeypatch):
    from swkernels.backends import cpu

    monkeypatch.setattr(cpu, "available", lambda: "it was not built")
    assert "backend 'cpu' is not there: it was not built" in fail("m", "--backend", "cpu")
    monkeypatch.setenv("SWKERNELS_BACKEND", "cpu")
    assert "backend 'cpu' is not there: it was not built" in fail("m")
    monkeypatch.setenv("SWKERNELS_BACKEND", "magic")
    assert "unknown backend 'magic' in SWKERNELS_BACKEND" in fail("m")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/no/such"])
def test_a_directory_that_cannot_be_written(fail, tmp_path, monkeypatch, place):
    from swkernels.detect import loading

    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert "cannot write into" in fail("some/model", "--output", tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_bad_texts(fail, checkpoint, tmp_path):
    path = tmp_path / "text.txt"
    for content, message in ((b"", "is empty"), (b"\xff\xfe", "not UTF-8")):
        path.write_bytes(content)
        assert message in fail(checkpoint, *SMALL, "--text", path)
    path.write_text("the")
    message = fail(checkpoint, *SMALL, "--text", path, "--special-tokens", "none")
    assert "shorter than one window of 2 tokens" in message


def test_bad_models(fail, checkpoint, tmp_path):
    assert "there is no model" in fail(tmp_path / "gone")
    broken = save(make_model(), tmp_path / "broken") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4])
    assert f"{broken} is truncated" in fail(broken.parent)


def test_vocabulary_mismatch(fail, text, tmp_path):
    small = save(make_model(vocab_size=VOCABULARY - 3), tmp_path / "small")
    assert "outside the model's vocabulary" in fail(small, *SMALL, "--text", text)


def test_no_down_projection(fail, text, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    mamba = save(MambaForCausalLM(config), tmp_path / "mamba")
    assert "down projection" in fail(mamba, *SMALL, "--text", text)


def nan_checkpoint(folder):
    path = save(make_model(), folder) / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    return folder


def test_nan_in_a_process_of_its_own(text, tmp_path):
    folder = nan_checkpoint(tmp_path / "nan")
    out = tmp_path / "out"
    process = command("scan", folder, *SMALL, "--text", text, "-o", out)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1, error
    assert "model.layers.1.mlp.down_proj" in error
    assert not out.exists()


def test_a_folder_of_the_user_stays_as_it_was(fail, text, tmp_path):
    folder = nan_checkpoint(tmp_path / "nan")
    out = tmp_path / "mine"
    out.mkdir()
    (out / "report.json").write_text("earlier")
    fail(folder, *SMALL, "--text", text, "--output", out)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("report.json", "earlier")]


def test_a_page_that_fails_leaves_no_files(fail, checkpoint, text, monkeypatch):
    from swkernels.detect import page
    from swkernels.errors import InvalidInput

    def render(document):
        raise InvalidInput("no page")

    monkeypatch.setattr(page, "render", render)
    assert "no page" in fail(checkpoint, *SMALL, "--text", text, "--no-verify")


def test_a_disk_that_fills_up_leaves_no_files(fail, checkpoint, text, monkeypatch):
    def save_report(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(ScanReport, "save", save_report)
    assert "No space left" in fail(checkpoint, *SMALL, "--text", text, "--no-verify")


def test_out_of_memory(fail, checkpoint, monkeypatch):
    from swkernels.detect import loading

    def load_model(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(loading, "load_model", load_model)
    assert "--dtype bfloat16" in fail(checkpoint)


def test_our_own_mistakes_are_not_hidden(checkpoint, monkeypatch):
    from swkernels.detect import loading

    def load_model(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(loading, "load_model", load_model)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["scan", checkpoint])


def test_interrupted(checkpoint, tmp_path):
    out = tmp_path / "deep" / "out"
    process = command(
        "scan", checkpoint, "--samples", 20000, "--length", 2, "--device", "cpu",
        "--special-tokens", "none", "-o", out, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    lines = []
    while "reading peaks\n" not in lines:
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    assert out.is_dir()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "swkernels: interrupted\n"
    assert not (tmp_path / "deep").exists()


def test_a_tokenizer_without_special_tokens_cannot_be_forced(fail, text, tmp_path):
    tokenizer = make_tokenizer(adds_bos=False, bos=False, eos=False)
    folder = save(make_model(), tmp_path / "plain", tokenizer)
    message = fail(folder, *SMALL, "--text", text, "--special-tokens", "force")
    assert "neither a BOS nor an EOS" in message
