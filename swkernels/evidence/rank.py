"""Rank the entries of every projection of a model by magnitude, from its files or in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.files import CONFIG, read_json
from swkernels.models import ProjectionNotFound, find_down_projections
from swkernels.models.checkpoint import Checkpoint, find_checkpoint, open_checkpoint, weight_files
from swkernels.models.kinds import KINDS, module_of, projection_kind, why_left_out
from swkernels.models.stored import StoredProjection, stored_projections
from swkernels.models.structure import base_of
from swkernels.models.unchanged import unchanged
from swkernels.ops import topk_abs

from . import rank_cache
from .ranking import LeftOut, Ranking, kinds_of
from .results import Progress, silent

# What quantized checkpoints call the parts of a packed weight, or its scale.
_PACKED = re.compile(
    r"(\.(qweight|weight_packed|weight_scale\w*|weight_format|scb|absmax|quant_map|quant_state\..*"
    r"|packed_\w+)|\.weight\.(absmax|quant_map|nested_\w+|quant_state\..*)|_(blocks|scales))$",
    re.I,
)
_LOAD = "load the model, dequantize it, and pass the model"


def rank(
    model: nn.Module | str | Path,
    k: int = 10_000,
    *,
    modules: Iterable[str] | str | None = None,
    backend: str | None = None,
    cache: bool = True,
    progress: Progress = silent,
) -> Ranking:
    """Return the k entries of largest magnitude over the projections of all blocks together.

    Projections are those of ``swkernels.models.kinds.KINDS``. Embeddings, heads, norms, biases,
    routers, state-space mixers and the towers of other modalities are left out, and listed.

    Args:
        model: a model; or a checkpoint, which is read as ``open_checkpoint`` does, without making
            the model.
        k: how many; all entries where there are fewer.
        modules: rank these kinds alone.
        backend: of ``ops.topk_abs``.
        cache: keep the ranking of a checkpoint, and use the one that was kept.
        progress: called with (stage, done, total).

    Raises:
        InvalidInput: no such checkpoint, a damaged one, quantized weights, a NaN (named with its
            place), no projection at all, ``k`` or ``modules``.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidInput(f"k must be an integer from 1, got {k!r}")
    kinds = kinds_of(modules)
    if isinstance(model, nn.Module):
        return _rank(_Model(model), k, kinds, backend, progress)
    if not isinstance(model, (str, Path)):
        raise InvalidInput(f"expected a model or a checkpoint, got {type(model).__name__}")
    path = find_checkpoint(model)
    folder = path if path.is_dir() else path.parent
    _refuse_quantized(path)
    kept = rank_cache.cache_file(path, weight_files(path), k, kinds) if cache else None
    ranking = rank_cache.read(kept) if kept is not None else None
    if ranking is None:
        with unchanged(path), open_checkpoint(path) as checkpoint:
            ranking = _rank(checkpoint, k, kinds, backend, progress)
        if kept is not None:
            rank_cache.write(kept, ranking)
    return replace(ranking, model=str(model), folder=str(folder))


class _Model:
    """The parameters and buffers of a model as named tensors, like a ``Checkpoint``."""

    def __init__(self, model: nn.Module):
        root = base_of(model)[0]
        self.label = getattr(getattr(root, "config", None), "_name_or_path", "") or (
            type(root).__name__
        )
        self._tensors = dict(root.named_parameters()) | dict(root.named_buffers())
        self.transposed = self._transposed(root)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def _transposed(self, root: nn.Module) -> dict[str, bool]:
        """What the modules say of the layout of their weights; see ``stored_projections``."""
        known = {
            f"{path}.weight": type(module).__name__ == "Conv1D"
            for path, module in root.named_modules()
            if isinstance(module._parameters.get("weight"), torch.Tensor)
            and module.weight.dim() == 2
        }
        try:
            projections = find_down_projections(root, towers="all")
        except ProjectionNotFound:
            return known
        for p in projections:
            if p.layout in ("eoi", "eio"):
                name = f"{p.name}.{p.parameter}"
                owner = module_of(name).rpartition(".")[0]
                known |= {
                    key: p.layout == "eio"
                    for key, tensor in self._tensors.items()
                    if key.startswith(f"{owner}.") and tensor.dim() == 3
                }
        return known


def _rank(source, k: int, kinds, backend: str | None, progress: Progress) -> Ranking:
    shapes = source.shapes()
    _refuse_packed(source, shapes)
    found = stored_projections(shapes, getattr(source, "transposed", None))
    ranked = [p for p in found if kinds is None or p.kind in kinds]
    if not ranked:
        raise InvalidInput(
            f"{source.label} holds no {' or '.join(kinds or ['projection'])}: "
            f"{len(shapes)} tensors, {len(found)} of them projections of blocks"
        )
    tensors: dict[str, torch.Tensor] = {}
    for p in ranked:
        if p.name not in tensors:
            tensors[p.name] = source[p.name]
    matrices = [p.view(tensors[p.name]) for p in ranked]
    progress("ranking", 0, 1)
    value, number, row, column = _largest(ranked, matrices, k, backend)
    progress("ranking", 1, 1)
    largest = _largest_of_blocks(ranked, matrices, value, number, backend, progress)
    used, matrix = number.unique(return_inverse=True)
    sizes = {}
    for kind in KINDS:
        own = [p.shape[0] * p.shape[1] for p in ranked if p.kind == kind]
        if own:
            sizes[kind] = len(own), sum(own)
    return Ranking(
        source.label,
        tuple(ranked[place] for place in used.tolist()),
        matrix, row, column, value, sizes, largest,
        _left_out(shapes, {p.name for p in found}, set(tensors)),
    )  # fmt: skip


