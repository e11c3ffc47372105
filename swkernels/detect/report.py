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
from swkernels.files import read_json, write_atomically

from .report_schema import SCHEMA, check_report


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
        """Read a document that ``save`` wrote, as if anyone had (docs/untrusted-files.md).

        Raises:
            InvalidInput: not a report, damaged, or of a schema that this version does not read.
        """
        try:
            document = read_json(path)
        except InvalidInput as error:
            raise InvalidInput(f"cannot read the report {path}: {error}") from error
        return cls.of_document(document, path)

    @classmethod
    def of_document(cls, document: object, where: object) -> ScanReport:
        """Check a document that was read as plain JSON; ``where`` names it in messages.

        Raises:
            InvalidInput: as ``load``.
        """
        data = _decode(document)
        check_report(data, where)
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
    "kl_max", "in_median", "out_median", "mean", "std", "information", "outlier_gamma",
    "threshold", "critical_ratio", "mild_ratio", "critical_damage", "mild_damage",
    "min_information", "spare_share", "in_top", "out_top",
}  # fmt: skip


def _decode(value, key: str | None = None):
    if isinstance(value, str) and value in _SPECIAL and key in _NUMBERS | {"ratios", "kls"}:
        return _SPECIAL[value]
    if isinstance(value, dict):
        return {name: _decode(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_decode(item, key) for item in value]
    return value


__all__ = ["SCHEMA", "ScanReport", "encode", "versions"]
