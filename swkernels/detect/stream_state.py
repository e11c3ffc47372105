"""The state on disk of a scan layer by layer: what was learnt, and where every sample stands.

After a layer every sample's forward can be started again from what the layer returned (``carry``),
so the state holds those hidden states besides the peaks. It is written tensor by tensor: at no
moment are all hidden states in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from swkernels.errors import InvalidInput
from swkernels.files import parse_json
from swkernels.models.checkpoint import DTYPES
from swkernels.models.safetensors_header import load_header

from . import state_tensors as form
from .carry import Carry
from .peaks import Batch, PeakRecord
from .state import ScanState, reading

_NO_HASH = "0" * 64
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 64 << 20  # bytes read at a time
_PATIENCE = 20  # a state is written again when this many times what it took has passed

_SIDES = ("x", "w")


@dataclass
class Passed:
    """What a pass over the layers has come to.

    Attributes:
        parts: the layers that are done.
        spikes: as JSON's types but for ``x`` and ``w``, float32 [H] tensors or None.
        carries: by first sample of a batch; empty when all layers are done.
    """

    parts: list[str]
    spikes: list[dict]
    carries: dict[int, Carry]


class StreamState(ScanState):
    """As ``ScanState``, saved after layers and measurements; for one process.

    Where writing takes long, because many samples wait, it is done less often: a state costs at
    most a twentieth of the time.
    """

    SCHEMA = "swkernels.stream-state/1"

    def restore_passed(self, record: PeakRecord, batches: list[Batch]) -> Passed | None:
        """Put what a state has of the peaks into ``record``; None where there is no state.

        Raises:
            InvalidInput: the state is damaged.
        """
        self._saved, self._took = time.monotonic(), 0.0
        self._learnt: dict[str, torch.Tensor] = {}
        self._texts: dict[str, str] = {}
        if not self.path.exists():
            return None
        with reading(self.path):
            header = load_header(self.path)
            _check_hash(self.path, header)
            tensors = _read(self.path, header)
            passed = _passed_of(header.metadata, tensors, record, batches)
        self._found = {k: v for k, v in tensors.items() if k in form.NO_CELLS}
        self._learnt = {
            name: tensor.clone()
            for name, tensor in tensors.items()
            if name not in form.NO_CELLS and not name.startswith("carry.")
        }
        self._texts = {name: header.metadata[name] for name in ("parts", "spikes")}
        cells = len(self._found["cells.kl"])
        measured = f", with {cells} measurements" if cells else ""
        layers = len({state.projection.block_name for state in record.states})
        self._notice(
            f"continuing after layer {len(passed.parts)} of {layers}{measured}: {self.path}"
        )
        return passed

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= max(self.every, _PATIENCE * self._took)

    def save_passed(self, record: PeakRecord, passed: Passed, present: Callable) -> None:
        """Write the state after a layer.

        Args:
            record: what was learnt.
            passed: where the samples stand.
            present: a context in which carried tensors have their values; entered for one by one.
        """
        tensors, spikes = _learnt(record), []
        for number, spike in enumerate(passed.spikes):
            sides = {side: spike[side] for side in _SIDES if spike[side] is not None}
            tensors |= {f"{side}.{number}": tensor for side, tensor in sides.items()}
            spikes.append({k: v for k, v in spike.items() if k not in _SIDES})
        self._learnt = tensors
        self._texts = {"parts": json.dumps(passed.parts), "spikes": json.dumps(spikes)}
        carried = {
            f"carry.{first}.{number}": tensor
            for first, carry in passed.carries.items()
            for number, tensor in enumerate(carry.tensors())
        }
        carries = {str(first): carry.to_dict() for first, carry in passed.carries.items()}
        self._write(tensors | form.NO_CELLS | carried, carries, present)

    def cell_done(self, evaluator, projections: list) -> None:
        """Save the measurements so far, and all layers' peaks, if it is time."""
        if self.due():
            cells = form.cell_tensors(evaluator.cells, projections)
            self._write(self._learnt | form.NO_CELLS | cells, {}, nullcontext)

    def _write(self, tensors: dict[str, torch.Tensor], carries: dict, present: Callable) -> None:
        begun = time.monotonic()
        metadata = {
            "schema": self.SCHEMA,
            "identity": json.dumps(self._identity),
            **self._texts,
            "carries": json.dumps(carries),
            "sha256": _NO_HASH,
        }
        try:
            _write_aside(self.path, tensors, metadata, present)
        except OSError as error:
            self._warn(
                f"the scan goes on without a newer state: cannot write {self.path}: "
                f"{error.strerror or error}"
            )
        self._saved = time.monotonic()
        self._took = self._saved - begun


