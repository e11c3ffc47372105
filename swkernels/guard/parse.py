"""A manifest's document, checked field by field: nothing in it is believed."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import re
from collections.abc import Callable
from pathlib import PurePosixPath

from swkernels.detect.report import encode
from swkernels.errors import InvalidInput

from .digests import SIZES, check_chunk, chunk_count, whole
from .manifest import SCHEMA, File, Manifest, SuperWeight, Tensor, canonical
from .values import item_size, value_of

_LONGEST_NAME = 4096
_MOST_DIMENSIONS = 64
_LARGEST = 2**63 - 1
SOURCES = ("report", "catalogue", "coordinates")


def parse(document: object) -> Manifest:
    """Return the manifest of a document whose every field is as it must be; the seal is not looked
    at.

    Raises:
        InvalidInput: it is not; the message names the field.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise InvalidInput(f"expected a manifest of schema {SCHEMA}, got {found!r:.100}")
    _keys(
        "the manifest",
        document,
        {"schema", "model", "architecture", "hash", "chunk", "files", "others", "tensors",
         "super_weights", "source", "report", "sha256"},
        {"hmac"},
    )  # fmt: skip
    _hexadecimal("sha256", document["sha256"], 32)
    if "hmac" in document:
        _hexadecimal("hmac", document["hmac"], 32)
    hash = document["hash"]
    if not isinstance(hash, str) or hash not in SIZES:
        raise InvalidInput(f"hash: expected one of {', '.join(SIZES)}, got {hash!r:.100}")
    chunk = check_chunk(document["chunk"])
    files = _listed("files", document, lambda where, entry: _file(where, entry, SIZES[hash]))
    others = _listed("others", document, lambda where, entry: _file(where, entry, SIZES[hash]))
    _different("files", [file.name for file in (*files, *others)])
    names = {file.name for file in files}
    tensors = _listed("tensors", document, lambda *given: _tensor(*given, names, hash, chunk))
    _different("tensors", [tensor.name for tensor in tensors])
    by_name = {tensor.name: tensor for tensor in tensors}
    weights = _listed("super_weights", document, lambda *given: _super_weight(*given, by_name))
    _different("super_weights", [(weight.tensor, weight.element) for weight in weights])
    source, report = document["source"], document["report"]
    if source is not None and source not in SOURCES:
        raise InvalidInput(f"source: expected one of {', '.join(SOURCES)}, got {source!r:.100}")
    if report is not None:
        _hexadecimal("report", report, 32)
    if (source is None) != (not weights) or (report is None) != (source != "report"):
        raise InvalidInput("source and report do not fit the super weights")
    manifest = Manifest(
        model=_text("model", document["model"]),
        architecture=None
        if document["architecture"] is None
        else _text("architecture", document["architecture"]),
        hash=hash,
        chunk=chunk,
        files=files,
        others=others,
        tensors=tensors,
        super_weights=weights,
        source=source,
        report=report,
    )
    found = hashlib.sha256(canonical(document)).hexdigest()
    if not hmac.compare_digest(found, document["sha256"]):
        raise InvalidInput("the manifest is not what was written: its sha256 is another")
    return manifest


def _file(where: str, entry: object, digest: int) -> File:
    _keys(where, entry, {"name", "size", "digest"})
    return File(
        _path(f"{where}.name", entry["name"]),
        _integer(f"{where}.size", entry["size"]),
        _hexadecimal(f"{where}.digest", entry["digest"], digest),
    )


