"""The state of a scan on disk, from which it goes on after it was ended at any moment.

    scan(model, texts, state=ScanState("scan.state"))

One safetensors file, replaced as a whole; docs/scale/resume.md has the table of its tensors. What
it says is checked against this run before anything of it is used.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from swkernels.errors import InvalidInput
from swkernels.files import parse_json, write_atomically
from swkernels.models.safetensors_header import load_header

from . import state_tensors as form
from .evaluate import Evaluator
from .peaks import Batch, PeakRecord
from .ranks import Ranks

EVERY = 60.0  # seconds
_LONGEST = 80  # characters of a value in a message


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)


class ScanState:
    """The state file of one scan. Give each scan a new object.

    It is written after a batch or a measurement when ``every`` seconds have passed, so that an
    end at any moment loses at most that and what was under way. A state that cannot be written
    does not end the scan: the last good one stays, and the next attempt comes an interval later.

    Args:
        path: the file. Of several ranks each has its own, ``path`` with ``.RANK-of-SIZE`` added.
        every: seconds between two states; 0 writes after every batch and measurement.
        fresh: remove a state that is there and start anew.
        files: the checkpoint on disk, for weights that accelerate keeps outside of the model.
        notice: called with a line that says where the scan goes on, if it goes on from a state.
        warn: called with a line that says why a state could not be written; a Python warning by
            default.

    Raises:
        InvalidInput: ``every`` is no number of seconds.
    """

    SCHEMA = "swkernels.scan-state/1"

    def __init__(
        self,
        path: str | Path,
        every: float = EVERY,
        *,
        fresh: bool = False,
        files: Path | None = None,
        notice: Callable[[str], None] | None = None,
        warn: Callable[[str], None] = _warn,
    ):
        check_every(every)
        self.path = Path(path)
        self.every = every
        self.files = files
        self._fresh = fresh
        self._notice = notice or (lambda line: None)
        self._warn = warn
        self._identity: dict[str, object] = {}
        self._found: dict[str, torch.Tensor] | None = None  # what the file had
        self._peaks: dict[str, torch.Tensor] = {}
        self._done: list[int] = []  # first samples of the batches that are in it
        self._saved = time.monotonic()

    def begin(self, identity: dict[str, object], ranks: Ranks) -> None:
        """Say what is scanned, and refuse a state that is there and of something else.

        Raises:
            InvalidInput: the state is damaged, no state, or of another scan; or the folder for it
                is not there.
        """
        if ranks.size > 1:
            name = f"{self.path.name}.{ranks.rank}-of-{ranks.size}"
            self.path = self.path.with_name(name)
        self._identity = json.loads(json.dumps(identity))
        if not self.path.parent.is_dir():
            raise InvalidInput(
                f"cannot write the state {self.path}: there is no folder {self.path.parent}; make "
                "it or give another path"
            )
        if self._fresh:
            self.remove()
        elif self.path.exists():
            self._check_identity()

    def restore_peaks(self, record: PeakRecord, batches: list[Batch]) -> set[int]:
        """Put what a state has of stage 1 into ``record``.

        Args:
            record: fresh; its states must be those of the scan that wrote the state.
            batches: of all ranks.

        Returns:
            The first samples of the batches that are done.

        Raises:
            InvalidInput: the state is damaged.
        """
        self._saved = time.monotonic()
        if not self.path.exists():
            return set()
        self._found = self._load(record, batches)
        form.restore_peaks(self._found, record, batches)
        self._done = self._found["done"].tolist()
        self._peaks = form.peaks_of(record, self._done)
        samples = sum(len(b.ids) for b in batches if b.first in self._done)
        total = sum(len(b.ids) for b in batches)
        cells = len(self._found["cells.kl"])
        measured = f", with {cells} measurements" if cells else ""
        self._notice(f"continuing at sample {samples} of {total}{measured}: {self.path}")
        return set(self._done)

    def restore_cells(self, evaluator: Evaluator, projections: list) -> None:
        """Put the measurements of a state into ``evaluator``."""
        if self._found is not None:
            evaluator.cells.update(form.cells_of(self._found, projections, evaluator.windows))
            self._found = None

    def batch_done(self, batch: Batch, record: PeakRecord) -> None:
        """Note that ``record`` has taken over ``batch``; save if it is time."""
        self._done.append(batch.first)
        if self._due():
            self._peaks = form.peaks_of(record, self._done)
            self._save({})

    def peaks_done(self, record: PeakRecord) -> None:
        """Keep what stage 1 has learnt, before ``record`` merges other ranks' or is finished."""
        self._peaks = form.peaks_of(record, self._done)

    def cell_done(self, evaluator: Evaluator, projections: list) -> None:
        """Save the measurements so far if it is time."""
        if self._due():
            self._save(form.cell_tensors(evaluator.cells, projections))

    def remove(self) -> None:
        """The scan's result is in its place: the state is not needed any more."""
        self.path.unlink(missing_ok=True)

    def _due(self) -> bool:
        return time.monotonic() - self._saved >= self.every

    def _save(self, cells: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save

        tensors = form.NO_CELLS | self._peaks | cells
        identity = json.dumps(self._identity)
        metadata = {
            "schema": self.SCHEMA,
            "identity": identity,
            "sha256": form.digest(identity, tensors),
        }
        try:
            write_atomically(self.path, save(tensors, metadata))
        except InvalidInput as error:
            self._warn(f"the scan goes on without a newer state: {error}")
        self._saved = time.monotonic()

    def _check_identity(self) -> None:
        """Compare field by field; the first that differs is named."""
        with reading(self.path):
            metadata = load_header(self.path).metadata
            if metadata.get("schema") != self.SCHEMA:
                raise InvalidInput(
                    f"expected the schema {self.SCHEMA}, got {_short(metadata.get('schema'))}"
                )
            found = parse_json(metadata.get("identity", "").encode(), "what it is of")
            if not isinstance(found, dict):
                raise InvalidInput("expected an object that says what it is of")
        for name in [*self._identity, *sorted(found.keys() - self._identity.keys())]:
            was, now = found.get(name), self._identity.get(name)
            if was != now or type(was) is not type(now):
                raise InvalidInput(
                    f"the state {self.path} is of another scan: its {name} is {_short(was)}, of "
                    f"this scan {_short(now)}; delete it to start anew, or give another path"
                )

    def _load(self, record: PeakRecord, batches: list[Batch]) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        with reading(self.path):
            header = load_header(self.path)
            form.check_forms(header.tensors, record)
            try:
                tensors = load_file(self.path)
            except (OSError, SafetensorError) as error:
                raise InvalidInput(str(error)) from error
            if form.digest(header.metadata["identity"], tensors) != header.metadata.get("sha256"):
                raise InvalidInput("its content does not match its checksum")
            form.check_values(tensors, record, batches)
        return tensors


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A context in which what is wrong with a state becomes one line that says what to do."""
    try:
        yield
    except InvalidInput as error:
        reason = str(error).replace(f"{path} ", "it ")
        for advice in ("download it again", "take an undamaged copy"):
            reason = reason.replace(f"; {advice}", "").replace(f": {advice}", "")
        raise InvalidInput(
            f"cannot continue from the state {path}: {reason}; delete it to start anew, or give "
            "another path"
        ) from error


def check_every(seconds: float) -> None:
    """Raise InvalidInput unless ``seconds`` can stand between two states."""
    if not 0 <= seconds < float("inf"):
        raise InvalidInput(f"the seconds between two states must be at least 0, got {seconds}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
