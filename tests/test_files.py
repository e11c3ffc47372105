"""JSON that others wrote: what is refused, in one line and without cost, and what is read."""

from __future__ import annotations

import json
import math
import os
import tracemalloc

import pytest

from swkernels.documents import (
    COUNT,
    FLAG,
    MAGNITUDE,
    NUMBER,
    Either,
    Fields,
    Integer,
    ListOf,
    MapOf,
    Maybe,
    Number,
    OneOf,
    Row,
    Text,
    check_document,
)
from swkernels.errors import InvalidInput
from swkernels.files import Limits, open_regular, parse_json, read_json


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(InvalidInput) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message


@pytest.mark.parametrize(
    "value",
    [{}, [], None, True, 0, -1, 2**63, 1.5, 1e308, -1e-300, "é\u202e\x00", "", "\U0001f600",
     {"a": {"b": [1, 2, {"c": '"\\[{'}]}, "": "\\"}, ["\\\"", "\\\\", "[" * 100]],
)  # fmt: skip
def test_json_is_read_as_the_library_reads_it(value, tmp_path):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(text.encode(), "it") == value
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        (tmp_path / "link.json").unlink(missing_ok=True)
        (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
        assert read_json(tmp_path / "link.json") == read_json(str(tmp_path / "a.json")) == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1,]", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b'"', "Unterminated string"),
        (b'"\\', "Unterminated string"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), "can't decode"),
        (b'"\xff"', "can't decode"),
        (b'"\xed\xa0\x80"', "can't decode"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'{"\\uDFFF": 1}', "surrogates not allowed"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' twice"),
        (b'{"\x1b": 1}', "Invalid control character"),
        (b'{"\\u001b": 1, "\\u001b": 1}', r"the key '\x1b' twice"),
        (b"NaN", "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"1e999", "the number 1e999 is out of range"),
        (b"-1e999", "out of range"),
        (b"1." + b"1" * 1000, "out of range"),
        (b"9" * 5000, "has 5000 digits"),
        (b"[" * 33 + b"]" * 33, "nested deeper than 32"),
        (b"[" * 10**6, "nested deeper than 32"),
        (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested deeper than 32"),
    ],
)
def test_what_is_no_json_of_ours(data, reason, tmp_path):
    assert reason in refused(parse_json, data, "it")
    (tmp_path / "a.json").write_bytes(data)
    assert reason in refused(read_json, tmp_path / "a.json")


def test_the_limits():
    limits = Limits(size=40, depth=3, values=6)
    for data in (b"[" + b" " * 38 + b"]", b"[[[]]]", b"[1,2,3,4,5,6]", b'{"[[[[": "{,,,,,,,,{"}'):
        parse_json(data, "it", limits=limits)
    for data, reason in (
        (b"[" + b" " * 39 + b"]", "more than 40 bytes"),
        (b"[[[[]]]]", "deeper than 3"),
        (b"[[],[[[]]]]", "deeper than 3"),
        (b"[1,2,3,4,5,6,7]", "more than 6 values"),
        (b'["\\\\",1,2,3,4,5,6]', "more than 6 values"),
        (b'["\\"",1,2,3,4,5,6]', "more than 6 values"),
    ):
        assert reason in refused(parse_json, data, "it", limits=limits)
    deep = b"[" * 32 + b'"[[\\"["' + b"]" * 32
    assert parse_json(deep, "it") is not None


def test_special_numbers_only_where_they_are_asked_for():
    data = b"[NaN, Infinity, -Infinity, 1e999, 0.5, -0]"
    found = parse_json(data, "it", special=True)
    assert math.isnan(found[0]) and found[1:5] == [math.inf, -math.inf, math.inf, 0.5]
    assert isinstance(found[5], float) and math.copysign(1, found[5]) == -1  # not the integer 0
    refused(parse_json, data, "it")


def test_hostile_texts_cost_no_more_than_a_few_times_their_size():
    """Nesting, quotes, escapes and digits without end: refused before anything is built."""
    size = 1 << 20
    limits = Limits(size=2 * size, depth=32, values=1000)
    texts = (b"[" * size, b"[]," * (size // 3), b'"' * size, b'"' + b"\\" * size,
             b'"' + b'\\"' * (size // 2), b'["' + b'","' * (size // 3), b"1" * size,
             b"[" + b"1e9," * (size // 4), b'{"a":' * (size // 5))  # fmt: skip
    for text in texts:
        tracemalloc.start()
        refused(parse_json, text, "it", limits=limits)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 12 * size, text[:8]


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path, "/dev/zero", "/dev/null"):
        assert "a regular file" in refused(read_json, path)  # and does not hang
        assert "a regular file" in refused(open_regular, path)
    assert "No such file" in refused(read_json, tmp_path / "gone")
    assert "symbolic links" in refused(read_json, tmp_path / "loop")
    assert "null byte" in refused(read_json, "a\0b")
    (tmp_path / "long").write_bytes(b" " * 100)
    assert "more than 99 bytes" in refused(
        read_json, tmp_path / "long", limits=Limits(size=99, depth=1, values=1)
    )


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (COUNT, (0, 2**63 - 1), (-1, 2**63, True, 1.0, "1", None)),
        (Integer(1, 3), (1, 3), (0, 4)),
        (NUMBER, (0, -1.5, math.inf, math.nan), (True, "1", None, [])),
        (Number(0, 1), (0, 0.5, 1, math.nan), (-0.1, 1.1, math.inf)),
        (Number(0, special=False), (0, 1e300), (math.nan, math.inf, -1)),
        (MAGNITUDE, (0, math.inf), (-1,)),
        (FLAG, (True, False), (0, 1, None)),
        (Text(3, 1), ("a", "abc"), ("", "abcd", None, 1)),
        (OneOf(("a", "b")), ("a",), ("c", 1, ["a"], None)),
        (Maybe(COUNT), (None, 1), ("", -1)),
        (Either((COUNT, Text())), (1, "a"), (None, -1)),
        (ListOf(COUNT, 1, 2), ([1], [1, 2]), ([], [1, 2, 3], ["a"], (1,), {})),
        (Row((COUNT, Text())), ([1, "a"],), ([1], ["a", 1], [1, "a", 2])),
        (MapOf(COUNT), ({}, {"a": 1}), ({"a": -1}, [], None)),
        (Fields({"a": COUNT}, {"b": FLAG}), ({"a": 1}, {"a": 1, "b": True, "z": []}),
         ({}, {"a": None}, {"a": 1, "b": 1}, [], None)),
    ],
)  # fmt: skip
def test_each_kind_of_field(schema, good, bad):
    for value in good:
        check_document(value, schema, "it")
    for value in bad:
        assert refused(check_document, value, schema, "it").startswith("it is damaged: expected")


def test_a_message_says_where_and_what():
    schema = Fields({"sets": ListOf(Fields({"row": Maybe(COUNT)}))})
    message = refused(check_document, {"sets": [{"row": 1}, {"row": "\x1b[31m"}]}, schema, "f.json")
    assert "at sets[1].row, got '\\x1b[31m'" in message
    message = refused(check_document, {"sets": [{"\x1b": 1}]}, schema, "f.json")
    assert "expected the field row at sets[0], got only '\\x1b'" in message
    message = refused(check_document, {"a\nb": "x" * 10**6}, MapOf(COUNT), "f.json")
    assert "at 'a\\nb', got 'xxx" in message
