"""Log-likelihoods of continuations: each choice alone, or what choices begin with run once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from swkernels.detect.samples import Runner
from swkernels.errors import InvalidInput

from .pairs import Pair, shared_prefix

_ROWS = 256  # logits turned into losses at a time: their float32 copies are V wide each


class PrefixRun:
    """One run over a task's items with one model.

    Attributes:
        shares: whether prefixes are shared; false from the start, or from the first batch on for
            a model that does not take it.
    """

    def __init__(self, model: nn.Module, shares: bool = True):
        self._scorer = Scorer(model)
        self._checked = False
        self._tolerance = _tolerance(model)
        self.shares = shares and hasattr(model, "config")

    def batches(self, items: Sequence[Sequence[Pair]], size: int) -> Iterator[list[int]]:
        """Numbers of items that run together, the longest first: what is too much fails early."""
        lengths = [shared_prefix(pairs) for pairs in items]
        longest = [max(len(pair.inputs) for pair in pairs) for pairs in items]
        order = sorted(range(len(items)), key=lambda n: (-lengths[n], -longest[n]))
        while order:
            first = lengths[order[0]]
            batch = [n for n in order[:size] if lengths[n] == first]
            del order[: len(batch)]
            yield batch

    def scores(self, items: Sequence[Sequence[Pair]]) -> list[list[float]]:
        """Summed log-likelihood of each pair of each item."""
        if not self.shares or shared_prefix(items[0]) == 0:
            return self._scorer.in_full(items)
        if self._checked:
            return self._scorer.together(items)
        self._checked = True
        try:
            found = self._scorer.together(items)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            found = None
        ends = sorted({0, len(items) - 1})
        expected = self._scorer.in_full([items[end] for end in ends])
        if found is None or not all(
            self._agree(items[end], found[end], other) for end, other in zip(ends, expected)
        ):
            self.shares = False
            return self._scorer.in_full(items)
        return found

    def _agree(self, pairs, found, expected) -> bool:
        return all(
            a == b or abs(a - b) <= self._tolerance * len(pair.targets) or (a != a and b != b)
            for pair, a, b in zip(pairs, found, expected)
        )


def _tolerance(model: nn.Module) -> float:
    """Nats a token by which two ways of running a model may differ: the root of its dtype's eps.

    Rounding makes a few eps times the size of the logits, some 10; a prefix that is lost or out of
    place makes about one nat. This is in the middle.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-3) ** 0.5


class Scorer:
    """Scores pairs with one model, which the caller keeps in eval mode and without gradients."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._device = Runner(model).device
        self._hugging_face = hasattr(model, "config")
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def in_full(self, items: Sequence[Sequence[Pair]]) -> list[list[float]]:
        """Summed log-likelihood of each pair's targets, in nats: every pair is run by itself."""
        pairs = [pair for of_item in items for pair in of_item]
        sums = _Sums(len(pairs))
        start = min(pair.first for pair in pairs)
        ids = _padded([pair.inputs for pair in pairs])  # [B, S]
        logits, _ = self._run(ids, ids.shape[1] - start, use_cache=False)
        for row, pair in enumerate(pairs):
            sums.want(row, row, range(pair.first - start, len(pair.inputs) - start), pair.targets)
        sums.add(logits)
        return _by_item(items, sums)

    def together(self, items: Sequence[Sequence[Pair]]) -> list[list[float]]:
        """The same for the pairs of items: what all pairs of an item begin with is run once.

        The prefixes of a batch are equally long, so that none is padded; what follows them is
        padded on the right, where no token sees it.
        """
        length = min(shared_prefix(pairs) for pairs in items)
        choices = [(number, pair) for number, pairs in enumerate(items) for pair in pairs]
        sums = _Sums(len(choices))
        start = min(length - 1, *(pair.first for _, pair in choices))
        prefixes = torch.tensor([pairs[0].inputs[:length] for pairs in items])  # [B, length]
        logits, cache = self._run(prefixes, length - start, use_cache=True)
        for choice, (number, pair) in enumerate(choices):
            places = range(pair.first - start, length - start)  # empty: all of it comes later
            sums.want(choice, number, places, pair.targets)
        sums.add(logits)
        del logits

        rest = [
            (choice, number, pair)
            for choice, (number, pair) in enumerate(choices)
            if len(pair.inputs) > length
        ]
        if rest:
            indices = torch.tensor([number for _, number, _ in rest], device=self._device)
            cache.batch_select_indices(indices)
            ids = _padded([pair.inputs[length:] for *_, pair in rest])  # [R, S]
            start = min(max(pair.first, length) for *_, pair in rest)
            logits, _ = self._run(
                ids, length + ids.shape[1] - start, use_cache=True, past_key_values=cache
            )
            for row, (choice, _, pair) in enumerate(rest):
                places = range(max(pair.first, length) - start, len(pair.inputs) - start)
                sums.want(choice, row, places, pair.targets[len(pair.targets) - len(places) :])
            sums.add(logits)
        return _by_item(items, sums)

    def _run(self, ids: torch.Tensor, keep: int, **options) -> tuple[torch.Tensor, object]:
        """The last ``keep`` logits [B, keep, V] of ids [B, S], and the cache."""
        if not self._hugging_face:
            options = {}
        elif self._keeps:
            options["logits_to_keep"] = keep
        ids = ids.to(self._device)
        output = self._model(input_ids=ids, **options) if options else self._model(ids)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            raise InvalidInput(
                f"{type(self._model).__name__} gives no logits [B, S, V]: multiple choice needs a "
                "model with a language-model head"
            )
        return logits[:, -keep:], getattr(output, "past_key_values", None)


class _Sums:
    """Sums of log-probabilities of chosen targets at chosen places of logits, in float64."""

    def __init__(self, count: int):
        self._sums = torch.zeros(count, dtype=torch.float64)
        self._wanted: list[tuple[int, int, int, int]] = []

    def want(self, into: int, row: int, columns: range, targets: Sequence[int]) -> None:
        """Add to sum ``into`` the targets [N] at ``columns`` [N] of a row of the next logits."""
        self._wanted += [(into, row, *place) for place in zip(columns, targets)]

    def add(self, logits: torch.Tensor) -> None:
        """Take what was wanted from logits [B, K, V]: log-softmax in float32."""
        wanted, self._wanted = torch.tensor(self._wanted, dtype=torch.int64).view(-1, 4), []
        losses = [
            F.cross_entropy(logits[rows, columns].float(), targets, reduction="none")
            for _, rows, columns, targets in (
                part.to(logits.device).unbind(1) for part in wanted.split(_ROWS)
            )
        ]
        if len(wanted):
            self._sums.index_add_(0, wanted[:, 0], -torch.cat(losses).double().cpu())

    def values(self) -> list[float]:
        return self._sums.tolist()


def _by_item(items: Sequence[Sequence[Pair]], sums: _Sums) -> list[list[float]]:
    found = iter(sums.values())
    return [[next(found) for _ in pairs] for pairs in items]


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [B, S]: rows padded on the right with 0, which no token of theirs sees."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
