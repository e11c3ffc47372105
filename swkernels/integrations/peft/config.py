"""The configuration: which coordinates, and how ``adapter_config.json`` holds them."""

from __future__ import annotations

import base64
import copy
import os
import zlib
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from peft import PeftConfig
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.train.coordinates import Coordinates, Site

from .registry import peft_type

# Its own name, so that a method that PEFT itself may get one day does not clash with it.
NAME = "SWKERNELS_SPARSE"
# Names of parameters hold it; PEFT and transformers derive it from the name of the type.
PREFIX = f"{NAME.lower()}_"


@dataclass
class SparseCoordinateConfig(PeftConfig):
    """Train deltas of chosen weights: float32 values at coordinates, zero at first.

    ``adapter_config.json`` holds the coordinates in a compact form, with the shape of each weight
    and a fingerprint of the base's values there.

    Args:
        coordinates: a ``Coordinates``; the path of a file that it saved; or a dict {name of the
            module: [[row, column], ...]}, whose shapes the model gives. An expert of fused
            experts is (name, expert).
        modules_to_save: names of further modules that are trained and saved whole, as for other
            PEFT methods (the head of a classifier).

    Raises:
        InvalidInput: there are no coordinates, or they are none of these.
    """

    coordinates: Coordinates | str | os.PathLike | dict | list | None = field(
        default=None, repr=False, metadata={"help": "Coordinates, the path of a file, or a dict"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules beside the coordinates to train and save whole"}
    )
    # PEFT reads it, and may shorten it; the coordinates alone say which modules are adapted.
    target_modules: set[str] | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type(NAME)
        self.base: dict[Site, str | None] = {}  # fingerprints of the base that it was trained on
        given = self.coordinates
        if isinstance(given, (str, os.PathLike)):
            self.coordinates = Coordinates.load(given)
        elif isinstance(given, list):
            self.coordinates, self.base = _decode(given)
        elif not isinstance(given, Coordinates) and not (isinstance(given, dict) and given):
            raise InvalidInput(
                "coordinates must be a Coordinates, the path of a file, or a dict {module: "
                f"[[row, column], ...]}} that is not empty, got {given!r:.80}"
            )
        listed = given if isinstance(given, dict) else self.coordinates.weights
        self.module_names = frozenset(key if isinstance(key, str) else key[0] for key in listed)
        self.target_modules = set(self.module_names)

    def resolve(self, model: nn.Module) -> Coordinates:
        """Return the coordinates; a dict gets its shapes from ``model``.

        Raises:
            InvalidInput: what ``Coordinates.of`` finds: a module that is not there, a coordinate
                outside its weight or listed twice.
        """
        if isinstance(self.coordinates, dict):
            return Coordinates.of(self.coordinates, model)
        return self.coordinates

    def to_dict(self) -> dict:
        """What is written to ``adapter_config.json``."""
        others = copy.copy(self)
        others.coordinates = None  # not copied entry by entry
        values = asdict(others)
        del values["target_modules"]
        values["coordinates"] = self.coordinates
        if isinstance(self.coordinates, Coordinates):
            values["coordinates"] = _encode(self.coordinates, self.base)
        return values


def _encode(coordinates: Coordinates, base: dict[Site, str | None]) -> list[dict]:
    entries = []
    for site, pairs in coordinates.weights.items():
        rows, cols = pairs.long().unbind(1)
        D, H = coordinates.shapes[site]
        steps = np.diff((rows * H + cols).numpy(), prepend=0)  # ascending, so none is negative
        packed = zlib.compress(steps.astype("<i8").tobytes(), 9)
        entries.append(
            {
                "module": site.name,
                "expert": site.expert,
                "shape": [D, H],
                "base": base.get(site),
                "packed": base64.b64encode(packed).decode(),
            }
        )
    return entries


def _decode(entries: list) -> tuple[Coordinates, dict[Site, str | None]]:
    weights, shapes, base = [], [], {}
    try:
        for entry in entries:
            site = Site(entry["module"], entry["expert"])
            D, H = entry["shape"]
            steps = zlib.decompress(base64.b64decode(entry["packed"], validate=True))
            flat = torch.from_numpy(np.frombuffer(steps, "<i8").cumsum())
            weights.append((site, torch.stack([flat // H, flat % H], 1)))
            shapes.append((site, (D, H)))
            base[site] = entry["base"]
        return Coordinates(weights, shapes), base
    except (KeyError, TypeError, ValueError, RuntimeError, zlib.error) as error:
        raise InvalidInput(
            f"adapter_config.json has damaged coordinates ({type(error).__name__}: {error}): take "
            "an undamaged copy of the adapter"
        ) from error
