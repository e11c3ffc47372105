"""Small checkpoints of random bytes, and how they are damaged."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from swkernels.guard.contents import look
from swkernels.train import Coordinates

CHUNK = 1024
LAYERS, D, H = 3, 64, 160  # a weight has 20 chunks in bfloat16
NAME = "model.layers.{}.mlp.down_proj"
PLACES = {1: [[3, 5], [40, 159]], 2: [[0, 0]]}


def tensors(dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{NAME.format(layer)}.weight": torch.randn(D, H, generator=generator).to(dtype)
        for layer in range(LAYERS)
    }
    return found | {"model.norm.weight": torch.ones(H), "model.empty": torch.zeros(0, 7)}


def write(folder: Path, held: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors() if held is None else held, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def coordinates() -> Coordinates:
    listed = {NAME.format(layer): places for layer, places in PLACES.items()}
    return Coordinates.of(listed, {(name, None): (D, H) for name in listed})


def flip(path: Path, byte: int, bit: int = 6) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        before = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([before ^ 1 << bit]))


def flip_in(source: Path, name: str, byte: int, bit: int = 6) -> None:
    """Flip a bit of a tensor's data."""
    stretch = look(source, "xxh3_128").entries[name].stretch
    flip(stretch.path, stretch.start + byte, bit)
