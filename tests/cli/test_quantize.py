"""``swkernels quantize``, from the command line to a packed checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import swkernels
from swkernels.backends.plan import Clip
from swkernels.cli import app, inputs, main
from swkernels.cli.quantize import block_of, clip_of
from swkernels.detect import loading
from swkernels.errors import InvalidInput
from swkernels.ops import block_quantize
from swkernels.quant import QuantConfig, QuantReport
from swkernels.train import Coordinates
from tests.cli.checkpoints import TEXT, make_model, plant, save
from tests.detect import fake_report
from tests.detect.test_loading import write_gguf

NAME = "model.layers.1.mlp.down_proj"
REPORT = "quantize_report.json"
FILES = {"config.json", "generation_config.json", "model.safetensors", REPORT,
         "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


@pytest.fixture(scope="module")
def planted():
    model = make_model()
    plant(model)
    return model


@pytest.fixture(scope="module")
def checkpoint(planted, tmp_path_factory):
    return save(planted, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A scan's report that names the planted weight."""
    listed = [fake_report.candidate(0, 1, 5, 7, "super weight", 9.0)]
    report = fake_report.report(listed, layers=2, shape=(32, 48))
    path = tmp_path_factory.mktemp("reports") / "report.json"
    path.write_text(json.dumps(report))
    return path


@pytest.fixture
def go(checkpoint):
    def go(*options, model=checkpoint):
        return main(["quantize", str(model), "--device", "cpu", *map(str, options)])

    return go


@pytest.fixture
def fail(go, capfd, tmp_path):
    """Run what must fail in one line, with code 2 and nothing written; return the line."""

    def run(*options, **changes) -> str:
        before = sorted(tmp_path.rglob("*"))
        if "-o" not in options:
            options += ("-o", tmp_path / "deep" / "out")
        capfd.readouterr()
        assert go(*options, **changes) == 2
        assert sorted(tmp_path.rglob("*")) == before
        error = capfd.readouterr().err
        assert error.startswith("swkernels: error: ") and error.count("\n") == 1, error
        return error

    return run


@pytest.fixture
def unloaded(monkeypatch):
    """Fail where a model is loaded."""
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))


def test_from_a_name_to_a_packed_checkpoint(go, checkpoint, planted, scan, tmp_path, capfd):
    out = tmp_path / "deep" / "out"
    assert go("--bits", 4, "--block", 16384, "--super-weights", scan, "-o", out) == 0
    shown = capfd.readouterr()
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in out.parent.iterdir()} == {"out"}

    report = QuantReport.load(out / REPORT)
    assert report.config == QuantConfig(block_size=16384)
    assert len(report.layers) == 14
    [of_it] = [layer for layer in report.layers if layer.super_weights]
    assert of_it.name == NAME and of_it.super_weights == ((5, 7, 10.0),)
    source = json.loads((out / REPORT).read_text())["source"]
    assert source == {
        "model": str(checkpoint), "fingerprint": loading.fingerprint(checkpoint),
        "dtype": "float32", "super_weights": str(scan),
    }  # fmt: skip

    model = AutoModelForCausalLM.from_pretrained(out)
    for name, module in planted.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            outliers = torch.tensor([[5, 7]]) if name == NAME else None
            expected = block_quantize(module.weight, block_size=16384, outliers=outliers)
            found = model.get_submodule(name).dequantize()
            assert torch.equal(found, expected.dequantize()), name
    assert model.get_submodule(NAME).dequantize()[5, 7] == 10.0
    ids = AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"]

    assert shown.err == ""
    assert shown.out.startswith("packing\nsaving\n")
    assert f"kept: {NAME} [5, 7] = 10\n" in shown.out
    assert "model.layers.*.mlp.down_proj" in shown.out and str(report) in shown.out
    assert shown.out.endswith(f"{out}\n")


def test_twice_gives_the_same_files(go, scan, tmp_path):
    for name in ("a", "b"):
        assert go("--clip", "search=0.5", "--super-weights", scan, "-o", tmp_path / name) == 0
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {}),
        (["--bits", 8], {"code": "int8"}),
        (["--code", "nf4"], {"code": "nf4"}),
        (["--asymmetric"], {"symmetric": False}),
        (["--symmetric"], {"symmetric": True}),
        (["--block", "128"], {"block_size": 128}),
        (["--block", "16x32"], {"block_size": (16, 32)}),
        (["--block", "row"], {"block_size": "row"}),
        (["--block", "channel"], {"block_size": "channel"}),
        (["--block", "tensor"], {"block_size": "tensor"}),
        (["--clip", "zscore=9"], {"clip": Clip("zscore", 9)}),
        (["--clip", "percentile=99.9"], {"clip": Clip("percentile", 99.9)}),
        (["--scales", "float16"], {"scale_dtype": "float16"}),
        (["--largest", 2, "--largest-per", "block"], {"largest": 2, "largest_per": "block"}),
        (["--embeddings", "int8"], {"embeddings": "int8"}),
        (
            ["--include", "down_proj", "--include", "o_proj", "--exclude", "layers.0.*"],
            {"include": ("down_proj", "o_proj"), "exclude": ("layers.0.*",)},
        ),
    ],
)
def test_options_reach_the_config(go, tmp_path, options, expected):
    assert go(*options, "-o", tmp_path / "out") == 0
    assert QuantReport.load(tmp_path / "out" / REPORT).config == QuantConfig(**expected)


