"""The head of a GGUF file: counts and lengths that the file has no room for are refused at once."""

from __future__ import annotations

import struct

import pytest

from swkernels.errors import InvalidInput
from swkernels.models.gguf_head import check_gguf_head


def text(value: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}Q", len(value)) + value


def head(pairs: bytes, infos: bytes, tensors: int, fields: int, order: str = "<") -> bytes:
    return b"GGUF" + struct.pack(f"{order}IQQ", 3, tensors, fields) + pairs + infos


def whole(order: str = "<") -> bytes:
    array = struct.pack(f"{order}IIQ", 9, 8, 2) + text(b"a", order) + text(b"", order)
    pairs = text(b"general.name", order) + struct.pack(f"{order}I", 8) + text(b"model", order)
    pairs += text(b"tokens", order) + array
    pairs += text(b"scores", order) + struct.pack(f"{order}IIQ3f", 9, 6, 3, 1, 2, 3)
    pairs += text(b"layers", order) + struct.pack(f"{order}II", 4, 7)
    info = text(b"w", order) + struct.pack(f"{order}IQQIQ", 2, 4, 2, 0, 0)
    return head(pairs, info, 1, 4, order) + bytes(64)


def refused(path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        check_gguf_head(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_byte_orders_are_walked(tmp_path):
    for order in "<>":
        (tmp_path / "a.gguf").write_bytes(whole(order))
        check_gguf_head(tmp_path / "a.gguf")


def test_every_truncation_of_the_head_is_refused(tmp_path):
    data = whole()[:-64]
    for length in range(len(data)):
        assert "is not a GGUF file" in refused(tmp_path / "a.gguf", data[:length])


def test_counts_that_lie(tmp_path):
    file = tmp_path / "a.gguf"
    name = text(b"k")
    for data, reason in (
        (head(b"", b"", 2**63, 0), "no room for 9223372036854775808 tensors"),
        (head(b"", b"", 0, 2**40), "no room for 0 tensors and 1099511627776 fields"),
        (head(struct.pack("<QQ", 2**62, 0), b"", 0, 1), "a key of 4611686018427387904 bytes"),
        (head(name + struct.pack("<IIQ", 9, 6, 2**61), b"", 0, 1), "more than 4000000 values"),
        (head(name + struct.pack("<IIQ", 9, 6, 1000), b"", 0, 1), "an array of 4000 bytes"),
        (head(name + struct.pack("<IIQ", 9, 9, 1), b"", 0, 1), "unknown kind 9"),
        (head(name + struct.pack("<IQ", 99, 1), b"", 0, 1), "unknown kind 99"),
        (head(b"", name + struct.pack("<I", 2**31) + bytes(40), 1, 0), "2147483648 dimensions"),
        (head(b"", name + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0), 1, 0), "2^63 elements"),
        (head(b"", name + struct.pack("<IQIQ", 1, 4, 0, 2**40), 1, 0), "a tensor begins"),
        (head(b"", struct.pack("<Q", 5000) + bytes(6000), 1, 0), "name has 5000 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "expected version 2 or 3, got 1"),
    ):
        assert reason in refused(file, data)
    with pytest.raises(InvalidInput, match="No such file"):
        check_gguf_head(tmp_path / "gone.gguf")
    with pytest.raises(InvalidInput, match="a regular file"):
        check_gguf_head(tmp_path)
