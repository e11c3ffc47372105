"""Run many forwards of one model side by side: all pass a part before any enters the next.

Each forward is the model's own, as it is written; it pauses where it calls a part (an embedding, a
block, the head) and goes on when that part's weights are there. What a model passes from block to
block, masks, positions, several states, lives in the paused forward. greenlet makes the pauses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from swkernels.errors import SwkernelsError

from .hidden import HiddenStates
from .streaming import PartStream


@dataclass
class Call:
    """How a forward calls a part."""

    part: str
    args: tuple
    kwargs: dict

    @property
    def hidden(self) -> torch.Tensor | None:
        """The hidden states that go in, or None: an embedding takes token ids."""
        first = self.args[0] if self.args else self.kwargs.get("hidden_states")
        is_state = isinstance(first, torch.Tensor) and first.is_floating_point()
        return first if is_state and first.dim() > 1 else None


def tensors_in(value) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dictionaries, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


@dataclass(eq=False)
class Job:
    """One forward.

    Attributes:
        run: runs the model; called once. What it returns is ``result``.
        order: jobs pass a part in this order.
        entering: called before a part runs, with its name.
        passed: called after it, with the ``Call`` and the output, while its weights are there.
        pausing: called with the job when its forward has paused.
        keeps_calls: what goes into a block is kept until all jobs have passed it.
        after: the part after which it starts; None: at once.
        played: parts that do not run, and what they return instead. Hidden states among it, that
            other jobs may hold, are in memory while this one starts.
    """

    run: Callable[[], object]
    order: tuple = ()
    entering: Callable[[str], None] = lambda part: None
    passed: Callable[[Call, object], None] = lambda call, output: None
    pausing: Callable[[Job], None] = lambda job: None
    keeps_calls: bool = False
    after: str | None = None
    played: dict[str, object] = field(default_factory=dict)
    result: object = None
    waiting: Call | None = None
    fiber: object = None


class Lockstep:
    """Runs jobs over a ``PartStream``.

    Args:
        stream: the model and its parts.
        hidden: where hidden states wait.
        part_done: called with a part when every job has passed it, while its weights are there,
            and with the (job, Call) of the jobs that keep theirs; see ``again``.
    """

    def __init__(
        self,
        stream: PartStream,
        hidden: HiddenStates,
        part_done: Callable[[str, list[tuple[Job, Call]]], None] = lambda part, calls: None,
    ):
        try:
            from greenlet import greenlet
        except ImportError as error:
            raise SwkernelsError(
                "streaming needs the library greenlet: pip install 'swkernels[stream]'"
            ) from error
        self._greenlet = greenlet
        self._stream = stream
        self._hidden = hidden
        self._part_done = part_done
        self._originals: dict[str, Callable] = {}
        self._current: Job | None = None

    def run(
        self,
        jobs: Iterable[Job],
        until: str | None = None,
        reached: Callable[[list[Job]], None] = lambda jobs: None,
    ) -> None:
        """Run all jobs to their ends. An exception in one of them ends them all.

        Args:
            jobs: what to run.
            until: a part that does not run any more: where all jobs wait for it or for a later
                one, ``reached`` is called with them, and their forwards end there.
        """
        dormant, started = sorted(jobs, key=lambda job: job.order), []
        before = {name: m.__dict__.get("forward") for name, m in self._stream.parts.items()}
        try:
            for name, module in self._stream.parts.items():
                self._originals[name] = module.forward
                module.__dict__["forward"] = self._gate(name, module.forward)
            # Some models ask an embedding's weight where it is before they call the embedding.
            self._stream.use(next(iter(self._stream.parts)))
            self._start(dormant, None, started)
            while any(job.waiting is not None for job in started):
                parts = {job.waiting.part for job in started if job.waiting is not None}
                part = min(parts, key=self._stream.order)
                if until is not None and self._stream.order(part) >= self._stream.order(until):
                    reached([job for job in started if job.waiting is not None])
                    break
                self._pass(part, [j for j in started if j.waiting and j.waiting.part == part])
                self._start(dormant, part, started)
        finally:
            for job in started:
                if job.fiber is not None and not job.fiber.dead:
                    job.fiber.throw()  # its forward is unwound
            for name, forward in before.items():
                module = self._stream.parts[name]
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward
            self._stream.put_away()

    def again(self, call: Call) -> object:
        """Run a part that a job has just passed once more; for ``part_done``."""
        with self._hidden.present(tensors_in((call.args, call.kwargs))):
            return self._originals[call.part](*call.args, **call.kwargs)

    def _start(self, dormant: list[Job], passed: str | None, started: list[Job]) -> None:
        starting = [job for job in dormant if job.after == passed]
        sources = [job.played for job in starting]
        for job in starting:
            dormant.remove(job)
            started.append(job)
            job.fiber = self._greenlet(lambda job=job: setattr(job, "result", job.run()))
            job.played = dict(job.played)
            for tensor in tensors_in(job.played):
                self._hidden.fetch(tensor)
            self._go_on(job)
        for source in sources:
            source.clear()  # what it holds is large
        started.sort(key=lambda job: job.order)

    def _go_on(self, job: Job) -> None:
        """Let a job run until it calls the next part, or to its end."""
        job.waiting = None
        before, self._current = self._current, job
        try:
            job.fiber.switch()
        finally:
            self._current = before
        job.pausing(job)
        if job.waiting is None or self._is_beyond(job.waiting.part, job.played):
            job.played = {}
        if job.waiting is None:
            job.fiber = None
        elif job.waiting.hidden is not None:
            self._hidden.hold(job.waiting.hidden)

    def _is_beyond(self, part: str, played: dict[str, object]) -> bool:
        """Whether none of ``played`` will be called any more."""
        order = self._stream.order
        return all(order(other) < order(part) for other in played)

    def _pass(self, part: str, jobs: list[Job]) -> None:
        """Let every job pass one part."""
        kept: list[tuple[Job, Call]] = []
        self._stream.use(part)
        for job in jobs:
            call = job.waiting
            job.entering(part)
            if call.hidden is not None:
                self._hidden.fetch(call.hidden)
            self._go_on(job)
            if call.hidden is not None:
                if job.keeps_calls:
                    self._hidden.rest(call.hidden)
                    kept.append((job, call))
                else:
                    self._hidden.release(call.hidden)
        self._part_done(part, kept)
        for _, call in kept:
            self._hidden.release(call.hidden)

    def _gate(self, part: str, original: Callable) -> Callable:
        def forward(*args, **kwargs):
            job = self._current
            if part in job.played:
                return job.played[part]
            call = Call(part, args, kwargs)
            job.waiting = call
            job.fiber.parent.switch()
            output = original(*args, **kwargs)
            job.passed(call, output)
            return output

        return forward
