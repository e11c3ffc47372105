"""What ``rank`` returns: the largest entries of a model, where they are, and of which kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from swkernels.detect.report import versions
from swkernels.errors import InvalidInput
from swkernels.models.kinds import KINDS, module_of
from swkernels.models.stored import StoredProjection
from swkernels.train import Coordinates
from swkernels.train.weights import Site

from . import rank_figure
from .rank_sites import in_model, skeleton
from .results import Result

TOPS = (10, 100, 1_000, 10_000)


@dataclass(frozen=True)
class LeftOut:
    """Tensors that were not ranked.

    Attributes:
        name: theirs, with * for each number.
        why: "embedding", "head", "vector", "router", ..., or "not asked for".
        tensors: how many.
    """

    name: str
    why: str
    tensors: int


@dataclass(frozen=True, eq=False)
class Ranking(Result):
    """The k entries of largest magnitude over the projections of a model, the largest first.

    Of equal magnitudes the first comes first: by name in natural order, expert, row, column.

    Attributes:
        model: what was ranked.
        matrices: those that hold an entry of the ranking.
        matrix: int64 [k], which of them an entry is in.
        row, column: int64 [k], output and input channel.
        value: float64 [k], with its sign.
        sizes: by kind, how many matrices and how many entries were ranked.
        largest: by block and kind, the largest magnitude, whether it is in the ranking or not.
        left_out: the other tensors.
        folder: where the checkpoint is that was read; None if a model was ranked.
    """

    model: str
    matrices: tuple[StoredProjection, ...]
    matrix: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    value: torch.Tensor
    sizes: dict[str, tuple[int, int]]
    largest: dict[tuple[str, str], float]
    left_out: tuple[LeftOut, ...]
    folder: str | None = None

    schema = "swkernels.rank/1"
    height = 3.8

    def __len__(self) -> int:
        return len(self.value)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that were ranked, in the order of ``KINDS``."""
        return tuple(kind for kind in KINDS if kind in self.sizes)

    def shares(self) -> list[dict]:
        """Rows {"top": n, kind: share, ...} for n of 10, 100, 1,000, 10,000, up to k; and for k."""
        tops = sorted({n for n in TOPS if n < len(self)} | {len(self)})
        return [
            {"top": n} | {kind: int(own[:n].sum()) / n for kind, own in self._of_kind()}
            for n in tops
        ]

    def layers(self) -> list[dict]:
        """Rows of each kind in each block: how many entries are in the ranking, and the largest."""
        blocks = [m.block for m in self.matrices]
        counts: dict[tuple[str, str], int] = {}
        for number, count in enumerate(self.matrix.bincount(minlength=len(blocks)).tolist()):
            key = blocks[number], self.matrices[number].kind
            counts[key] = counts.get(key, 0) + count
        return [
            {
                "block": block,
                "layer": int(block.rpartition(".")[2]),
                "kind": kind,
                "count": counts.get((block, kind), 0),
                "largest": magnitude,
            }
            for (block, kind), magnitude in self.largest.items()
        ]

    def coordinates(
        self,
        n: int | None = None,
        kinds: Iterable[str] | str | None = None,
        *,
        model: nn.Module | None = None,
        strict: bool = True,
    ) -> Coordinates:
        """Return the entries as coordinates, by the names that modules have in the model.

        The names in a file may differ: without the model's prefix, or with a tensor for each
        expert where the model has one for all. They are translated by ``model``, or by a model
        without weights made from the config.json beside the files; where there is neither, or its
        architecture is unknown, they are the names in the file.

        Args:
            n: the first so many of the ranking; None takes all.
            kinds: of these only, among the first n.
            model: it may be on the meta device.
            strict: an entry that no coordinates can name is an error; else it is left out. That is
                so for all but the down projections of fused experts.

        Raises:
            InvalidInput: ``n`` or ``kinds``, nothing left, or an entry without a name.
        """
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise InvalidInput(f"expected n from 1 to {len(self)}, got {n!r}")
        wanted = kinds_of(kinds) or KINDS
        if model is None and self.folder is not None:
            model = skeleton(Path(self.folder))
        sites = [_plain_site(m) for m in self.matrices]
        if model is not None:
            sites = in_model(self.matrices, model)
        listed: dict[Site, list] = {}
        shapes: dict[Site, tuple[int, int]] = {}
        for number, row, column in self._places(n):
            found, site = self.matrices[number], sites[number]
            if found.kind not in wanted:
                continue
            if site is None and strict:
                raise InvalidInput(
                    f"no coordinates can name {found.name}, a {found.kind} projection of fused "
                    'experts: take other kinds (kinds="down"), or strict=False'
                )
            if site is not None:
                listed.setdefault(site, []).append((row, column))
                shapes[site] = found.shape
        return Coordinates(listed, shapes)

    def rows(self, n: int | None = None) -> list[dict]:
        """A row for each of the first n entries (None: all): rank from 1, place and value."""
        values = self.value.tolist()
        return [
            {
                "rank": place + 1,
                "name": module_of(found.name),
                "layer": found.layer,
                "kind": found.kind,
                "expert": found.expert,
                "row": row,
                "column": column,
                "value": values[place],
            }
            for place, (found, row, column) in enumerate(
                (self.matrices[number], row, column) for number, row, column in self._places(n)
            )
        ]

    def to_dict(self) -> dict:
        """Everything; the entries as columns, of which "matrix" counts "matrices" from 0."""
        return {
            "schema": self.schema,
            "model": self.model,
            "k": len(self),
            "shares": self.shares(),
            "sizes": {
                kind: {"matrices": count, "entries": entries}
                for kind, (count, entries) in self.sizes.items()
            },
            "layers": self.layers(),
            "matrices": [asdict(m) | {"shape": list(m.shape)} for m in self.matrices],
            "entries": {
                "matrix": self.matrix.tolist(),
                "row": self.row.tolist(),
                "column": self.column.tolist(),
                "value": self.value.tolist(),
            },
            "left_out": [asdict(entry) for entry in self.left_out],
            "versions": versions("torch", "safetensors"),
        }

    @classmethod
    def from_dict(cls, document: dict) -> Ranking:
        """The ranking of a document that ``to_dict`` made; KeyError and the like if it is none."""
        entries = document["entries"]
        index = {name: torch.tensor(entries[name]) for name in ("matrix", "row", "column")}
        return cls(
            document["model"],
            tuple(
                StoredProjection(**m | {"shape": tuple(m["shape"])}) for m in document["matrices"]
            ),
            **index,
            value=torch.tensor([float(v) for v in entries["value"]], dtype=torch.float64),
            sizes={k: (s["matrices"], s["entries"]) for k, s in document["sizes"].items()},
            largest={(r["block"], r["kind"]): float(r["largest"]) for r in document["layers"]},
            left_out=tuple(LeftOut(**entry) for entry in document["left_out"]),
        )

    def _of_kind(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each ranked kind, and which entries [k] are of it."""
        number = {kind: place for place, kind in enumerate(KINDS)}
        kind_of = torch.tensor([number[m.kind] for m in self.matrices])[self.matrix]
        for kind in self.kinds:
            yield kind, kind_of == number[kind]

    def _places(self, n: int | None) -> Iterator[tuple[int, int, int]]:
        return zip(*(part[:n].tolist() for part in (self.matrix, self.row, self.column)))

    def _draw(self, figure) -> None:
        rank_figure.draw(figure, self)


def kinds_of(given: Iterable[str] | str | None) -> tuple[str, ...] | None:
    """Return the kinds that a caller names, in the order of ``KINDS``; None for None.

    Raises:
        InvalidInput: none, or one that is not there.
    """
    if given is None:
        return None
    listed = [given] if isinstance(given, str) else list(given)
    unknown = [kind for kind in listed if kind not in KINDS]
    if unknown or not listed:
        what = repr(unknown[0]) if unknown else "none"
        raise InvalidInput(f"expected kinds of {', '.join(KINDS)}; got {what:.100}")
    return tuple(kind for kind in KINDS if kind in listed)


def _plain_site(found: StoredProjection) -> Site | None:
    """The site of a matrix by the name of its tensor; None where coordinates have no name."""
    if found.fused:
        return Site(found.module, found.expert) if found.kind == "down" else None
    return Site(found.module)
