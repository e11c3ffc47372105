"""The manifest: what an intact checkpoint is, as a JSON document that proves itself.

``sha256`` in it is the hash of its canonical content: the document without ``sha256`` and ``hmac``,
as JSON with sorted keys, no spaces and ASCII only. ``hmac``, if a key was given, is an HMAC-SHA256
of the same. docs/guard.md describes the fields.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from swkernels.detect.report import encode
from swkernels.errors import InvalidInput
from swkernels.files import read_json, write_atomically

SCHEMA = "swkernels.guard/1"
NAME = "guard.json"  # what a manifest beside the weights is called; such files are not part of it
_SEAL = b"swkernels.guard/1 hmac\n"  # what comes before the content: a MAC of this and nothing else
SHORTEST_KEY = 16  # bytes


@dataclass(frozen=True)
class File:
    """A file that is hashed as a whole, or a file of weights, whose header is.

    Attributes:
        name: relative to the checkpoint's folder, with "/".
        size: bytes.
        digest: of the content, or of the header's bytes.
    """

    name: str
    size: int
    digest: bytes

    def to_dict(self) -> dict:
        """As in the document."""
        return {"name": self.name, "size": self.size, "digest": self.digest.hex()}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint.

    Attributes:
        name, dtype, shape: as in the safetensors header ("BF16").
        size: bytes.
        file: the name of the file that held it.
        chunks: the digests of its chunks, one after the other.
        digest: of those.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    file: str
    chunks: bytes = field(repr=False)
    digest: bytes

    def to_dict(self) -> dict:
        """As in the document."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "size": self.size,
            "file": self.file,
            "chunks": base64.b64encode(self.chunks).decode(),
            "digest": self.digest.hex(),
        }


@dataclass(frozen=True)
class SuperWeight:
    """A weight that the model cannot do without.

    Attributes:
        tensor: the name of the tensor that holds it.
        element: its place in that tensor, counted in elements, row by row.
        module, expert, row, column: where it is in the model: the path of the module, the expert
            of fused ones or None, output channel and input channel.
        bits: its bytes in the file, as hexadecimal digits.
        value: what they mean.
    """

    tensor: str
    element: int
    module: str
    expert: int | None
    row: int
    column: int
    bits: str
    value: float | int | bool

    def __str__(self) -> str:
        expert = "" if self.expert is None else f" expert {self.expert}"
        return f"{self.module}{expert} [{self.row}, {self.column}]"

    def to_dict(self) -> dict:
        """As in the document; a value that JSON lacks is a string."""
        return {
            "tensor": self.tensor,
            "element": self.element,
            "module": self.module,
            "expert": self.expert,
            "row": self.row,
            "column": self.column,
            "bits": self.bits,
            "value": encode(self.value),
        }


@dataclass(frozen=True)
class Manifest:
    """What an intact checkpoint is.

    Attributes:
        model: its name: of the folder, the file, or on the Hugging Face hub.
        architecture: the class in its configuration, if any.
        hash: one of ``digests.SIZES``.
        chunk: bytes of a chunk.
        files: of weights, with the digests of their headers.
        others: the other files of the folder, hashed as a whole.
        tensors: in the order in which the files hold them.
        super_weights: by tensor and element.
        source: where the super weights come from: "report", "catalogue", "coordinates" or None.
        report: the SHA-256 of the report's file, or None.
    """

    model: str
    architecture: str | None
    hash: str
    chunk: int
    files: tuple[File, ...]
    others: tuple[File, ...]
    tensors: tuple[Tensor, ...]
    super_weights: tuple[SuperWeight, ...] = ()
    source: str | None = None
    report: str | None = None

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def sha256(self) -> str:
        """The hash of the canonical content."""
        return hashlib.sha256(canonical(self.content())).hexdigest()

    def content(self) -> dict:
        """The document without ``sha256`` and ``hmac``."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "architecture": self.architecture,
            "hash": self.hash,
            "chunk": self.chunk,
            "files": [file.to_dict() for file in self.files],
            "others": [file.to_dict() for file in self.others],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "super_weights": [weight.to_dict() for weight in self.super_weights],
            "source": self.source,
            "report": self.report,
        }

    def to_dict(self, key: bytes | None = None) -> dict:
        """The document; sealed if there is a key.

        Raises:
            InvalidInput: the key is too short.
        """
        document = self.content() | {"sha256": self.sha256}
        if key is not None:
            document["hmac"] = seal(document, key)
        return document

    def save(self, path: str | Path, key: bytes | None = None) -> None:
        """Write the document as JSON, aside and then renamed.

        Args:
            path: where to.
            key: seals it: nobody without the key can change it unseen.

        Raises:
            InvalidInput: the folder cannot be written, or the key is too short.
        """
        text = json.dumps(self.to_dict(key), indent=1, allow_nan=False)
        write_atomically(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path, key: bytes | None = None) -> Manifest:
        """Read what ``save`` wrote, and check every field, the hash, and the seal.

        Args:
            path: of the manifest.
            key: the one that it was sealed with; None where it is not sealed.

        Raises:
            InvalidInput: unreadable, of another schema, a field is not what it must be, changed
                since it was written, sealed and no key given, or a key given and not sealed with
                it.
        """
        from .parse import parse

        document = read_json(path)
        try:
            manifest = parse(document)
            check_seal(document, key)
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from error
        return manifest


def canonical(document: dict) -> bytes:
    """The bytes that are hashed and sealed."""
    content = {name: value for name, value in document.items() if name not in ("sha256", "hmac")}
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def seal(document: dict, key: bytes) -> str:
    """The HMAC-SHA256 of a document.

    Raises:
        InvalidInput: the key is too short.
    """
    if len(key) < SHORTEST_KEY:
        raise InvalidInput(f"expected a key of at least {SHORTEST_KEY} bytes, got {len(key)}")
    return hmac.new(key, _SEAL + canonical(document), hashlib.sha256).hexdigest()


def check_seal(document: dict, key: bytes | None) -> None:
    """Raise InvalidInput unless the document is sealed with ``key``, or has no seal and no key."""
    sealed = document.get("hmac")
    if sealed is None and key is None:
        return
    if sealed is None:
        raise InvalidInput("the manifest is not sealed, and a key was given: it proves nothing")
    if key is None:
        raise InvalidInput("the manifest is sealed: give the key that it was sealed with")
    if not hmac.compare_digest(sealed, seal(document, key)):
        raise InvalidInput("the seal is not that of this key: another key, or a changed manifest")
