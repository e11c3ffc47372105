"""The report: its figures against a few independent lines, its JSON, its table."""

from __future__ import annotations

import json
import math

import pytest
import torch

from swkernels import QuantConfig, QuantReport, quantize
from swkernels.errors import InvalidInput
from tests.models.tiny import tiny_model

from .dense import packed_modules

DOWN = "model.layers.1.mlp.down_proj"
BLOCKS = {"runs": 48, "tiles": (5, 7), "row": "row", "channel": "channel", "tensor": "tensor"}


def quantized(arch="llama", super_weights=None, **fields):
    model = tiny_model(arch)
    return model, quantize(model, QuantConfig(**fields), super_weights, progress=False)


def blocks_of(change, block):
    """The elements of each block, in the order of their numbers."""
    D, H = change.shape
    if block == "row":
        return list(change)
    if block == "channel":
        return list(change.T)
    if block == "tensor":
        return [change]
    if isinstance(block, int):
        return list(change.flatten().split(block))
    r, c = block
    return [change[i : i + r, j : j + c] for i in range(0, D, r) for j in range(0, H, c)]


@pytest.mark.parametrize("name", BLOCKS)
def test_figures_of_a_layer(name):
    model, report = quantized(block_size=BLOCKS[name], super_weights={DOWN: [[3, 5], [0, 1]]})
    (layer,) = [layer for layer in report.layers if layer.name == DOWN]
    before = tiny_model("llama").get_submodule(DOWN).weight.detach().double()
    change = before - model.get_submodule(DOWN).dequantize().double()
    scale = before.square().mean().sqrt()
    assert layer.error == pytest.approx(float(change.square().mean().sqrt() / scale), rel=1e-5)
    parts = blocks_of(change, BLOCKS[name])
    of_blocks = [float(part.square().mean().sqrt() / scale) for part in parts]
    assert layer.worst_error == pytest.approx(max(of_blocks), rel=1e-5)
    assert of_blocks[layer.worst_block] == pytest.approx(max(of_blocks), rel=1e-5)
    assert layer.super_weights == tuple(
        (row, col, float(before[row, col])) for row, col in ((0, 1), (3, 5))
    )
    assert layer.bytes_before == 32 * 80 * 4
    held = model.get_submodule(DOWN).packed.tensors().values()
    assert layer.bytes_after == sum(tensor.nbytes for tensor in held)
    assert (layer.shape, layer.bits, layer.largest) == ((32, 80), 4, 0)


def test_figures_of_the_model():
    model, report = quantized(largest=2)
    assert [layer.largest for layer in report.layers] == [2] * 21
    sizes = [math.prod(layer.shape) for layer in report.layers]
    errors = [layer.error for layer in report.layers]
    mean = sum(e * s for e, s in zip(errors, sizes)) / sum(sizes)
    assert report.error == pytest.approx(mean)
    assert report.worst.error == max(errors)
    assert report.bytes_before == sum(p.nbytes for p in tiny_model("llama").parameters()) + sum(
        b.nbytes for b in tiny_model("llama").buffers()
    )
    after = [*model.parameters(), *model.buffers()]
    assert report.bytes_after == sum(tensor.nbytes for tensor in after)
    total = report.to_dict()["total"]
    assert (total["matrices"], total["elements"], total["largest"]) == (21, sum(sizes), 42)


def test_a_layer_of_zeros():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(DOWN).weight.zero_()
    report = quantize(model, progress=False)
    (layer,) = [layer for layer in report.layers if layer.name == DOWN]
    assert (layer.error, layer.worst_block, layer.worst_error) == (0.0, 0, 0.0)


def test_every_expert_has_its_own_figures():
    model, report = quantized("mixtral", {("model.layers.0.mlp.experts", 2): [[1, 4]]})
    name = "model.layers.0.mlp.experts.down_proj"
    layers = [layer for layer in report.layers if layer.name == name]
    assert [layer.expert for layer in layers] == [0, 1, 2, 3]
    assert [len(layer.super_weights) for layer in layers] == [0, 0, 1, 0]
    before = tiny_model("mixtral").model.layers[0].mlp.experts.down_proj.detach()
    after = packed_modules(model)[name].dequantize()
    for layer in layers:
        w, change = before[layer.expert], (before - after)[layer.expert]
        assert layer.error == pytest.approx(float(change.norm() / w.norm()), rel=1e-5)


def test_json_brings_it_back(tmp_path):
    _, report = quantized(super_weights={DOWN: [[3, 5]]}, block_size=(4, 4), exclude="lm_head")
    report.save(tmp_path / "report.json")
    assert QuantReport.load(tmp_path / "report.json") == report
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["schema"] == "swkernels.quantize/1"
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


def test_in_words_and_as_a_table():
    from rich.console import Console

    _, report = quantized("mixtral")
    assert "in int4" in str(report) and "\n" not in str(report)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(report.table())
    text = console.export_text()
    assert text.count("experts.down_proj") == 3 and "4 x 32 x 80" in text


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot read"),
        ("[]", "expected a report of schema swkernels.quantize/1, got None"),
        ('{"schema": "swkernels.scan/1"}', "got 'swkernels.scan/1'"),
        ('{"schema": "swkernels.quantize/1"}', "is damaged"),
    ],
)
def test_files_that_are_refused(tmp_path, content, message):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        QuantReport.load(path)


def test_a_folder_that_is_not_there(tmp_path):
    _, report = quantized()
    with pytest.raises(InvalidInput, match="cannot write"):
        report.save(tmp_path / "nowhere" / "report.json")
