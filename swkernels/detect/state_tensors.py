"""What a scan has learnt as tensors, for ``state``; the checks of such tensors; and back."""

from __future__ import annotations

import hashlib

import torch

from swkernels import ops
from swkernels.errors import InvalidInput
from swkernels.models import DownProjection

from .evaluate import BLOCK, Cell, Key
from .peaks import Batch, PeakRecord

NO_CELLS = {
    "cells.at": torch.zeros(0, 2, dtype=torch.int64),  # window, number of the set
    "cells.kl": torch.zeros(0, dtype=torch.float64),
    "cells.losses": torch.zeros(0, dtype=torch.float64),  # of all cells, one after another
    "sets": torch.zeros(0, 5, dtype=torch.int64),  # number, site, expert or -1, row, column
}
_NAMES = {torch.int64: "I64", torch.float64: "F64"}


def peaks_of(record: PeakRecord, done: list[int]) -> dict[str, torch.Tensor]:
    """Stage 1 as tensors that do not change with ``record``.

    Args:
        record: not merged with other ranks' and not finished.
        done: first samples of the batches that it has taken over.
    """
    found = {"done": torch.tensor(done, dtype=torch.int64)}
    for site, state in enumerate(record.states):
        for name in ("inputs", "outputs", "routed"):
            found[f"{name}.{site}"] = getattr(state, name).detach().cpu().clone()
        if state.moments is not None:
            parts = [record.moments[first][site] for first in done]
            none = torch.zeros(0, state.experts, 3, dtype=torch.float64)
            found[f"moments.{site}"] = torch.stack(parts) if parts else none
    rows = [(sample, *at) for sample, every in sorted(record.spiking.items()) for at in every]
    found["spiking"] = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
    return found


def restore_peaks(
    tensors: dict[str, torch.Tensor], record: PeakRecord, batches: list[Batch]
) -> None:
    """Put tensors that were checked into a fresh record."""
    done = tensors["done"].tolist()
    for site, state in enumerate(record.states):
        for name in ("inputs", "outputs", "routed"):
            getattr(state, name).copy_(tensors[f"{name}.{site}"])
        if state.moments is not None:
            for first, moments in zip(done, tensors[f"moments.{site}"]):
                record.moments.setdefault(first, {})[site] = moments.clone()
    for batch in batches:
        if batch.first in done:
            for sample in batch.samples:  # those without a spike count too
                record.spiking.setdefault(sample, [])
    for sample, *at in tensors["spiking"].tolist():
        record.spiking[sample].append(tuple(at))


def cell_tensors(
    cells: dict[tuple[int, Key], Cell], projections: list[DownProjection]
) -> dict[str, torch.Tensor]:
    """Measurements as tensors."""
    sites = {projection.name: site for site, projection in enumerate(projections)}
    numbers = {key: number for number, key in enumerate(dict.fromkeys(key for _, key in cells))}
    at = [(window, numbers[key]) for window, key in cells]
    members = [(n, sites[name], *rest) for key, n in numbers.items() for name, *rest in key]
    losses = [loss for cell in cells.values() for loss in cell.losses]
    return {
        "cells.at": torch.tensor(at, dtype=torch.int64).reshape(-1, 2),
        "cells.kl": torch.tensor([cell.kl for cell in cells.values()], dtype=torch.float64),
        "cells.losses": torch.tensor(losses, dtype=torch.float64),
        "sets": torch.tensor(members, dtype=torch.int64).reshape(-1, 5),
    }


