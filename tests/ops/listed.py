"""Coordinates of a weight, the obvious gradient at them, and a watch on what is allocated."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backends_here import DEVICE


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def integers(*shape, dtype=torch.float32, seed=0):
    """Small whole numbers: their sums of products are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype).to(DEVICE)


def coordinates(D, H, k=None, seed=0, dtype=torch.int64):
    """rows, cols [k] of k different coordinates (None: all of them), in no order."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(D * H, generator=generator)[:k]
    return (flat // H).to(dtype).to(DEVICE), (flat % H).to(dtype).to(DEVICE)


def dense_gradient(dy, x):
    """dW [D, H] of y = x W^T, in float64."""
    return dy.double().reshape(-1, dy.shape[-1]).T @ x.double().reshape(-1, x.shape[-1])


class Allocations(TorchDispatchMode):
    """Inside the ``with`` block: the sizes, in elements, of every tensor that an operation makes.

    A view or an in-place result counts for the storage that it had before: not at all.
    """

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []
        self._known: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        self._known.update({self._key(t): t for t in given if isinstance(t, torch.Tensor)})
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in self._known:
                self._known[self._key(tensor)] = tensor  # kept, so that no address comes twice
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result

    @staticmethod
    def _key(tensor):
        return tensor.untyped_storage()._cdata
