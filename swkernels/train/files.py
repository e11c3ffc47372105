"""Coordinates as a file, JSON or safetensors by the suffix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from swkernels.documents import COUNT, TEXT, Fields, Integer, ListOf, Maybe, Row, check_document
from swkernels.errors import InvalidInput
from swkernels.files import parse_json, read_json, write_atomically
from swkernels.models.safetensors_header import load_header

SCHEMA = "swkernels.coordinates/1"
_WEIGHT = {"name": TEXT, "expert": Maybe(COUNT), "shape": Row((Integer(1), Integer(1)))}
_TENSORS = Fields({"weights": ListOf(Fields(_WEIGHT))})
_LISTED = Fields(
    {"weights": ListOf(Fields(_WEIGHT | {"coordinates": ListOf(Row((COUNT, COUNT)))}))}
)


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
    as_lists = _suffix(path) == ".json"
    check_document(document, _LISTED if as_lists else _TENSORS, path)
    entries = [((e["name"], e["expert"]), e["shape"], e["coordinates"])
               for e in document["weights"]]  # fmt: skip
    return [(key, listed) for key, _, listed in entries], [(key, s) for key, s, _ in entries]


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".json", ".safetensors"):
        raise InvalidInput(f"expected a file name that ends in .json or .safetensors, got {path}")
    return suffix


def _read_safetensors(path: Path) -> dict:
    """Return the document that the JSON form would have, with tensors for coordinates."""
    from safetensors import SafetensorError, safe_open

    load_header(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != SCHEMA:
                return metadata
            weights = parse_json(metadata.get("weights", "").encode(), f"the list in {path}")
            check_document({"weights": weights}, _TENSORS, path)
            for number, entry in enumerate(weights):
                entry["coordinates"] = file.get_tensor(str(number))
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"cannot read {path} as coordinates: {error}") from error
    return {"schema": SCHEMA, "weights": weights}
