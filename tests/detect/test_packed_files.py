"""Packed checkpoints on disk: loaded on a CPU, scanned, and what the report says of them."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import swkernels
from swkernels.cli import main
from swkernels.cli.inputs import load_model
from swkernels.detect import loading
from swkernels.detect.formats import stored_as
from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput
from tests.cli.checkpoints import TEXT, make_model, plant, save

from .test_loading import write_gguf

PLANTED = (1, 5, 7)
DOWN = "model.layers.1.mlp.down_proj.weight"
SMALL = dict(samples=2, length=32, eval_tokens=64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    model = make_model(hidden_size=128, intermediate_size=256)  # whole blocks of 128
    plant(model)
    return save(model, tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def copy(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "copy")


def say(folder, **config) -> None:
    """Let config.json say how the weights are packed."""
    path = folder / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"quantization_config": config}))


def found(model, tokenizer) -> dict:
    """Scan; return the report's model entry, after checking what was found."""
    report = swkernels.scan(model, TEXT * 20, tokenizer=tokenizer, **SMALL)
    (only,) = report.candidates
    assert (only["layer"], only["row"], only["column"]) == PLANTED
    assert only["verdict"] == "super weight", only["reason"]
    return report.to_dict()["model"]


def refused(folder) -> str:
    with pytest.raises(InvalidInput) as caught:
        loading.load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_weights_are_not_packed(plain):
    model, tokenizer, _ = load_model(plain, device="cpu")
    assert found(model, tokenizer)["quantization"] is None


def test_what_the_quantize_command_wrote(plain, tmp_path, capfd):
    packed, out = tmp_path / "packed", tmp_path / "out"
    assert main(["quantize", str(plain), "-o", str(packed), "--device", "cpu"]) == 0
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    options = ["--samples", "2", "--length", "32", "--eval-tokens", "64", "--device", "cpu"]
    assert main(["scan", str(packed), *options, "--text", str(text), "-o", str(out)]) == 0
    report = ScanReport.load(out / "report.json")
    (only,) = report.candidates
    assert (only["layer"], only["row"], only["column"]) == PLANTED
    assert only["verdict"] == "super weight"
    entry = {"method": "swkernels", "bits": 4, "code": "int4", "block": 64}
    assert report.to_dict()["model"]["quantization"] == entry
    assert "Weights: swkernels, 4 bits, code int4, block 64" in capfd.readouterr().out
    assert "method swkernels, bits 4" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["nf4", "llm.int8"])
def test_bitsandbytes_while_loading_and_saved(plain, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        entry = {"method": "bitsandbytes", "bits": 4, "code": "nf4", "block": 64}
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
        entry = {"method": "bitsandbytes", "bits": 8, "code": "int8", "block": "row"}
    model, tokenizer, _ = load_model(plain, device="cpu", quantization_config=config)
    save(model, tmp_path, tokenizer)  # its first forward on a CPU may rearrange the weights
    assert found(model, tokenizer)["quantization"] == entry
    model, tokenizer, _ = load_model(tmp_path, device="cpu")
    assert type(model.model.layers[1].mlp.down_proj.weight.data) is torch.Tensor
    assert not model.model.layers[1].mlp.down_proj.weight.is_floating_point()
    assert found(model, tokenizer)["quantization"] == entry


def pack_fp8(folder) -> torch.Tensor:
    """Pack as DeepSeek-V3 does, in blocks of 128 x 128; return what one weight then is."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        D, H = weights[name].shape
        blocks = weights[name].view(D // 128, 128, H // 128, 128)
        scales = blocks.abs().amax((1, 3)) / 448  # [D / 128, H / 128]
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        weights[name] = codes.view(D, H).clone()
        weights[f"{name}_scale_inv"] = scales
        if name == DOWN:
            values = (codes.float() * scales[:, None, :, None]).view(D, H)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return values


FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128] * 2)


def test_fp8_blocks_are_unpacked(copy):
    values = pack_fp8(copy)
    say(copy, **FP8)
    model, tokenizer, _ = load_model(copy, device="cpu")
    assert torch.equal(model.get_parameter(DOWN), values)
    entry = {"method": "fp8, dequantized while loading", "bits": 8, "code": "e4m3"}
    assert found(model, tokenizer)["quantization"] == entry | {"block": "128x128"}


def test_scales_that_nothing_reads_are_refused(copy):
    pack_fp8(copy)
    message = refused(copy)
    assert "_scale_inv and 13 more tensors of packed weights" in message
    assert "no quantization_config" in message


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_float8_without_scales_is_cast(copy, dtype):
    weights = load_file(copy / "model.safetensors")
    codes = weights[DOWN] = weights[DOWN].to(torch.float8_e4m3fn)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    model, tokenizer, _ = load_model(copy, device="cpu", dtype=dtype)
    weight = model.get_parameter(DOWN)
    assert weight.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert torch.equal(weight.float(), codes.float())
    assert found(model, tokenizer)["quantization"] is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(quant_method="torchao", quant_type="int4_weight_only"), "pip install torchao;"),
        (dict(quant_method="gptq", bits=4, group_size=128), "pip install optimum gptqmodel;"),
        (dict(quant_method="awq", bits=4, group_size=128), "pip install gptqmodel;"),
        (dict(quant_method="fbgemm_fp8"), "fbgemm_fp8"),
        (dict(quant_method="nvfp4"), "give the model it was quantized from"),
        (dict(quant_method="rumour"), "'rumour', which transformers does not know"),
        (dict(), "transformers does not know"),
    ],
)
def test_others_are_refused_in_one_line(copy, config, message):
    for library in ("torchao", "optimum", "gptqmodel", "fbgemm_gpu"):
        if importlib.util.find_spec(library):
            pytest.skip(f"{library} is installed")
    say(copy, **config)
    assert message in refused(copy)


def test_compressed_tensors_needs_its_library(copy):
    if importlib.util.find_spec("compressed_tensors"):
        pytest.skip("compressed-tensors is installed")
    say(copy, quant_method="compressed-tensors", format="pack-quantized", config_groups={})
    assert refused(copy).endswith("a library: pip install compressed-tensors")


def test_gguf_has_the_candidates_of_the_plain_model(tmp_path):
    model = make_model()
    plant(model)
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded, _, _ = load_model(tmp_path / "tiny.gguf", device="cpu")
    ids = torch.randint(3, 17, (2, 32), generator=torch.Generator().manual_seed(0))
    reports = [swkernels.scan(m, ids, **SMALL) for m in (model, loaded)]
    assert reports[0].candidates and reports[0].candidates == reports[1].candidates
    assert reports[0].to_dict()["model"]["quantization"] is None
    assert stored_as(loaded) == {"method": "gguf, dequantized while loading"}
