"""Weight changes against their definitions, from models, state dicts and checkpoints."""

from __future__ import annotations

import copy
import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections
from swkernels.train import Coordinates, Site, weight_change
from swkernels.train.sparse import sparse
from tests.models.tiny import H, I, tiny_model

MODULE = sys.modules["swkernels.train.weight_change"]  # of that name the package has the function

STATES = ("before", "after", "delta")


def by_definition(before: np.ndarray, after: np.ndarray, row: int, column: int) -> dict:
    """The figures of one coordinate, one entry at a time."""
    delta = after - before
    w, change = before[row, column], abs(delta[row, column])
    figures = {
        "row": row, "column": column, "before": w, "after": after[row, column],
        "delta": delta[row, column], "absolute": change,
        "relative": 0.0 if change == 0 else math.inf if w == 0 else change / abs(w),
    }  # fmt: skip
    D, columns = before.shape
    for state, values in zip(STATES, (np.abs(before), np.abs(after), np.abs(delta))):
        v = values[row, column]
        below = sum(bool(e < v) for e in values.ravel())
        equal = sum(bool(e == v) for e in values.ravel())
        near = [
            values[i, j]
            for i in range(max(row - 1, 0), min(row + 2, D))
            for j in range(max(column - 1, 0), min(column + 2, columns))
            if (i, j) != (row, column)
        ]
        mean = sum(near) / len(near) if near else math.nan
        figures[f"percentile_{state}"] = 100 * (below + (equal + 1) / 2) / values.size
        figures[f"local_maximum_{state}"] = all(v > e for e in near)
        ratio = v / mean if mean else math.inf if v else math.nan
        figures[f"neighbor_ratio_{state}"] = ratio
    return figures


def assert_close(row: dict, expected: dict, rel: float = 1e-6) -> None:
    """The same keys, numbers but for rounding, and everything else equal."""
    assert row.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=rel, nan_ok=True)
        assert row[key] == value, key


def everything(shape: tuple[int, int], name: str = "w") -> Coordinates:
    D, columns = shape
    return Coordinates.random({name: shape}, D * columns)


matrices = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))


@settings(deadline=None)
@given(matrices, st.sampled_from([1, 4, 1 << 22]), st.sampled_from(["float64", "float32"]))
def test_every_figure_is_its_definition(size, chunk, dtype):
    """Small whole numbers, so that zeros and ties are frequent and float32 is exact."""
    D, columns, seed = size
    generator = np.random.default_rng(seed)
    before, after = generator.integers(-3, 4, (2, D, columns)).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "_CHUNK", chunk)
        sources = ({"w.weight": torch.from_numpy(m)} for m in (before, after))
        rows = weight_change(*sources, everything((D, columns))).rows
    assert len(rows) == D * columns
    for row in rows:
        expected = by_definition(before.astype(float), after.astype(float),
                                 row["row"], row["column"])  # fmt: skip
        assert_close(row, {"name": "w", "expert": None} | expected)
        assert all(type(row[f"local_maximum_{state}"]) is bool for state in STATES)


def planted() -> tuple[dict, dict, Coordinates]:
    """Ten entries of 2.0 in a weight of ones; each moves by another eighth."""
    before = torch.ones(40, 50, dtype=torch.float64)
    place = torch.arange(10) * 4 + 1
    before[place, place] = 2.0
    after = before.clone()
    after[place, place] += torch.arange(10) * 0.125
    c = Coordinates.of({"w": torch.stack([place, place], 1)}, {"w": (40, 50)})
    return {"w.weight": before}, {"w.weight": after}, c


