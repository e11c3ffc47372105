"""Which elements are kept exactly: what a caller names, as coordinates in the layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from swkernels.detect.report import SCHEMA as REPORT
from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput
from swkernels.files import read_json
from swkernels.train.coordinates import Coordinates
from swkernels.train.sites import find_targets

# By the parameter that holds a weight and the expert of a stack: int32 [k, 2].
Listed = dict[tuple[nn.Parameter, "int | None"], torch.Tensor]


def find_listed(model: nn.Module, source: object) -> Listed:
    """Find the super weights that ``source`` names in the model.

    Args:
        source: see ``swkernels.quantize``.

    Raises:
        InvalidInput: no such source, a name that is no layer's, or a coordinate outside of it.
    """
    coordinates = read_super_weights(source, model)
    if coordinates is None:
        return {}
    targets = find_targets(model, coordinates)
    return {
        (target.parameter, site.expert): coordinates.weights[site]
        for site, target in targets.items()
    }


def read_super_weights(source: object, model: nn.Module | None = None) -> Coordinates | None:
    """Read super weights as coordinates.

    Args:
        source: None, a ``ScanReport`` or its document, ``Coordinates``, the path of a report or of
            a file of coordinates, or {name or (name, expert): [[row, column], ...]}.
        model: needed for the last; it says how large the weights are.

    Raises:
        InvalidInput: none of these, or a file that cannot be read.
    """
    if source is None or isinstance(source, Coordinates):
        return source
    if isinstance(source, (str, Path)):
        return _read_file(Path(source))
    if isinstance(source, ScanReport):
        return Coordinates.from_report(source)
    if isinstance(source, Mapping):
        if source.get("schema") == REPORT:
            return Coordinates.from_report(source)
        return Coordinates.of(source, model) if source else None
    raise InvalidInput(
        "super_weights must be a ScanReport, Coordinates, the path of a file of either, or "
        f"{{name: [[row, column], ...]}}, got {type(source).__name__}"
    )


def _read_file(path: Path) -> Coordinates:
    document = read_json(path) if path.suffix.lower() == ".json" else None
    is_report = isinstance(document, dict) and document.get("schema") == REPORT
    if not is_report:
        return Coordinates.load(path)
    return Coordinates.from_report(ScanReport.of_document(document, path))
