"""Records of perplexity after quantization: one JSON line a cell (see results/README.md)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import records
from swkernels.detect.perplexity import Perplexity
from swkernels.errors import InvalidInput
from swkernels.files import write_atomically

SCHEMA = "swkernels.quality/1"
FOLDER = "quality"  # beside the records of speed
BITS = (4, 8)
TENSOR = "tensor"
BLOCKS = (64, 256, 1024, 4096, 16384, 65536, 262144, TENSOR)
PLAIN, CLIP, PRESERVE, LARGEST = METHODS = ("plain", "clip", "preserve", "preserve, largest")

Key = tuple[int, "int | str", str]  # bits, block, method


@dataclass(frozen=True)
class Study:
    """What the cells of a file share.

    Attributes:
        model, text: what was measured on what.
        window, windows: tokens of a window, and how many.
        matrices, elements: how many matrices are quantized, and the size of the largest.
        z: the clips that were tried, None being none, on as many other windows of the text; of
            those each cell has the one with the least loss.
        largest: how many weights of a matrix the last method keeps.
    """

    model: str
    text: str
    window: int
    windows: int
    matrices: int
    elements: int
    z: tuple[float | None, ...]
    largest: int


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        key: bits, block and method; None: the original.
        measured: the perplexity.
        clip: where ranges are cut, None: not at all.
        kept: weights that are kept exactly.
        about: time and commit, see ``machine.provenance``.
    """

    key: Key | None
    measured: Perplexity
    clip: float | None
    kept: int
    about: dict


class Table:
    """The cells of a study, by their keys.

    Args:
        study: what they share.
        cells: in any order; a later one replaces an earlier one of the same key.
    """

    def __init__(self, study: Study, cells: Iterable[Cell] = ()):
        self.study = study
        self.cells = {cell.key: cell for cell in cells}

    @property
    def original(self) -> Perplexity | None:
        """The perplexity of the model as it is."""
        return self.perplexity(None)

    def perplexity(self, key: Key | None) -> Perplexity | None:
        cell = self.cells.get(key)
        return cell and cell.measured

    def ratio(self, key: Key, over: Key | None = None) -> tuple[float, float | None] | None:
        """A cell's perplexity over another's (the original's), and the standard error of that."""
        one, other = self.perplexity(key), self.perplexity(over)
        return one.ratio(other) if one and other else None

    def write(self, path: Path) -> None:
        """Write every cell as a line, aside and then renamed."""
        lines = [
            {
                "schema": SCHEMA,
                **vars(self.study),
                **dict(zip(("bits", "block", "method"), cell.key or (None, None, None))),
                "perplexity": cell.measured.value,
                "losses": cell.measured.losses,
                "tokens": cell.measured.tokens,
                "clip": cell.clip,
                "kept": cell.kept,
                **cell.about,
            }
            for cell in self.cells.values()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


_ABOUT = ("time", "commit", "modified")


def read(path: Path) -> Table | None:
    """The table of a file; None where there is none.

    Raises:
        InvalidInput: a line does not follow the schema, or is of another study than the first; or
            none is of the original.
    """
    if not path.exists():
        return None
    table = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            study, cell = _parse(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__} {error}"
            raise InvalidInput(f"{path}, line {number}: no cell of {SCHEMA}: {reason}") from error
        table = table or Table(study)
        if study != table.study:
            raise InvalidInput(f"{path}, line {number}: it is of another study than line 1")
        table.cells[cell.key] = cell
    if table and table.original is None:
        raise InvalidInput(f"{path} lacks the original, which the cells are compared with")
    return table


def read_all(results: Path = records.RESULTS) -> dict[Path, Table]:
    """The tables beside the records of speed, by file."""
    found = {path: read(path) for path in sorted((results / FOLDER).glob("*.jsonl"))}
    return {path: table for path, table in found.items() if table is not None}


def _parse(line: dict) -> tuple[Study, Cell]:
    if line["schema"] != SCHEMA:
        raise ValueError(f"schema is {line['schema']!r}")
    fields = {name: line[name] for name in Study.__dataclass_fields__}
    study = Study(**fields | {"z": tuple(line["z"])})
    key = line["bits"], line["block"], line["method"]
    if key != (None, None, None) and not (
        key[0] in BITS and key[1] in BLOCKS and key[2] in METHODS
    ):
        raise ValueError(f"unknown cell {key}")
    losses, tokens = tuple(line["losses"]), tuple(line["tokens"])
    if not len(losses) == len(tokens) == study.windows:
        raise ValueError(f"{len(losses)} losses of {len(tokens)} windows, expected {study.windows}")
    measured = Perplexity(losses, tokens, study.window, study.window)
    about = {name: line[name] for name in _ABOUT}
    clip, kept = line["clip"], line["kept"]
    return study, Cell(key if key[0] else None, measured, clip, kept, about)
