"""Weights that accelerate keeps in host memory or on disk between forwards.

Accelerate's hook puts such a weight on the device before its module's forward, from a map of
names to tensors, and back on the meta device after it. Held, the map gives one tensor each time:
what is written to that tensor is what the next forwards compute with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class _Held(Mapping):
    """A map of weights in which some are held in memory."""

    def __init__(self, base: Mapping):
        self.base = base
        self.tensors: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name] if name in self.tensors else self.base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def held_weight(module: nn.Module, path: str) -> torch.Tensor | None:
    """The tensor that is held for the parameter at ``path`` below ``module``, or None."""
    hook, name = _hook(module, path)
    weights = getattr(hook, "weights_map", None)
    return weights.tensors.get(name) if isinstance(weights, _Held) else None


@contextmanager
def holding(module: nn.Module, path: str) -> Iterator[None]:
    """A context in which an offloaded weight is in host memory, and what is written to it counts.

    Where the weight is not offloaded, or is held already, nothing happens.
    """
    hook, name = _hook(module, path)
    if hook is None or held_weight(module, path) is not None:
        yield
        return
    before = hook.weights_map
    held = _Held(before)
    held.tensors[name] = before[name]
    hook.weights_map = held
    try:
        yield
    finally:
        hook.weights_map = before


def execution_device(module: nn.Module) -> torch.device | None:
    """Where the forward of a dispatched module runs; None where accelerate does not say."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return None


def _hook(module: nn.Module, path: str) -> tuple[object, str]:
    """The hook that offloads a parameter, or None, and the parameter's own name."""
    parent, _, name = path.rpartition(".")
    for hook in _hooks(module.get_submodule(parent)):
        weights = getattr(hook, "weights_map", None)
        if getattr(hook, "offload", False) and weights is not None and name in weights:
            return hook, name
    return None, name


def _hooks(module: nn.Module) -> list:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))