def test_shown_defaults_are_those_of_the_config():
    options = typer.main.get_command(app).commands["quantize"].params
    shown = {option.name: option.show_default for option in options}
    defaults = QuantConfig()
    assert shown["code"] == defaults.code and shown["scales"] == defaults.scale_dtype
    assert shown["block"] == str(defaults.block_size) and shown["largest"] == str(defaults.largest)
    assert shown["largest_per"] == defaults.largest_per
    assert (defaults.symmetric, defaults.clip, defaults.embeddings) == (True, None, None)
    assert shown["symmetric"] == "symmetric"


def test_what_is_not_packed_has_the_dtype_asked_for(go, tmp_path):
    assert go("--dtype", "bfloat16", "-o", tmp_path / "out") == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    floats = {t.dtype for t in tensors.values() if t.is_floating_point() and t.numel()}
    assert floats == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / REPORT).read_text())["source"]["dtype"] == "bfloat16"


def test_coordinates_of_a_file(go, tmp_path):
    path = tmp_path / "c.json"
    Coordinates.of({NAME: [[3, 4], [5, 6]]}, {NAME: (32, 48)}).save(path)
    assert go("--super-weights", path, "-o", tmp_path / "out") == 0
    layers = {layer.name: layer for layer in QuantReport.load(tmp_path / "out" / REPORT).layers}
    assert [kept[:2] for kept in layers[NAME].super_weights] == [(3, 4), (5, 6)]


def test_a_dry_run_writes_nothing(go, checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert go("--dry-run") == 0
    assert go("--dry-run", "-o", tmp_path / "out") == 0
    assert not list(tmp_path.iterdir())
    assert "model.layers.*.mlp.down_proj" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "3"], "--bits must be 4 or 8, got 3"),
        (["--bits", "many"], "Invalid value for '--bits'"),
        (["--bits", "4", "--code", "nf4"], "exclude each other"),
        (["--code", "int3"], "unknown code 'int3'"),
        (["--code", "nf4", "--asymmetric"], "nf4 is symmetric"),
        (["--block", "0"], "block_size must be"),
        (["--block", "-64"], "block_size must be"),
        (["--block", "6.4"], "block_size must be"),
        (["--block", "16x0"], "block_size must be"),
        (["--block", "1x2x3"], "block_size must be"),
        (["--block", "column"], "got 'column'"),
        (["--clip", "zscore"], "--clip must be a rule and a number, such as zscore=9"),
        (["--clip", "zscore=much"], "got 'zscore=much'"),
        (["--clip", "magic=1"], "unknown clip 'magic'"),
        (["--clip", "percentile=101"], "above 0 and at most 100, got 101"),
        (["--clip", "zscore=nan"], "must be at least 0, got nan"),
        (["--scales", "int4"], "unknown scale_dtype 'int4'"),
        (["--largest", "-1"], "largest must be an integer from 0"),
        (["--largest-per", "row"], "largest_per must be"),
        (["--embeddings", "int5"], "embeddings must be"),
        (["--device", "gpu9"], "unknown device 'gpu9'"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--super-weights", "gone.json"], "cannot read gone.json as JSON"),
        (["--super-weights", "gone.txt"], "ends in .json or .safetensors"),
        (["--bogus"], "No such option"),
    ],
)
def test_bad_options_are_refused_before_the_model_loads(fail, unloaded, options, message):
    assert message in fail(*options)


