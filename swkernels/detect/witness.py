"""Second look: run again the samples that hold a spike and read what stood around it.

The tracking pass keeps peaks only. For each spike this pass reads, at the spike's own token, the
input vector of the down projection (one [H] vector) and the residual stream after each block (one
number), so its memory grows with the number of spikes and not with tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from swkernels.models import DownProjection
from swkernels.models.experts import ExpertObserver

from .patching import Patches
from .peaks import Batch
from .ranks import Ranks
from .tensor_bytes import packed, unpacked


@dataclass
class Spike:
    """One output channel of one down projection at the token of its largest magnitude.

    Attributes:
        projection, expert, row: where it comes out.
        sample, position: which token; ``position`` counts tokens that are not padding.
        peak: |Y[i, j]|; prominence: peak over the median channel peak of its layer.
        x: float32 [H] on the CPU, the input at that token (filled by ``witness``).
        w: float32 [H] on the CPU, the row of the weight that makes this output (the same).
        residual: the value of channel ``row`` after the spike's own block and each later block
            (filled by ``witness``; empty where the block's output is not [.., D] wide).
        offset: rows before its sample in what runs together with it.
    """

    projection: DownProjection
    expert: int | None
    row: int
    sample: int
    position: int
    peak: float
    prominence: float
    x: torch.Tensor | None = None
    w: torch.Tensor | None = None
    residual: list[float] = field(default_factory=list)
    offset: int = 0

    @property
    def y(self) -> float:
        """The sum of the products of the matrix row and x: Y[i, j] without the bias."""
        return float(self.x.double() @ self.w.double())

    @property
    def at(self) -> int:
        """The row of its token in what runs together."""
        return self.offset + self.position

    @property
    def persistence(self) -> float:
        """Share of the blocks from the spike's own on whose output carries the spike.

        The spike has entered the residual stream when the channel leaves its own block with the
        spike's sign (and a tenth of its magnitude: a router or a norm may scale it). A later
        block carries it while the channel keeps that sign and half of that magnitude. A spike
        that cancels what earlier layers wrote, the common inert spike of the last layers, has
        persistence 0.
        """
        if not self.residual:
            return 0.0
        y, entered = self.y, self.residual[0]
        if entered * y <= 0 or abs(entered) < 0.1 * abs(y):
            return 0.0
        carried = sum(h * entered > 0 and abs(h) >= 0.5 * abs(entered) for h in self.residual)
        return carried / len(self.residual)


def witness(
    run,
    batches: list[Batch],
    projections: list[DownProjection],
    spikes: list[Spike],
    ranks: Ranks,
    step: str,
) -> None:
    """Fill ``x``, ``w`` and ``residual`` of every spike; each rank runs its share of the batches.

    Args:
        run: runs the model on a batch: with what ran together before, so that it rounds the same.
        batches: of all samples.
        projections: all down projections of the model, in forward order.
        spikes: what to look at, the same on every rank; filled in place.
        ranks, step: who takes part, and what errors call this.
    """
    blocks = {}
    for projection in projections:
        blocks.setdefault(projection.block_name, projection.block)
    order = {name: i for i, name in enumerate(blocks)}
    of_sample = {sample: batch for batch in batches for sample in batch.samples}
    by_batch = defaultdict(list)
    for spike in spikes:
        spike.offset = of_sample[spike.sample].offset(spike.sample)
        by_batch[of_sample[spike.sample]].append(spike)
    found = sorted(by_batch.items(), key=lambda item: item[0].first)
    for batch, wanted in ranks.share(found, step):
        with reading(wanted) as patches:
            for name, block in blocks.items():
                after = [s for s in wanted if order[s.projection.block_name] <= order[name]]
                after = [s for s in after if same_stack(s.projection.block_name, name)]
                if after:
                    patches.forward(block, _residual_reader(after))
            run(batch)
    if ranks.size > 1:
        _gather(spikes, ranks, step)


def _gather(spikes: list[Spike], ranks: Ranks, step: str) -> None:
    """Give every rank what the others have read."""
    seen = [
        (number, packed(spike.x), packed(spike.w), spike.residual)
        for number, spike in enumerate(spikes)
        if spike.x is not None
    ]
    for rank, theirs in enumerate(ranks.gather(seen, step)):
        for number, x, w, residual in theirs if rank != ranks.rank else ():
            spike = spikes[number]
            spike.x, spike.w, spike.residual = unpacked(x), unpacked(w), residual


@contextmanager
def reading(spikes: list[Spike]) -> Iterator[Patches]:
    """A context in which a run of the spikes' projections fills ``x`` and ``w``.

    Yields the patches, to which more can be added.
    """
    patches = Patches("witness")
    try:
        for module, here in _by_module(spikes).items():
            wrap = _reader if here[0].projection.scope is None else _expert_reader
            patches.forward(module, wrap(here))
        yield patches
    finally:
        patches.undo()


def read_residual(spikes: list[Spike], output) -> None:
    """Add to each spike's ``residual`` what its channel is in the output of a block."""
    hidden = output[0] if isinstance(output, tuple) else output
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    for spike in spikes:
        if spike.row < flat.shape[1] and spike.at < flat.shape[0]:
            spike.residual.append(float(flat[spike.at, spike.row]))


def same_stack(a: str, b: str) -> bool:
    """Whether two blocks, by their names, lie in one list."""
    return a.rpartition(".")[0] == b.rpartition(".")[0]


def _by_module(spikes: list[Spike]) -> dict[nn.Module, list[Spike]]:
    grouped = defaultdict(list)
    for spike in spikes:
        grouped[spike.projection.scope or spike.projection.module].append(spike)
    return grouped


def _read(spikes: list[Spike], x: torch.Tensor, rows: torch.Tensor | None) -> None:
    flat = x.detach().reshape(-1, x.shape[-1])
    for spike in spikes:
        at = _row_of(spike, flat, rows)
        if at is not None:
            spike.x = flat[at].float().cpu()
            spike.w = spike.projection.row(spike.row, spike.expert)


def _reader(spikes: list[Spike]):
    def wrap(original):
        def forward(*args, **kwargs):
            _read(spikes, args[0] if args else next(iter(kwargs.values())), None)
            return original(*args, **kwargs)

        return forward

    return wrap


def _expert_reader(spikes: list[Spike]):
    projections = list({spike.projection: None for spike in spikes})

    def callback(projection, expert, x, y, rows):
        here = [s for s in spikes if s.projection is projection]
        if projection.experts is not None:
            here = [s for s in here if s.expert == expert]
        _read(here, x, rows)

    def wrap(original):
        def forward(*args, **kwargs):
            hidden = args[0] if args else next(iter(kwargs.values()))
            tokens = hidden.numel() // hidden.shape[-1]
            with ExpertObserver(projections, tokens, callback):
                return original(*args, **kwargs)

        return forward

    return wrap


def _row_of(spike: Spike, flat: torch.Tensor, rows: torch.Tensor | None) -> int | None:
    """The row of ``flat`` [T, H] that is the spike's token, or None if it is not among them."""
    if rows is None:
        return spike.at if spike.at < flat.shape[0] else None
    found = (rows == spike.at).nonzero()
    return int(found[0]) if len(found) else None


def _residual_reader(spikes: list[Spike]):
    def wrap(original):
        def forward(*args, **kwargs):
            output = original(*args, **kwargs)
            read_residual(spikes, output)
            return output

        return forward

    return wrap