def cells_of(
    tensors: dict[str, torch.Tensor],
    projections: list[DownProjection],
    windows: list[torch.Tensor],
) -> dict[tuple[int, Key], Cell]:
    """The measurements that tensors hold.

    Raises:
        InvalidInput: they do not fit the windows.
    """
    keys: dict[int, list] = {}
    for number, site, *rest in tensors["sets"].tolist():
        keys.setdefault(number, []).append((projections[site].name, *rest))
    losses, found = tensors["cells.losses"].tolist(), {}
    for (window, number), kl in zip(tensors["cells.at"].tolist(), tensors["cells.kl"].tolist()):
        if not 0 <= window < len(windows):
            raise InvalidInput(f"the state has window {window} of {len(windows)}: delete it")
        blocks = -(-(windows[window].numel() - 1) // BLOCK)
        mine, losses = losses[:blocks], losses[blocks:]
        if len(mine) != blocks:
            raise InvalidInput("the state lacks losses of its measurements: delete it")
        found[window, tuple(sorted(keys.get(number, [])))] = Cell(mine, kl)
    return found


def digest(identity: str, tensors: dict[str, torch.Tensor]) -> str:
    """A hash of all that a state says."""
    total = hashlib.sha256(identity.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def check_forms(header: dict[str, dict], record: PeakRecord) -> None:
    """Check names, dtypes and shapes against the model, before data are read.

    Raises:
        InvalidInput: the first that is wrong.
    """
    expected: dict[str, tuple[str, list]] = {"done": ("I64", [None]), "spiking": ("I64", [None, 5])}
    for name, tensor in NO_CELLS.items():
        expected[name] = _NAMES[tensor.dtype], [None, *tensor.shape[1:]]
    for site, state in enumerate(record.states):
        expected[f"inputs.{site}"] = "I64", list(state.inputs.shape)
        expected[f"outputs.{site}"] = "I64", list(state.outputs.shape)
        expected[f"routed.{site}"] = "I64", list(state.routed.shape)
        if state.moments is not None:
            expected[f"moments.{site}"] = "F64", [None, *state.moments.shape]
    for name in sorted(expected.keys() ^ header.keys()):
        what = "lacks" if name in expected else "has the unknown"
        raise InvalidInput(f"it {what} tensor {name!r:.80}")
    for name, (dtype, shape) in expected.items():
        found = header[name]
        fits = len(found["shape"]) == len(shape) and all(
            wanted in (None, got) for wanted, got in zip(shape, found["shape"])
        )
        if found["dtype"] != dtype or not fits:
            raise InvalidInput(
                f"expected {name} as {dtype} {shape}, got {found['dtype']} {found['shape']!r:.80}"
            )


def check_values(
    tensors: dict[str, torch.Tensor], record: PeakRecord, batches: list[Batch]
) -> None:
    """Check that every number is one that this scan can have written.

    Raises:
        InvalidInput: the first that is not.
    """
    done = tensors["done"].tolist()
    firsts = {batch.first for batch in batches}
    if len(set(done)) != len(done) or not set(done) <= firsts:
        raise InvalidInput("it names batches that this scan does not have")
    tokens = sum(batch.ids.numel() for batch in batches)
    for site in range(len(record.states)):
        for name in ("inputs", "outputs"):
            check_keys(f"{name}.{site}", tensors[f"{name}.{site}"], tokens)
        routed = tensors[f"routed.{site}"]
        if not 0 <= int(routed.min()) <= int(routed.max()) <= tokens:
            raise InvalidInput(f"routed.{site} counts more tokens than there are, or fewer than 0")
        moments = tensors.get(f"moments.{site}")
        if moments is not None and len(moments) != len(done):
            raise InvalidInput(f"moments.{site} is of {len(moments)} batches of {len(done)}")
    samples = {sample for b in batches if b.first in set(done) for sample in b.samples}
    if not set(tensors["spiking"][:, 0].tolist()) <= samples:
        raise InvalidInput("it names spikes of samples that it has not seen")
    check_places(tensors["spiking"][:, 1:], record, "spikes", 0)
    check_places(tensors["sets"][:, 1:], record, "measured weights", -1)
    if len(tensors["cells.at"]) != len(tensors["cells.kl"]):
        raise InvalidInput("its measurements are not complete")


def check_keys(name: str, keys: torch.Tensor, tokens: int) -> None:
    """Raise InvalidInput unless ``keys`` are peaks at some of ``tokens`` tokens."""
    if int(keys.min()) < 0 or int(keys.max()) >= ops.INFINITY_KEY:
        raise InvalidInput(f"{name} has a peak that is no finite magnitude")
    seen = keys[keys > 0]
    if len(seen) and not 0 <= int(ops.peaks(seen).tokens.max()) < tokens:
        raise InvalidInput(f"{name} has a peak at a token that there is not")


def check_places(places: torch.Tensor, record: PeakRecord, what: str, least: int) -> None:
    """Check rows of (site, expert, row, column); ``least`` is the smallest number of an expert."""
    if not len(places):
        return
    sites = places[:, 0]
    if int(sites.min()) < 0 or int(sites.max()) >= len(record.states):
        raise InvalidInput(f"its {what} name a projection that the model does not have")
    of_site = [state.projection for state in record.states]
    experts = torch.tensor([max(p.experts or 1, (p.expert or 0) + 1) for p in of_site])
    sizes = torch.tensor([(p.rows, p.columns) for p in of_site])
    inside = (places[:, 1] >= least) & (places[:, 1] < experts[sites])
    inside &= ((places[:, 2:] >= 0) & (places[:, 2:] < sizes[sites])).all(1)
    if not inside.all():
        raise InvalidInput(f"its {what} lie outside of the model's matrices")
