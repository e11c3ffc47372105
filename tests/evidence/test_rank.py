"""Rankings: held against all entries sorted by NumPy, from files and from models alike."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from swkernels.errors import InvalidInput
from swkernels.evidence import rank_cache
from swkernels.evidence.edits import Edits
from swkernels.evidence.rank import _largest, rank
from swkernels.models import find_down_projections
from swkernels.models.kinds import KINDS
from swkernels.ops import topk_abs
from swkernels.quant import QuantConfig, quantize
from swkernels.train import Coordinates
from tests.cli.checkpoints import make_model
from tests.models.tiny import tiny_model

KIND = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate",
        "up_proj": "up", "down_proj": "down"}  # fmt: skip


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The folder where rankings are kept."""
    monkeypatch.setenv("SWKERNELS_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "rank"


@pytest.fixture
def folder(tmp_path):
    make_model(initializer_range=0.3).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def by_hand(tensors: dict[str, torch.Tensor], kinds=KINDS) -> list[tuple]:
    """(|value|, name, row, column, value) of every entry of a Llama, the largest first."""
    entries = []
    for name in sorted(tensors):  # fewer than ten layers: this is natural order
        part = name.removesuffix(".weight").rpartition(".")[2]
        if KIND.get(part) in kinds:
            matrix = tensors[name].double().numpy()
            for (row, column), value in np.ndenumerate(matrix):
                entries.append((abs(value), name.removesuffix(".weight"), row, column, value))
    return sorted(entries, key=lambda entry: -entry[0])  # stable: ties in order of their place


def places(ranking) -> list[tuple]:
    return [(abs(r["value"]), r["name"], r["row"], r["column"], r["value"])
            for r in ranking.rows()]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16,
                                   torch.float8_e4m3fn, torch.float8_e5m2])  # fmt: skip
def test_all_entries_of_a_file_in_order(folder, dtype):
    """In the narrow types almost every entry has equals."""
    file = folder / "model.safetensors"
    tensors = {key: value.to(dtype) for key, value in load_file(file).items()}
    save_file(tensors, file)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    expected = by_hand(tensors)
    assert len(expected) == 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert places(rank(folder, len(expected), cache=False)) == expected
    for k in (1, 37, 500):
        found = rank(file, k, cache=False)
        assert places(found) == expected[:k] and found.value.dtype == torch.float64
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


def test_shares_layers_and_sizes(folder):
    ranking = rank(folder, 700)
    expected = by_hand(load_file(folder / "model.safetensors"))
    kinds = [KIND[name.rpartition(".")[2]] for _, name, *_ in expected]
    assert ranking.shares() == [
        {"top": n} | {kind: kinds[:n].count(kind) / n for kind in KINDS if kind in kinds}
        for n in (10, 100, 700)
    ]
    for row in ranking.layers():
        block = f"layers.{row['layer']}."
        own = [(place, entry) for place, entry in enumerate(expected)
               if block in entry[1] and kinds[place] == row["kind"]]  # fmt: skip
        assert row["largest"] == own[0][1][0] and row["block"] == f"model.layers.{row['layer']}"
        assert row["count"] == sum(place < 700 for place, _ in own)
    assert len(ranking.layers()) == 14
    assert ranking.sizes["down"] == (2, 2 * 32 * 48) and ranking.sizes["q"] == (2, 2 * 32 * 32)
    left = {entry.name: (entry.why, entry.tensors) for entry in ranking.left_out}
    assert left == {
        "model.embed_tokens.weight": ("embedding", 1), "lm_head.weight": ("head", 1),
        "model.norm.weight": ("vector", 1),
        "model.layers.*.input_layernorm.weight": ("vector", 2),
        "model.layers.*.post_attention_layernorm.weight": ("vector", 2),
    }  # fmt: skip