@pytest.mark.parametrize("content", ["{", "{}", '{"schema": "swkernels.scan/99"}', "[]"])
def test_a_report_that_is_none(fail, unloaded, tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(content)
    fail("--super-weights", path)


def test_no_place_to_go(unloaded, checkpoint, capfd):
    assert main(["quantize", str(checkpoint)]) == 2
    assert "--output" in capfd.readouterr().err


def test_a_model_that_is_not_there(fail, unloaded, tmp_path):
    assert "there is no model" in fail(model=tmp_path / "gone")


def test_what_is_there_is_not_replaced(fail, go, tmp_path, monkeypatch, planted):
    out = tmp_path / "out"
    assert go("-o", out) == 0
    (out / "mine").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    original = save(planted, tmp_path / "original")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
        assert "--force to replace it" in fail("-o", out)
        assert "is no model, and is not replaced" in fail("-o", tmp_path / "other", "--force")
        assert "--force" in fail("-o", tmp_path / "file")
        assert "is no model" in fail("-o", tmp_path / "file", "--force")
        assert "itself" in fail("-o", original, "--force", model=original)
        assert "itself" in fail("-o", tmp_path, "--force", model=original)
    assert go("-o", out, "--force", "--bits", 8) == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert QuantReport.load(out / REPORT).config.code == "int8"


def test_an_empty_folder_is_filled(go, tmp_path):
    assert go("-o", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_weight_that_is_not_finite(fail, planted, tmp_path):
    folder = save(planted, tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights[f"{NAME}.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    error = fail(model=folder)
    assert NAME in error and "[3, 4]" in error and "nan" in error


def test_coordinates_of_another_model(fail, tmp_path):
    path = tmp_path / "c.json"
    Coordinates.of({NAME: [[40, 4]]}, {NAME: (64, 48)}).save(path)
    assert NAME in fail("--super-weights", path)
    Coordinates.of({"layers.9.mlp.down_proj": [[0, 0]]}, {"layers.9.mlp.down_proj": (32, 48)}).save(
        path
    )
    assert "layers.9" in fail("--super-weights", path)


def test_a_quantized_model_is_not_quantized_again(fail, go, tmp_path, monkeypatch):
    assert go("-o", tmp_path / "out") == 0
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert "is quantized already (swkernels)" in fail(model=tmp_path / "out")


def test_patterns_that_match_nothing(fail):
    assert "nowhere" in fail("--include", "nowhere")


def test_a_disk_that_fills_up(fail, go, tmp_path, monkeypatch):
    assert go("-o", tmp_path / "out") == 0
    before = (tmp_path / "out" / REPORT).read_bytes()

    def full(self, folder, *arguments, **options):
        (Path(folder) / "half").write_text("half")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    assert "No space left" in fail()
    assert "No space left" in fail("-o", tmp_path / "out", "--force", "--bits", 8)
    assert (tmp_path / "out" / REPORT).read_bytes() == before


HALFWAY = """
import sys, time
from pathlib import Path
from transformers import PreTrainedTokenizerBase
from swkernels.cli import main

def hang(self, folder, *arguments, **options):
    print("half written:", *sorted(p.name for p in Path(folder).iterdir()), flush=True)
    time.sleep(60)

PreTrainedTokenizerBase.save_pretrained = hang
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("force", [False, True])
def test_interrupted(go, checkpoint, tmp_path, how, force):
    out = tmp_path / "out"
    if force:
        assert go("-o", out) == 0
    before = {path: path.read_bytes() for path in out.glob("*")}
    process = subprocess.Popen(
        [sys.executable, "-c", HALFWAY, "quantize", str(checkpoint), "--device", "cpu", "--bits",
         "8", "-o", str(out), *["--force"] * force],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = ""
    while not line.startswith("half written:"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
    assert "model.safetensors" in line
    process.send_signal(how)
    _, error = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 130 and error == "swkernels: interrupted\n"
        assert list(tmp_path.iterdir()) == ([out] if force else [])
    assert out.exists() == force
    assert {path: path.read_bytes() for path in out.glob("*")} == before


def test_block_and_clip():
    assert [block_of(text) for text in ("64", "128x128", "16X4", "row", "x", "")] == [
        64, (128, 128), (16, 4), "row", "x", "",
    ]  # fmt: skip
    assert clip_of("count=1") == Clip("count", 1) and type(clip_of("count=1").value) is int
    assert clip_of("search=0.5") == Clip("search", 0.5)
    with pytest.raises(InvalidInput, match="unknown clip ''"):
        clip_of("=1")


def test_the_command_is_a_call(checkpoint, scan, go, tmp_path):
    """What the command writes is what ``swkernels.quantize`` makes of the loaded model."""
    assert go("--super-weights", scan, "--largest", 3, "-o", tmp_path / "out") == 0
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    report = swkernels.quantize(model, QuantConfig(largest=3), super_weights=scan)
    loaded, *_ = inputs.load_model(str(tmp_path / "out"), device="cpu")
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert QuantReport.load(tmp_path / "out" / REPORT).layers == report.layers


def test_other_commands_on_a_packed_model(go, scan, tmp_path, capfd):
    """It can be scanned, and trained beside its codes."""
    assert go("--super-weights", scan, "-o", tmp_path / "out") == 0
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    options = ["--text", str(text), "--samples", "2", "--length", "16", "--device", "cpu"]
    capfd.readouterr()
    assert main(["scan", str(tmp_path / "out"), *options]) == 0
    assert "super weight: layer 1 [5, 7]" in capfd.readouterr().out
    options = [
        "--data", str(text), "--coordinates", str(scan), "--length", "16", "--batch-size", "2",
        "--steps", "2", "--device", "cpu", "-o", str(tmp_path / "trained"),
    ]  # fmt: skip
    assert main(["train", str(tmp_path / "out"), *options]) == 0
    assert json.loads((tmp_path / "trained" / "train.json").read_text())["largest_delta"] > 0


def test_a_gguf_file(go, scan, planted, tmp_path):
    """It is unpacked whole, and then quantized as the model that was written into it."""
    write_gguf(tmp_path / "a.gguf", planted)
    assert go("--super-weights", scan, "-o", tmp_path / "a", model=tmp_path / "a.gguf") == 0
    assert go("--super-weights", scan, "-o", tmp_path / "b") == 0
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("a", "b")]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
