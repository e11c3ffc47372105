"""Reading multiple choice: every form, and every mistake by file and line."""

from __future__ import annotations

import json
import sys

import pytest

from swkernels.errors import InvalidInput
from swkernels.evidence.tasks import Item, read_task

PUBLISHED = {
    "id": "Q1",
    "question": {
        "stem": "Which is a planet?",
        "choices": [{"text": "the Sun", "label": "A"}, {"text": "Mars", "label": "B"}],
    },
    "answerKey": "B",
}
ON_THE_HUB = {
    "id": "Q1",
    "question": "Which is a planet?",
    "choices": {"text": ["the Sun", "Mars"], "label": ["1", "2"]},
    "answerKey": "2",
}
WINOGRANDE = {
    "qID": "W-1",
    "sentence": "Sarah beat Maria so _ got the_cup. ",
    "option1": "Sarah",
    "option2": "Maria",
    "answer": "1",
}
PLAIN = {"context": "two and two is", "choices": ["three", "four", "five"], "answer": 1}


def write(folder, *rows):
    path = folder / "quiz.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_form_becomes_the_prompts_of_lm_eval(tmp_path):
    path = write(tmp_path, PUBLISHED, ON_THE_HUB, "", WINOGRANDE, "  ", PLAIN)
    task = read_task(path)
    assert (task.name, task.source) == ("quiz", str(path))
    arc = Item("Q1", ("Question: Which is a planet?\nAnswer:",), (" the Sun", " Mars"), 1)
    assert task.items == (
        arc,
        arc,
        Item(
            "W-1",
            ("Sarah beat Maria so Sarah", "Sarah beat Maria so Maria"),
            (" got the_cup.", " got the_cup."),
            0,
        ),
        Item("line 6", ("two and two is",), (" three", " four", " five"), 1),
    )
    assert task.items[2].pairs[1] == ("Sarah beat Maria so Maria", " got the_cup.")
    assert task.items[3].pairs[2] == ("two and two is", " five")


def test_a_limit_reads_no_further_and_a_name_is_taken(tmp_path):
    task = read_task(write(tmp_path, PLAIN, PUBLISHED, "not JSON"), limit=2, name="mine")
    assert task.name == "mine" and len(task.items) == 2
    with pytest.raises(InvalidInput, match="limit must be at least 1 item, got 0"):
        read_task(tmp_path / "quiz.jsonl", limit=0)


def changed(row, **fields):
    return {key: value for key, value in (row | fields).items() if value is not None}


def asked(**fields):
    return PUBLISHED | {"question": changed(PUBLISHED["question"], **fields)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected ARC"),
        ({"text": "a"}, "expected ARC"),
        (asked(stem=None), "question is missing or no str"),
        (asked(choices=None), "choices with text is missing or no list"),
        (asked(choices=["a", "b"]), "choices with text is missing or no list"),
        (asked(choices=[{"label": "B"}, {"label": "C"}]), "choices that are strings"),
        (asked(choices=[{"text": "Mars", "label": "B"}]), "expected 2 choices at least, got 1"),
        (changed(PUBLISHED, answerKey=None), "answerKey is missing or no str"),
        (changed(PUBLISHED, answerKey="E"), r"answerKey 'E' is none of the labels \['A', 'B'\]"),
        (changed(ON_THE_HUB, choices=["a", "b"]), "choices with text is missing or no list"),
        (changed(ON_THE_HUB, choices={"text": ["a", "b"]}), "choices with label is missing"),
        (
            changed(ON_THE_HUB, choices={"text": ["a", "b"], "label": ["2"]}),
            "2 choices have 1 labels",
        ),
        (changed(WINOGRANDE, option2=None), "option2 is missing or no string"),
        (changed(WINOGRANDE, answer=""), "answer is missing or no string"),
        (changed(WINOGRANDE, answer="3"), 'expected the answer "1" or "2", got \'3\''),
        (changed(WINOGRANDE, sentence="no gap"), 'expected a sentence with a "_"'),
        (changed(WINOGRANDE, sentence="the end is _ "), 'expected a sentence with a "_"'),
        (changed(PLAIN, choices=None), "choices is missing or no list"),
        (changed(PLAIN, choices=["a"], answer=0), "expected 2 choices at least, got 1"),
        (changed(PLAIN, choices=["a", ""]), "strings and not empty"),
        (changed(PLAIN, answer=3), "answer 3 is none of the choices 0 to 2"),
        (changed(PLAIN, answer=-1), "answer -1 is none of the choices 0 to 2"),
        (changed(PLAIN, answer=True), "answer is missing or no int"),
        (changed(PLAIN, answer="1"), "answer is missing or no int"),
        (PLAIN | {"context": None}, "context is missing or no str"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path, row, message):
    path = write(tmp_path, PLAIN, "", row)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_task(path)
    assert f"{path}, line 3: " in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_task(tmp_path):
    for content, message in ((b"", "holds no item"), (b"\n \n", "holds no item")):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(InvalidInput, match=message):
            read_task(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "caf\xe9"}')
    with pytest.raises(InvalidInput, match="not UTF-8"):
        read_task(tmp_path / "latin.jsonl")
    with pytest.raises(InvalidInput, match="cannot read the task .*missing.jsonl"):
        read_task(tmp_path / "missing.jsonl")
    (tmp_path / "task.csv").write_text("a,b")
    with pytest.raises(InvalidInput, match="expected a .jsonl file or a Hugging Face data set"):
        read_task(tmp_path / "task.csv")


def test_a_data_set_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        if name == "none":
            raise FileNotFoundError("no such data set\nand more")
        return [ON_THE_HUB, WINOGRANDE | {"answer": ""}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = read_task("allenai/ai2_arc:ARC-Easy@test", limit=1)
    assert task.name == task.source == "allenai/ai2_arc:ARC-Easy@test"
    assert task.items[0].continuations == (" the Sun", " Mars")
    with pytest.raises(InvalidInput, match="allenai/winogrande, row 2: answer is missing"):
        read_task("allenai/winogrande")
    with pytest.raises(InvalidInput, match="cannot load the data set none: no such data set;"):
        read_task("none")
    assert asked == [
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        ("allenai/winogrande", None, "validation"),
        ("none", None, "validation"),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidInput, match=r"there is no file other.*swkernels\[datasets\]"):
        read_task("other")
