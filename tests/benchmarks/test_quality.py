"""The study of quality: its cells, its record, its page and plot."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import quality, records, report, tables
from benchmarks.models import quant_quality
from benchmarks.quality import CLIP, LARGEST, PLAIN, PRESERVE, Cell, Study, Table
from swkernels.detect.perplexity import Perplexity
from swkernels.errors import InvalidInput
from tests.models.tiny import VOCABULARY, tiny_model

STUDY = Study("a model", "a text", 8, 2, 3, 4096, (9.0, None), 32)
ABOUT = {"time": "2026-12-01T10:00:00+00:00", "commit": "c" * 40, "modified": False}


def cell(key, *losses):
    return Cell(key, Perplexity(losses, (7, 7), 8, 8), None, 4, ABOUT)


def table(*cells):
    return Table(STUDY, [cell(None, 14.0, 15.0), *cells])


def test_round_trip(tmp_path):
    path = tmp_path / "quality" / "model.jsonl"
    assert quality.read(path) is None and quality.read_all(tmp_path) == {}
    written = table(cell((4, 64, PLAIN), 14.5, 15.5), cell((8, "tensor", PRESERVE), 14.0, 15.1))
    written.write(path)
    (found,) = quality.read_all(tmp_path).values()
    assert found.study == STUDY and found.cells == written.cells
    ratio, error = found.ratio((4, 64, PLAIN))
    assert ratio == pytest.approx(torch.tensor(1 / 14).exp().item()) and error < 1e-6
    assert [entry.name for entry in path.parent.iterdir()] == ["model.jsonl"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "other/1"}, "line 2.*schema"),
        ({"bits": 3}, "line 2.*unknown cell"),
        ({"block": 65}, "line 2.*unknown cell"),
        ({"method": "magic"}, "line 2.*unknown cell"),
        ({"losses": [1.0]}, "line 2.*1 losses"),
        ({"z": [9.0]}, "line 2.*another study"),
    ],
)
def test_a_broken_line_is_named(tmp_path, change, says):
    path = tmp_path / "model.jsonl"
    table(cell((4, 64, PLAIN), 14.5, 15.5)).write(path)
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + json.dumps(json.loads(second) | change) + "\n")
    with pytest.raises(InvalidInput, match=says):
        quality.read(path)
    path.write_text(second + "\n")
    with pytest.raises(InvalidInput, match="lacks the original"):
        quality.read(path)


def test_what_the_page_says_of_the_cells():
    found = table(
        cell((4, 64, PLAIN), 20.0, 21.0), cell((4, 64, PRESERVE), 15.0, 16.1),
        cell((8, 64, PLAIN), 14.0, 15.0), cell((8, 64, PRESERVE), 14.1, 15.1),
        cell((8, 256, PLAIN), 14.0, 15.0), cell((8, 256, PRESERVE), 14.0, 15.0),
    )  # fmt: skip
    *_, said = tables._quality(found)
    assert "*preserve* is better in 1 of 3 cells, most with 4 bits and blocks of 64 (x0.4" in said
    assert "and worse in 1, with 8 bits and blocks of 64 (x1.01" in said
    assert "*preserve, largest* is better in 0 of 0 cells, and worse in 0." in said


@pytest.fixture
def place(tmp_path):
    """A record, a README with the markers, and a function that runs the report on them."""
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    cells = [cell((4, block, PLAIN), 15.0, 16.0) for block in quality.BLOCKS]
    table(*cells).write(tmp_path / "results" / "quality" / "model.jsonl")

    def run(*options):
        names = {"results": "results", "readme": "README.md", "output": "RESULTS.md"}
        given = [f"--{name}={tmp_path / path}" for name, path in names.items()]
        return report.main([*given, *options])

    return tmp_path, run


def test_the_page_and_the_plot_come_from_the_record(place):
    folder, run = place
    assert run() == 0 and run("--check") == 0
    page, readme = ((folder / name).read_text() for name in ("RESULTS.md", "README.md"))
    assert "## a model, quantized" in page and "4-bit file" in page
    assert "| 4 | 64 | 9.155 (x1.154 +- " in page and ") | not measured |" in page
    assert "results/quality/model.svg" in readme
    picture = folder / "results" / "quality" / "model.svg"
    first = picture.read_bytes()
    record = picture.with_suffix(".jsonl")
    record.write_text(record.read_text().replace("a model", "another"))
    assert run("--check") == 1
    assert run() == 0 and picture.read_bytes() == first
    picture.unlink()
    assert run("--check") == 1


class Tokenizer:
    """Characters as tokens."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study on a tiny model with one super weight, and its options."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = 50.0
    monkeypatch.setattr(quant_quality, "_load", lambda: (tiny_model_of(model), Tokenizer()))
    listed = {"model.layers.1.mlp.down_proj": [[3, 5]]}
    monkeypatch.setattr(quant_quality.smollm2, "SUPER_WEIGHTS", listed)
    monkeypatch.setattr(quality, "BLOCKS", (64, quality.TENSOR))
    text = tmp_path / "text"
    text.write_text("abcdefghijklmnopqrstuvwxyz " * 40)
    path = tmp_path / "quality" / "tiny.jsonl"
    options = ["--data", str(text), "--windows", "3", "--window", "32", "-o", str(path), "--z", "9"]
    return model, options, path


