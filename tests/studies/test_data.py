"""The data of studies: layouts of a folder, data sets of the Hub, and every mistake in one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types

import pytest

from swkernels.errors import InvalidInput
from swkernels.studies.data import LESS, NAMES, PARTS, TEXT, Data
from tests.studies.tiny import write_data

TASKS = [part for part in PARTS if part != TEXT]
LINE = {"context": "two and two is", "choices": ["three", "four"], "answer": 1}
GAP = {"sentence": "one _ two", "option1": "a", "option2": "b", "answer": "2"}


def question(n: int) -> dict:
    return LINE | {"context": f"question {n}"}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("part", [part for part in TASKS if part not in LESS])
def test_a_folder_may_be_laid_out_as_it_is_published_or_plainly(tmp_path, part):
    names, _ = PARTS[part]
    for number, name in enumerate(reversed(names)):  # the first name of a part comes first
        write(tmp_path / name, *(question(n) for n in range(number + 2)))
        task = Data(tmp_path).task(part)
        assert task.source == str(tmp_path / name) and len(task.items) == number + 2
        assert task.name == NAMES.get(part, part)


@pytest.mark.parametrize("name", PARTS[TEXT][0])
def test_a_text_is_read_as_it_stands(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf = A title = \n \n Gr\xc3\xbc\xc3\x9fe \n")
    assert Data(tmp_path).text == " = A title = \n \n Grüße \n"


def test_the_first_questions_are_taken_and_read_once(tmp_path):
    data = Data(write_data(tmp_path / "data"))
    whole = data.task("arc/train")
    shutil.rmtree(tmp_path / "data")
    assert data.task("arc/train", 5).items == whole.items[:5] and len(whole.items) == 12
    assert data.task("arc/train", None) == data.task("arc/train", 99) == whole


def test_held_out_questions_are_not_trained_on(tmp_path):
    small = write(tmp_path / "winogrande/train_s.jsonl", question(1), question(2))
    large = write(tmp_path / "winogrande/train_m.jsonl", *map(question, range(5)))
    data = Data(tmp_path)
    assert data.task("winogrande/train").source == str(small)
    held_out = data.task("winogrande/dev")
    assert [item.contexts for item in held_out.items] == [(f"question {n}",) for n in (0, 3, 4)]
    assert held_out.source == str(large) and len(data.task("winogrande/dev", 2).items) == 2


def test_held_out_questions_come_from_another_file_where_there_is_one(tmp_path):
    write(tmp_path / "winogrande/train_m.jsonl", question(1))
    message = "every question of .*train_m.jsonl is in .*train_m.jsonl, which is trained on"
    with pytest.raises(InvalidInput, match=message):
        Data(tmp_path).task("winogrande/dev")
    write(tmp_path / "winogrande/train_l.jsonl", question(1), question(2))
    assert Data(tmp_path).task("winogrande/dev").items[0].contexts == ("question 2",)


@pytest.mark.parametrize("part", PARTS)
def test_a_file_that_is_not_there_is_named(tmp_path, part):
    names, dataset = PARTS[part]
    with pytest.raises(InvalidInput) as caught:
        Data(tmp_path).check([part])
    said = str(caught.value)
    assert said.startswith(f"{tmp_path} has no ") and dataset in said and "\n" not in said
    assert all(name in said for name in names)


def test_a_folder_that_is_none(tmp_path):
    for path in (tmp_path / "missing", write(tmp_path / "file", LINE)):
        with pytest.raises(InvalidInput, match=f"^expected a folder .*{re.escape(str(path))}$"):
            Data(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question": "which", "answerKey": "A"}, "line 2: choices with text is missing"),
        ({"context": "x", "answer": 0}, "line 2: choices is missing or no list"),
        ({"text": "x"}, "line 2: expected ARC"),
        (LINE | {"answer": 2}, "line 2: answer 2 is none of the choices"),
        (GAP | {"sentence": "no gap"}, 'line 2: expected a sentence with a "_"'),
    ],
)
def test_a_wrong_column_is_told_with_file_and_line_before_anything_is_run(tmp_path, line, says):
    folder = write_data(tmp_path / "data")
    path = write(folder / "arc/test.jsonl", LINE, line, LINE)
    with pytest.raises(InvalidInput, match=f"^{re.escape(str(path))}, {re.escape(says)}"):
        Data(folder).check([TEXT, "arc/train", "arc/test"])
    Data(folder).check([TEXT, "arc/train"])  # what is not needed is not read


@pytest.mark.parametrize(
    ("content", "part", "says"),
    [
        (b"caf\xe9 \xff", TEXT, r"text.txt is not UTF-8 text \(byte 3\)"),
        (b'{"context": "caf\xe9"}\n', "arc/test", "test.jsonl is not UTF-8 text"),
        (b"", TEXT, "text.txt is empty"),
        (b" \n\n", TEXT, "text.txt is empty"),
        (b"", "arc/test", "test.jsonl holds no item"),
        (b"\n \n", "arc/test", "test.jsonl holds no item"),
        (b'{"context": "x"', "arc/test", "test.jsonl, line 1: not JSON"),
    ],
)
def test_damaged_and_empty_files(tmp_path, content, part, says):
    folder = write_data(tmp_path / "data")
    (folder / ("text.txt" if part == TEXT else f"{part}.jsonl")).write_bytes(content)
    with pytest.raises(InvalidInput, match=says) as caught:
        Data(folder).check([part])
    assert "\n" not in str(caught.value)


def test_a_digest_is_that_of_the_content(tmp_path):
    folder = write_data(tmp_path / "data")
    parts = [TEXT, "arc/train", "arc/test", "winogrande/test"]
    before = {part: Data(folder).digest(part) for part in parts}
    assert len(set(before.values())) == len(parts)
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in before.values())

    moved = shutil.copytree(folder, tmp_path / "moved")
    path = moved / "arc/test.jsonl"
    path.write_text(path.read_text().replace(", ", " ,  ") + "\n")  # the same questions
    assert {part: Data(moved).digest(part) for part in parts} == before

    rows = [json.loads(line) for line in (folder / "arc/test.jsonl").read_text().splitlines()]
    rows[7]["answer"] = (rows[7]["answer"] + 1) % 4
    write(folder / "arc/test.jsonl", *rows)
    (folder / "text.txt").write_text((folder / "text.txt").read_text() + ".")
    after = {part: Data(folder).digest(part) for part in parts}
    assert {part for part in parts if after[part] != before[part]} == {TEXT, "arc/test"}


def test_a_digest_takes_any_text(tmp_path):
    write(tmp_path / "arc/test.jsonl", LINE | {"context": "\ud800"})
    assert len(Data(tmp_path).digest("arc/test")) == 16


@pytest.fixture
def hub(monkeypatch):
    """Data sets by name, configuration and split; what is asked for is noted."""
    rows, asked = {}, []

    def load_dataset(name, configuration, *, split):
        asked.append(f"{name}:{configuration}@{split}")
        return rows.get(asked[-1], [])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return rows, asked


def test_without_a_folder_data_sets_of_the_hub_are_taken(hub):
    rows, asked = hub
    for part in TASKS:
        rows[PARTS[part][1]] = [question(n) for n in range(2 + (part in LESS))]
    # The Hub has the lines of the file, blank ones empty.
    rows[PARTS[TEXT][1]] = [{"text": text} for text in ("", " = A = \n", "", " Of it . \n")]
    data = Data()
    data.check([TEXT, *TASKS])
    data.check([TEXT, *TASKS])
    assert sorted(asked) == sorted(dataset for _, dataset in PARTS.values())  # each once
    assert data.text == " \n = A = \n \n Of it . \n"
    assert data.task("arc/test").source == "allenai/ai2_arc:ARC-Easy@test"
    assert [item.contexts for item in data.task("winogrande/dev").items] == [("question 2",)]


def test_data_sets_of_the_hub_that_hold_something_else(hub):
    rows, _ = hub
    rows[PARTS[TEXT][1]] = [{"texts": "a"}]
    with pytest.raises(InvalidInput, match="wikitext-2-raw-v1@test has no column .* text$"):
        Data().check([TEXT])
    rows[PARTS["arc/test"][1]] = [LINE, {"context": "x", "answer": 0}]
    with pytest.raises(InvalidInput, match="ARC-Easy@test, row 2: choices is missing"):
        Data().check(["arc/test"])
    with pytest.raises(InvalidInput, match="ARC-Easy@train holds no item"):
        Data().check(["arc/train"])


def test_an_empty_text_of_the_hub(hub):
    with pytest.raises(InvalidInput, match="wikitext-2-raw-v1@test holds no text"):
        Data().check([TEXT])


def test_no_network_and_no_library(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to the Hub\nand more")

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    for part in (TEXT, "arc/test"):
        with pytest.raises(InvalidInput, match="cannot load the data set .*no route to the Hub;"):
            Data().check([part])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidInput, match=r"swkernels\[datasets\]"):
        Data().check([TEXT])
