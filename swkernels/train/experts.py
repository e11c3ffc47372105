"""Deltas for experts whose weights are fused into one tensor.

Their module multiplies all experts in one forward, so there is no layer to hook. While it runs, the
products with the down weight are watched (``swkernels.models.experts``), and the contribution of an
expert's deltas is written into the rows that went through that expert.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from swkernels.models import DownProjection
from swkernels.models.experts import ExpertObserver
from swkernels.nn import SparseDelta

CHILD = "sparse_delta"  # the name of a layer of deltas, below the adapted module


def adapt_experts(projection: DownProjection) -> None:
    """Let the forward of the module around the experts pass through their deltas."""
    scope = projection.scope
    if not isinstance(scope.__dict__.get("forward"), _WithDeltas):
        scope.forward = _WithDeltas(scope, projection)


def release_experts(projection: DownProjection) -> None:
    """Put the forward back once none of the experts has deltas."""
    forward = projection.scope.__dict__.get("forward")
    if isinstance(forward, _WithDeltas) and not forward.deltas():
        forward.undo()


class _WithDeltas:
    """Stands in for the forward of a mixture of experts; a deep copy is the copied module's."""

    def __init__(self, scope: nn.Module, projection: DownProjection):
        self._scope = scope
        self._before = scope.__dict__.get("forward")
        self._projection = projection

    def deltas(self) -> dict[int, SparseDelta]:
        """The layers of deltas by expert."""
        return {
            int(name.removeprefix(f"{CHILD}_")): child
            for name, child in self._projection.module.named_children()
            if isinstance(child, SparseDelta)
        }

    def undo(self) -> None:
        if self._before is None:
            del self._scope.__dict__["forward"]
        else:
            self._scope.forward = self._before

    # Which experts run, and on which rows, depends on the data.
    @torch.compiler.disable
    def __call__(self, *args, **kwargs):
        original = self._before or partial(type(self._scope).forward, self._scope)
        hidden = args[0] if args else next(iter(kwargs.values()))
        deltas = self.deltas()

        def contribute(projection, expert, x, y, tokens):
            delta = deltas.get(expert)
            return None if delta is None else delta.add(x, y, inplace=False)

        tokens = hidden.numel() // hidden.shape[-1]
        with ExpertObserver([self._projection], tokens, contribute, replace=True):
            return original(*args, **kwargs)