def _tensor(where: str, entry: object, files: set[str], hash: str, chunk: int) -> Tensor:
    _keys(where, entry, {"name", "dtype", "shape", "size", "file", "chunks", "digest"})
    shape = entry["shape"]
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise InvalidInput(f"{where}.shape: expected a list of sizes, got {shape!r:.100}")
    shape = tuple(_integer(f"{where}.shape", length) for length in shape)
    dtype = _text(f"{where}.dtype", entry["dtype"])
    size = _integer(f"{where}.size", entry["size"])
    item = item_size(dtype)
    if item is not None and math.prod(shape) * item != size:
        raise InvalidInput(f"{where}.size: {size} bytes are no {dtype} {list(shape)}")
    if not isinstance(entry["file"], str) or entry["file"] not in files:
        raise InvalidInput(f"{where}.file: expected a file of the list, got {entry['file']!r:.100}")
    try:
        chunks = base64.b64decode(entry["chunks"], validate=True)
        encoded = base64.b64encode(chunks).decode() == entry["chunks"]
    except (TypeError, ValueError, binascii.Error) as error:
        raise InvalidInput(f"{where}.chunks: expected base64") from error
    expected = chunk_count(size, chunk) * SIZES[hash]
    if not encoded or len(chunks) != expected:
        raise InvalidInput(f"{where}.chunks: expected base64 of {expected} bytes")
    digest = _hexadecimal(f"{where}.digest", entry["digest"], SIZES[hash])
    if digest != whole(chunks, hash):
        raise InvalidInput(f"{where}.digest: it is not that of the chunks")
    name = _text(f"{where}.name", entry["name"])
    return Tensor(name, dtype, shape, size, entry["file"], chunks, digest)


def _super_weight(where: str, entry: object, tensors: dict[str, Tensor]) -> SuperWeight:
    _keys(
        where, entry,
        {"tensor", "element", "module", "expert", "row", "column", "bits", "value"},
    )  # fmt: skip
    name = entry["tensor"]
    tensor = tensors.get(name) if isinstance(name, str) else None
    if tensor is None:
        raise InvalidInput(f"{where}.tensor: expected a tensor of the list, got {name!r:.100}")
    item = item_size(tensor.dtype)
    if item is None:
        raise InvalidInput(f"{where}.tensor: {tensor.dtype} holds no single values")
    element = _integer(f"{where}.element", entry["element"])
    if element >= math.prod(tensor.shape):
        raise InvalidInput(f"{where}.element: {element} lies outside {list(tensor.shape)}")
    bits = _hexadecimal(f"{where}.bits", entry["bits"], item)
    value = value_of(bits, tensor.dtype)
    given = entry["value"]
    if type(given) is not type(encode(value)) or given != encode(value):
        raise InvalidInput(f"{where}.value: the bits mean {encode(value)}, got {given!r:.100}")
    expert = entry["expert"]
    return SuperWeight(
        tensor=name,
        element=element,
        module=_text(f"{where}.module", entry["module"]),
        expert=None if expert is None else _integer(f"{where}.expert", expert),
        row=_integer(f"{where}.row", entry["row"]),
        column=_integer(f"{where}.column", entry["column"]),
        bits=entry["bits"],
        value=value,
    )


def _keys(where: str, entry: object, wanted: set[str], allowed: frozenset | set = frozenset()):
    if not isinstance(entry, dict):
        raise InvalidInput(f"{where}: expected an object, got {entry!r:.100}")
    wrong = sorted((wanted - entry.keys()) | (entry.keys() - wanted - allowed))
    if wrong:
        state = "is missing" if wrong[0] in wanted else "is unknown"
        raise InvalidInput(f"{where}: the field {wrong[0]!r:.100} {state}")


def _listed(name: str, document: dict, read: Callable) -> tuple:
    entries = document[name]
    if not isinstance(entries, list):
        raise InvalidInput(f"{name}: expected a list, got {entries!r:.100}")
    return tuple(read(f"{name}[{number}]", entry) for number, entry in enumerate(entries))


def _different(name: str, entries: list) -> None:
    seen = set()
    for entry in entries:
        if entry in seen:
            raise InvalidInput(f"{name}: {entry!r:.200} is there twice")
        seen.add(entry)


def _integer(where: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise InvalidInput(f"{where}: expected an integer from 0, got {value!r:.100}")
    return value


def _text(where: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME or not value.isprintable():
        raise InvalidInput(f"{where}: expected a printable text, got {value!r:.100}")
    return value


def _path(where: str, value: object) -> str:
    """A path below the folder, which cannot lead out of it."""
    name = _text(where, value)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
        raise InvalidInput(f"{where}: expected a path below the folder, got {name!r:.100}")
    return name


def _hexadecimal(where: str, value: object, size: int) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", value):
        raise InvalidInput(f"{where}: expected {2 * size} hexadecimal digits, got {value!r:.100}")
    return bytes.fromhex(value)