def test_summary():
    s = weight_change(*planted(), threshold=0.25).summary
    relative = np.arange(10) / 16
    assert (s["coordinates"], s["weights"], s["threshold"]) == (10, 1, 0.25)
    assert s["relative"] == pytest.approx(
        {
            "mean": 0.28125,
            "median": 0.28125,
            "max": 0.5625,
            "cv": relative.std() / relative.mean(),
            "share_above": 0.5,  # 0.3125 to 0.5625; 0.25 itself is not above
        }
    )
    absolute = {"mean": 0.5625, "median": 0.5625, "max": 1.125, "cv": s["relative"]["cv"]}
    assert s["absolute"] == pytest.approx(absolute)
    assert s["magnitude"] == pytest.approx({"before": 2.0, "after": 2.5625, "change": 0.28125})
    assert s["local_maximum"] == {"before": 1.0, "after": 1.0, "delta": 0.9}
    assert s["neighbor_ratio"]["before"] == pytest.approx(2.0)
    assert s["neighbor_ratio"]["after"] == pytest.approx(2.5625)
    assert s["percentile"]["before"] == pytest.approx(100 * (1990 + 5.5) / 2000)
    assert s["percentile"]["after"] == pytest.approx(100 * (1990 + 5.5) / 2000)


def test_pruning_as_in_the_paper():
    """Table 10: every change is 100 %, and their coefficient of variation is 0."""
    before, _, c = planted()
    after = {"w.weight": before["w.weight"].clone()}
    after["w.weight"][tuple(c.weights[Site("w")].long().unbind(1))] = 0
    s = weight_change(before, after, c).summary["relative"]
    assert s == {"mean": 1.0, "median": 1.0, "max": 1.0, "cv": 0.0, "share_above": 1.0}


def test_nothing_changed():
    before, _, c = planted()
    change = weight_change(before, before, c)
    assert change.summary["relative"]["max"] == 0 and change.summary["relative"]["share_above"] == 0
    assert math.isnan(change.summary["relative"]["cv"])
    assert {row["percentile_delta"] for row in change.rows} == {100 * 2001 / 4000}
    assert not any(row["local_maximum_delta"] for row in change.rows)


def test_not_a_number_is_seen_and_does_not_spread():
    before, after, c = planted()
    after["w.weight"][1, 1] = math.nan
    rows = weight_change(before, after, c).rows
    assert math.isnan(rows[0]["relative"]) and math.isnan(rows[0]["percentile_after"])
    assert not rows[0]["local_maximum_after"]
    assert rows[0]["percentile_before"] == pytest.approx(99.775)
    # The NaN ranks above the nine others, and is no neighbour of theirs.
    assert rows[9]["percentile_after"] == pytest.approx(100 * 1999 / 2000)
    assert rows[9]["neighbor_ratio_after"] == pytest.approx(3.125)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_read_as_it_is(dtype):
    before, after, c = planted()
    low = [{"w.weight": source["w.weight"].to(dtype)} for source in (before, after)]
    wide = [{"w.weight": source["w.weight"].double()} for source in low]
    a, b = weight_change(*low, c), weight_change(*wide, c)
    for x, y in zip(a.rows, b.rows):
        assert_close(x, y)
    for x, y in zip(weight_change(low[0], wide[1], c).rows, b.rows):
        assert_close(x, y)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, "10 %", None, True])
def test_bad_threshold(threshold):
    with pytest.raises(InvalidInput, match="threshold"):
        weight_change(*planted(), threshold=threshold)


# Where the weights come from


