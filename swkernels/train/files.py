"""Coordinates as a file, JSON or safetensors by the suffix; files and folders that are whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from swkernels.errors import InvalidInput

SCHEMA = "swkernels.coordinates/1"


def write(path: str | Path, weights: Mapping, shapes: Mapping) -> None:
    """Write coordinates; see ``Coordinates.save``."""
    path = Path(path)
    suffix = _suffix(path)
    sites = [
        {"name": site.name, "expert": site.expert, "shape": list(shapes[site])} for site in weights
    ]
    if suffix == ".json":
        for entry, listed in zip(sites, weights.values()):
            entry["coordinates"] = listed.tolist()
        data = json.dumps({"schema": SCHEMA, "weights": sites}).encode()
    else:
        from safetensors.torch import save

        tensors = {str(number): listed for number, listed in enumerate(weights.values())}
        data = save(tensors, {"schema": SCHEMA, "weights": json.dumps(sites)})
    write_atomically(path, data)


def read(path: str | Path) -> tuple[list, list]:
    """Read what ``write`` wrote: the weights and the shapes, as lists of (site, value).

    They are lists, so that a site that a file names twice does not go unseen.

    Raises:
        InvalidInput: unreadable, or not of this format.
    """
    path = Path(path)
    if _suffix(path) == ".json":
        document = read_json(path)
    else:
        document = _read_safetensors(path)
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise InvalidInput(f"{path}: expected a file of {SCHEMA}, got {schema!r:.200}")
    try:
        entries = [((e["name"], e["expert"]), e["shape"], e["coordinates"])
                   for e in document["weights"]]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise InvalidInput(
            f"{path} is damaged: expected name, expert, shape and coordinates of every weight"
        ) from error
    return [(key, listed) for key, _, listed in entries], [(key, s) for key, s, _ in entries]


def read_json(path: str | Path):
    """Read a JSON document.

    Raises:
        InvalidInput: it is not there or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"cannot read {path} as JSON: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file aside in its own folder and rename it, so that no half file is ever seen.

    Raises:
        InvalidInput: the folder is not there or cannot be written.
    """
    try:
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror or error}; give a path in a folder that is "
            "there and can be written"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def in_folder(folder: Path, mark: str, write: Callable[[Path], None]) -> None:
    """Write a folder aside, beside its final place, and rename it: it is whole or as it was.

    Args:
        folder: made new with its parents, or replaced as a whole if it is empty or holds ``mark``.
        mark: a file that tells a folder of the kind that is written.
        write: called with an empty folder.

    Raises:
        InvalidInput: the folder holds something else; nothing is written.
        OSError: it cannot be made.
    """
    if folder.exists() and not (folder / mark).exists() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is there and holds no {mark}: choose another folder")
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        made, before = work / "made", work / "before"
        try:
            made.mkdir()
            write(made)
            if folder.exists():
                os.replace(folder, before)
            try:
                os.replace(made, folder)
            except BaseException:
                if before.exists():
                    os.replace(before, folder)
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # something that is not ours lies in it
                parent.rmdir()
        raise


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".json", ".safetensors"):
        raise InvalidInput(f"expected a file name that ends in .json or .safetensors, got {path}")
    return suffix


def _read_safetensors(path: Path) -> dict:
    """Return the document that the JSON form would have, with tensors for coordinates."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != SCHEMA:
                return metadata
            weights = json.loads(metadata["weights"])
            for number, entry in enumerate(weights):
                entry["coordinates"] = file.get_tensor(str(number))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"cannot read {path} as coordinates: {error}") from error
    return {"schema": SCHEMA, "weights": weights}
