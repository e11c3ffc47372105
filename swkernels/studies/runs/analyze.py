"""What the training paper's appendix I measures, of super weights and of random positions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from swkernels.detect.samples import as_samples
from swkernels.evidence.amplification import amplification
from swkernels.evidence.curvature import Curvature
from swkernels.evidence.edits import Entry
from swkernels.evidence.probe import probe
from swkernels.evidence.sensitivity import Sensitivity
from swkernels.files import read_json, write_atomically
from swkernels.train import Coordinates
from swkernels.train.weights import down_projection_weights

from ..lab import Lab, NotInModel

DETECTED, LARGEST, RANDOM = "super weight", "largest of a layer", "random"


def amplify(lab: Lab, config: dict, path: Path) -> dict:
    """Measure how far the inputs of the down projections stand out.

    Args:
        config: ``prompts`` and their ``length`` in tokens; ``top``, see ``candidates``; ``random``
            positions for each candidate, anywhere in the candidates' matrices; ``seed`` of these.

    Returns:
        ``prompts``, ``tokens``, ``layers`` and ``columns`` of ``Amplification.to_dict``; each
        column has its ``group``: of a detected super weight, of the largest weight of a layer, or
        random.
    """
    chosen = candidates(lab, config["top"])
    count = config["random"] * len(chosen)
    drawn = Coordinates.random(chosen.shapes, count, exclude=chosen, seed=config["seed"])
    found = amplification(
        lab.model, _inputs(lab, config["prompts"], config["length"]), coordinates=chosen | drawn,
        samples=config["prompts"], length=config["length"], progress=lab.progress,
    ).to_dict()  # fmt: skip
    for column in found["columns"]:
        column["group"] = LARGEST if _has_column(chosen, column) else RANDOM
        if _has_column(lab.super_weights, column):
            column["group"] = DETECTED
    return {key: found[key] for key in ("prompts", "tokens", "layers", "columns")}


def bend(lab: Lab, config: dict, path: Path) -> dict:
    """Differentiate the loss twice by candidates and by random positions of their matrices.

    With N inputs, P candidates and R random positions each, Q = P + P R, in the order of a
    ``Probe``. An interrupted run goes on with the next input.

    Args:
        config: ``inputs`` and their ``length`` in tokens; ``top``, see ``candidates``; ``random``
            positions, in the same ``row`` (True) or matrix; ``eps`` and ``seed`` of ``probe``.

    Returns:
        ``entries`` (P, with their ``group``) and ``controls`` (P lists of R): their places;
        ``loss`` and ``rounding`` [N], nats; and [N, Q]: ``amplification`` (M at the column),
        ``gradient``, ``curvature`` (exact), ``differences`` (the estimate of it) with
        ``differences_noise``; ``foretold`` and ``measured`` (change of the loss, nats).

    Raises:
        NotInModel: no super weights, or a dtype with nothing left to differentiate.
    """
    if lab.model.dtype not in (torch.float32, torch.float64):
        raise NotInModel(
            f"second derivatives need a model in float32, got {lab.model.dtype}: give --dtype "
            "float32"
        )
    chosen, special = candidates(lab, config["top"]), lab.super_weights
    ids = _inputs(lab, config["inputs"], config["length"])
    state = path.with_suffix(".json")
    parts: list[dict] = read_json(state, special=True) if state.exists() else []
    for number in range(len(parts), len(ids)):
        found = probe(
            lab.model, chosen, [ids[number]], random=config["random"], same_row=config["row"],
            eps=config["eps"], seed=config["seed"],
        )  # fmt: skip
        places = found.to_dict()
        for entry, place in zip(found.entries, places["entries"]):
            place["group"] = DETECTED if _holds(special, entry) else LARGEST
        curvature, sensitivity = Curvature(found), Sensitivity(found)
        values = {
            "loss": found.losses,
            "rounding": found.rounding,
            "gradient": found.gradients,
            "curvature": curvature.exact,
            "differences": curvature.finite_differences,
            "differences_noise": curvature.noise,
            "foretold": sensitivity.foretold,
            "measured": sensitivity.measured,
        }
        entries = [*found.entries, *(one for drawn in found.controls for one in drawn)]
        part = {name: tensor[0].tolist() for name, tensor in values.items()}
        part["amplification"] = _amplification_at(lab, entries, ids[number])
        parts.append({key: places[key] for key in ("entries", "controls")} | {"values": part})
        write_atomically(state, json.dumps(parts))
        lab.progress("inputs", number + 1, len(ids))
    names = parts[0]["values"]
    return {key: parts[0][key] for key in ("entries", "controls")} | {
        name: [part["values"][name] for part in parts] for name in names
    }


def candidates(lab: Lab, top: int) -> Coordinates:
    """The super weights, and the largest weight of each of ``top`` layers.

    The layers lie evenly; where there are fewer than ``top``, each has as many as fit.
    """
    layers: dict[int, list] = {}
    for weight in down_projection_weights(lab.model):
        layers.setdefault(weight.projection.layer, []).append(weight.site)
    sites = list(layers.values())
    count = min(top, len(sites))
    found = lab.super_weights
    for n in range(count):
        middle = (2 * n + 1) * len(sites) // (2 * count)
        found = found | Coordinates.from_magnitude(lab.model, top // count, sites[middle])
    return found


def _inputs(lab: Lab, count: int, length: int) -> list[torch.Tensor]:
    return as_samples(lab.data.text, lab.tokenizer, count, length, "tokenizer", None)[0]


def _has_column(coordinates: Coordinates, found: dict) -> bool:
    return any(
        site.name == found["module"]
        and site.expert in (None, found["expert"])
        and found["column"] in listed[:, 1].tolist()
        for site, listed in coordinates.weights.items()
    )


def _holds(coordinates: Coordinates, entry: Entry) -> bool:
    listed = coordinates.weights.get(entry.site)
    return listed is not None and [entry.row, entry.column] in listed.tolist()


def _amplification_at(lab: Lab, entries: Iterable[Entry], ids: torch.Tensor) -> list[float]:
    """M of one input at the column of each entry; NaN where no token reaches an expert."""
    places: dict = {}
    for entry in entries:
        places.setdefault(entry.site, []).append((entry.row, entry.column))
    at = amplification(
        lab.model, [ids], coordinates=Coordinates.of(places, lab.model), length=len(ids)
    ).at
    found = [at(entry.site, entry.column).values for entry in entries]
    return [values[0] if values else math.nan for values in found]
