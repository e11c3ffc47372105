"""Published coordinates of super weights: the catalogue that comes with the package."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections

from .weights import Site


@dataclass(frozen=True)
class CatalogueEntry:
    """What was published for one model.

    Attributes:
        model: its id on the Hugging Face hub.
        module: path of a layer's down projection in transformers, with ``{layer}``.
        shape: (D, H) of each weight, from the model's configuration.
        positions: (layer, expert or None, row, column) of each coordinate, counted from 0.
        tier: "A" published by the authors in paper and code, "B" two sources, "C" one source,
            "measured" measured with swkernels.
        source: who published it.
        note: values and effects, where they were published.
        variant: which weights of the model, where there are several.
        values: the published weight at each position, to as many digits as were printed; empty
            where none was.
    """

    model: str
    module: str
    shape: tuple[int, int]
    positions: tuple[tuple[int, int | None, int, int], ...]
    tier: str
    source: str
    note: str = ""
    variant: str = ""
    values: tuple[float, ...] = ()

    def to_dict(self) -> dict:
        """Everything, with what the tier means, and one dictionary for each coordinate."""
        values = self.values or [None] * len(self.positions)
        keys = ("layer", "expert", "row", "column")
        return {
            "model": self.model,
            "variant": self.variant,
            "tier": self.tier,
            "tier_means": tiers()[self.tier],
            "source": self.source,
            "note": self.note,
            "module": self.module,
            "shape": list(self.shape),
            "coordinates": [
                dict(zip(keys, position)) | {"value": value}
                for position, value in zip(self.positions, values)
            ],
        }


@lru_cache(maxsize=1)
def _document() -> dict:
    text = files("swkernels.train").joinpath("catalogue.json").read_text(encoding="utf-8")
    return json.loads(text)


@lru_cache(maxsize=1)
def _entries() -> tuple[CatalogueEntry, ...]:
    return tuple(
        CatalogueEntry(
            **entry
            | {
                "shape": tuple(entry["shape"]),
                "positions": tuple(tuple(position) for position in entry["positions"]),
                "values": tuple(entry.get("values", ())),
            }
        )
        for entry in _document()["models"]
    )


def tiers() -> dict[str, str]:
    """What each tier of the catalogue means, the best proven first."""
    return dict(_document()["tiers"])


def convention() -> str:
    """How positions and shapes of the catalogue are to be read."""
    return _document()["convention"]


def catalogue() -> list[CatalogueEntry]:
    """Return every model whose super weights have been published, with their provenance."""
    return list(_entries())


def find_entry(model_id: str) -> CatalogueEntry:
    """Return the entry of a model.

    Args:
        model_id: its id on the Hugging Face hub, or the last part of it; upper and lower case
            do not matter. An id with another owner is another model.

    Raises:
        InvalidInput: no such entry, or several; the message names the nearest.
    """
    if not isinstance(model_id, str):
        raise InvalidInput(f"expected the id of a model, got {model_id!r:.200}")
    wanted = model_id.strip().lower()
    whole = "/" in wanted
    found = [e for e in _entries() if (e.model if whole else _last(e.model)).lower() == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(entry.model for entry in found)
        raise InvalidInput(f"{model_id!r} means several models of the catalogue: {names}; name one")
    raise InvalidInput(
        f"the catalogue has no {model_id!r}; the nearest are {', '.join(_nearest(wanted))}; "
        "catalogue() lists all of them"
    )


def sites_of(
    entry: CatalogueEntry, model: nn.Module | None = None
) -> tuple[dict[Site, list[tuple[int, int]]], dict[Site, tuple[int, int]]]:
    """Return the coordinates of an entry and the shapes of their weights.

    Args:
        entry: of the catalogue.
        model: where the weights are looked up by layer and expert, whatever their names are. None
            takes the names that the model has in transformers.

    Raises:
        InvalidInput: the model has no such layer, or its weights have another shape.
    """
    weights: dict[Site, list[tuple[int, int]]] = {}
    shapes: dict[Site, tuple[int, int]] = {}
    projections = [] if model is None else find_down_projections(model)
    for layer, expert, row, column in entry.positions:
        if model is None:
            site, shape = Site(entry.module.format(layer=layer), expert), entry.shape
        else:
            site, shape = _locate(entry, projections, layer, expert)
        weights.setdefault(site, []).append((row, column))
        shapes[site] = shape
    return weights, shapes


def _locate(entry: CatalogueEntry, projections: list, layer: int, expert: int | None):
    place = f"layer {layer}" + ("" if expert is None else f" expert {expert}")
    for p in projections:
        fused = expert is not None and p.experts is not None and expert < p.experts
        if p.layer == layer and (fused or p.expert == expert and p.experts is None):
            if (p.rows, p.columns) != entry.shape:
                raise InvalidInput(
                    f"{p.name} is [{p.rows}, {p.columns}], that of {entry.model} is "
                    f"{list(entry.shape)}: give the model that the entry is for"
                )
            return Site(p.name, expert if fused else None), entry.shape
    raise InvalidInput(
        f"the model has no down projection in {place}: give {entry.model}, or one like it"
    )


def _last(model: str) -> str:
    return model.rpartition("/")[2]


def _nearest(wanted: str) -> list[str]:
    names = {e.model: _last(e.model).lower() for e in _entries()}
    last = _last(wanted)

    def likeness(model: str) -> float:
        return difflib.SequenceMatcher(None, last, names[model]).ratio()

    return sorted(names, key=likeness, reverse=True)[:3]