def tiny_model_of(model):
    """A copy: the study changes weights in place."""
    copy = tiny_model("llama")
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_study_that_was_interrupted_goes_on(small, monkeypatch):
    _, options, path = small
    real, calls = quant_quality.perplexity, []

    def interrupted(*args, **keywords):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    monkeypatch.setattr(quant_quality, "perplexity", interrupted)
    assert quant_quality.main(options) == 130
    assert list(quality.read(path).cells) == [None, (4, 64, PLAIN), (4, 64, CLIP)]
    assert quant_quality.main(options) == 0
    whole = quality.read(path)
    assert len(whole.cells) == 1 + 2 * 2 * 4 and len(calls) == len(whole.cells) + 1
    assert quant_quality.main(options) == 0 and len(calls) == len(whole.cells) + 1
    path.unlink()
    assert quant_quality.main(options) == 0  # in one go it is the same
    assert {k: c.measured for k, c in quality.read(path).cells.items()} == {
        k: c.measured for k, c in whole.cells.items()
    }


def test_what_a_cell_keeps_and_that_it_helps(small):
    model, options, path = small
    assert quant_quality.main(options) == 0
    found = quality.read(path)
    assert (found.study.matrices, found.study.windows) == (3 * 7, 3)
    kept = {key[2]: cell.kept for key, cell in found.cells.items() if key}
    matrices = found.study.matrices
    assert (kept[PLAIN], kept[CLIP], kept[PRESERVE]) == (0, 0, 1)
    assert matrices * quant_quality.KEPT <= kept[LARGEST] <= matrices * quant_quality.KEPT + 1
    # One element a hundred times the others: the whole tensor is rounded to 0 with it, not without.
    change = {
        method: abs(found.ratio((4, quality.TENSOR, method))[0] - 1) for method in (PLAIN, PRESERVE)
    }
    assert change[PRESERVE] < change[PLAIN]


def test_windows_are_spread_over_the_text():
    tokens = torch.arange(100)
    chosen = quant_quality.spread(tokens, 3, 10).view(3, 10)
    assert chosen[:, 0].tolist() == [0, 30, 60]
    assert (chosen.diff(dim=1) == 1).all()
    others = quant_quality.spread(tokens, 3, 10, 1)
    assert not set(others.tolist()) & set(chosen.view(-1).tolist())
    for count in (1, 6):
        with pytest.raises(InvalidInput, match="to 5 windows of 10 tokens"):
            quant_quality.spread(tokens, count, 10)


def test_the_clip_is_chosen_on_other_windows(small, monkeypatch):
    _, options, path = small
    real, seen = quant_quality.perplexity, []

    def noted(model, tokens, **keywords):
        seen.append(tuple(tokens.tolist()))
        return real(model, tokens, **keywords)

    monkeypatch.setattr(quant_quality, "perplexity", noted)
    assert quant_quality.main([*options[:-1], "0.1", "none"]) == 0
    found = quality.read(path)
    assert found.study.z == (0.1, None)
    clips = {key: cell.clip for key, cell in found.cells.items() if key}
    assert all(clip is None for (_, _, method), clip in clips.items() if method == PLAIN)
    assert clips[8, 64, CLIP] is None  # cutting half of the weights helps no 8-bit code
    texts = {text: seen.count(text) for text in seen}
    assert sorted(texts.values()) == [1 + 2 * 2 * 4, 2 * 2 * 2 * 3]


def test_bad_input_is_said_in_a_line(small, capsys):
    _, options, path = small
    assert quant_quality.main([*options, "--data", "nowhere.txt"]) == 2
    assert "--data or SWKERNELS_WIKITEXT2" in capsys.readouterr().err.replace("\n", " ")
    table().write(path)
    assert quant_quality.main(options) == 2
    assert "another study" in capsys.readouterr().err


def test_the_record_that_is_kept_shows_what_preserving_is_for():
    """Never worse than plain beyond noise, and a gap that opens as blocks grow."""
    (found,) = quality.read_all(records.RESULTS).values()
    assert len(found.cells) == 1 + 2 * len(quality.BLOCKS) * len(quality.METHODS)

    def over_plain(bits, block, method):
        return found.ratio((bits, block, method), (bits, block, PLAIN))

    for bits in quality.BITS:
        for block in quality.BLOCKS:
            ratio, error = over_plain(bits, block, LARGEST)
            assert ratio <= 1 + 3 * error, (bits, block)
    large = [over_plain(4, block, PRESERVE) for block in (65536, 262144, quality.TENSOR)]
    assert large[0][0] + 3 * large[0][1] < 1
    assert large[2][0] < large[1][0] < large[0][0]