def trained(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model and the same with every down projection changed a little."""
    before = tiny_model(name)
    after = copy.deepcopy(before)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in find_down_projections(after):
            p.weight.add_(torch.randn(p.weight.shape, generator=generator), alpha=1e-3)
    return before, after


# Dense; transposed; experts [E, D, H], [E, H, D], stacked; experts that are modules; and those
# whose names on disk differ: Mixtral, Qwen, GraniteMoE, Aria.
LAYOUTS = ("llama", "gpt2", "mixtral", "qwen2_moe", "gpt_oss", "dbrx", "jetmoe", "granitemoe",
           "aria", "llama4", "switch_transformers", "deepseek_v3")  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_models_state_dicts_and_checkpoints_agree(name, tmp_path):
    before, after = trained(name)
    c = Coordinates.random(before, 40, seed=2)
    change = weight_change(before, after, c)
    old = {p.name: p for p in find_down_projections(before)}
    new = {p.name: p for p in find_down_projections(after)}
    assert len(change.rows) == 40
    for row in change.rows:
        place = row["row"], row["column"]
        for key, model in (("before", old), ("after", new)):
            assert row[key] == model[row["name"]].matrix(row["expert"])[place].item()
    assert change == weight_change(before.state_dict(), after.state_dict(), c)
    for model, folder in ((before, "before"), (after, "after")):
        model.save_pretrained(tmp_path / folder, max_shard_size="40KB")
    assert len(list((tmp_path / "after").glob("*.safetensors"))) > 1
    assert change == weight_change(tmp_path / "before", str(tmp_path / "after"), c)
    assert change == weight_change(before, tmp_path / "after", c)


def test_one_file_and_a_folder_without_an_index(tmp_path):
    before, after = trained("llama")
    c = Coordinates.random(before, 20)
    expected = weight_change(before, after, c)
    tensors = {key: value.contiguous() for key, value in after.state_dict().items()}
    names = sorted(tensors)
    save_file(tensors, tmp_path / "whole.safetensors")
    assert weight_change(before, tmp_path / "whole.safetensors", c) == expected
    (tmp_path / "parts").mkdir()
    for part in range(3):
        some = {name: tensors[name] for name in names[part::3]}
        save_file(some, tmp_path / "parts" / f"{part}.safetensors")
    assert weight_change(before, tmp_path / "parts", c) == expected


def test_only_the_named_tensors_are_read(tmp_path, monkeypatch):
    import safetensors

    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    read = []

    class Watched:
        def __init__(self, *args):
            self._file = open_(*args)

        def __enter__(self):
            self._file = self._file.__enter__()
            return self

        def __exit__(self, *exception):
            return self._file.__exit__(*exception)

        def keys(self):
            return self._file.keys()

        def get_slice(self, key):
            return Slice(key, self._file.get_slice(key))

        def get_tensor(self, key):
            read.append(key)
            return self._file.get_tensor(key)

    class Slice:
        def __init__(self, key, inner):
            self._key, self._inner = key, inner

        def __getitem__(self, index):
            part = self._inner[index]
            read.extend([self._key] if part.numel() else [])
            return part

        def __getattr__(self, name):
            return getattr(self._inner, name)

    open_ = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    c = Coordinates.of({("model.layers.1.mlp.experts", 2): [[0, 1]],
                        "model.layers.0.self_attn.q_proj": [[3, 3]]}, model)  # fmt: skip
    weight_change(tmp_path, tmp_path, c)
    assert sorted(read) == 2 * ["model.layers.0.self_attn.q_proj.weight"] + 2 * [
        "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    ]


def test_square_weights_of_gpt2_are_transposed():
    """Attention's c_proj is [32, 32]: only the biases of other layers say that it is Conv1D."""
    before, after = trained("gpt2")
    name = "transformer.h.0.attn.c_proj"
    with torch.no_grad():
        after.get_submodule(name).weight[3, 9] += 1.0  # [input, output]
    c = Coordinates.of({name: [[9, 3], [3, 9]]}, before)
    for sources in ((before, after), (before.state_dict(), after.state_dict())):
        deltas = {row["row"]: row["delta"] for row in weight_change(*sources, c).rows}
        assert deltas == {9: pytest.approx(1.0), 3: 0.0}
    linear = tiny_model("phi")  # with biases, and not transposed
    name = "model.layers.0.self_attn.q_proj"
    changed = {key: value.clone() for key, value in linear.state_dict().items()}
    changed[f"{name}.weight"][9, 3] += 1.0
    rows = weight_change(linear, changed, Coordinates.of({name: [[9, 3]]}, linear)).rows
    assert rows[0]["delta"] == pytest.approx(1.0)


def test_square_experts_need_the_model():
    before = tiny_model("gpt_oss", intermediate_size=H)
    c = Coordinates.random(before, 5)
    assert weight_change(before, before, c).summary["absolute"]["max"] == 0
    with pytest.raises(InvalidInput, match=r"transposed.*give the model"):
        weight_change(before, before.state_dict(), c)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_names_with_and_without_the_models_prefix(name):
    before, after = trained(name)
    c = Coordinates.random(before, 20)
    expected = weight_change(before, after, c)
    bare = after.model.state_dict()  # "layers.0...." for "model.layers.0...."
    assert weight_change(before, bare, c) == expected
    longer = {f"wrapped.{key}": value for key, value in after.state_dict().items()}
    assert weight_change(before, longer, c) == expected


def test_names_of_one_layer_alone_mean_no_layer():
    before = tiny_model("llama")
    c = Coordinates.of({"model.layers.1.mlp.down_proj": [[0, 0]]}, before)
    mlp = {f"mlp.{key}": value for key, value in before.model.layers[0].mlp.state_dict().items()}
    with pytest.raises(InvalidInput, match=r"no model\.layers\.1\.mlp\.down_proj"):
        weight_change(before, mlp, c)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_deltas_that_are_not_merged_count(name):
    before, model = tiny_model(name), tiny_model(name)
    c = Coordinates.random(model, 30, seed=3)
    handle = sparse(model, c)
    with torch.no_grad():
        for values in handle.parameters():
            values.normal_()
    change = weight_change(before, model, c)
    deltas = torch.cat([values.detach() for values in handle.values().values()])
    found = torch.tensor([row["delta"] for row in change.rows])
    assert torch.allclose(found, deltas, atol=1e-6)
    with handle.disable():
        assert weight_change(before, model, c).summary["absolute"]["max"] == 0
    handle.merge()
    for merged, live in zip(weight_change(before, model, c).rows, change.rows):
        assert_close(merged, live)
    assert max(row["percentile_delta"] for row in change.rows) == 100


def test_bad_sources(tmp_path):
    model = tiny_model("llama")
    c = Coordinates.random(model, 5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "index").mkdir()
    index = tmp_path / "index" / "model.safetensors.index.json"
    for source, words in (
        (tmp_path / "none.safetensors", "cannot read"),
        (tmp_path / "empty", "no .safetensors"),
        (tmp_path / "text.safetensors", "not a readable safetensors"),
        (5, "got int"),
        ({}, r"the state dict has no model\.layers"),
    ):
        with pytest.raises(InvalidInput, match=words) as error:
            weight_change(model, source, c)
        assert "\n" not in str(error.value)
    for weight_map in (None, [1], {"a": 5}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InvalidInput, match="index.json is unreadable"):
            weight_change(tmp_path / "index", model, c)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InvalidInput, match="gone.safetensors is missing"):
        weight_change(tmp_path / "index", model, c)
    with pytest.raises(InvalidInput, match="Coordinates"):
        weight_change(model, model, {"a": [[0, 0]]})


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda w: w[:-1], "coordinates are for"),
        (lambda w: w.to(torch.int8), "packed"),
        (lambda w: w.to(torch.float8_e4m3fn), "packed"),
        (lambda w: w.to("meta"), "meta"),
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_bad_tensors(tmp_path, spoil, words, on_disk):
    model = tiny_model("llama")
    name = "model.layers.1.mlp.down_proj"
    source = {key: value.clone() for key, value in model.state_dict().items()}
    source[f"{name}.weight"] = spoil(source[f"{name}.weight"])
    if on_disk:
        if words == "meta":
            pytest.skip("a file holds no meta tensor")
        save_file(source, tmp_path / "model.safetensors")
        source = tmp_path
    with pytest.raises(InvalidInput, match=words):
        weight_change(model, source, Coordinates.of({name: [[0, 0]]}, model))


