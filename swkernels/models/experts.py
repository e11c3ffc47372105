"""See the activations of experts without rewriting a model's mixture of experts.

Inside the forward of a mixture-of-experts module an observer watches the torch functions that are
called, recognises the products with a down weight by the storage of their operand, and works out
which expert and which tokens they are for. The functions run as they would; nothing is replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .projections import DownProjection

# callback(projection, expert, x [n, columns], y [n, rows], tokens [n] or None)
Callback = Callable[
    [DownProjection, "int | None", torch.Tensor, torch.Tensor, "torch.Tensor | None"], None
]

_GATHERS = {torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select}
_REPEATS = {torch.repeat_interleave, torch.Tensor.repeat_interleave}
_MATMULS = {
    torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__,
}  # fmt: skip
_BATCHED = {torch.bmm, torch.Tensor.bmm}
_ADDS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__}
_GROUPED_NAMES = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}


@dataclass
class _Call:
    """A product with a down weight, held back until its bias is known to be added or not."""

    projection: DownProjection
    pieces: list[tuple[int | None, slice | int]]
    x: torch.Tensor
    y: torch.Tensor
    tokens: torch.Tensor | None


class ExpertObserver(TorchFunctionMode):
    """Calls back for every product of routed tokens with a down weight of ``projections``.

    Args:
        projections: the experts of one mixture-of-experts module (``scope``).
        tokens: number of tokens that the module was given.
        callback: gets projection, expert (None where the expert is a module of its own), x, y
            (with the bias, before the router's weight), and the flat index of the token of each
            row: int64, negative where a row is no token's; None if it cannot be known.
    """

    def __init__(self, projections: list[DownProjection], tokens: int, callback: Callback):
        super().__init__()
        self._by_storage = {_storage(p.weight): p for p in projections}
        self._count = tokens
        self._callback = callback
        self._tokens: torch.Tensor | None = None
        self._gathered: tuple[weakref.ref, DownProjection, torch.Tensor] | None = None
        self._held: _Call | None = None

    def __exit__(self, *exception):
        if exception[0] is None:
            self._release()
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            self._watch(func, args, kwargs, output)
        return output

    def _watch(self, func, args, kwargs, output: torch.Tensor) -> None:
        if self._held is not None and _storage(args[0]) == _storage(self._held.y):
            if func in _ADDS:
                self._held.y = output
                return self._release()
            if _storage(output) == _storage(self._held.y):
                return None  # a view on the way to the bias
        if func in _GATHERS:
            return self._gather(args, kwargs, output)
        self._release()
        if func in _REPEATS:
            self._repeat(args, kwargs, output)
        elif func is F.linear or func in _MATMULS:
            self._product(args[0], args[1] if len(args) > 1 else kwargs["weight"], output)
        elif func in _BATCHED:
            self._batched(args[0], args[1], output)
        elif getattr(func, "__name__", "") in _GROUPED_NAMES:
            offsets = kwargs["offs"] if "offs" in kwargs else args[2]
            self._grouped(args[0], args[1], offsets, output)

    def _gather(self, args, kwargs, output) -> None:
        source, index = args[0], args[-1]
        if isinstance(index, tuple):
            tensors = [part for part in index if isinstance(part, torch.Tensor)]
            index = tensors[0] if len(tensors) == 1 else None
        if not isinstance(index, torch.Tensor) or index.dim() != 1 or index.dtype == torch.bool:
            return
        projection = self._by_storage.get(_storage(source))
        if projection is not None and source.dim() == 3:
            self._gathered = (weakref.ref(output), projection, index)
        elif source.dim() >= 2 and source.is_floating_point() and self._is_hidden(source):
            self._tokens = index

    def _is_hidden(self, source: torch.Tensor) -> bool:
        widths = {projection.rows for projection in self._by_storage.values()}
        return source.shape[-1] in widths and source.numel() == self._count * source.shape[-1]

    def _repeat(self, args, kwargs, output) -> None:
        source, repeats = args[0], args[1] if len(args) > 1 else kwargs.get("repeats")
        if source.dim() == 2 and self._is_hidden(source) and isinstance(repeats, int):
            tokens = torch.arange(self._count, device=source.device)
            self._tokens = tokens.repeat_interleave(repeats)

    def _product(self, x, weight, y) -> None:
        projection = self._by_storage.get(_storage(weight))
        if projection is None:
            return
        expert = None
        if projection.experts is not None:
            stored = projection.weight
            size = projection.rows * projection.columns
            expert = (weight.storage_offset() - stored.storage_offset()) // size
        self._hold(projection, [(expert, slice(None))], x, y)

    def _batched(self, a, b, y) -> None:
        for x, weight in ((a, b), (b, a)):
            if self._gathered is not None and self._gathered[0]() is weight:
                _, projection, experts = self._gathered
                pieces = [(e, experts == e) for e in experts.unique().tolist()]
                x = x.squeeze(1) if x is a else x.squeeze(-1)
                return self._hold(projection, pieces, x, y.view(len(x), -1))
            projection = self._by_storage.get(_storage(weight))
            if projection is not None and weight.dim() == 3:
                for e in range(projection.experts):
                    self._dense_rows(projection, e, x[e], y[e])
                return None
        return None

    def _dense_rows(self, projection, expert: int, x, y) -> None:
        """Every token goes through every expert, those not routed as zeros (Llama 4)."""
        tokens = torch.arange(len(x), device=x.device)
        self._callback(projection, expert, x, y, tokens.masked_fill((x == 0).all(-1), -1))

    def _grouped(self, x, weight, offsets, y) -> None:
        projection = self._by_storage.get(_storage(weight))
        if projection is None:
            return
        bounds = [0, *offsets.tolist()]
        pieces = [(e, slice(*bounds[e : e + 2])) for e in range(projection.experts)]
        self._hold(projection, pieces, x, y)

    def _hold(self, projection, pieces, x, y) -> None:
        tokens = self._tokens_of(x)
        self._held = _Call(projection, pieces, x, y, tokens)
        if not hasattr(projection.module, f"{projection.parameter}_bias"):
            self._release()

    def _tokens_of(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which tokens the rows of x are: those gathered last, a slice of them, or all."""
        rows = x.numel() // x.shape[-1]
        if self._tokens is not None:
            gathered = len(self._tokens)
            if rows == gathered:
                return self._tokens
            row_bytes = x.shape[-1] * x.element_size()
            if x.is_contiguous() and x.untyped_storage().nbytes() == gathered * row_bytes:
                start = x.storage_offset() // x.shape[-1]  # x is a split of the gathered rows
                return self._tokens[start : start + rows]
        return torch.arange(rows, device=x.device) if rows == self._count else None

    def _release(self) -> None:
        call, self._held = self._held, None
        if call is None:
            return
        x, y = call.x.reshape(-1, call.x.shape[-1]), call.y.reshape(-1, call.y.shape[-1])
        for expert, piece in call.pieces:
            tokens = None if call.tokens is None else call.tokens[piece]
            if len(x[piece]):
                self._callback(call.projection, expert, x[piece], y[piece], tokens)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if isinstance(tensor, torch.Tensor) else -1
