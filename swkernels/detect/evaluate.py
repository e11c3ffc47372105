"""Stage 3's instrument: the loss of a model on a text with chosen weights zeroed.

Every window is run on the intact model first; its next-token distribution then stands beside that
of the zeroed model, so besides the perplexity ratio there is the KL divergence between the two,
which says how much the weights change what the model predicts, whatever the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F

from swkernels.errors import InvalidInput
from swkernels.models import DownProjection

from .packed import zeroed_packed
from .ranks import Ranks
from .replay import Replay

BLOCK = 64  # tokens that the bootstrap resamples together: neighbours' losses go together

Coordinate = tuple[DownProjection, "int | None", int, int]  # projection, expert, row, column


Place = tuple[torch.Tensor, int, int]  # a weight as a matrix without its history, row, column


@contextmanager
def zeroed(coordinates: list[Coordinate]) -> Iterator[None]:
    """A context in which weights are zero; see ``scaled`` and, if packed, ``zeroed_packed``."""
    with ExitStack() as held:
        plain, packed = [], []
        for coordinate in coordinates:
            (packed if coordinate[0].is_packed else plain).append(coordinate)
        held.enter_context(zeroed_packed(packed))
        for projection in dict.fromkeys(coordinate[0] for coordinate in plain):
            held.enter_context(projection.held())
        places = ((p.matrix(e).detach(), row, column) for p, e, row, column in plain)
        with scaled(places, 0.0):
            yield


@contextmanager
def scaled(places: Iterable[Place], factor: float) -> Iterator[None]:
    """A context in which entries of weights are ``factor`` times what they are.

    They are changed where they lie and get the same bits back, whatever ends the block.
    """
    saved: list[tuple[Place, torch.Tensor]] = []
    try:
        for matrix, row, column in places:
            saved.append(((matrix, row, column), matrix[row, column].clone()))
            matrix[row, column] *= factor
            if factor == 0:  # what is infinite, too
                matrix[row, column] = 0
        yield
    finally:
        # A Ctrl-C meanwhile waits until all are back. Python looks for one where a function
        # begins and where a loop goes round, so both must happen inside the try.
        interrupted = None
        while saved:
            try:
                while saved:
                    _put_back_last(saved)
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


def _put_back_last(saved: list[tuple[Place, torch.Tensor]]) -> None:
    (matrix, row, column), value = saved[-1]
    matrix[row, column] = value
    saved.pop()


Key = tuple[tuple[str, int, int, int], ...]  # of a set: (name, expert or -1, row, column)
INTACT: Key = ()


@dataclass(frozen=True)
class Cell:
    """One window with one set zeroed.

    Attributes:
        losses: mean next-token loss of each block of ``BLOCK`` tokens, in nats.
        kl: mean KL divergence from the intact model; of the intact model its ``information``.
    """

    losses: list[float]
    kl: float


@dataclass
class Baseline:
    """The intact model on the evaluation text.

    Attributes:
        losses: mean next-token loss of each block of ``BLOCK`` tokens, in nats.
        tokens: number of predicted tokens in each block.
        windows: number of windows.
        information: mean KL divergence of the model's predictions from their own average over
            a window, in nats: what its predictions tell about the token at hand. Damage in KL is
            measured against it.
    """

    losses: list[float]
    tokens: list[int]
    windows: int
    information: float

    @property
    def perplexity(self) -> float:
        return exp(_mean(self.losses, self.tokens))


@dataclass
class Measurement:
    """A set of weights zeroed on the evaluation text.

    Attributes:
        ratio: perplexity over the intact model's; ratio_low, ratio_high: its 95 % bootstrap
            interval over blocks of the text.
        kl: mean KL(intact || zeroed) of the next-token distribution, in nats.
        damage: kl / ``Baseline.information``.
    """

    losses: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    perplexity: float = math.nan
    ratio: float = math.nan
    ratio_low: float = math.nan
    ratio_high: float = math.nan
    kl: float = math.nan
    damage: float = math.nan

    @property
    def log_ratio(self) -> float:
        return math.log(self.ratio) if self.ratio > 0 else -math.inf


class Evaluator:
    """Measures what is lost when weights are zeroed, on fixed windows of tokens.

    Args:
        logits: runs the model: ids [1, S] -> logits [1, S, V].
        windows: int64 [1, S] tensors, S >= 2.
        projections: all down projections of the model, in forward order; with them, what comes
            before the first zeroed weight is not run again (see ``replay``).
        seed: of the bootstrap.
        ranks: who shares the cells; None for one process.

    Attributes:
        cells: what was measured, by window and set. Cells are independent of each other, so they
            may be filled elsewhere, in any order, and kept.
    """

    def __init__(
        self,
        logits: Callable[[torch.Tensor], torch.Tensor],
        windows: list[torch.Tensor],
        projections: list[DownProjection],
        seed: int = 0,
        ranks: Ranks | None = None,
    ):
        if not windows:
            raise InvalidInput("the evaluation text has no window of at least 2 tokens")
        self.logits = logits
        self.windows = windows
        self.seed = seed
        self._ranks = ranks or Ranks.alone()
        blocks = {p.block_name: p.block for p in projections}
        one_stack = len({name.rpartition(".")[0] for name in blocks}) == 1
        self._depths = {name: i for i, name in enumerate(blocks)} if one_stack else {}
        self._blocks = list(blocks.values())
        self._replays: bool | None = None
        self.cells: dict[tuple[int, Key], Cell] = {}
        self.baseline: Baseline | None = None

    @torch.no_grad()
    def measure(
        self, sets: list[list[Coordinate]], progress: Callable[[int, int], None] | None = None
    ) -> list[Measurement]:
        """Zero each set in turn on every window; also fills ``baseline``."""
        self._fill(sets, progress or (lambda done, total: None))
        self.baseline = self._baseline()
        return [self._summary(key_of(coordinates)) for coordinates in sets]

    def share_cells(self) -> None:
        """Give every rank the cells that any has, where some were kept from before."""
        self._gather(list(self.cells), "sharing what was measured before")

    def ready(self, projection: DownProjection) -> None:
        """Have the weight of ``projection`` in memory: it is."""

    def _fill(self, sets: list[list[Coordinate]], progress: Callable[[int, int], None]) -> None:
        """Measure the cells that are not known yet, each rank a stretch of neighbours."""
        step = "measuring what zeroing costs"
        before = set(self.cells)
        missing = self._missing(sets)
        mine = self._ranks.stretch(missing)
        total = max(len(missing), len(sets) * len(self.windows))
        done = total - len(missing)
        progress(done, total)
        for n, _ in enumerate(self._ranks.in_rounds(self._measured(mine), len(missing), step), 1):
            progress(done + n * len(missing) // len(mine), total)
        if self._ranks.size > 1:
            self._gather([at for at in self.cells if at not in before], step)

    def _missing(self, sets: list[list[Coordinate]]) -> list[tuple[int, list[Coordinate] | None]]:
        """(window, set) of the cells to measure; None for the intact model alone."""
        missing: list[tuple[int, list[Coordinate] | None]] = []
        for number in range(len(self.windows)):
            wanted = [s for s in sets if (number, key_of(s)) not in self.cells]
            missing += [(number, coordinates) for coordinates in wanted]
            if not wanted and (number, INTACT) not in self.cells:
                missing.append((number, None))
        return missing

    def _gather(self, measured: list[tuple[int, Key]], step: str) -> None:
        """Give every rank the cells that the others have measured."""
        mine = [(*at, self.cells[at].losses, self.cells[at].kl) for at in measured]
        for theirs in self._ranks.gather(mine, step):
            for number, key, losses, kl in theirs:
                self.cells[number, tuple(tuple(at) for at in key)] = Cell(losses, kl)

    def _measured(self, cells: list[tuple[int, list[Coordinate] | None]]) -> Iterator[None]:
        """Measure cells, which come window by window, and yield after each."""
        for number, of_window in groupby(cells, key=lambda cell: cell[0]):
            sets = [coordinates for _, coordinates in of_window if coordinates is not None]
            yield from self._fill_window(number, self.windows[number], sets)
            if not sets:
                yield

    def _fill_window(self, number: int, window, sets: list[list[Coordinate]]) -> Iterator[None]:
        depths = [self._depth(coordinates) for coordinates in sets]
        replay = Replay(self._blocks, depths)
        with replay.recording():
            intact = self._log_probabilities(window)
        if not self._may_replay(replay, window, intact):
            depths = [0] * len(sets)
        targets = window[0, 1:].to(intact.device)
        self.cells[number, INTACT] = Cell(_losses(intact, targets), _information(intact))
        for coordinates, depth in zip(sets, depths):
            with zeroed(coordinates), replay.starting_at(depth):
                cell = Cell(*_compare(intact, self._logits(window), targets))
            self.cells[number, key_of(coordinates)] = cell
            yield

    def _depth(self, coordinates: list[Coordinate]) -> int:
        """The first block that the zeroed weights touch."""
        return min((self._depths.get(c[0].block_name, 0) for c in coordinates), default=0)

    def _may_replay(self, replay: Replay, window: torch.Tensor, intact: torch.Tensor) -> bool:
        """Check once that starting at a block gives what the whole model gives."""
        if replay.depths and self._replays is None:
            self._replays = replay.works(lambda: self._log_probabilities(window), intact)
        return bool(self._replays)

    def _log_probabilities(self, window: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the next token, float32 [S - 1, V]."""
        return F.log_softmax(self._logits(window), dim=-1)

    def _logits(self, window: torch.Tensor) -> torch.Tensor:
        return self.logits(window)[0, :-1].float()  # [S - 1, V]

    def _baseline(self) -> Baseline:
        sizes = [window.numel() - 1 for window in self.windows]
        tokens = [min(BLOCK, size - at) for size in sizes for at in range(0, size, BLOCK)]
        losses, information = self._row(INTACT)
        return Baseline(losses, tokens, len(sizes), _mean(information, sizes))

    def _row(self, key: Key) -> tuple[list[float], list[float]]:
        """The losses of all blocks and the second numbers of all windows of one set."""
        cells = [self.cells[number, key] for number in range(len(self.windows))]
        return [loss for cell in cells for loss in cell.losses], [cell.kl for cell in cells]

    def _summary(self, key: Key) -> Measurement:
        base, tokens = self.baseline.losses, self.baseline.tokens
        result = Measurement(*self._row(key))
        result.perplexity = exp(_mean(result.losses, tokens))
        differences = [a - b for a, b in zip(result.losses, base)]
        result.ratio = exp(_mean(differences, tokens))
        result.ratio_low, result.ratio_high = _bootstrap(differences, tokens, self.seed)
        result.kl = _mean(result.kls, [window.numel() - 1 for window in self.windows])
        result.damage = result.kl / self.baseline.information if result.kl else 0.0
        return result


