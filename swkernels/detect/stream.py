"""The passes of a scan over a model of which one layer at a time is in memory.

Stage 1 and the second look are one pass over the weights: all samples pass a layer, its peaks are
final, its spikes are looked at, then the next layer is read. What a spike does to the residual
stream is seen as the samples go on. Each round of zeroing is one more pass, whatever the number of
sets. What runs, and with what batches, is what the scan in memory runs; see docs/scale/stream.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch

from swkernels.models import DownProjection
from swkernels.models.hidden import HiddenStates
from swkernels.models.stepping import Call, Job, Lockstep
from swkernels.models.streaming import PartStream

from .candidates import find_spikes
from .evaluate import (
    INTACT,
    Cell,
    Coordinate,
    Evaluator,
    Key,
    _compare,
    _information,
    _losses,
    key_of,
    zeroed,
)
from .peaks import Batch, PeakRecord, batches, locator
from .samples import Runner
from .tracking import TrackHandle, track
from .witness import Spike, read_residual, reading, same_stack


class StreamedPeaks:
    """Stage 1 and the second look, in one pass over the weights.

    Args:
        stream: the model.
        runner: runs it.
        tokens: the samples, int64 [S_i].
        config: the ``ScanConfig``.
        hidden: where hidden states wait.
        progress: called with (stage, done, total).

    Attributes:
        handle, record: as ``read_peaks`` gives them.
        spikes: looked at.
    """

    def __init__(
        self,
        stream: PartStream,
        runner: Runner,
        tokens: list[torch.Tensor],
        config,
        hidden: HiddenStates,
        progress: Callable[[str, int, int], None],
    ):
        self._config = config
        self._runner = runner
        self._progress = progress
        self._tokens = tokens
        self._batches = batches(tokens, config.batch_size)
        self._locate = locator(tokens)
        self._of_sample = {sample: batch for batch in self._batches for sample in batch.samples}
        self._numbering: dict[int, list] = {}
        self._spiking: dict[int, list[Spike]] = defaultdict(list)  # by first sample of a batch
        self.spikes: list[Spike] = []
        moments = "outlier" in config.methods
        self.handle: TrackHandle = track(
            stream.model, per_sample=True, moments=moments, backend=config.backend
        )
        with self.handle:
            self.handle.interleave()
            self.record = PeakRecord(self.handle.states, config)
            self._sites: dict[str, list[int]] = defaultdict(list)
            for site, state in enumerate(self.handle.states):
                self._sites[state.projection.block_name].append(site)
            self._layers_done = 0
            self._lockstep = Lockstep(stream, hidden, self._part_done)
            self._lockstep.run(self._job(batch) for batch in self._batches)
        self.spikes.sort(key=lambda spike: self._place(spike))

    def _job(self, batch: Batch) -> Job:
        def run() -> None:
            self.handle.label_next_token(batch.token)
            self._runner.body(batch.ids)

        return Job(
            run,
            order=(batch.first,),
            entering=lambda part: self._entering(batch, part),
            passed=lambda call, output: self._passed(batch, call, output),
            pausing=lambda: self._pausing(batch),
            keeps_calls=True,
        )

    def _pausing(self, batch: Batch) -> None:
        self._numbering[batch.first] = self.handle.numbering

    def _entering(self, batch: Batch, part: str) -> None:
        self.handle.numbering = self._numbering[batch.first]
        for site in self._sites.get(part, ()):
            self.handle.states[site].begin(len(batch.ids))

    def _passed(self, batch: Batch, call: Call, output) -> None:
        sites = self._sites.get(call.part)
        if not sites:
            return
        self.handle.check_finite([self.handle.states[site] for site in sites])
        self.record.add(batch, sites)
        earlier = [
            spike
            for spike in self._spiking[batch.first]
            if same_stack(spike.projection.block_name, call.part)
        ]
        read_residual(earlier, output)

    def _part_done(self, part: str, calls: list[tuple[Job, Call]]) -> None:
        sites = self._sites.get(part)
        if not sites:
            return
        self.record.finish(sites)
        states = [self.handle.states[site] for site in sites]
        found = find_spikes(states, self._locate, self._config)
        for spike in found:
            batch = self._of_sample[spike.sample]
            spike.offset = (spike.sample - batch.first) * batch.ids.shape[1]
            self._spiking[batch.first].append(spike)
        self.spikes += found
        by_batch = {job.order[0]: call for job, call in calls}
        for first in sorted({self._of_sample[spike.sample].first for spike in found}):
            here = [s for s in found if self._of_sample[s.sample].first == first]
            with self.handle.not_watching(), reading(here):
                read_residual(here, self._lockstep.again(by_batch[first]))
        for state in states:
            state.sample_inputs = state.sample_outputs = None
        self._layers_done += 1
        self._progress("reading peaks", self._layers_done, len(self._sites))

    def _place(self, spike: Spike) -> int:
        names = [state.projection.name for state in self.handle.states]
        return names.index(spike.projection.name)


class StreamedEvaluator(Evaluator):
    """Measures the cells of many sets and windows in one pass over the weights.

    A set's run starts at the first block that it touches, from what the intact model's run gave
    there; the first such pass also starts the intact model so and compares the results.

    Args:
        stream, runner, hidden: as of ``StreamedPeaks``.
        windows, projections, seed: as of ``Evaluator``.
    """

    def __init__(self, stream: PartStream, runner: Runner, hidden: HiddenStates, windows,
                 projections, seed: int = 0):  # fmt: skip
        super().__init__(runner.logits, windows, projections, seed)
        self._stream = stream
        self._hidden = hidden
        self._intact: dict[int, torch.Tensor] = {}  # log-probabilities by window
        self._open: Counter[int] = Counter()  # runs of a window that still need them
        self._same = True

    def _fill(self, sets: list[list[Coordinate]], progress: Callable[[int, int], None]) -> None:
        jobs: list[Job] = []
        late: list[tuple[int, Key]] = []
        for number in range(len(self.windows)):
            wanted = [s for s in sets if (number, key_of(s)) not in self.cells]
            if wanted or (number, INTACT) not in self.cells:
                depths = [0 if self._replays is False else self._depth(s) for s in wanted]
                late += [(number, key_of(s)) for s, depth in zip(wanted, depths) if depth]
                jobs += self._jobs(number, wanted, depths)
        if not jobs:
            return
        parts = len(self._stream.parts)
        self._same = True
        lockstep = Lockstep(
            self._stream,
            self._hidden,
            lambda part, calls: progress(self._stream.order(part) + 1, parts),
        )
        lockstep.run(jobs)
        if late and self._replays is None:
            self._replays = self._same
            if not self._same:
                for cell in late:
                    del self.cells[cell]
                self._fill(sets, progress)

    def ready(self, projection: DownProjection) -> None:
        self._stream.use(projection.block_name)

    def _jobs(self, number: int, sets: list[list[Coordinate]], depths: list[int]) -> list[Job]:
        """The intact run of a window, the runs of sets, and those that check the late starts."""
        late = {depth: self._block_before(depth) for depth in depths if depth}
        played: dict[int, dict[str, object]] = {depth: {} for depth in late}
        self._open[number] = len(sets)
        jobs = [self._intact_job(number, late, played)]
        for i, (coordinates, depth) in enumerate(zip(sets, depths)):
            run = partial(self._measure, number, coordinates)
            jobs.append(self._set_job((number, 1, i), run, coordinates))
            jobs[-1].after, jobs[-1].played = late.get(depth), played.get(depth, {})
        if self._replays is None and number == 0:
            self._open[number] += len(late)
            for depth, block in late.items():
                run = partial(self._check, number)
                jobs.append(Job(run, (number, 2, depth), after=block, played=played[depth]))
        return jobs

    def _intact_job(self, number: int, late: dict[int, str], played: dict[int, dict]) -> Job:
        embedded: dict[str, torch.Tensor] = {}

        def passed(call: Call, output) -> None:
            if call.hidden is None and isinstance(output, torch.Tensor):
                embedded[call.part] = output.clone() if late else output
            for depth, block in late.items():
                if block == call.part:
                    order = self._stream.order(block)
                    blocks = [p for p in self._stream.parts if self._stream.order(p) <= order]
                    played[depth].update(dict.fromkeys(blocks, output) | embedded)

        def run() -> None:
            window = self.windows[number]
            intact = self._log_probabilities(window)
            self.cells[number, INTACT] = Cell(
                _losses(intact, window[0, 1:].to(intact.device)), _information(intact)
            )
            if self._open[number]:
                self._intact[number] = intact

        return Job(run, (number, 0, 0), passed=passed)

    def _set_job(self, order: tuple, run: Callable[[], None], coordinates) -> Job:
        here = ExitStack()

        def entering(part: str) -> None:
            inside = [c for c in coordinates if c[0].block_name == part]
            if inside:
                here.enter_context(zeroed(inside))

        return Job(run, order, entering=entering, passed=lambda call, output: here.close())

    def _measure(self, number: int, coordinates: list[Coordinate]) -> None:
        window = self.windows[number]
        logits = self._logits(window)
        intact = self._intact[number]  # which is there by now
        cell = Cell(*_compare(intact, logits, window[0, 1:].to(intact.device)))
        self.cells[number, key_of(coordinates)] = cell
        self._close(number)

    def _check(self, number: int) -> None:
        self._same &= torch.equal(
            self._log_probabilities(self.windows[number]), self._intact[number]
        )
        self._close(number)

    def _close(self, number: int) -> None:
        self._open[number] -= 1
        if not self._open[number]:
            del self._intact[number]

    def _block_before(self, depth: int) -> str:
        return list(self._depths)[depth - 1]