def test_another_model():
    model, other = tiny_model("llama"), tiny_model("llama", intermediate_size=96)
    c = Coordinates.random(model, 5)
    with pytest.raises(InvalidInput, match=rf"\[{H}, 96\].*\[{H}, {I}\]"):
        weight_change(model, other, c)
    with pytest.raises(InvalidInput, match=r"no down projection.*experts expert"):
        mixtral = tiny_model("mixtral")
        weight_change(mixtral, model.state_dict(), Coordinates.random(mixtral, 5))
    with pytest.raises(InvalidInput, match="meta"):
        weight_change(model, tiny_model("llama").to("meta"), c)


# Table and plot


def printed(change, **keywords) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(change.table(**keywords))
    return console.file.getvalue()


def test_table_says_what_the_summary_says():
    change = weight_change(*planted(), threshold=0.25)
    text = printed(change)
    assert "Change of 10 coordinates in 1 weights" in text and "above 25 %" in text
    line = next(line.split() for line in text.splitlines() if line.split()[:1] == ["relative"])
    assert line[1:] == ["28.1", "%", "28.1", "%", "56.2", "%", "0.64", "50", "%"]
    line = next(line.split() for line in text.splitlines() if "mean magnitude" in line)
    assert line[2:] == ["2", "2.562", "+28.1", "%"]
    listed = [line for line in text.splitlines() if line.split()[:1] == ["w"]]
    assert "[37, 37]" in listed[0] and "[1, 1]" in listed[-1] and len(listed) == 10
    text = printed(change, limit=3)
    assert "the 3 largest changes" in text and "[33, 33]" in text and "[25, 25]" not in text
    assert "[37, 37]" not in printed(change, limit=0)


