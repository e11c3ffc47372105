"""The records as the pages need them: the newest measurement of each case on each machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import records
from benchmarks.suites import OPERATIONS

OURS = "swkernels"  # the provider that is the automatic choice
RIVALS = ("eager", "compile", "peer")


@dataclass(frozen=True)
class Entry:
    """One case on one machine: the results of the newest run that has it."""

    header: dict
    results: list[dict]

    @property
    def op(self) -> str:
        return self.results[0]["op"]

    @property
    def case(self) -> str:
        return self.results[0]["case"]

    @property
    def dtype(self) -> str:
        return self.results[0]["dtype"]

    @property
    def shape(self) -> dict:
        return self.results[0]["shape"]

    @property
    def described(self) -> dict:
        """What it may be looked for by."""
        projection = self.results[0]["projection"]
        return {"dtype": self.dtype, "projection": projection, **self.shape}

    @property
    def skipped(self) -> str | None:
        """Why the case was not measured, or None."""
        first = self.results[0]
        return first["reason"] if first["status"] == "skipped" else None

    def timed(self, *roles: str) -> list[dict]:
        """The results that have a speed, of these roles (of all, where none is named)."""
        return [
            r for r in self.results if r["status"] == "ok" and (not roles or r["role"] in roles)
        ]

    def of(self, provider: str) -> dict | None:
        """The timed result of a provider."""
        return next((r for r in self.timed() if r["provider"] == provider), None)

    @property
    def bare(self) -> dict | None:
        """The plain operation without our extra work."""
        return next(iter(self.timed("bare")), None)

    @property
    def rival(self) -> dict | None:
        """The fastest way to do the work without this package."""
        return min(self.timed(*RIVALS), key=lambda r: r["median"], default=None)

    def over_bare(self, provider: str = OURS) -> float | None:
        """Time of a provider over that of the bare operation, in the same run."""
        result, bare = self.of(provider), self.bare
        return result["median"] / bare["median"] if result and bare else None

    def over_rival(self) -> float | None:
        """Time of the automatic choice over that of the fastest rival, in the same run."""
        result, rival = self.of(OURS), self.rival
        return result["median"] / rival["median"] if result and rival else None


class Book:
    """All entries, by machine and operation.

    Args:
        folder: of the records. Dry runs are left out.

    Raises:
        InvalidInput: a record is broken; it is named.
    """

    def __init__(self, folder: Path = records.RESULTS):
        self.runs = [run for run in records.read(folder) if not run.header["dry"]]
        self._entries: dict[tuple[str, str, str], Entry] = {}
        for run in self.runs:  # oldest first: what is newer replaces
            cases: dict[tuple[str, str], list[dict]] = {}
            for result in run.results:
                cases.setdefault((result["op"], result["case"]), []).append(result)
            for key, results in cases.items():
                found = (run.header["device"]["name"], *key)
                entry = Entry(run.header, results)
                # A case that was left out does not replace one that was measured.
                if found not in self._entries or not entry.skipped:
                    self._entries[found] = entry

    @property
    def machines(self) -> list[str]:
        return sorted({machine for machine, _, _ in self._entries})

    def entries(self, machine: str | None = None, op: str | None = None) -> Iterator[Entry]:
        """Entries by machine, operation, dtype and shape."""

        def order(entry: Entry):
            machine = entry.header["device"]["name"]
            shape = entry.shape
            sizes = shape["columns"] * shape.get("rows", 1), shape.get("tokens", 0)
            return machine, OPERATIONS.index(entry.op), entry.dtype, sizes, entry.case

        for entry in sorted(self._entries.values(), key=order):
            if machine in (None, entry.header["device"]["name"]) and op in (None, entry.op):
                yield entry

    def find(self, machine: str, op: str, **wanted) -> list[Entry]:
        """Measured entries of an operation with a dtype, a projection and sizes (tokens=, ...)."""
        return [
            entry
            for entry in self.entries(machine, op)
            if not entry.skipped and wanted.items() <= entry.described.items()
        ]
