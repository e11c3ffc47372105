"""Super activations: recorded on the intact model, put back where weights are gone.

The third condition of Yu et al., "The Super Weight in Large Language Models" (table 1, "Prune SW,
+SA"): the super weight is zero, and the one activation that it makes is set to what it was, at the
layer and the token where it appears. What the model loses then is not carried by that activation.

A weight [row, column] of a down projection feeds the channel ``row``. The super activation is the
largest of that channel's values by magnitude, in each sequence. It is read and written where it
enters the residual stream: at the output of the down projection, or of the mixture-of-experts
module around an expert, whose output sums the experts of a token.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.structure import base_of
from swkernels.train.weights import block_of

from .edits import Entry

LEAST = 0.1  # of a channel's largest peak: smaller peaks are no super activation


class SuperActivations:
    """The super activations of some entries of a model: recorded once, then put back.

    Recording and putting back must run the same inputs in the same order, batched alike.

    Args:
        model: of which ``entries`` are.
        entries: any weights; those of one row share its activation.
    """

    def __init__(self, model: nn.Module, entries: Iterable[Entry]):
        root = base_of(model)[0]
        self._inputs: dict[nn.Module, _Inputs] = {}
        self._outlets: dict[nn.Module, _Outlet] = {}
        for entry in entries:
            module = _outlet_of(entry)
            if module not in self._outlets:
                inputs = self._inputs_of(root, entry)
                self._outlets[module] = _Outlet(module, entry, inputs)
            self._outlets[module].add(entry.row)

    def _inputs_of(self, root: nn.Module, entry: Entry) -> _Inputs | None:
        """What the owner of the block's list is called with; None for a weight in no block."""
        projection = entry.weight.projection
        block = block_of(entry.site.name) if projection is None else projection.block_name
        if not block:
            return None
        owner = root.get_submodule(block.rpartition(".")[0].rpartition(".")[0])
        return self._inputs.setdefault(owner, _Inputs(owner))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context in which the model runs intact; what was recorded before is forgotten.

        Raises:
            InvalidInput: an output that cannot be read by sequence, or a module that never ran.
        """
        for outlet in self._outlets.values():
            outlet.calls = []
        with self._hooked({module: o.record for module, o in self._outlets.items()}):
            yield
        for outlet in self._outlets.values():
            outlet.finish()

    @contextmanager
    def restored(self, entries: Iterable[Entry]) -> Iterator[None]:
        """A context in which the super activations of these entries are what they were.

        A peak below a tenth of its channel's largest is left alone: the continuations of multiple
        choice, for instance, have no super activation of their own.

        Raises:
            InvalidInput: the model runs on other inputs than were recorded.
        """
        rows: dict[nn.Module, set[int]] = {}
        for entry in entries:
            rows.setdefault(_outlet_of(entry), set()).add(entry.row)
        chosen = [self._outlets[module] for module in rows]
        for outlet in chosen:
            outlet.prepare(rows[outlet.module])
        with self._hooked({outlet.module: outlet.put_back for outlet in chosen}):
            yield
        for outlet in chosen:
            outlet.check_all_done()

    @contextmanager
    def _hooked(self, hooks: dict) -> Iterator[None]:
        handles: list = []
        try:
            for inputs in self._inputs.values():
                owner = inputs.owner
                handles.append(owner.register_forward_pre_hook(inputs.note, with_kwargs=True))
            for module, hook in hooks.items():
                handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def to_dict(self) -> list[dict]:
        """Of each channel: where, its largest peak, and how often and at which tokens it spikes."""
        return [found for outlet in self._outlets.values() for found in outlet.to_dict()]


def _outlet_of(entry: Entry) -> nn.Module:
    """The module at whose output what the entry makes enters the residual stream."""
    projection = entry.weight.projection
    scope = None if projection is None else projection.scope
    return entry.weight.module if scope is None else scope


class _Inputs:
    """The shape and the padding of the inputs that the module of a list of blocks runs on."""

    def __init__(self, owner: nn.Module):
        self.owner = owner
        self._names = list(inspect.signature(owner.forward).parameters)
        self.shape: tuple[int, int] | None = None  # (B, S)
        self.mask: torch.Tensor | None = None  # bool [B, S], False for padding

    def note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = {**dict(zip(self._names, args)), **kwargs}
        tokens = bound.get("input_ids")
        tokens = bound.get("inputs_embeds") if tokens is None else tokens
        tokens = next(iter(bound.values())) if tokens is None else tokens
        B, S = self.shape = tuple(tokens.shape[:2])
        mask = bound.get("attention_mask")
        fits = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[0] == B
        if fits and mask.shape[1] >= S:
            self.mask = mask[:, -S:].bool()
        elif tokens.dim() == 2 and B > 1:  # no mask: score_choices pads with 0 on the right
            self.mask = (tokens != 0).flip(1).cummax(1).values.flip(1)
        else:
            self.mask = None


class _Outlet:
    """Some channels of one module's output.

    Attributes:
        calls: of each call, in order, the token (int64 [B, R]) at which each channel is largest
            in each sequence, and its value there [B, R].
        least: the magnitude from which on a peak is put back, float64 [R].
    """

    def __init__(self, module: nn.Module, entry: Entry, inputs: _Inputs | None):
        self.module = module
        self.name, self.layer = entry.site.name, entry.layer
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.least = torch.zeros(0)
        self._width = entry.weight.shape[0]
        self._inputs = inputs
        self._rows: list[int] = []
        self._chosen = torch.zeros(0, dtype=torch.bool)
        self._done = 0

    def add(self, row: int) -> None:
        if row not in self._rows:
            self._rows.append(row)

    def record(self, module: nn.Module, args: tuple, output) -> None:
        y = self._by_sequence(_hidden(output))[..., self._rows]  # [B, S, R]
        size = y.abs()
        mask = None if self._inputs is None else self._inputs.mask
        if mask is not None:
            size = size.masked_fill(~mask.to(y.device)[..., None], -1)
        tokens = size.argmax(1, keepdim=True)  # [B, 1, R]
        self.calls.append((tokens.squeeze(1), y.gather(1, tokens).squeeze(1)))

    def finish(self) -> None:
        if not self.calls:
            raise InvalidInput(
                f"{self.name} never ran, or its hooks did not (compiled code skips them): its "
                "activations cannot be put back"
            )
        peaks = [values.double().abs().nan_to_num(0.0, torch.inf) for _, values in self.calls]
        self.least = LEAST * torch.stack([values.amax(0).cpu() for values in peaks]).amax(0)

    def prepare(self, rows: set[int]) -> None:
        """From the next call on, put back these rows."""
        self._chosen = torch.tensor([row in rows for row in self._rows])
        self._done = 0

    def put_back(self, module: nn.Module, args: tuple, output):
        if self._done == len(self.calls):
            raise InvalidInput(self._unlike(f"call {self._done + 1} of {len(self.calls)}"))
        tokens, values = self.calls[self._done]
        self._done += 1
        hidden = _hidden(output).clone(memory_format=torch.contiguous_format)
        y = self._by_sequence(hidden)  # [B, S, D], a view
        if y.shape[0] != len(tokens) or int(tokens.max()) >= y.shape[1]:
            raise InvalidInput(self._unlike(f"{list(y.shape[:2])} tokens in call {self._done}"))
        spikes = self._spikes(values) & self._chosen.to(values.device)
        sequence, which = spikes.nonzero().unbind(1)
        channel = torch.tensor(self._rows, device=which.device)[which]
        y[sequence, tokens[sequence, which], channel] = values[sequence, which]
        if isinstance(output, (tuple, list)):
            return type(output)([hidden, *output[1:]])
        return hidden

    def check_all_done(self) -> None:
        if self._done != len(self.calls):
            raise InvalidInput(self._unlike(f"{self._done} calls of {len(self.calls)}"))

    def _unlike(self, what: str) -> str:
        return (
            f"{self.name} ran on other inputs than were recorded ({what}): put activations back "
            "on the same inputs, in the same order and batches"
        )

    def _by_sequence(self, y: torch.Tensor) -> torch.Tensor:
        """View an output as [B, S, D], whether it is [B, S, D] or [B * S, D]."""
        shape = None if self._inputs is None else self._inputs.shape
        if y.shape[-1] == self._width:
            if shape is not None and y.numel() == shape[0] * shape[1] * self._width:
                return y.reshape(*shape, self._width)
            if y.dim() == 3:
                return y
        raise InvalidInput(
            f"{self.name} gives {list(y.shape)}: expected [batch, tokens, {self._width}], to put "
            "activations back by sequence"
        )

    def _spikes(self, values: torch.Tensor) -> torch.Tensor:
        """Which of the peaks [B, R] are super activations."""
        return values.abs() >= self.least.to(values.device)

    def to_dict(self) -> list[dict]:
        found = []
        for i, row in enumerate(self._rows):
            peaks = torch.cat([values[:, i] for _, values in self.calls]).tolist()
            spikes = torch.cat([self._spikes(values)[:, i] for _, values in self.calls]).tolist()
            tokens = torch.cat([tokens[:, i] for tokens, _ in self.calls]).tolist()
            where = Counter(token for token, spike in zip(tokens, spikes) if spike)
            found.append(
                {
                    "layer": self.layer,
                    "module": self.name,
                    "row": row,
                    "peak": max(peaks, key=abs),
                    "sequences": len(peaks),
                    "put_back": sum(spikes),
                    "tokens": {str(token): count for token, count in where.most_common(5)},
                }
            )
        return found


def _hidden(output) -> torch.Tensor:
    """The hidden states of a module's output: its first tensor, where there are several."""
    return output[0] if isinstance(output, (tuple, list)) else output


__all__ = ["LEAST", "SuperActivations"]