def test_table_of_experts_and_names_that_look_like_markup():
    model = tiny_model("mixtral")
    text = printed(weight_change(model, model, Coordinates.random(model, 3)), limit=3)
    assert "experts expert " in text
    c = Coordinates.of({"[red]w": [[0, 0]]}, {"[red]w": (1, 1)})
    source = {"[red]w.weight": torch.ones(1, 1)}
    assert "[red]w" in printed(weight_change(source, source, c))


def test_table_fits_100_columns_and_shows_nan_first():
    before, after, c = planted()
    after["w.weight"][1, 1] = math.nan
    text = printed(weight_change(before, after, c), limit=1)
    assert "[1, 1]" in text and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("suffix, head", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_plot_writes_the_format_of_the_suffix(tmp_path, suffix, head):
    path = tmp_path / f"change.{suffix}"
    weight_change(*planted()).plot(path)
    assert path.read_bytes().startswith(head)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_plot_of_any_change(tmp_path):
    before, after, c = planted()
    nothing = weight_change(before, before, c, threshold=0)
    after["w.weight"][1, 1] = math.inf
    for change in (nothing, weight_change(before, after, c)):
        change.plot(tmp_path / "change.svg")
        assert "</svg>" in (tmp_path / "change.svg").read_text()
    change.plot(str(tmp_path / "again.svg"))


def test_plot_needs_no_display_and_leaves_no_state(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, torch; from swkernels.train import Coordinates, weight_change\n"
        "assert not {'rich', 'matplotlib'} & set(sys.modules)\n"
        "w = {'w.weight': torch.ones(2, 2)}\n"
        "c = Coordinates.of({'w': [[0, 1]]}, {'w': (2, 2)})\n"
        f"weight_change(w, w, c).plot({str(tmp_path / 'x.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_headless()
    )
    assert run.returncode == 0, run.stderr


def _headless() -> dict:
    import os

    return {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}


def test_bad_plot_paths(tmp_path):
    change = weight_change(*planted())
    with pytest.raises(InvalidInput, match=".png, .svg or .pdf"):
        change.plot(tmp_path / "change.gif")
    with pytest.raises(InvalidInput, match="cannot write"):
        change.plot(tmp_path / "none" / "change.png")


def test_the_real_model_with_its_super_weights_scaled(smollm2, smollm2_path):
    """The checkpoint on disk against the model, two published weights scaled by 1.25."""
    model, _ = smollm2
    c = Coordinates.from_catalogue("SmolLM2-135M-Instruct", model)
    (site,) = c.weights
    state = dict(model.state_dict())
    state[f"{site.name}.weight"] = state[f"{site.name}.weight"].clone()
    state[f"{site.name}.weight"][tuple(c.weights[site].long().unbind(1))] *= 1.25
    change = weight_change(smollm2_path, state, c)
    assert change.summary["relative"]["mean"] == pytest.approx(0.25, rel=1e-3)
    assert change.summary["local_maximum"] == {"before": 1.0, "after": 1.0, "delta": 1.0}
    assert change.summary["percentile"]["before"] > 99.99
    assert change.summary["neighbor_ratio"]["before"] > 10
    whole = weight_change(smollm2_path, model, c)
    assert whole.summary["absolute"]["max"] == 0
