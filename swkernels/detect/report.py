"""The report of a scan: a JSON document with a versioned schema (docs/report.md)."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from swkernels import __version__
from swkernels.errors import InvalidInput
from swkernels.files import write_atomically

SCHEMA = "swkernels.scan/1"


@dataclass
class ScanReport:
    """A scan's result. ``data`` is the document; the properties are shorthands into it."""

    data: dict

    @property
    def candidates(self) -> list[dict]:
        """Every candidate with its numbers and its verdict, strongest spike first."""
        return self.data["candidates"]

    @property
    def sets(self) -> list[dict]:
        """Every set that was measured, with its leave-one-out."""
        return self.data["sets"]

    @property
    def super_weights(self) -> list[dict]:
        """The candidates that ruin the model, alone or as part of a critical set."""
        wanted = ("super weight", "part of a critical set")
        return [c for c in self.candidates if c["verdict"] in wanted]

    def __str__(self) -> str:
        return self.data["summary"]

    def to_dict(self) -> dict:
        """Return the document."""
        return self.data

    def save(self, path: str | Path) -> None:
        """Write the document as JSON, aside and then renamed; infinities as strings."""
        write_atomically(Path(path), json.dumps(encode(self.data), indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> ScanReport:
        """Read a document that ``save`` wrote.

        Raises:
            InvalidInput: not a report, or of a schema that this version does not read.
        """
        try:
            data = _decode(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InvalidInput(f"cannot read the report {path}: {error}") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise InvalidInput(f"{path}: expected a report of schema {SCHEMA}, got {schema!r}")
        return cls(data)


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of swkernels, Python and ``packages``; None for one that is not installed."""
    found: dict[str, str | None] = {"swkernels": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value):
    """JSON has no infinities: they are written as the strings "Infinity", "-Infinity", "NaN"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


_NUMBERS = {
    "value", "weight", "in_peak", "out_peak", "share", "dominance", "signed_share", "prominence",
    "ratio", "ratio_low", "ratio_high", "kl", "damage", "perplexity", "matched", "ratio_max",
    "kl_max", "in_median", "out_median", "mean", "std",
}  # fmt: skip


def _decode(value, key: str | None = None):
    if isinstance(value, str) and value in _SPECIAL and key in _NUMBERS | {"ratios", "kls"}:
        return _SPECIAL[value]
    if isinstance(value, dict):
        return {name: _decode(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_decode(item, key) for item in value]
    return value
