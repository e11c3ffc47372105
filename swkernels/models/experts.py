"""See the activations of experts without rewriting a model's mixture of experts.

Inside the forward of a mixture-of-experts module an observer watches the torch functions that are
called, recognises the products with a down weight by the storage of their operand, and works out
which expert and which tokens they are for. The functions run as they would; nothing is replaced.
An expert that is a module of its own is read where its down projection is called.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .projections import DownProjection

# callback(projection, expert, x [n, columns], y [n, rows], tokens [n] or None) -> None, or what
# stands in y's place from here on
Callback = Callable[
    [DownProjection, "int | None", torch.Tensor, torch.Tensor, "torch.Tensor | None"],
    "torch.Tensor | None",
]

_GATHERS = {torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select}
_REPEATS = {torch.repeat_interleave, torch.Tensor.repeat_interleave}
_PRODUCTS = {
    torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm,
    torch.Tensor.__matmul__,
}  # fmt: skip
_ADDS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__}
_GROUPED_NAMES = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}


@dataclass
class _Call:
    """A product with a down weight, held back until its bias is known to be added or not."""

    projection: DownProjection
    pieces: list[tuple[int, slice | torch.Tensor]]
    x: torch.Tensor
    y: torch.Tensor
    tokens: torch.Tensor | None


class ExpertObserver(TorchFunctionMode):
    """Calls back for every product of routed tokens with a down weight of ``projections``.

    Args:
        projections: the experts of one mixture-of-experts module (``DownProjection.scope``).
        tokens: number of tokens that the module was given.
        callback: gets projection, expert (None where the expert is a module of its own), x, y
            (with the bias, before the router's weight), and the flat index of the token of each
            row: int64, negative where a row is no token's; None if it cannot be known. With
            ``replace``, what it returns is written into y.
        replace: call back as soon as a fused product is there, before its bias is added, so that
            the model goes on with what the callback returns.

    Warns:
        RuntimeWarning: tokens went through the module, but no product with one of its fused
            weights was seen: its implementation is none that can be observed.
    """

    def __init__(
        self,
        projections: list[DownProjection],
        tokens: int,
        callback: Callback,
        *,
        replace: bool = False,
    ):
        super().__init__()
        self._replace = replace
        self._fused = [p for p in projections if p.expert is None]
        self._modules = [p for p in projections if p.expert is not None]
        self._count = tokens
        self._callback = callback
        self._tokens: torch.Tensor | None = None  # of the rows gathered last
        self._part: torch.Tensor | None = None  # of the slice of them that was multiplied last
        self._rows: weakref.ref = lambda: None
        self._weights: tuple[weakref.ref, DownProjection, torch.Tensor] | None = None
        self._held: _Call | None = None
        self._seen: set[DownProjection] = set()
        self._reading = False
        self._forwards: list[tuple[nn.Module, Callable | None]] = []

    def __enter__(self):
        for projection in self._modules:
            module = projection.module
            self._forwards.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = self._reader(projection, module.forward)
        return super().__enter__()

    def __exit__(self, *exception):
        while self._forwards:
            module, before = self._forwards.pop()
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        if exception[0] is None:
            self._release()
            self._check()
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if isinstance(output, torch.Tensor) and not self._reading:
            self._watch(func, [*args, *kwargs.values()], kwargs, output)
        return output

    def _reader(self, projection: DownProjection, original: Callable) -> Callable:
        def forward(*args, **kwargs):
            y = original(*args, **kwargs)
            x = args[0] if args else next(iter(kwargs.values()))
            rows = x.reshape(-1, x.shape[-1])
            if len(rows):
                tokens = self._tokens_of(rows)
                self._call(projection, None, rows, y.reshape(-1, y.shape[-1]), tokens)
            return y

        return forward

    def _call(self, projection, expert, x, y, tokens, piece=...) -> None:
        """Call back for the rows ``piece`` of x and y."""
        self._seen.add(projection)
        self._reading = True  # what the callback computes is none of the model's products
        try:
            changed = self._callback(projection, expert, x[piece], y[piece], tokens)
            if self._replace and changed is not None:
                y[piece] = changed
        finally:
            self._reading = False

    def _check(self) -> None:
        for projection in self._fused:
            if self._count and projection not in self._seen:
                warnings.warn(
                    f"no product with the experts of {projection.name} was seen: expected matmul, "
                    "bmm, linear or grouped_mm with their weight in "
                    f"{type(projection.module).__name__}; set experts_implementation to "
                    '"eager", or its peaks stay empty',
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _watch(self, func, inputs: list, kwargs: dict, output: torch.Tensor) -> None:
        """Look at one call: ``inputs`` are its arguments in the order of the signature."""
        first = inputs[0] if inputs else None
        if self._held is not None and _same_storage(first, self._held.y):
            if func in _ADDS:
                self._held.y = output
                return self._release()
            if _same_storage(output, self._held.y):
                return None  # a view on the way to the bias
        if func in _GATHERS:
            return self._gather(first, inputs[-1], output)
        self._release()
        if func in _REPEATS:
            self._repeat(first, inputs[1] if len(inputs) > 1 else None, output)
        elif func is F.linear or func in _PRODUCTS:
            self._slice(first)
            self._product(first, inputs[1], output, bias_inside=func is F.linear)
        elif getattr(func, "__name__", "") in _GROUPED_NAMES:
            offsets = kwargs["offs"] if "offs" in kwargs else inputs[2]
            self._grouped(first, inputs[1], offsets, output)

    def _gather(self, source, index, output: torch.Tensor) -> None:
        if isinstance(index, tuple):
            tensors = [part for part in index if isinstance(part, torch.Tensor)]
            index = tensors[0] if len(tensors) == 1 else None
        if not isinstance(index, torch.Tensor) or index.dim() != 1 or source.dim() < 2:
            return
        projection = self._owner(source)
        if projection is not None and source.dim() == 3:
            self._weights = (weakref.ref(output), projection, index)
            return
        again = _same_storage(source, self._rows()) and len(source) == len(self._tokens)
        if not again and not self._is_hidden(source):
            return
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        self._gathered(self._tokens[index] if again else index, output)

    def _gathered(self, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        self._tokens, self._part, self._rows = tokens, None, weakref.ref(rows)

    def _is_hidden(self, source: torch.Tensor) -> bool:
        widths = {projection.rows for projection in (*self._fused, *self._modules)}
        size = self._count * source.shape[-1]
        return source.is_floating_point() and source.shape[-1] in widths and source.numel() == size

    def _repeat(self, source, repeats, output: torch.Tensor) -> None:
        if source.dim() == 2 and self._is_hidden(source) and isinstance(repeats, int):
            tokens = torch.arange(self._count, device=source.device)
            self._gathered(tokens.repeat_interleave(repeats), output)

    def _slice(self, x) -> None:
        """A product with some of the gathered rows: those of one expert, sorted by expert."""
        gathered = self._rows()
        if _same_storage(x, gathered) and x.is_contiguous():
            start = (x.storage_offset() - gathered.storage_offset()) // x.shape[-1]
            self._part = self._tokens[start : start + x.numel() // x.shape[-1]]

    def _owner(self, weight) -> DownProjection | None:
        """The fused projection that ``weight`` is (a part of); asked anew, for weights move."""
        stack = getattr(weight, "stack", weight)  # of a packed expert's weight
        for projection in self._fused:
            if stack is projection.weight or _same_storage(weight, projection.weight):
                return projection
        return None

    def _product(self, a, b, y: torch.Tensor, bias_inside: bool) -> None:
        """x @ weight or weight @ x, with the weight of one expert, of all, or of one per row."""
        for x, weight, out in ((a, b, y), (b, a, y.mT if y.dim() > 1 else y)):
            if not isinstance(x, torch.Tensor):
                continue  # a packed weight
            x = x if x is a else x.mT if x.dim() > 1 else x
            if self._weights is not None and self._weights[0]() is weight:
                _, projection, experts = self._weights
                pieces = [(e, experts == e) for e in experts.unique().tolist()]
                return self._hold(projection, pieces, x.squeeze(1), out.squeeze(1))
            projection = self._owner(weight)
            if projection is None:
                continue
            if weight.dim() == 3:
                for e in range(projection.experts):
                    self._dense_rows(projection, e, x[e], out[e])
                return None
            expert = _expert_of(weight, projection)
            self._hold(projection, [(expert, slice(None))], x, out, bias_inside)
            return None
        return None

    def _dense_rows(self, projection, expert: int, x, y) -> None:
        """Every token goes through every expert, those not routed as zeros (Llama 4)."""
        tokens = None
        if len(x) == self._count:
            routed = (x != 0).any(-1)
            tokens = torch.arange(len(x), device=x.device).masked_fill(~routed, -1)
        self._call(projection, expert, x, y, tokens)

    def _grouped(self, x, weight, offsets, y: torch.Tensor) -> None:
        projection = self._owner(weight)
        if projection is None:
            return
        bounds = [0, *offsets.tolist()]
        pieces = [(e, slice(*bounds[e : e + 2])) for e in range(projection.experts)]
        self._hold(projection, pieces, x, y)

    def _hold(self, projection, pieces, x, y, bias_inside: bool = False) -> None:
        self._held = _Call(projection, pieces, x, y, self._tokens_of(x))
        bias_to_come = hasattr(projection.module, f"{projection.parameter}_bias")
        if self._replace or bias_inside or not bias_to_come:
            self._release()

    def _tokens_of(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which tokens the rows of x are: those gathered last, a part of them, or all."""
        rows = x.numel() // x.shape[-1]
        if self._tokens is not None:
            gathered = len(self._tokens)
            if rows == gathered:
                return self._tokens
            row_bytes = x.shape[-1] * x.element_size()
            if x.is_contiguous() and x.untyped_storage().nbytes() == gathered * row_bytes:
                start = x.storage_offset() // x.shape[-1]  # x is a split of the gathered rows
                return self._tokens[start : start + rows]
            if self._part is not None and rows == len(self._part):
                return self._part
        return torch.arange(rows, device=x.device) if rows == self._count else None

    def _release(self) -> None:
        call, self._held = self._held, None
        if call is None:
            return
        x, y = call.x.reshape(-1, call.x.shape[-1]), call.y.reshape(-1, call.y.shape[-1])
        for expert, piece in call.pieces:
            tokens = None if call.tokens is None else call.tokens[piece]
            if len(x[piece]):
                self._call(call.projection, expert, x, y, tokens, piece)


@contextmanager
def observe_experts(projections: list[DownProjection], callback: Callback) -> Iterator[None]:
    """Observe every forward of one mixture-of-experts module while the context is open.

    The module's own ``forward`` runs; it is patched on the instance and restored at the end.

    Args:
        projections: down projections of one ``scope``.
        callback: see ``ExpertObserver``; rows are numbered over the flattened hidden states.
    """
    scope = projections[0].scope
    before, original = scope.__dict__.get("forward"), scope.forward

    def forward(*args, **kwargs):
        hidden = args[0] if args else next(iter(kwargs.values()))
        with ExpertObserver(projections, hidden.numel() // hidden.shape[-1], callback):
            return original(*args, **kwargs)

    scope.__dict__["forward"] = torch.compiler.disable(forward)
    try:
        yield
    finally:
        if before is None:
            del scope.__dict__["forward"]
        else:
            scope.__dict__["forward"] = before


def _expert_of(weight, projection: DownProjection) -> int:
    """Which of the experts ``weight`` is, a part of the projection's."""
    if not isinstance(weight, torch.Tensor):
        return weight.expert
    size = projection.rows * projection.columns
    return (weight.storage_offset() - projection.weight.storage_offset()) // size


def _same_storage(a: object, b: object) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.is_meta or b.is_meta:
        return False
    pointer = a.untyped_storage().data_ptr()
    return pointer != 0 and pointer == b.untyped_storage().data_ptr()
