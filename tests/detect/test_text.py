"""Texts, and how they become samples of token ids."""

from __future__ import annotations

import json
import platform

import pytest

from swkernels.detect import text
from swkernels.errors import InvalidInput
from tests.cli.checkpoints import BOS, EOS, TEXT, make_tokenizer


def samples_of(given, tokenizer=None, *, samples=3, length=6, special_tokens="none"):
    made = text.make_samples(
        given,
        tokenizer or make_tokenizer(),
        samples=samples,
        length=length,
        special_tokens=special_tokens,
    )
    assert all(sample.dim() == 1 and str(sample.dtype) == "torch.int64" for sample in made)
    return [sample.tolist() for sample in made]


def ids_of(given):
    return make_tokenizer()(given, add_special_tokens=False)["input_ids"]


def test_default_text_is_prose_and_the_same_each_time():
    prose = text.default_text()
    assert prose == text.default_text()
    assert len(prose.split()) > 8 * 512 * 2  # more than a default scan and its evaluation take
    paragraphs = prose.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(p.endswith(".") and "::=" not in p and ">>>" not in p for p in paragraphs)
    assert platform.python_version() in text.DEFAULT_SOURCE


def test_grammar_code_and_headings_are_not_prose():
    sentence = "An assignment evaluates the expression list and then assigns the object to it all."
    assert text._is_prose(sentence)
    for other in (
        "   " + sentence,
        'The "assert" statement\n**********************',
        "* " + sentence,
        sentence[:-1] + ":",
        "Too short.",
        "A_STMT ::= " + sentence,
    ):
        assert not text._is_prose(other)


def test_windows_cut_the_stream():
    stream = ids_of(TEXT * 3)
    assert samples_of(TEXT * 3) == [stream[0:6], stream[6:12], stream[12:18]]


def test_texts_are_one_stream():
    assert samples_of([TEXT, "", TEXT * 2]) == samples_of(TEXT * 3)


def test_no_more_samples_than_the_text_gives():
    stream = ids_of(TEXT)  # 15 tokens
    assert samples_of(TEXT, samples=9, length=4)[-1] == stream[12:]
    assert len(samples_of(TEXT, samples=9, length=4)) == 4


def test_a_last_window_of_one_token_is_dropped_unless_it_is_the_only_one():
    assert len(ids_of(TEXT)) == 15
    assert [len(s) for s in samples_of(TEXT, samples=9, length=7)] == [7, 7]
    assert samples_of("the", length=7) == [ids_of("the")]
    assert len(samples_of(TEXT, samples=99, length=1)) == 15


def test_a_long_text_gives_the_same_windows_as_all_of_it():
    long = TEXT * 500
    stream = ids_of(long)
    made = samples_of(long, samples=5, length=100)
    assert [i for sample in made for i in sample] == stream[:500]
    wide = "   ".join(["the" + " " * 200] * 90)  # few tokens a character: more text must be read
    assert [len(s) for s in samples_of(wide, samples=2, length=40)] == [40, 40]


def test_as_the_tokenizer_does():
    stream = ids_of(TEXT)
    assert samples_of(TEXT, special_tokens="tokenizer") == [
        [BOS, *stream[0:5]],
        [BOS, *stream[5:10]],
        [BOS, *stream[10:15]],
    ]
    silent = make_tokenizer(adds_bos=False)
    assert samples_of(TEXT, silent, special_tokens="tokenizer") == samples_of(TEXT)


def test_what_the_tokenizer_adds_at_the_end_is_kept():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(adds_bos=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    first, *_ = samples_of(TEXT, tokenizer, special_tokens="tokenizer")
    assert first == [BOS, *ids_of(TEXT)[:4], EOS]


def test_force_puts_a_bos_once_or_an_eos():
    stream = ids_of(TEXT)
    silent = make_tokenizer(adds_bos=False)
    assert samples_of(TEXT, silent, special_tokens="force")[1] == [BOS, *stream[5:10]]
    assert samples_of(TEXT, special_tokens="force")[1] == [BOS, *stream[5:10]]
    eos_only = make_tokenizer(adds_bos=False, bos=False)
    assert samples_of(TEXT, eos_only, special_tokens="force")[0] == [EOS, *stream[:5]]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("", {}, "empty"),
        (" \n ", {}, "empty"),
        ([], {}, "empty"),
        (["", " "], {}, "empty"),
        ("\u200b", {"tokenizer": "silent"}, "shorter than one token"),
        (TEXT, {"special_tokens": "always"}, "unknown policy 'always'"),
        (TEXT, {"special_tokens": "tokenizer", "length": 1}, "no room"),
        (TEXT, {"special_tokens": "force", "tokenizer": "nothing"}, "neither a BOS nor an EOS"),
    ],
)
def test_what_cannot_be_sampled(given, options, message):
    tokenizer = make_tokenizer(adds_bos=False, bos=False, eos=False)
    if options.get("tokenizer") == "silent":
        from tokenizers.normalizers import Replace, Sequence, Strip

        normalizer = Sequence([Replace("\u200b", ""), Strip()])
        tokenizer.backend_tokenizer.normalizer = normalizer
    elif "tokenizer" not in options:
        tokenizer = make_tokenizer()
    rest = {k: v for k, v in options.items() if k != "tokenizer"}
    with pytest.raises(InvalidInput, match=message) as caught:
        samples_of(given, tokenizer, **rest)
    assert "\n" not in str(caught.value)


def test_read_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffnaïve".encode())
    assert text.read_text(path) == "naïve"


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\x00", "not UTF-8"), (b" \n", "empty"), (None, "cannot")]
)
def test_unreadable_text(tmp_path, content, message):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as caught:
        text.read_text(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_datasets_on_disk(tmp_path):
    lines = tmp_path / "d.jsonl"
    lines.write_text('{"text": "one"}\n\n{"text": "two\\u2028", "other": 1}\n', encoding="utf-8")
    assert text.read_dataset(str(lines)) == ["one", "two\u2028"]
    plain = tmp_path / "d.txt"
    plain.write_text("one two", encoding="utf-8")
    assert text.read_dataset(str(plain)) == ["one two"]


@pytest.mark.parametrize("line", ["not json", json.dumps({"body": "a"}), '{"text": 3}', "[1]"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "one"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InvalidInput, match="line 2"):
        text.read_dataset(str(path))


def test_bad_datasets(tmp_path, monkeypatch):
    import sys

    empty = tmp_path / "d.jsonl"
    empty.write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(InvalidInput, match="no text"):
        text.read_dataset(str(empty))
    with pytest.raises(InvalidInput, match="expected a .txt or .jsonl"):
        text.read_dataset(str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidInput, match=r"swkernels\[datasets\]"):
        text.read_dataset("some/name")


def test_a_hugging_face_dataset_through_the_library(monkeypatch):
    import sys
    import types

    calls = []

    def load_dataset(path, configuration, *, split, streaming):
        calls.append((path, configuration, split, streaming))
        if path == "gone":
            raise ConnectionError("no network\nat all")
        return iter([{"text": "one"}, {"text": "two"}] if path == "a/b" else [{"body": "x"}])

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert text.read_dataset("a/b:small") == ["one", "two"]
    assert calls == [("a/b", "small", "train", True)]
    with pytest.raises(InvalidInput, match="cannot load the data set gone: no network;"):
        text.read_dataset("gone")
    with pytest.raises(InvalidInput, match="no column"):
        text.read_dataset("c/d")
