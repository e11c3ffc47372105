"""Where a trained LoRA changes weights most: the largest entries of B A alpha / r."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from swkernels import ops
from swkernels.documents import FLAG, Fields, MapOf, Maybe, Number, check_document
from swkernels.errors import InvalidInput
from swkernels.files import CONFIG, read_json
from swkernels.models.safetensors_header import load_header

from .coordinates import Coordinates
from .weights import Site

_FINITE = Number(-1e30, 1e30, special=False)
_CONFIG = Fields(  # of PEFT
    {"lora_alpha": _FINITE},
    {"alpha_pattern": Maybe(MapOf(_FINITE)), "use_rslora": Maybe(FLAG)},
)
_WRAPPED = "base_model.model."  # before the names of a model that PEFT has wrapped


@dataclass(frozen=True)
class DeltaTop:
    """The largest entries of the updates of all adapted weights together.

    Attributes:
        coordinates: where they are, by module; ready for ``MaskedLoraConfig``.
        entries: (module, row, column, entry of dW), the largest magnitude first; of equal ones the
            first by module in the order of the model, row and column.
    """

    coordinates: Coordinates
    entries: tuple[tuple[str, int, int, float], ...]


def delta_top(
    adapter: nn.Module | str | Path,
    k: int = 1000,
    *,
    name: str | None = None,
    backend: str | None = None,
) -> DeltaTop:
    """Find the k largest |dW| = |B A| alpha / r over all adapted weights; no dW is built.

    The study freezes the rows of B and the columns of A that hold the first 1,000.

    Args:
        adapter: a model with LoRA layers of PEFT, masked or not; or the folder of a saved LoRA.
        k: how many, from 1.
        name: of the adapter in the model; None is the active one.
        backend: as of ``ops.topk_low_rank``.

    Raises:
        InvalidInput: no LoRA of linear layers, no adapter of this name, a damaged folder, or k.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidInput(f"k must be an integer from 1, got {k!r}")
    if isinstance(adapter, nn.Module):
        factors = _of_model(adapter, name)
    else:
        factors = _of_folder(Path(adapter))
    modules = list(factors)
    top = ops.topk_low_rank([factors[module] for module in modules], k, backend=backend)
    columns = [t.tolist() for t in (top.tensor, top.row, top.column, top.values)]
    entries = tuple((modules[m], row, col, value) for m, row, col, value in zip(*columns))
    listed: dict[Site, list[tuple[int, int]]] = {}
    for module, row, col, _ in entries:
        listed.setdefault(Site(module), []).append((row, col))
    shapes = {Site(m): (len(B), A.shape[1]) for m, (B, A) in factors.items()}
    return DeltaTop(Coordinates(listed, shapes), entries)


def _of_model(model: nn.Module, name: str | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(B scaled, A) by module of the LoRA layers of a model, with their masks."""
    layers = {
        module_name: module
        for module_name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling") and len(module.lora_A)
    }
    factors, known = {}, set()
    for module_name, layer in layers.items():
        known.update(layer.lora_A)
        adapter = name if name is not None else layer.active_adapters[0]
        if adapter not in layer.lora_A:
            continue
        state = layer.state_dict()  # with the masks that the layer may have
        A, B = state[f"lora_A.{adapter}.weight"], state[f"lora_B.{adapter}.weight"]
        factors[module_name.removeprefix(_WRAPPED)] = (B * layer.scaling[adapter], A)
    if not factors:
        if known:
            raise InvalidInput(f"there is no adapter {name!r}: the model has {sorted(known)}")
        raise InvalidInput("the model has no LoRA on linear layers: make one with PEFT")
    return factors


def _of_folder(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    where = folder / "adapter_config.json"
    config = read_json(where, limits=CONFIG)
    check_document(config, _CONFIG, where)
    alpha_pattern = config.get("alpha_pattern") or {}
    alpha, root = config["lora_alpha"], config.get("use_rslora", False)
    path = folder / "adapter_model.safetensors"
    load_header(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{folder} holds no LoRA that can be read: {error!r:.200}") from error
    factors = {}
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight").removeprefix(_WRAPPED)
        B = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if B is None or B.dim() != 2 or A.dim() != 2:
            raise InvalidInput(f"{path} has no lora_B for {module}: take an undamaged copy")
        own = next((v for p, v in alpha_pattern.items() if _matches(p, module)), alpha)
        factors[module] = (B * (own / (math.sqrt(len(A)) if root else len(A))), A)
    if not factors:
        raise InvalidInput(f"{path} has no LoRA of linear layers, but {list(tensors)[:3]}")
    return factors


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT takes a key of its patterns for a module."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except (re.error, OverflowError) as error:
        raise InvalidInput(f"the pattern {pattern!r:.200} is no regular expression") from error
