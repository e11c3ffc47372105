"""The head of a GGUF file, walked before a reader that trusts its counts is let at it.

github.com/ggml-org/ggml/blob/master/docs/gguf.md. A count or length that the file has no room for
would make the reader of the ``gguf`` package run on, appending, for as long as the count says.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO

from swkernels.errors import InvalidInput
from swkernels.files import open_regular

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the scalars
_STRING, _ARRAY = 8, 9
_MOST_VALUES = 4_000_000  # in all arrays: a vocabulary is listed three times or so
_MOST_TENSORS = 1_000_000
_LONGEST_NAME = 1024
_MOST_DIMENSIONS = 4
_SMALLEST_PAIR, _SMALLEST_TENSOR = 13, 24  # bytes


def check_gguf_head(path: Path) -> None:
    """Check magic, version, counts, lengths and places of a GGUF file against its size.

    Raises:
        InvalidInput: no such regular file, another format or version, or a head that is damaged.
    """
    try:
        with open_regular(path) as file:
            _Head(file).walk()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidInput(f"{path} is not a GGUF file that can be read: {error}") from error


class _Head:
    def __init__(self, file: BinaryIO):
        self.file = file
        self.left = os.fstat(file.fileno()).st_size
        self.order, self.values = "little", 0

    def walk(self) -> None:
        if self.take(4) != b"GGUF":
            raise ValueError("its first bytes are not GGUF")
        version = self.take(4)
        if version[:2] == bytes(2):  # written on a machine of the other byte order
            self.order = "big"
        if int.from_bytes(version, self.order) not in _VERSIONS:
            number = int.from_bytes(version, self.order)
            raise ValueError(f"expected version {_VERSIONS[0]} or {_VERSIONS[1]}, got {number}")
        tensors, pairs = self.number(8), self.number(8)
        least = _SMALLEST_PAIR * pairs + _SMALLEST_TENSOR * tensors
        if tensors > _MOST_TENSORS or least > self.left:
            raise ValueError(f"it has no room for {tensors} tensors and {pairs} fields")
        for _ in range(pairs):
            self.skip(self.number(8), "a key")
            self.value(self.number(4))
        offsets = [self.tensor() for _ in range(tensors)]
        if max(offsets, default=0) > self.left:
            raise ValueError(f"a tensor begins {max(offsets)} bytes on, past its end")

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number(8), "a text")
        elif kind == _ARRAY:
            kind, count = self.number(4), self.number(8)
            self.values += count
            if self.values > _MOST_VALUES:
                raise ValueError(f"its arrays have more than {_MOST_VALUES} values")
            if kind == _STRING:
                for _ in range(count):
                    self.skip(self.number(8), "a text")
            else:
                self.skip(count * self.size(kind), "an array")
        else:
            self.skip(self.size(kind), "a value")

    def tensor(self) -> int:
        """Step over what describes a tensor; return where its data begin."""
        length = self.number(8)
        if length > _LONGEST_NAME:
            raise ValueError(f"a tensor's name has {length} bytes")
        self.skip(length, "a name")
        dimensions = self.number(4)
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        if math.prod(max(self.number(8), 1) for _ in range(dimensions)) >= 2**63:
            raise ValueError("a tensor has more than 2^63 elements")
        self.number(4)  # how it is packed, which the reader checks
        return self.number(8)

    def size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"a value is of the unknown kind {kind}")
        return _SIZES[kind]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), self.order)

    def take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError("it ends within its head")
        self.left -= size
        return data

    def skip(self, size: int, what: str) -> None:
        if size > self.left:
            raise ValueError(f"{what} of {size} bytes goes past its end")
        self.file.seek(size, os.SEEK_CUR)
        self.left -= size