def key_of(coordinates: list[Coordinate]) -> Key:
    """What a set of coordinates is called in ``Evaluator.cells``."""
    return tuple(
        sorted((p.name, -1 if e is None else e, row, column) for p, e, row, column in coordinates)
    )


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights)) / sum(weights)


def _losses(log_probabilities: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Mean loss of each block of a window."""
    losses = F.nll_loss(log_probabilities, targets, reduction="none").split(BLOCK)
    return [float(block.mean()) for block in losses]


def _compare(
    intact: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[list[float], float]:
    """Mean loss of each block, and the mean KL divergence from the intact model's prediction.

    Block by block: temporaries the size of all logits would cost more than the arithmetic.

    Args:
        intact: log-probabilities [S, V]; logits: [S, V] of the changed model; targets: [S].
    """
    losses, divergence = [], 0.0
    for p, q, target in zip(intact.split(BLOCK), logits.split(BLOCK), targets.split(BLOCK)):
        q = F.log_softmax(q, dim=-1)
        losses.append(float(F.nll_loss(q, target)))
        divergence += float(F.kl_div(q, p, reduction="sum", log_target=True))
    return losses, max(0.0, divergence / len(targets))


def exp(value: float) -> float:
    """e^value; infinity where a float cannot hold it, NaN for NaN."""
    return math.inf if value >= 700 else math.exp(value)


def _information(log_probabilities: torch.Tensor) -> float:
    """Mean KL divergence of the rows [S, V] from their average, in nats, and above zero."""
    blocks = log_probabilities.split(BLOCK)
    average = (sum(block.exp().sum(0) for block in blocks) / len(log_probabilities)).log()
    total = sum(
        float(F.kl_div(average.expand_as(block), block, reduction="sum", log_target=True))
        for block in blocks
    )
    return max(total / len(log_probabilities), torch.finfo(torch.float32).eps)


def _bootstrap(
    differences: list[float], tokens: list[int], seed: int, draws: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the ratio, resampling blocks."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(differences, dtype=torch.float64)
    weights = torch.tensor(tokens, dtype=torch.float64)
    pick = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = (values[pick] * weights[pick]).sum(1) / weights[pick].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return exp(low), exp(high)
