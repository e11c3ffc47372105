"""Stages 1 and 2 of a scan over a model of which one layer at a time is in memory: one pass.

All samples pass a layer; its peaks are final then and its spikes are looked at, before the next
layer is read. What a spike does to the residual stream is seen as its sample goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from swkernels.errors import InvalidInput
from swkernels.models.hidden import HiddenStates
from swkernels.models.stepping import Call, Job, Lockstep, tensors_in
from swkernels.models.streaming import PartStream

from .candidates import find_spikes
from .carry import CannotGoOn, Carry, digest_of
from .peaks import Batch, PeakRecord, batches, locator
from .ranks import Ranks
from .samples import Runner
from .stream_state import Passed, StreamState
from .tensor_bytes import packed, unpacked
from .tracking import TrackHandle, track
from .witness import Spike, read_residual, reading, same_stack

_STEP = "reading peaks"


class StreamedPeaks:
    """The pass.

    Args:
        stream: the model.
        runner: runs it.
        tokens: the samples, int64 [S_i].
        config: the ``ScanConfig``.
        hidden: where hidden states wait.
        progress: called with (stage, done, total).
        ranks: who shares the work: samples, each rank reading all layers; or
        by_layers: layers, each rank reading a range of them and passing all samples on.
        state: from which the pass goes on, and which it writes; of one process.

    Attributes:
        handle, record: as ``read_peaks`` gives them.
        spikes: looked at, in the order of the layers.
    """

    def __init__(
        self,
        stream: PartStream,
        runner: Runner,
        tokens: list[torch.Tensor],
        config,
        hidden: HiddenStates,
        progress: Callable[[str, int, int], None],
        ranks: Ranks,
        by_layers: bool = False,
        state: StreamState | None = None,
    ):
        self._stream = stream
        self._config = config
        self._runner = runner
        self._hidden = hidden
        self._progress = progress
        self._ranks = ranks
        self._state = state
        self._relays = by_layers and ranks.size > 1
        self._carrying = self._relays or state is not None
        every = batches(tokens, config.batch_size)
        self._batches = every if self._relays else every[ranks.rank :: ranks.size]
        self._locate = locator(tokens)
        self._of_sample = {sample: batch for batch in every for sample in batch.samples}
        self._numbering: dict[int, list] = {}
        self._carries: dict[int, Carry] = defaultdict(Carry)
        self._carried: dict[int, list[torch.Tensor]] = defaultdict(list)  # held for a carry
        self._arriving: set[int] = set()  # batches whose carry has not been used yet
        self._done: list[str] = []  # layers
        self._spikes: list[tuple[int, int, Spike]] = []  # site, number in its layer, spike
        moments = "outlier" in config.methods
        self.handle: TrackHandle = track(
            stream.model, per_sample=True, moments=moments, backend=config.backend
        )
        with self.handle:
            self.handle.interleave()
            self.record = PeakRecord(self.handle.states, config)
            self._sites: dict[str, list[int]] = defaultdict(list)
            for site, tracked in enumerate(self.handle.states):
                self._sites[tracked.projection.block_name].append(site)
            self._lockstep = Lockstep(stream, hidden, self._part_done)
            if self._relays:
                self._run_own_layers()
            elif self._state is not None:
                self._continue()
            elif self._batches:
                self._lockstep.run(self._job(batch) for batch in self._batches)
            else:  # more ranks than batches
                for part in self._sites:
                    stream.use(part)
                    self._part_done(part, [])
                stream.put_away()
        self.spikes = self._gathered()

    def _job(self, batch: Batch, played: dict[str, object] | None = None) -> Job:
        def run() -> None:
            self.handle.label_next_token(batch.token)
            self._runner.body(batch.ids)

        return Job(
            run,
            order=(batch.first,),
            entering=lambda part: self._entering(batch, part),
            passed=lambda call, output: self._passed(batch, call, output),
            pausing=lambda job: self._pausing(batch, job),
            keeps_calls=True,
            played=played or {},
        )

    def _entering(self, batch: Batch, part: str) -> None:
        self.handle.numbering = self._numbering[batch.first]
        for site in self._sites.get(part, ()):
            self.handle.states[site].begin(len(batch.ids))
        for tensor in self._carried[batch.first]:
            self._hidden.fetch(tensor)

    def _passed(self, batch: Batch, call: Call, output) -> None:
        if self._carrying and call.part in self._stream.blocks:
            self._carries[batch.first].note(call.part, output)
        sites = self._sites.get(call.part)
        if not sites:
            return
        self.handle.check_finite([self.handle.states[site] for site in sites])
        self.record.add(batch, sites)
        earlier = [
            spike
            for _, _, spike in self._spikes
            if spike.sample in batch.samples and same_stack(spike.projection.block_name, call.part)
        ]
        read_residual(earlier, output)

    def _pausing(self, batch: Batch, job: Job) -> None:
        self._numbering[batch.first] = self.handle.numbering
        if batch.first in self._arriving:
            if job.waiting.part not in self._stream.blocks:
                for tensor in self._carried[batch.first]:
                    self._hidden.rest(tensor)
                return
            self._carries[batch.first].check(job.waiting)
            self._arriving.discard(batch.first)
        if self._carrying:
            self._hold_carry(batch.first)

    def _hold_carry(self, first: int) -> None:
        """Let what a forward carries wait with the hidden states; it is mostly one of them."""
        before, now = self._carried[first], self._carries[first].tensors()
        for tensor in now:
            self._hidden.hold(tensor)
        for tensor in before:
            self._hidden.release(tensor)
        self._carried[first] = now

    def _part_done(self, part: str, calls: list[tuple[Job, Call]]) -> None:
        """All samples have passed a layer: merge, and look at what spikes there."""
        sites = self._sites.get(part)
        if not sites:
            return
        if self._ranks.size > 1 and not self._relays:
            self.record.merge(self._ranks, _STEP, sites)
        self.record.finish(sites)
        states = [self.handle.states[site] for site in sites]
        found = find_spikes(states, self._locate, self._config)
        by_batch = {job.order[0]: call for job, call in calls}
        here: dict[int, list[Spike]] = defaultdict(list)
        for number, spike in enumerate(found):
            batch = self._of_sample[spike.sample]
            spike.offset = batch.offset(spike.sample)
            if batch.first in by_batch:
                site = next(s for s in sites if self._projection(s) is spike.projection)
                self._spikes.append((site, number, spike))
                here[batch.first].append(spike)
        for first, spikes in sorted(here.items()):
            with self.handle.not_watching(), reading(spikes):
                read_residual(spikes, self._lockstep.again(by_batch[first]))
        for state in states:
            state.sample_inputs = state.sample_outputs = None
        self._done.append(part)
        if self._state is not None and (self._state.due() or len(self._done) == len(self._sites)):
            self._save([job for job, _ in calls])
        self._progress(_STEP, len(self._done), len(self._sites))

    def _save(self, jobs: list[Job]) -> None:
        carries = {}
        for job in jobs:
            if job.waiting is not None:
                carries[job.order[0]] = self._carries[job.order[0]]
                with self._hidden.present(tensors_in((job.waiting.args, job.waiting.kwargs))):
                    carries[job.order[0]].digest = digest_of(job.waiting)
        spikes = [self._entry(*entry) for entry in self._spikes]
        passed = Passed(list(self._done), spikes, carries)
        self._state.save_passed(self.record, passed, self._hidden.present)

    def _continue(self) -> None:
        """Go on after the last layer of the state, or begin where there is none."""
        passed = self._state.restore_passed(self.record, self._batches)
        if passed is None:
            self._lockstep.run(self._job(batch) for batch in self._batches)
            return
        self._done = passed.parts
        self._spikes = [self._spike(entry) for entry in passed.spikes]
        if len(self._done) < len(self._sites):
            for first, carry in passed.carries.items():
                self._arrive(first, carry.to_dict(), carry.tensors())
            try:
                self._lockstep.run(self._arrived())
            except CannotGoOn as error:
                raise InvalidInput(
                    f"cannot continue from the state {self._state.path}: {error}; delete it to "
                    "start anew"
                ) from error

    def _arrive(self, first: int, carry: dict, tensors: list[torch.Tensor]) -> None:
        """Take over where the forward of a batch stands."""
        tensors = [tensor.to(self._stream.device, copy=True) for tensor in tensors]
        self._carries[first] = Carry.from_dict(carry, tensors)
        self._arriving.add(first)
        self._hold_carry(first)

    def _arrived(self) -> list[Job]:
        parts = list(self._stream.parts)
        played = {b.first: self._carries[b.first].played(parts) for b in self._batches}
        first = next(iter(played.values()))
        self._stream.expect(next(block for block in self._stream.blocks if block not in first))
        return [self._job(batch, played[batch.first]) for batch in self._batches]

    def _projection(self, site: int):
        return self.handle.states[site].projection

    def _run_own_layers(self) -> None:
        """Take all samples over from the rank before, run a range of blocks, pass them on."""
        ranks, stream = self._ranks, self._stream
        ranges = split_by_size([stream.bytes_of(block) for block in stream.blocks], ranks.size)
        starts = [stream.blocks[start] for start in ranges]
        following = starts[ranks.rank + 1] if ranks.rank + 1 < ranks.size else None
        if ranks.rank:
            spikes, _ = ranks.receive(ranks.rank - 1, _STEP)
            self._spikes = [self._unpacked(entry) for entry in spikes]
            for batch in self._batches:
                self._arrive(batch.first, *ranks.receive(ranks.rank - 1, _STEP))
        self._lockstep.run(self._arrived(), following, self._pass_on)
        self.record.merge(ranks, _STEP)
        elsewhere = [sites for part, sites in self._sites.items() if part not in self._done]
        self.record.finish(site for sites in elsewhere for site in sites)

    def _pass_on(self, jobs: list[Job]) -> None:
        to = self._ranks.rank + 1
        self._ranks.send(to, [self._packed(*entry) for entry in self._spikes], [], _STEP)
        for job in jobs:
            carry = self._carries[job.order[0]]
            carried, call = self._carried[job.order[0]], job.waiting
            with self._hidden.present([*carried, *tensors_in((call.args, call.kwargs))]):
                carry.digest = digest_of(call)
                self._ranks.send(to, carry.to_dict(), carried, _STEP)

    def _gathered(self) -> list[Spike]:
        """The spikes that all ranks have looked at."""
        found = self._spikes
        if self._ranks.size > 1:
            last = self._ranks.rank == self._ranks.size - 1
            mine = found if last or not self._relays else []
            every = self._ranks.gather([self._packed(*entry) for entry in mine], _STEP)
            found = [self._unpacked(entry) for entries in every for entry in entries]
        return [spike for _, _, spike in sorted(found, key=lambda entry: entry[:2])]

    def _entry(self, site: int, number: int, spike: Spike) -> dict:
        """A spike as JSON's types, but for x and w."""
        return {
            "site": site,
            "number": number,
            "expert": spike.expert,
            "row": spike.row,
            "sample": spike.sample,
            "position": spike.position,
            "offset": spike.offset,
            "peak": spike.peak,
            "prominence": spike.prominence,
            "residual": spike.residual,
            "x": spike.x,
            "w": spike.w,
        }

    def _packed(self, site: int, number: int, spike: Spike) -> dict:
        entry = self._entry(site, number, spike)
        sides = {side: entry[side] for side in "xw"}
        return entry | {s: None if t is None else packed(t) for s, t in sides.items()}

    def _unpacked(self, entry: dict) -> tuple[int, int, Spike]:
        sides = {side: entry[side] for side in "xw"}
        return self._spike(
            entry | {s: None if d is None else unpacked(d) for s, d in sides.items()}
        )

    def _spike(self, entry: dict) -> tuple[int, int, Spike]:
        fields = {k: v for k, v in entry.items() if k not in ("site", "number")}
        return entry["site"], entry["number"], Spike(self._projection(entry["site"]), **fields)


def split_by_size(sizes: list[int], count: int) -> list[int]:
    """The start of each of ``count`` runs of neighbours of about the same size.

    Raises:
        InvalidInput: there are fewer than ``count``.
    """
    if len(sizes) < count:
        raise InvalidInput(
            f"{count} ranks cannot share {len(sizes)} blocks: start fewer, or split the samples"
        )
    starts, done, total = [0], 0, sum(sizes)
    for i, size in enumerate(sizes[:-1]):
        done += size
        left = count - len(starts)
        if left and (done * count >= total * len(starts) or len(sizes) - 1 - i == left):
            starts.append(i + 1)
    return starts
