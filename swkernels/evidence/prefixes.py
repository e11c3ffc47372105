"""Log-likelihoods of continuations: each choice in full, or what choices begin with run once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from swkernels.detect.samples import Runner
from swkernels.errors import InvalidInput

from .pairs import Pair, shared_prefix

_ROWS = 256  # logits turned into losses at a time: their float32 copies are V wide each
_WINDOWS = "sliding_window", "attention_chunk_size"  # a mask of one's own overrides these
_REFUSALS = TypeError, ValueError, IndexError, AttributeError, RuntimeError


class PrefixRun:
    """One run over a task's items with one model, kept in eval mode and without gradients.

    Args:
        size: sequences that run together.
        shares: run what the choices of an item begin with once.

    Attributes:
        shares: false from the first batch on for a model that does not take it.
    """

    def __init__(self, model: nn.Module, size: int, shares: bool = True):
        self._scorer = _Scorer(model, size)
        self._size = size
        self._window = _window(model)
        self._tolerance = _tolerance(model)
        self._checked = False
        self.shares = shares and hasattr(model, "config")

    def batches(self, items: Sequence[Sequence[Pair]]) -> Iterator[list[int]]:
        """Numbers of items that run together, the longest first: what is too much fails early."""
        lengths = [len(Packed(pairs).ids) if self.shares else _longest([pairs]) for pairs in items]
        order = sorted(range(len(items)), key=lambda number: -lengths[number])
        for begin in range(0, len(order), self._size):
            yield order[begin : begin + self._size]

    def scores(self, items: Sequence[Sequence[Pair]]) -> list[list[float]]:
        """Summed log-likelihood of the targets of each pair of a batch of items, in nats."""
        if self.shares and _longest(items) <= self._window:
            packed = [Packed(pairs) for pairs in items]
            if self._checked:
                return self._scorer.packed(packed)
            forked = [number for number, one in enumerate(packed) if one.last is not None]
            if forked:
                self._checked = True
                found = self._tried(packed, items, forked)
                if found is not None:
                    return found
                self.shares = False
        return self._scorer.in_full(items)

    def _tried(
        self, packed: list[Packed], items: Sequence[Sequence[Pair]], forked: list[int]
    ) -> list[list[float]] | None:
        """The scores of packed items; None where those of some are not the ones in full.

        Three items are checked, by the choice with the most tokens before it that it must not see.
        """
        try:
            found = self._scorer.packed(packed)
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS:
            return None
        checked = {forked[0], forked[len(forked) // 2], forked[-1]}
        places = [(number, packed[number].last) for number in sorted(checked)]
        pairs = [items[number][last] for number, last in places]
        [in_full] = self._scorer.in_full([pairs])
        for (number, last), pair, a in zip(places, pairs, in_full):
            b = found[number][last]
            near = abs(a - b) <= self._tolerance * len(pair.targets)
            if not (near or a == b or (math.isnan(a) and math.isnan(b))):
                return None
        return found


def _longest(items: Sequence[Sequence[Pair]]) -> int:
    return max(len(pair.inputs) for pairs in items for pair in pairs)


def _window(model: nn.Module) -> float:
    """The longest sequence whose every token sees all before it."""
    config = getattr(model, "config", None)
    config = config if config is None else config.get_text_config()
    found = [getattr(config, name, None) for name in _WINDOWS]
    return min((size for size in found if isinstance(size, int)), default=math.inf)


def _tolerance(model: nn.Module) -> float:
    """Nats a token by which two ways of running a model may differ: 50 eps of its dtype or 3e-4.

    Rounding made 1e-5 in float32 and 0.14, 18 eps, in bfloat16 with SmolLM2; a beginning that is
    lost or out of place makes about one.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    return max([3e-4, *(50 * torch.finfo(dtype).eps for dtype in dtypes)])


class Packed:
    """The choices of an item in one sequence [T]: what all begin with, then the rest of each.

    Attributes:
        ids: the tokens.
        positions: where each is in its own choice.
        parts: 0 for what all begin with, then 1, 2, ...: the choice.
        last: the last choice that goes on after the beginning; None if it is the only one.
        columns: of each choice, where its scored predictions are.
        targets: of each choice, the tokens that are scored.
    """

    def __init__(self, pairs: Sequence[Pair]):
        shared = shared_prefix(pairs)
        self.ids = pairs[0].inputs[:shared]
        self.positions = list(range(shared))
        self.parts = [0] * shared
        self.columns: list[list[int]] = []
        self.targets = [pair.targets for pair in pairs]
        for part, pair in enumerate(pairs, 1):
            begin, rest = len(self.ids), pair.inputs[shared:]
            places = [*range(shared), *range(begin, begin + len(rest))]
            self.columns.append(places[pair.first :])
            self.ids = self.ids + rest
            self.positions += range(shared, shared + len(rest))
            self.parts += [part] * len(rest)
        self.last = self.parts[-1] - 1 if len(set(self.parts) - {0}) > 1 else None