def _learnt(record: PeakRecord) -> dict[str, torch.Tensor]:
    """The peaks as tensors; those of layers to come are zero."""
    found: dict[str, torch.Tensor] = {}
    for site, state in enumerate(record.states):
        for name in ("inputs", "outputs", "routed"):
            found[f"{name}.{site}"] = getattr(state, name).detach().cpu().clone()
        if state.moments is not None:
            found[f"moments.{site}"] = state.moments.cpu().clone()
    rows = [(sample, *at) for sample, every in sorted(record.spiking.items()) for at in every]
    found["spiking"] = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
    return found


def _write_aside(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], present: Callable
) -> None:
    """Write a safetensors file tensor by tensor, aside, and rename it."""
    entries: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    header = json.dumps(entries).encode()
    total = hashlib.sha256(header)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for tensor in tensors.values():
                with present([tensor]):
                    # A copy: NumPy would keep a waiting tensor's memory from being given back.
                    data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                if data.numel():
                    raw = data.flatten().view(torch.uint8).numpy()
                    total.update(raw)
                    file.write(raw)
            file.seek(8 + header.index(_NO_HASH.encode()))
            file.write(total.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def _check_hash(path: Path, header) -> None:
    """Raise InvalidInput unless the file is what was written: header, with no hash, and data."""
    said = header.metadata.get("sha256", "")
    total = hashlib.sha256(header.raw.replace(said.encode(), _NO_HASH.encode(), 1))
    with open(path, "rb") as file:
        file.seek(8 + len(header.raw))
        while piece := file.read(_PIECE):
            total.update(piece)
    if len(said) != len(_NO_HASH) or total.hexdigest() != said:
        raise InvalidInput("its content does not match its checksum")


def _read(path: Path, header) -> dict[str, torch.Tensor]:
    """All tensors, mapped: they are copied where they are used."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidInput(str(error)) from error


def _passed_of(
    metadata: dict[str, str],
    tensors: dict[str, torch.Tensor],
    record: PeakRecord,
    batches: list[Batch],
) -> Passed:
    """Put the peaks into ``record``; give the rest."""
    layers = list(dict.fromkeys(state.projection.block_name for state in record.states))
    parts, spikes, carries = (
        parse_json(metadata.get(name, "").encode(), f"its {name}")
        for name in ("parts", "spikes", "carries")
    )
    if not isinstance(parts, list) or parts != layers[: len(parts)] or not parts:
        raise InvalidInput("the layers that it has done are not the first ones of this model")
    _check_learnt(tensors, record, sum(batch.ids.numel() for batch in batches))
    for site, state in enumerate(record.states):
        for name in ("inputs", "outputs", "routed"):
            getattr(state, name).copy_(tensors[f"{name}.{site}"])
        if state.moments is not None:
            state.moments.copy_(tensors[f"moments.{site}"])
    for batch in batches:
        for sample in batch.samples:  # those without a spike count too
            record.spiking.setdefault(sample, [])
    for sample, *at in tensors["spiking"].tolist():
        record.spiking[sample].append(tuple(at))
    try:
        for number, spike in enumerate(spikes):
            for side in _SIDES:
                tensor = tensors.get(f"{side}.{number}")
                spike[side] = None if tensor is None else tensor.clone()
        found = {
            int(first): Carry.from_dict(carry, _carried(tensors, first))
            for first, carry in carries.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InvalidInput("what it says of spikes and samples is damaged") from error
    if set(found) not in (set(), {batch.first for batch in batches}):
        raise InvalidInput("it does not have all samples' hidden states")
    return Passed(parts, spikes, found)


def _carried(tensors: dict[str, torch.Tensor], first: str) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    while (name := f"carry.{first}.{len(found)}") in tensors:
        found.append(tensors[name])
    return found


def _check_learnt(tensors: dict[str, torch.Tensor], record: PeakRecord, tokens: int) -> None:
    """Check what is not carried against the model."""
    expected = {name: (t.dtype, [None, *t.shape[1:]]) for name, t in form.NO_CELLS.items()}
    expected["spiking"] = torch.int64, [None, 5]
    for site, state in enumerate(record.states):
        for name in ("inputs", "outputs", "routed"):
            expected[f"{name}.{site}"] = torch.int64, list(getattr(state, name).shape)
        if state.moments is not None:
            expected[f"moments.{site}"] = torch.float64, list(state.moments.shape)
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        if found is None:
            raise InvalidInput(f"it lacks tensor {name!r}")
        sizes = zip(shape, found.shape)
        if (
            found.dtype != dtype
            or found.dim() != len(shape)
            or any(wanted not in (None, got) for wanted, got in sizes)
        ):
            raise InvalidInput(f"expected {name} as {dtype} {shape}, got {found.dtype} "
                               f"{list(found.shape)!r:.80}")  # fmt: skip
    for site in range(len(record.states)):
        for name in ("inputs", "outputs"):
            form.check_keys(f"{name}.{site}", tensors[f"{name}.{site}"], tokens)
    form.check_places(tensors["spiking"][:, 1:], record, "spikes", 0)
    form.check_places(tensors["sets"][:, 1:], record, "measured weights", -1)
