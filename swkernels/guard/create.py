"""Make the manifest of a checkpoint: every chunk is hashed, the super weights are written down."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from swkernels.errors import InvalidInput
from swkernels.files import CONFIG, read_json

from .contents import Contents, Entry, look
from .digests import CHUNK, HASH, check_chunk, digest_of, hasher, whole
from .manifest import File, Manifest, SuperWeight, Tensor
from .parse import parse
from .reading import (
    Progress,
    check_same,
    check_threads,
    digest_stretches,
    read_bytes,
    silent,
    state_of,
)
from .values import item_size, value_of


def create(
    source: str | Path,
    super_weights: object = None,
    *,
    chunk: int = CHUNK,
    hash: str = HASH,
    name: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Return the manifest of a checkpoint.

    Args:
        source: a safetensors file; a folder of them; or the name of a model in the local cache of
            the Hugging Face hub. Nothing is loaded: files are read once, chunk by chunk.
        super_weights: the path of a scan's report (docs/report.md), whose super weights and
            members of critical sets are taken; an id of the catalogue, as in "catalogue:NAME"; or
            ``swkernels.train.Coordinates``; or None.
        chunk: bytes of a chunk: how exactly damage is placed.
        hash: "xxh3_128" or "xxh3_64", which find every accident, or "sha256", which nobody can
            forge; see docs/guard.md.
        name: of the model; by default that of the folder or file, or ``source`` if it is a name.
        threads: that read and hash; by default one a processor, at most 8.
        progress: called with (stage, bytes done, bytes in all).

    Raises:
        InvalidInput: nothing there, a damaged file, one that changes meanwhile, or super weights
            that are not in the checkpoint.
    """
    check_chunk(chunk)
    threads = check_threads(threads)
    contents = look(source, hash)
    kind, listed, report = _listed(super_weights)
    placed = [] if listed is None else place(contents, listed)
    entries = list(contents.entries.values())
    stretches = [entry.stretch for entry in entries] + list(contents.others.values())
    digests = digest_stretches(
        stretches, chunk=chunk, hash=hash, threads=threads, progress=progress
    )
    contents.check_same()
    tensors = tuple(
        Tensor(
            entry.name, entry.dtype, entry.shape, entry.stretch.size, entry.file, found,
            whole(found, hash),
        )
        for entry, found in zip(entries, digests)
    )  # fmt: skip
    others = tuple(
        File(other, stretch.size, whole(found, hash))
        for (other, stretch), found in zip(contents.others.items(), digests[len(entries) :])
    )
    manifest = Manifest(
        model=name or _name(source),
        architecture=_architecture(contents),
        hash=hash,
        chunk=chunk,
        files=tuple(contents.headers.values()),
        others=others,
        tensors=tensors,
        super_weights=read_super_weights(contents, placed, tensors, chunk, hash),
        source=kind,
        report=report,
    )
    return parse(manifest.to_dict())  # what is written can be read


def _name(source: str | Path) -> str:
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else str(source)


def _architecture(contents: Contents) -> str | None:
    config = contents.others.get("config.json")
    if config is None:
        return None
    try:
        found = read_json(config.path, limits=CONFIG, special=True)["architectures"][0]
    except (InvalidInput, KeyError, IndexError, TypeError):
        return None  # the digest speaks for the file
    return found if isinstance(found, str) and found.isprintable() and found else None


def _listed(given: object):
    """The kind of source, the coordinates, and the SHA-256 of a report."""
    from swkernels.train import Coordinates

    if given is None:
        return None, None, None
    if isinstance(given, Coordinates):
        return "coordinates", given, None
    if isinstance(given, str) and given.startswith("catalogue:"):
        return "catalogue", Coordinates.from_catalogue(given.removeprefix("catalogue:")), None
    if not isinstance(given, (str, Path)):
        raise InvalidInput(
            "expected super weights as the path of a report, as 'catalogue:NAME' or as "
            f"Coordinates, got {type(given).__name__}"
        )
    path = Path(given)
    before = state_of(path)
    found = Coordinates.from_report(path)
    fingerprint = hashlib.sha256(read_bytes(path, 0, before.size)).hexdigest()
    check_same(path, before)
    return "report", found, fingerprint


def place(contents: Contents, coordinates) -> list[tuple[Entry, SuperWeight]]:
    """Say where coordinates are in the files; their bits are still empty.

    Raises:
        InvalidInput: a weight is not there, of another shape, or packed.
    """
    from swkernels.train.sources import locate

    found = []
    for site, (key, matrix) in locate(contents, coordinates.shapes).items():
        entry = contents.entries[key]
        if item_size(entry.dtype) is None:
            raise InvalidInput(f"{key} is packed ({entry.dtype}): it holds no single values")
        for row, column in coordinates.weights[site].tolist():
            element = matrix.storage_offset() + row * matrix.stride(0) + column * matrix.stride(1)
            weight = SuperWeight(key, element, site.name, site.expert, row, column, "", 0.0)
            found.append((entry, weight))
    return sorted(found, key=lambda pair: (pair[1].tensor, pair[1].element))


def read_super_weights(
    contents: Contents,
    placed: list[tuple[Entry, SuperWeight]],
    tensors: tuple[Tensor, ...],
    chunk: int,
    hash: str,
) -> tuple[SuperWeight, ...]:
    """Read the bits of super weights, each with its chunk, which must be the one that was hashed.

    Raises:
        InvalidInput: the file has changed since.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    digest = hasher(hash)
    found = []
    for entry, weight in placed:
        size = item_size(entry.dtype)
        number, at = divmod(weight.element * size, chunk)
        stretch = entry.stretch
        held = read_bytes(
            stretch.path, stretch.start + number * chunk, min(chunk, stretch.size - number * chunk)
        )
        if digest(held) != digest_of(by_name[entry.name].chunks, number, hash):
            raise InvalidInput(f"{stretch.path} changed while it was read: start again")
        bits = held[at : at + size]
        found.append(replace(weight, bits=bits.hex(), value=value_of(bits, entry.dtype)))
    return tuple(found)
