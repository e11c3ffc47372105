"""The layer that PEFT puts in the place of fused experts that coordinates name."""

from __future__ import annotations

import torch
from torch import nn

from swkernels import ops
from swkernels.models.experts import ExpertObserver
from swkernels.train.sites import Target

from .layer import SparseCoordinateLayer


class SparseExpertsLayer(SparseCoordinateLayer):
    """Fused experts with deltas beside their down weights [D, H].

    The weights of all experts count as one matrix [E * D, H], so that the values of an adapter are
    one vector. The products with them are watched while the base runs, as
    ``swkernels.train.sparse`` does.

    Args:
        base_layer: the module that holds the experts.
        target: any of its experts.
    """

    def __init__(self, base_layer: nn.Module, target: Target):
        D, H = target.shape
        super().__init__(base_layer, (target.projection.experts * D, H))
        self._projection = target.projection
        self._patterns: dict[str, dict[int, ops.SparsePattern]] = {}

    def update_layer(self, adapter_name, targets, coordinates, bases) -> None:
        super().update_layer(adapter_name, targets, coordinates, bases)
        self._patterns[adapter_name] = {
            target.site.expert: ops.SparsePattern.sort(*pairs.unbind(1), target.shape)[0]
            for target, pairs in zip(targets, coordinates)
        }
        self._move_patterns()

    def delete_adapter(self, adapter_name: str) -> None:
        self._patterns.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    # Which experts run, and on which rows, depends on the data.
    @torch.compiler.disable
    def forward(self, *args, **kwargs) -> torch.Tensor:
        """The experts' output, with the deltas' contribution."""
        self._unmerge_disabled()
        if not self.active:
            return self.base_layer(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        tokens = hidden.numel() // hidden.shape[-1]
        with ExpertObserver([self._projection], tokens, self._contribute, replace=True):
            return self.base_layer(*args, **kwargs)

    def _contribute(self, projection, expert: int, x, y, tokens) -> torch.Tensor:
        """Return y [n, D] of one expert plus its deltas' contribution for x [n, H]."""
        for name in self.active:
            for part in self._parts[name]:
                if part.site.expert == expert:
                    values = self.values[name][part.share.place]
                    y = ops.pattern_linear(x, y, values, self._patterns[name][expert])
        return y

    def _place(self, target: Target, pairs: torch.Tensor) -> torch.Tensor:
        D, _ = target.shape
        return pairs + torch.tensor([target.site.expert * D, 0], dtype=pairs.dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._move_patterns()
        return self

    def _move_patterns(self) -> None:
        for patterns in self._patterns.values():
            for expert, pattern in patterns.items():
                patterns[expert] = pattern.to(self.device)