def test_a_kind_without_an_entry_has_its_largest(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in tensors.items():
        if "down_proj" in name:
            value.mul_(1000)
        if "v_proj" in name:
            value.mul_(1e-3)
    save_file(tensors, file)
    stages = []
    ranking = rank(folder, 3, progress=lambda *stage: stages.append(stage))
    assert ranking.shares() == [{"top": 3} | {k: float(k == "down") for k in ranking.kinds}]
    for row in ranking.layers():
        part = next(part for part, kind in KIND.items() if kind == row["kind"])
        own = [v for n, v in tensors.items() if f"layers.{row['layer']}." in n and part in n]
        assert row["largest"] == own[0].abs().max().item()
    assert stages[0] == ("ranking", 0, 1) and stages[-1][1] == stages[-1][2]


def test_some_kinds_alone(folder):
    expected = by_hand(load_file(folder / "model.safetensors"), ("down", "q"))
    for modules in (["down", "q"], ("q", "down")):
        ranking = rank(folder, 90, modules=modules)
        assert places(ranking) == expected[:90] and ranking.kinds == ("q", "down")
    assert rank(folder, 5, modules="down").kinds == ("down",)
    why = {entry.why for entry in ranking.left_out}
    assert why == {"not asked for", "embedding", "head", "vector"}


# Dense, fused and transposed; encoder and decoder; experts that are split, fused, stacked, or have
# other names in the files than in the model.
LAYOUTS = ("llama", "phi3", "gpt2", "t5", "gpt_neox", "mixtral", "qwen2_moe", "granitemoe",
           "gpt_oss", "llama4", "jetmoe", "dbrx", "aria", "nemotron_h", "switch_transformers",
           "longcat_flash")  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_and_models_agree_and_coordinates_find_the_entries(name, tmp_path):
    """The coordinates, by the names of the model, lead back to the values that were ranked."""
    model = tiny_model(name)
    with torch.no_grad():
        for projection in find_down_projections(model):
            projection.weight.mul_(3)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    of_files, of_model = rank(tmp_path, 200), rank(model, 200)
    assert torch.equal(of_files.value, of_model.value)
    fused = {"gate": "gate_up", "up": "gate_up"}  # split in the files, fused in the model
    for a, b in zip(of_files.rows(), of_model.rows()):
        assert (a["layer"], a["expert"], a["column"]) == (b["layer"], b["expert"], b["column"])
        assert a["kind"] == b["kind"] or fused[a["kind"]] == b["kind"]
    for ranking in (of_files, of_model):
        down = ranking.coordinates(kinds="down")
        assert down == of_model.coordinates(kinds="down", model=model)
        values = sorted(entry.value for entry in Edits(model, down).entries)
        assert values == sorted(r["value"] for r in ranking.rows() if r["kind"] == "down")
        named = ranking.coordinates(strict=False)
        found = sorted(entry.value for entry in Edits(model, named).entries)
        assert set(found) <= set(ranking.value.tolist())
        if not any(p.fused for p in of_model.matrices):
            assert found == sorted(ranking.value.tolist())


def test_planted_entries_have_their_rows_and_columns(tmp_path):
    """Conv1D and experts [E, H, D] are stored with input channels first."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[70, 5] = 9.0  # [input, output]
        model.transformer.h[2].attn.c_proj.weight[3, 8] = -8.0
    model.save_pretrained(tmp_path / "gpt2")
    experts = tiny_model("gpt_oss")
    with torch.no_grad():
        experts.model.layers[1].mlp.experts.down_proj[3, 70, 5] = 9.0
    experts.save_pretrained(tmp_path / "gpt_oss")
    stacked = tiny_model("dbrx")
    with torch.no_grad():
        stacked.transformer.blocks[1].ffn.experts.mlp.w2[3 * 48 + 40, 5] = 9.0
        stacked.transformer.blocks[0].ffn.experts.mlp.v1[2 * 48 + 7, 9] = 8.0
    keys = ("layer", "kind", "expert", "row", "column", "value")
    for source in (model, tmp_path / "gpt2"):
        first, second = ([row[key] for key in keys] for row in rank(source, 2).rows())
        assert first == [1, "down", None, 5, 70, 9.0] and second == [2, "o", None, 8, 3, -8.0]
    for source in (experts, tmp_path / "gpt_oss"):
        assert [rank(source, 1).rows()[0][key] for key in keys] == [1, "down", 3, 5, 70, 9.0]
    first, second = ([row[key] for key in keys] for row in rank(stacked, 2).rows())
    assert first == [1, "down", 3, 5, 40, 9.0] and second == [0, "up", 2, 7, 9, 8.0]


def test_coordinates_without_a_config_or_with_a_model(tmp_path):
    """GPT-2 on the hub has no "transformer." in its names."""
    model = tiny_model("gpt2")
    bare = {key.removeprefix("transformer."): value.clone()
            for key, value in model.state_dict().items() if key != "lm_head.weight"}  # fmt: skip
    save_file(bare, tmp_path / "model.safetensors")
    ranking = rank(tmp_path, 50)
    assert all(site.name.startswith("h.") for site in ranking.coordinates().weights)
    named = ranking.coordinates(model=model)
    assert named == rank(model, 50).coordinates()
    model.config.save_pretrained(tmp_path)
    assert rank(tmp_path, 50).coordinates() == named
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    assert rank(tmp_path, 50).coordinates() == ranking.coordinates()


def test_weights_on_several_devices_are_merged(monkeypatch):
    """Of equal magnitudes the first comes first, whichever device it is on."""

    class Elsewhere:
        def __init__(self, values, device):
            self.values, self.device = values, torch.device(device)

    def of_one_device(given, k, backend):
        assert len({entry.device for entry in given}) == 1
        return topk_abs([entry.values for entry in given], k, backend=backend)

    monkeypatch.setattr("swkernels.evidence.rank.topk_abs", of_one_device)
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randint(-9, 10, (6, 5), generator=generator).float() for _ in range(5)]
    placed = [Elsewhere(m, device) for m, device in zip(matrices, ("cuda:1", "cpu", "cuda:0") * 2)]
    flat = [(-abs(value), n, row, column, value) for n, m in enumerate(matrices)
            for (row, column), value in np.ndenumerate(m.numpy())]  # fmt: skip
    for k in (1, 20, 150):
        value, *place = _largest([None] * 5, placed, k, None)
        found = list(zip(*(part.tolist() for part in place), value.tolist()))
        assert found == [entry[1:] for entry in sorted(flat)[:k]]


def test_choosing_coordinates(folder):
    ranking = rank(folder, 60)
    rows = ranking.rows()
    some = ranking.coordinates(20, ["down", "up"])
    expected: dict[str, list] = {}
    for row in rows[:20]:
        if row["kind"] in ("down", "up"):
            expected.setdefault(row["name"], []).append([row["row"], row["column"]])
    assert some == Coordinates.of(expected, make_model())
    assert len(ranking.coordinates()) == 60
    for n in (0, -1, True, 2.0):
        with pytest.raises(InvalidInput, match="expected n from 1 to 60"):
            ranking.coordinates(n)
    with pytest.raises(InvalidInput, match="expected kinds of q, k, v"):
        ranking.coordinates(kinds="downs")
    with pytest.raises(InvalidInput, match="no coordinate"):
        ranking.coordinates(kinds="gate_up")


def test_entries_without_a_name_are_an_error_unless_they_may_be_left_out():
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1, 2, 3] = 50.0
    ranking = rank(model, 30)
    with pytest.raises(InvalidInput, match="no coordinates can name .*gate_up_proj"):
        ranking.coordinates()
    named = ranking.coordinates(strict=False)
    assert len(named) == sum(row["kind"] != "gate_up" for row in ranking.rows()) > 0


def test_kept_rankings(folder, kept, monkeypatch):
    first = rank(folder, 40)
    (file,) = kept.iterdir()
    content = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("swkernels.evidence.rank.topk_abs", None)  # what is kept needs no look
        again = rank(str(folder), 40)
        assert again.to_dict() == first.to_dict() | {"model": str(folder)}
        assert again.coordinates() == first.coordinates()
        with pytest.raises(TypeError):
            rank(folder, 40, cache=False)
        with pytest.raises(TypeError):
            rank(folder, 41)
        with pytest.raises(TypeError):
            rank(folder, 40, modules="down")
        patch.setattr(rank_cache, "__version__", "0")
        with pytest.raises(TypeError):
            rank(folder, 40)
    other = content.replace(b'"row": [', b'"row": [1', 1)
    listed = json.dumps([])
    own = json.dumps({"sha256": hashlib.sha256(listed.encode()).hexdigest(), "ranking": []})
    twice = content.replace(b"{", b'{"sha256": "", ', 1)
    deep = b"[" * 100_000
    for damaged in (b"", b"{", b"[]", b"{}", content[:-30], other, own.encode(), twice, deep):
        file.write_bytes(damaged)
        assert rank(folder, 40).to_dict() == first.to_dict()
        assert file.read_bytes() == content  # made anew
    file.unlink()
    os.mkfifo(file)  # one that is opened as a file waits for a writer
    assert rank(folder, 40).to_dict() == first.to_dict()
    assert file.read_bytes() == content
    assert [entry.name for entry in kept.iterdir()] == [file.name]


def test_other_values_or_times_are_another_checkpoint(folder, kept):
    file = folder / "model.safetensors"
    first = rank(folder, 5)
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 77.0  # the header stays as it is
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(0, 12345))
    changed = rank(folder, 5)
    assert changed.value[0] == 77.0 and first.value[0] < 77 and len(list(kept.iterdir())) == 2


def test_a_folder_that_cannot_be_written_keeps_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWKERNELS_CACHE", str(tmp_path / "file"))
    assert len(rank(folder, 5)) == 5
    assert rank_cache.cache_directory() == tmp_path / "file" / "rank"
    monkeypatch.delenv("SWKERNELS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rank_cache.cache_directory() == tmp_path / ".cache" / "swkernels" / "rank"


def test_documents_tables_and_figures(folder, tmp_path):
    ranking = rank(folder, 200)
    ranking.save(tmp_path / "rank.json")
    document = json.loads((tmp_path / "rank.json").read_text())
    assert document["schema"] == "swkernels.rank/1" and document["k"] == 200
    entries = document["entries"]
    for place, row in enumerate(ranking.rows()):
        matrix = document["matrices"][entries["matrix"][place]]
        assert matrix["name"] == f"{row['name']}.weight" and matrix["kind"] == row["kind"]
        assert entries["row"][place] == row["row"] and entries["value"][place] == row["value"]
    frame = ranking.to_dataframe()
    assert list(frame["rank"]) == list(range(1, 201))
    assert list(frame.columns) == ["rank", "name", "layer", "kind", "expert", "row", "column",
                                   "value"]  # fmt: skip
    ranking.plot(tmp_path / "rank.svg")
    assert "<svg" in (tmp_path / "rank.svg").read_text()
    rank(tiny_model("t5"), 9).plot(tmp_path / "two_stacks.png")
    assert (tmp_path / "two_stacks.png").read_bytes()[:4] == b"\x89PNG"


def refused(*args, **kwargs) -> str:
    with pytest.raises(InvalidInput) as caught:
        rank(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nan_is_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file)
    assert "model.layers.1.self_attn.v_proj.weight holds NaN at [3, 4]" in refused(folder)
    assert len(rank(folder, 9, modules="down")) == 9
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[1, 7, 5] = torch.nan
    message = refused(model)
    assert "model.layers.2.mlp.experts.down_proj expert 1 holds NaN at [5, 7]" in message


def test_infinity_is_the_largest(folder):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 2] = -torch.inf
    ranking = rank(model, 4)
    assert ranking.value[0] == -torch.inf and ranking.rows()[0]["row"] == 1
    ranking.plot(folder / "rank.png")


@pytest.mark.parametrize(
    "names",
    [
        {"q_proj.qweight": torch.int32},
        {"q_proj.weight": torch.uint8},
        {"q_proj.weight": torch.int8},
        {"q_proj.weight": torch.float8_e4m3fn, "q_proj.weight_scale_inv": torch.float32},
        {"q_proj.weight": torch.float32, "q_proj.weight.absmax": torch.float32},
        {"q_proj.weight": torch.float32, "q_proj.weight.quant_state.bitsandbytes__nf4": torch.int8},
        {"q_proj.packed_codes": torch.uint8},
    ],
)
def test_packed_codes_are_never_ranked(tmp_path, names):
    tensors = {f"model.layers.0.self_attn.{name}": torch.ones(4, 4).to(dtype)
               for name, dtype in names.items()}  # fmt: skip
    save_file(tensors | {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)},
              tmp_path / "a.safetensors")  # fmt: skip
    message = refused(tmp_path)
    assert "packed" in message and "pass the model" in message


def test_experts_that_are_packed(tmp_path):
    tensors = {"model.layers.0.mlp.experts.down_proj_blocks": torch.ones(2, 4, 4).byte(),
               "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    assert "is of a packed weight" in refused(tmp_path)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_quantized_model_is_refused(name):
    model = tiny_model(name)
    quantize(model, QuantConfig(block_size="tensor"), progress=False)
    assert "of a packed weight" in refused(model)


def test_an_adapted_model_ranks_the_weights_below_its_adapters():
    model = make_model()
    expected = rank(model, 50)
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj", "q_proj"]))
    ranking = rank(adapted, 50)
    assert torch.equal(ranking.value, expected.value)
    assert "other" in {entry.why for entry in ranking.left_out}
    for named in (ranking.coordinates(), ranking.coordinates(model=adapted)):
        values = [entry.value for entry in Edits(adapted, named).entries]
        assert sorted(values) == sorted(expected.value.tolist())


def test_bad_input(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(folder)
    assert "packed by bitsandbytes" in message and "pass the model" in message
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "load the model" in refused(tmp_path / "a.gguf")
    assert "no such file or folder" in refused(tmp_path / "gone")
    assert "expected a model or a checkpoint, got int" in refused(5)
    model = make_model()
    for k in (0, -3, True, 2.0):
        assert "k must be an integer from 1" in refused(model, k)
    assert "expected kinds of q, k" in refused(model, modules=["down", "dwon"])
    assert "got none" in refused(model, modules=[])
    assert "holds no gate_up" in refused(model, modules="gate_up")
    assert "holds no projection" in refused(torch.nn.Linear(3, 3))
    assert "up_proj" in refused(model.to("meta"), modules="up")
    assert len(rank(make_model(), 10**9)) == 2 * (4 * 32 * 32 + 3 * 32 * 48)