def _largest(ranked, matrices, k: int, backend: str | None) -> tuple[torch.Tensor, ...]:
    """(value float64, number, row, column), each [k] on the CPU, as ``topk_abs`` orders them.

    The matrices may be on several devices: each gives its largest, and they are merged.
    """
    devices: dict[torch.device, list[int]] = {}
    for place, matrix in enumerate(matrices):
        devices.setdefault(matrix.device, []).append(place)
    parts = []
    for places in devices.values():
        with _naming([ranked[place] for place in places]):
            top = topk_abs([matrices[place] for place in places], k, backend=backend)
        number = torch.tensor(places)[top.tensor.cpu()]
        parts.append((top.values.cpu().double(), number, top.row.cpu(), top.column.cpu()))
    if len(parts) == 1:
        return parts[0]
    value, number, row, column = (torch.cat(part) for part in zip(*parts))
    order = number.sort(stable=True).indices  # within a matrix they are in order
    order = order[value[order].abs().sort(descending=True, stable=True).indices][:k]
    return value[order], number[order], row[order], column[order]


def _largest_of_blocks(ranked, matrices, value, number, backend, progress: Progress) -> dict:
    """By block and kind, the largest magnitude: from the ranking, or else by another look."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, p in enumerate(ranked):
        groups.setdefault((p.block, p.kind), []).append(place)
    largest: dict[tuple[str, str], float] = {}
    for magnitude, place in zip(value.abs().tolist(), number.tolist()):
        largest.setdefault((ranked[place].block, ranked[place].kind), magnitude)
    missing = [key for key in groups if key not in largest]
    for done, key in enumerate(missing):
        progress("largest of each layer", done, len(missing))
        own = groups[key]
        top = _largest([ranked[n] for n in own], [matrices[n] for n in own], 1, backend)
        largest[key] = top[0].abs().item()
    if missing:
        progress("largest of each layer", len(missing), len(missing))
    return {key: largest[key] for key in groups}


@contextmanager
def _naming(ranked: list[StoredProjection]):
    """Let an error of ``topk_abs`` name the weight, not its number."""
    try:
        yield
    except InvalidInput as error:
        found = re.match(r"tensor (\d+) ", str(error))
        if found is None:
            raise
        p = ranked[int(found[1])]
        expert = f" expert {p.expert}" if p.fused else ""
        raise InvalidInput(f"{p.name}{expert} {str(error)[found.end() :]}") from error


def _left_out(shapes: Mapping, known: set[str], ranked: set[str]) -> tuple[LeftOut, ...]:
    counts: dict[tuple[str, str], int] = {}
    for name, shape in shapes.items():
        if name not in ranked:
            why = "not asked for" if name in known else why_left_out(name, shape)
            key = re.sub(r"(?<![a-z])\d+(?![a-z])", "*", name), why
            counts[key] = counts.get(key, 0) + 1
    return tuple(LeftOut(name, why, count) for (name, why), count in counts.items())


def _refuse_quantized(path: Path) -> None:
    """Raise InvalidInput for a .gguf file, and where the config.json says that codes are stored."""
    if path.suffix.lower() == ".gguf":
        raise InvalidInput(
            f"{path} is a .gguf file, which packs its weights: load the model "
            "(swkernels.detect.loading.load_model) and pass the model"
        )
    if not (path / "config.json").is_file():
        return
    config = read_json(path / "config.json", limits=CONFIG, special=True)
    quantized = config.get("quantization_config") if isinstance(config, dict) else None
    if isinstance(quantized, dict):
        method = quantized.get("quant_method", "a quantizer")
        raise InvalidInput(f"{path} is packed by {method}: {_LOAD}")


def _refuse_packed(source: Checkpoint | _Model, shapes: Mapping) -> None:
    """Raise InvalidInput where a projection holds codes: they must not be ranked as values."""
    for name in shapes:
        part = _PACKED.search(name)
        if part and projection_kind(name[: part.start()]) is not None:
            raise InvalidInput(f"{name} of {source.label} is of a packed weight: {_LOAD}")
        if projection_kind(name) is not None:
            dtype = source.dtype(name)
            if dtype is None or not dtype.is_floating_point:
                raise InvalidInput(f"{name} of {source.label} is packed ({dtype}): {_LOAD}")