class _Scorer:
    """Runs a model on batches of items, at most ``size`` sequences at a time."""

    def __init__(self, model: nn.Module, size: int):
        self._model = model
        self._size = size
        self._device = Runner(model).device
        self._hugging_face = hasattr(model, "config")
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def in_full(self, items: Sequence[Sequence[Pair]]) -> list[list[float]]:
        """Every choice is run by itself, from its beginning.

        They are padded on the right, where no token of theirs sees it; those that run together
        are about equally long, so that little is padded.
        """
        pairs = [pair for of_item in items for pair in of_item]
        sums = _Sums(len(pairs))
        order = sorted(range(len(pairs)), key=lambda number: -len(pairs[number].inputs))
        for begin in range(0, len(order), self._size):
            part = order[begin : begin + self._size]
            ids = _padded([pairs[number].inputs for number in part])  # [B, S]
            start = min(pairs[number].first for number in part)
            logits = self._logits(ids, start)
            for row, number in enumerate(part):
                pair = pairs[number]
                sums.want(number, row, range(pair.first, len(pair.inputs)), pair.targets)
            sums.add(logits, start)
        return sums.of(items)

    def packed(self, items: Sequence[Packed]) -> list[list[float]]:
        """Every item is one sequence; a choice sees what all begin with, and itself."""
        sums = _Sums(sum(len(item.columns) for item in items))
        ids = _padded([item.ids for item in items])  # [B, T]
        parts = _padded([item.parts for item in items], -1)
        query, key = parts[:, :, None], parts[:, None, :]
        seen = ((key == 0) | (key == query)).tril()  # [B, T, T]
        mask = torch.zeros(seen.shape, dtype=self._model.dtype)
        mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
        start = min(column for item in items for columns in item.columns for column in columns)
        logits = self._logits(
            ids,
            start,
            attention_mask=mask[:, None].to(self._device),
            position_ids=_padded([item.positions for item in items]).to(self._device),
        )
        number = 0
        for row, item in enumerate(items):
            for columns, targets in zip(item.columns, item.targets):
                sums.want(number, row, columns, targets)
                number += 1
        sums.add(logits, start)
        return sums.of([item.columns for item in items])

    def _logits(self, ids: torch.Tensor, start: int, **options) -> torch.Tensor:
        """The logits [B, S - start, V] from place ``start`` on, for ids [B, S]."""
        ids, keep = ids.to(self._device), ids.shape[1] - start
        if self._keeps:
            options["logits_to_keep"] = keep
        if self._hugging_face:
            output = self._model(input_ids=ids, use_cache=False, **options)
        else:
            output = self._model(ids)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            raise InvalidInput(
                f"{type(self._model).__name__} gives no logits [B, S, V]: multiple choice needs a "
                "model with a language-model head"
            )
        return logits[:, -keep:]


class _Sums:
    """Sums of log-probabilities of chosen targets at chosen places of logits, in float64."""

    def __init__(self, count: int):
        self._sums = torch.zeros(count, dtype=torch.float64)
        self._wanted: list[tuple[int, int, int, int]] = []

    def want(self, into: int, row: int, columns: Sequence[int], targets: Sequence[int]) -> None:
        """Add to sum ``into`` the targets [N] at the places ``columns`` [N] of a row."""
        self._wanted += [(into, row, *place) for place in zip(columns, targets)]

    def add(self, logits: torch.Tensor, start: int) -> None:
        """Take what was wanted from logits [B, K, V] of the places from ``start`` on.

        The log-softmax is taken in float32.
        """
        wanted, self._wanted = torch.tensor(self._wanted, dtype=torch.int64).view(-1, 4), []
        for part in wanted.split(_ROWS):
            into, rows, columns, targets = part.to(logits.device).unbind(1)
            scored = logits[rows, columns - start].float()  # [N, V]
            losses = F.cross_entropy(scored, targets, reduction="none")
            self._sums.index_add_(0, into.cpu(), -losses.double().cpu())

    def of(self, items: Iterable[Sequence]) -> list[list[float]]:
        """The sums of the choices of each item."""
        sums = iter(self._sums.tolist())
        return [[next(sums) for _ in pairs] for pairs in items]


def _padded(rows: Iterable[Sequence[int]], value: int = 0) -> torch.Tensor:
    """int64 [B, S]: rows padded on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
