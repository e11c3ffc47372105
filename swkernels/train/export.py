"""Take trained deltas elsewhere: as an ordinary LoRA, or inside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from swkernels.errors import InvalidInput
from swkernels.files import in_folder

from .sparse import SparseHandle, whole
from .weights import Site


def to_lora(handle: SparseHandle, folder: str | Path, *, max_rank: int = 64) -> int:
    """Write the deltas as a LoRA adapter that stock PEFT, vLLM and llama.cpp's converter load.

    Deltas that touch R different rows and C different columns of a weight are a matrix of rank at
    most min(R, C): B has one 1 for each of these rows, A has the rows themselves (or the other way
    round), so that B A is the deltas exactly. The adapter's rank is the largest of all weights.

    Args:
        handle: of ``swkernels.train.sparse``.
        folder: made new, or replaced if it holds an adapter; written aside and renamed.
        max_rank: what the program that will load it takes.

    Returns:
        The rank.

    Raises:
        InvalidInput: the deltas need a larger rank, or lie in experts or transposed weights, for
            which PEFT's LoRA files have no such form; nothing is written.
    """
    rank = lora_rank(handle, max_rank)
    sites = list(handle.values())
    factors = {site: _factors(handle, site) for site in sites}
    tensors = {}
    for site, (a, b) in factors.items():
        prefix = f"base_model.model.{site.name}"
        tensors[f"{prefix}.lora_A.weight"] = _padded(a, (rank, a.shape[1]))
        tensors[f"{prefix}.lora_B.weight"] = _padded(b, (b.shape[0], rank))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(handle.model.config, "_name_or_path", None),
        "r": rank,
        "lora_alpha": rank,  # a scaling of 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [site.name for site in sites],
        "inference_mode": True,
    }

    def write(aside: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, aside / "adapter_model.safetensors", {"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (aside / "adapter_config.json").write_text(text, encoding="utf-8")

    in_folder(Path(folder), "adapter_config.json", write)
    return rank


def lora_rank(handle: SparseHandle, max_rank: int = 64) -> int:
    """The rank that ``to_lora`` will need: it follows from the coordinates, before any training.

    Raises:
        InvalidInput: as ``to_lora``.
    """
    for site in handle.values():
        handle.target(site).check_for_lora()
    weights = handle.coordinates.weights.values()
    rank = max(min(len(w[:, 0].unique()), len(w[:, 1].unique())) for w in weights)
    if rank > max_rank:
        raise InvalidInput(
            f"the deltas have rank {rank}, more than max_rank = {max_rank}: they touch as many "
            "different rows and columns of a weight; export a checkpoint instead"
        )
    return rank


def to_checkpoint(handle: SparseHandle, folder: str | Path, **options) -> None:
    """Write the whole model with the deltas in its weights, as safetensors.

    Args:
        handle: of ``swkernels.train.sparse`` on a Hugging Face model with plain weights.
        folder: made new, or replaced if it holds a model; written aside and renamed.
        options: of ``save_pretrained``, such as ``max_shard_size``.

    Raises:
        InvalidInput: a weight that is packed or sharded; nothing is written.
    """
    merged_before = handle.merged
    if not merged_before:
        handle.merge()
    try:
        state = {
            name: value
            for name, value in handle.model.state_dict().items()
            if not handle.owns(name)
        }
        in_folder(
            Path(folder),
            "config.json",
            lambda aside: handle.model.save_pretrained(aside, state_dict=state, **options),
        )
    finally:
        if not merged_before:
            handle.unmerge()


def _factors(handle: SparseHandle, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, H] and B [D, r] whose product is the deltas of a site."""
    D, H = handle.coordinates.shapes[site]
    rows, cols = handle.coordinates.weights[site].long().unbind(1)
    values = whole(handle.values()[site].detach()).float().cpu()
    touched_rows, of_row = rows.unique(return_inverse=True)
    touched_cols, of_col = cols.unique(return_inverse=True)
    if len(touched_rows) <= len(touched_cols):
        a, b = torch.zeros(len(touched_rows), H), torch.zeros(D, len(touched_rows))
        a[of_row, cols] = values
        b[touched_rows, torch.arange(len(touched_rows))] = 1
    else:
        a, b = torch.zeros(len(touched_cols), H), torch.zeros(D, len(touched_cols))
        b[rows, of_col] = values
        a[torch.arange(len(touched_cols)), touched_cols] = 1
    return a, b


def _padded(matrix: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    padded = matrix.new_zeros(shape)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded
