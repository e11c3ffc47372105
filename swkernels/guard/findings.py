"""What a verification found: the findings, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field

from swkernels.detect.report import encode
from swkernels.errors import InvalidInput

from .manifest import SuperWeight

INTACT = "intact"
MOVED = "the same weights in other files"
DAMAGED = "damaged"
KINDS = (
    "unreadable file", "missing file", "extra file", "changed file", "changed header",
    "missing tensor", "extra tensor", "changed tensor", "damaged chunks",
)  # fmt: skip


@dataclass(frozen=True)
class Hit:
    """A super weight that is not what it was.

    Attributes:
        weight: as the manifest has it.
        bits: found in its place, as hexadecimal digits; None where the tensor is gone.
        value: what they mean; None where the tensor is gone.
    """

    weight: SuperWeight
    bits: str | None = None
    value: float | int | bool | None = None

    def __str__(self) -> str:
        found = "gone" if self.bits is None else f"found {self.value} ({self.bits})"
        return f"{self.weight}: expected {self.weight.value} ({self.weight.bits}), {found}"

    def to_dict(self) -> dict:
        """Plain values."""
        return {
            "weight": self.weight.to_dict(),
            "found_bits": self.bits,
            "found_value": encode(self.value),
        }


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the manifest has it.

    Attributes:
        kind: one of ``KINDS``.
        name: of the file or tensor.
        detail: what was expected and what was found.
        file: the name of the file that holds the tensor now.
        chunks: the first and the last of neighbouring damaged chunks.
        start, stop: their bytes in the tensor.
        rows: the first and the last row that they touch, of the tensor as a matrix
            [product of the other sizes, last size]; None where it has no rows.
        super_weights: those that are not what they were.
    """

    kind: str
    name: str
    detail: str = ""
    file: str | None = None
    chunks: tuple[int, int] | None = None
    start: int | None = None
    stop: int | None = None
    rows: tuple[int, int] | None = None
    super_weights: tuple[Hit, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}" + (f": {self.detail}" if self.detail else "")

    def to_dict(self) -> dict:
        """Plain values."""
        return self._flat() | {"super_weights": [hit.to_dict() for hit in self.super_weights]}

    def row(self) -> dict:
        """Plain values without lists, with the number of super weights."""
        return self._flat() | {"super_weights": len(self.super_weights)}

    def _flat(self) -> dict:
        first, last = self.chunks or (None, None)
        first_row, last_row = self.rows or (None, None)
        return {
            "kind": self.kind,
            "name": self.name,
            "detail": self.detail,
            "file": self.file,
            "first_chunk": first,
            "last_chunk": last,
            "start": self.start,
            "stop": self.stop,
            "first_row": first_row,
            "last_row": last_row,
        }


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        source: what was checked.
        manifest: the SHA-256 of the manifest's content.
        status: "intact", "the same weights in other files" or "damaged".
        findings: what is not as it was; empty unless damaged.
        tensors, bytes: how many were hashed, and how large they are.
        super_weights: how many the manifest has.
    """

    source: str
    manifest: str
    status: str
    findings: tuple[Finding, ...] = ()
    tensors: int = 0
    bytes: int = 0
    super_weights: int = 0
    schema: str = field(default="swkernels.verification/1", init=False)

    @property
    def ok(self) -> bool:
        """Whether these are the weights of the manifest, and all that belongs to them."""
        return self.status != DAMAGED

    @property
    def hits(self) -> list[Hit]:
        """The super weights that are not what they were."""
        return [hit for finding in self.findings for hit in finding.super_weights]

    def __str__(self) -> str:
        if self.ok:
            return f"{self.source}: {self.status}, {self.tensors} tensors, {self.bytes} bytes"
        hit = f", {len(self.hits)} of {self.super_weights} super weights hit"
        number = len(self.findings)
        return f"{self.source}: damaged, {number} finding{'s' * (number > 1)}{hit}"

    def to_dict(self) -> dict:
        """The whole result as plain values, with ``schema`` first."""
        return {
            "schema": self.schema,
            "source": self.source,
            "manifest": self.manifest,
            "status": self.status,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "super_weights": self.super_weights,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def rows(self) -> list[dict]:
        """One flat dictionary for each finding."""
        return [finding.row() for finding in self.findings]

    def to_dataframe(self):
        """Return ``rows()`` as a pandas DataFrame.

        Raises:
            InvalidInput: pandas is not installed.
        """
        return to_dataframe(self.rows(), list(Finding(KINDS[0], "").row()))


def to_dataframe(rows: list[dict], columns: list[str]):
    """Return rows as a pandas DataFrame, or raise InvalidInput where there is no pandas."""
    try:
        import pandas
    except ImportError as error:
        raise InvalidInput("a DataFrame needs pandas: pip install pandas") from error
    return pandas.DataFrame(rows, columns=columns)
