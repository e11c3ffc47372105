"""The header of a safetensors file, checked as strictly as the safetensors library does or more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from swkernels.errors import InvalidInput
from swkernels.files import Limits, open_regular, parse_json

# 100 MB is the limit of the safetensors library; an entry of the header has about 9 values.
LIMITS = Limits(size=100_000_000, depth=4, values=4_000_000)
METADATA = "__metadata__"
_MOST_DIMENSIONS = 64
_MOST = 2**63 - 1  # elements and bytes, which PyTorch counts in int64
# Bits of an element, by every dtype that the format knows.
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8,
    "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """A header that was checked.

    Attributes:
        raw: its bytes; the data begin at byte 8 + len(raw).
        tensors: ``dtype``, ``shape`` and ``data_offsets`` of each tensor, in the header's order.
        metadata: what the file says of itself.
    """

    raw: bytes
    tensors: dict[str, dict]
    metadata: dict[str, str]


def load_header(file: Path) -> Header:
    """Read and check a safetensors header, and that the file has just the data it describes.

    The format: 8 bytes, little-endian, the header's length n; n bytes of JSON; the data, to which
    the header's ``data_offsets`` refer (github.com/huggingface/safetensors, README).

    Raises:
        InvalidInput: no such regular file, another format, truncated, or an entry that is wrong.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length) if 2 <= length <= min(LIMITS.size, size - 8) else b""
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror or error}") from error
    unreadable = f"{file} is not a readable safetensors file ({size} bytes)"
    if len(raw) < 2 or len(raw) != length:
        raise InvalidInput(f"{unreadable}: download it again")
    try:
        document = parse_json(raw, f"the header of {file}", limits=LIMITS)
    except InvalidInput as error:
        raise InvalidInput(f"{unreadable}: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"{unreadable}: its header is no object; download it again")
    metadata = document.pop(METADATA, {})
    try:
        _check_metadata(metadata)
        ranges = [_check_entry(name, entry) for name, entry in document.items()]
        end = _check_cover(ranges)
    except ValueError as error:
        raise InvalidInput(f"{file} is damaged: {error}; download it again") from error
    expected = 8 + length + end
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise InvalidInput(
            f"{file} is {state}: expected {expected} bytes, got {size}; download it again"
        )
    return Header(raw, document, metadata)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{METADATA} is no object of texts")


def _check_entry(name: str, entry: object) -> tuple[int, int, str]:
    """Check one tensor's entry; return the range of its bytes and its name."""
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.200} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name!r:.200} has the unknown dtype {dtype!r:.80}")
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name!r:.200} has the shape {shape!r:.80}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r:.200} has the data_offsets {offsets!r:.80}")
    elements, bits = 1, _BITS[dtype]
    for extent in shape:
        elements *= max(extent, 1)
        if elements * bits > 8 * _MOST:
            raise ValueError(f"{name!r:.200} has the shape {shape!r:.80}, more than 2^63 bytes")
    wanted = 0 if 0 in shape else elements * bits
    if wanted != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{name!r:.200} is {dtype} {shape!r:.80}, which is {wanted / 8:g} bytes, but has "
            f"{offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1], name


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= _MOST for v in value)


def _check_cover(ranges: list[tuple[int, int, str]]) -> int:
    """Check that the ranges cover the data without a gap or an overlap; return their end."""
    end, before = 0, "the beginning"
    for begin, stop, name in sorted(ranges):
        if begin != end:
            how = "overlaps with" if begin < end else "leaves a gap after"
            raise ValueError(f"the data of {name!r:.200} {how} {before:.200}")
        end, before = stop, repr(name)
    return end
