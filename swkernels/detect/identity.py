"""What a scan is of, field by field: a state of one scan must not be continued by another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from swkernels.backends import explicit_choice

from .ranks import Ranks
from .report import versions

_CHUNK = 1 << 22  # elements that are multiplied at a time
# Of a model's config: where it was loaded from and by which library does not change a result.
_ELSEWHERE = ("_name_or_path", "transformers_version")


def identity(
    model: nn.Module,
    config,
    tokens: list[torch.Tensor],
    windows: list[torch.Tensor],
    fingerprint: str | None,
    files: Path | None,
    ranks: Ranks,
) -> dict[str, object]:
    """Everything on which a bit of the report may depend, but for the model's name.

    Args:
        model, config, tokens, windows, ranks: of the scan.
        fingerprint: of the checkpoint's files, see ``loading.fingerprint``.
        files: the checkpoint; looked at where accelerate keeps weights outside of the model.

    Returns:
        JSON's plain values by name, in the order in which they are best compared: what explains a
        difference comes before what only shows it.
    """
    settings = asdict(config) | {"backend": explicit_choice(config.backend)}
    found: dict[str, object] = {
        f"version of {name}": version
        for name, version in versions("torch", "transformers", "triton").items()
        if name != "python"
    }
    found["class of the model"] = type(model).__name__
    found["dtype"] = _dtypes(model)
    found["attention"] = getattr(getattr(model, "config", None), "_attn_implementation", None)
    found["config of the model"] = _digest(_plain_config(model))
    found["fingerprint"] = fingerprint
    found["weights"] = weights_digest(model)
    if any(p.is_meta for p in model.parameters()):
        found["files of weights"] = _digest(_stamps(files))
    for name, value in settings.items():
        found[f"setting {name}"] = list(value) if isinstance(value, tuple) else value
    found["samples"] = _digest([sample.tolist() for sample in tokens])
    found["evaluation text"] = _digest([window.tolist() for window in windows])
    found["device"] = _device(model)
    found["threads"] = torch.get_num_threads()
    found["rank"] = f"{ranks.rank} of {ranks.size}"
    return found


def weights_digest(model: nn.Module) -> str:
    """A hash of every bit of every weight and buffer that is in memory, where it lies.

    Each tensor's words are multiplied by fixed odd random numbers and added in 64 bits, which is
    exact on any device and reads a GPU's weights at the speed of its memory. It tells a model from
    its fine-tuned twin, not from one that somebody made to collide.
    """
    factors: dict[torch.device, torch.Tensor] = {}
    total = hashlib.sha256()
    for name, tensor in _tensors(model):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        if tensor.device not in factors:
            generator = torch.Generator().manual_seed(1)
            draws = torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator)
            factors[tensor.device] = (2 * draws + 1).to(tensor.device)
        words = _words(tensor)
        sums = [
            (part.to(torch.int64) * factors[tensor.device][: len(part)]).sum()
            for part in words.split(_CHUNK)
        ]
        total.update(repr([int(value) for value in sums]).encode())
    return total.hexdigest()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as a row of integers, without a copy where it is contiguous."""
    row = tensor.detach().reshape(-1)
    if row.dtype == torch.bool:
        return row
    return row.view(torch.int16 if row.element_size() > 1 else torch.uint8)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        for part in _plain(value):
            if not part.is_meta and part.numel():
                yield name, part


def _plain(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a tensor subclass is made of, or the tensor itself."""
    if not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _plain(getattr(value, name))


def _dtypes(model: nn.Module) -> str:
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return ", ".join(sorted(found))


def _plain_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    return {k: v for k, v in sorted(config.to_dict().items()) if k not in _ELSEWHERE}


def _stamps(files: Path | None) -> list:
    if files is None:
        return []
    every = sorted(files.glob("*.safetensors")) if files.is_dir() else [files]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in every]


def _device(model: nn.Module) -> str:
    """The kinds of devices that compute: another one rounds otherwise."""
    found = set()
    for parameter in model.parameters():
        if parameter.device.type == "cuda":
            found.add(torch.cuda.get_device_name(parameter.device))
        elif not parameter.is_meta:
            found.add(f"{parameter.device.type} {torch.backends.cpu.get_cpu_capability()}")
    return ", ".join(sorted(found))


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, default=str).encode()).hexdigest()
