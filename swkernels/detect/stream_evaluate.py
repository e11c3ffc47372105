"""Stage 3's passes over a model of which one layer at a time is in memory.

Each round of zeroing is one pass over the weights, whatever the number of sets and windows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import groupby

import torch

from swkernels.models import DownProjection
from swkernels.models.hidden import HiddenStates
from swkernels.models.stepping import Call, Job, Lockstep
from swkernels.models.streaming import PartStream

from .evaluate import (
    INTACT,
    Cell,
    Coordinate,
    Evaluator,
    _compare,
    _information,
    _losses,
    key_of,
    zeroed,
)
from .ranks import Ranks
from .samples import Runner


class StreamedEvaluator(Evaluator):
    """Measures the cells of many sets and windows in one pass over the weights.

    A set's run starts at the first block that it touches, from what the intact model's run gave
    there; the first such pass also starts the intact model so and compares the results.

    Args:
        stream, runner, hidden: as of ``StreamedPeaks``.
        windows, projections, seed, ranks: as of ``Evaluator``.
    """

    def __init__(self, stream: PartStream, runner: Runner, hidden: HiddenStates, windows,
                 projections, seed: int = 0, ranks: Ranks | None = None):  # fmt: skip
        super().__init__(runner.logits, windows, projections, seed, ranks)
        self._stream = stream
        self._hidden = hidden
        self._intact: dict[int, torch.Tensor] = {}  # log-probabilities by window
        self._open: Counter[int] = Counter()  # runs of a window that still need them
        self._same, self._checking = True, False  # of the first round's check

    def _fill(self, sets: list[list[Coordinate]], progress: Callable[[int, int], None]) -> None:
        step = "measuring what zeroing costs"
        missing = self._missing(sets)
        if not missing:
            return
        before = set(self.cells)
        late = {(n, key_of(s)) for n, s in missing if s is not None and self._depth(s)}
        self._same, self._checking = True, False
        parts = len(self._stream.parts)
        done = lambda part, calls: progress(self._stream.order(part) + 1, parts)  # noqa: E731
        jobs: list[Job] = []
        for number, cells in groupby(self._ranks.stretch(missing), key=lambda cell: cell[0]):
            jobs += self._jobs(number, [wanted for _, wanted in cells if wanted is not None])
        if jobs:
            Lockstep(self._stream, self._hidden, done).run(jobs)
        if self._ranks.size > 1:
            self._gather([at for at in self.cells if at not in before], step)
            self._same = all(self._ranks.gather(self._same, step))
        if late and self._replays is None:
            self._replays = self._same
            if not self._same:
                for cell in late:
                    del self.cells[cell]
                self._fill(sets, progress)

    def _depth(self, coordinates: list[Coordinate]) -> int:
        return 0 if self._replays is False else super()._depth(coordinates)

    def ready(self, projection: DownProjection) -> None:
        self._stream.use(projection.block_name, ahead=False)

    def _jobs(self, number: int, sets: list[list[Coordinate]]) -> list[Job]:
        """The intact run of a window, the runs of sets, and those that check the late starts."""
        depths = [self._depth(coordinates) for coordinates in sets]
        late = {depth: list(self._depths)[depth - 1] for depth in depths if depth}
        played: dict[int, dict[str, object]] = {depth: {} for depth in late}
        self._open[number] = len(sets)
        jobs = [self._intact_job(number, late, played)]
        for i, (coordinates, depth) in enumerate(zip(sets, depths)):
            run = partial(self._measure, number, coordinates)
            jobs.append(self._set_job((number, 1, i), run, coordinates))
            jobs[-1].after, jobs[-1].played = late.get(depth), played.get(depth, {})
        if self._replays is None and not self._checking:
            self._checking = True  # one window tells
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
