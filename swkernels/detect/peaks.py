"""Stage 1's pass: the peaks of every projection over the samples, and what counts samples.

What is learnt lies in a form in which order does not matter: keys merge by maximum and name the
first of equal tokens; what a sample or a batch adds is kept by its number and put together in that
order at the end. So samples may run in any order, in several processes, and be continued later.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .consistency import Consistency, spiking_positions
from .ranks import Ranks
from .tensor_bytes import packed, unpacked
from .tracking import ProjectionState, TrackHandle, track


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one length that run together.

    Attributes:
        first: the number of its first sample.
        token: the running index of its first token, over all samples.
        ids: int64 [B, S].
    """

    first: int
    token: int
    ids: torch.Tensor

    @property
    def samples(self) -> range:
        return range(self.first, self.first + len(self.ids))

    def offset(self, sample: int) -> int:
        """The tokens of the batch before those of ``sample``."""
        return (sample - self.first) * self.ids.shape[1]


@dataclass
class PeakRecord:
    """What the pass has learnt.

    Attributes:
        states: the running keys of every projection, in forward order; and ``routed``, int64 [E],
            which grows by what each batch adds, so that parts of the pass add up.
        config: the ``ScanConfig``.
        spiking: by sample, the positions that spike in it: (index of the state, expert, row,
            column).
        moments: by first sample of a batch, float64 [E, 3] of every state that has moments.
    """

    states: list[ProjectionState]
    config: object
    spiking: dict[int, list[tuple[int, int, int, int]]] = field(default_factory=dict)
    moments: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)

    def add(self, batch: Batch, sites: list[int] | None = None) -> None:
        """Take over what ``batch`` has left in the states ``sites`` (all of them) before the next.

        Args:
            batch: what has just run.
            sites: indices into ``states``; a streamed layer has its own only.
        """
        for site in range(len(self.states)) if sites is None else sites:
            state = self.states[site]
            for i, sample in enumerate(batch.samples):
                here = self.spiking.setdefault(sample, [])
                here += [(site, *at) for at in spiking_positions(state, i, self.config)]
            if state.moments is not None:
                of_batch = self.moments.setdefault(batch.first, {})
                of_batch[site] = state.moments.cpu().clone()
                state.moments.zero_()

    def merge(self, ranks: Ranks, step: str, sites: Iterable[int] | None = None) -> None:
        """Take over what the other ranks have learnt, before ``finish``.

        Args:
            ranks, step: who takes part, and what errors call this.
            sites: the states that are complete: all of them, or a streamed layer's.
        """
        wanted = list(range(len(self.states)) if sites is None else sites)
        here = set(wanted)
        states = [self.states[site] for site in wanted]
        ranks.merge_max_([keys for s in states for keys in (s.inputs, s.outputs)], step)
        mine = {
            "routed": [state.routed.tolist() for state in states],
            "spiking": [
                (sample, [at for at in positions if at[0] in here])
                for sample, positions in self.spiking.items()
            ],
            "moments": [
                (first, site, packed(of_batch[site]))
                for first, of_batch in self.moments.items()
                for site in wanted
                if site in of_batch
            ],
        }
        every = ranks.gather(mine, step)
        for state, *counts in zip(states, *(theirs["routed"] for theirs in every)):
            state.routed.copy_(torch.tensor(counts).sum(0))
        for rank, theirs in enumerate(every):
            if rank == ranks.rank:
                continue
            for sample, positions in theirs["spiking"]:
                self.spiking.setdefault(sample, []).extend(tuple(at) for at in positions)
            for first, site, moments in theirs["moments"]:
                self.moments.setdefault(first, {})[site] = unpacked(moments)

    def finish(self, sites: Iterable[int] | None = None) -> None:
        """Put the moments of all batches together, in their order, into the states.

        Args:
            sites: the states that are complete: all of them, or a streamed layer's.
        """
        wanted = set(range(len(self.states)) if sites is None else sites)
        for _, of_batch in sorted(self.moments.items()):
            for site, moments in of_batch.items():
                if site in wanted:
                    state = self.states[site]
                    state.moments += moments.to(state.moments.device)

    def consistency(self) -> Consistency:
        """In how many samples each position spikes."""
        counted = Consistency()
        for _, positions in sorted(self.spiking.items()):
            counted.add(_named(self.states[site], *at) for site, *at in positions)
        return counted


def read_peaks(
    model, runner, tokens, config, progress, ranks: Ranks, state=None
) -> tuple[TrackHandle, PeakRecord]:
    """One forward of the body a batch, over all ranks; peaks merged, spikes counted.

    ``state``: a ``ScanState`` or None; batches that it has are not run again.
    """
    step = "reading peaks"
    moments = "outlier" in config.methods
    handle = track(model, per_sample=True, moments=moments, backend=config.backend)
    record = PeakRecord(handle.states, config)
    every = batches(tokens, config.batch_size)
    with handle:
        done = state.restore_peaks(record, every) if state else set()
        mine = [batch for batch in every[ranks.rank :: ranks.size] if batch.first not in done]
        for batch in ranks.in_rounds(mine, len(every), step):
            handle.label_next_token(batch.token)
            runner.body(batch.ids)
            handle.check_finite()
            record.add(batch)
            if state:
                state.batch_done(batch, record)
            progress(step, batch.samples.stop, len(tokens))
    if state:
        state.peaks_done(record)
    if ranks.size > 1:
        record.merge(ranks, step)
    record.finish()
    return handle, record


def batches(tokens: list[torch.Tensor], batch_size: int) -> list[Batch]:
    """Cut samples into batches of neighbours of one length, at most ``batch_size`` each."""
    found: list[Batch] = []
    first = token = 0
    while first < len(tokens):
        length, last = len(tokens[first]), first + 1
        while last < min(len(tokens), first + batch_size) and len(tokens[last]) == length:
            last += 1
        found.append(Batch(first, token, torch.stack(tokens[first:last])))
        first, token = last, token + (last - first) * length
    return found


def locator(tokens: list[torch.Tensor]) -> Callable[[int], tuple[int, int]]:
    """A function from the running index of a token to (sample, position in it)."""
    starts = [0]
    for sample in tokens[:-1]:
        starts.append(starts[-1] + len(sample))

    def locate(token: int) -> tuple[int, int]:
        sample = bisect.bisect_right(starts, token) - 1
        return sample, token - starts[sample]

    return locate


def _named(state: ProjectionState, e: int, row: int, column: int) -> tuple:
    projection = state.projection
    expert = projection.expert if projection.experts is None else e
    return projection.layer, projection.name, expert, row, column
