"""Rankings of checkpoints that were made before, as files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from swkernels import __version__
from swkernels.detect.loading import fingerprint
from swkernels.detect.report import encode
from swkernels.errors import InvalidInput
from swkernels.files import Limits, read_json, write_atomically

from .ranking import Ranking

LIMITS = Limits(size=1 << 30, depth=16, values=1 << 26)  # four numbers an entry


def cache_directory() -> Path:
    """Return ``rank`` in ``$SWKERNELS_CACHE``, or in ``~/.cache/swkernels``."""
    base = os.environ.get("SWKERNELS_CACHE") or Path.home() / ".cache" / "swkernels"
    return Path(base) / "rank"


def cache_file(path: Path, files: Sequence[Path], k: int, kinds: tuple[str, ...] | None) -> Path:
    """Return where the ranking of a checkpoint is kept.

    The fingerprint does not cover the weights' values, so every file's size and time of change
    count too.
    """
    states = [(file.name, file.stat()) for file in files]
    key = {
        "schema": Ranking.schema,
        "version": __version__,
        "fingerprint": fingerprint(path),
        "files": [[name, state.st_size, state.st_mtime_ns] for name, state in states],
        "k": k,
        "kinds": kinds,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_directory() / f"{digest}.json"


def read(file: Path) -> Ranking | None:
    """Return the ranking in a file; None if there is none, or the file is damaged."""
    try:
        content = read_json(file, limits=LIMITS)
        stored, digest = content["ranking"], content["sha256"]
        if hashlib.sha256(_text(stored).encode()).hexdigest() != digest:
            return None
        return Ranking.from_dict(stored)
    except (InvalidInput, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(file: Path, ranking: Ranking) -> None:
    """Keep a ranking, if the folder can be written; the file is whole or not there."""
    stored = encode(ranking.to_dict())
    digest = hashlib.sha256(_text(stored).encode()).hexdigest()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, _text({"sha256": digest, "ranking": stored}).encode())
    except (OSError, InvalidInput):
        return


def _text(document: dict) -> str:
    return json.dumps(document, allow_nan=False)
