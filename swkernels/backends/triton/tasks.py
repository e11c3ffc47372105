"""What `swkernels tune` measures: operations at sizes. Importing this does not import Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from swkernels import tuning
from swkernels.errors import InvalidInput

DTYPES = ("bfloat16", "float16", "float32", "tfloat32")

# What serves a down projection [rows, columns], in the order in which it is measured: the passes
# over x and y are part of linear_absmax's two-pass variant, so column_absmax comes first.
_SERVES: dict[str, Callable[[int, int], list[tuple[int, int]]]] = {
    "column_absmax": lambda rows, columns: [(columns, columns), (rows, rows)],
    "glu_absmax": lambda rows, columns: [(columns, columns)],
    "linear_absmax": lambda rows, columns: [(rows, columns)],
}
OPERATIONS = tuple(_SERVES)


@dataclass(frozen=True)
class Task:
    """An operation at one size.

    Attributes:
        op: one of `OPERATIONS`.
        rows, columns: shape of the weight; the number of channels for both on [T, C].
        tokens: rows of the activation that is measured.
        dtype: as tuning records spell it: "tfloat32" is float32 multiplied as TF32.
    """

    op: str
    rows: int
    columns: int
    tokens: int
    dtype: str

    @property
    def bucket(self) -> int:
        """The tokens that the record is for."""
        return tuning.token_bucket(self.tokens)

    def record(self, variant: str, config: Mapping[str, int]) -> dict:
        """The tuning record that makes `variant` with `config` the choice for this task."""
        return {
            "op": self.op,
            "dtypes": [self.dtype],
            "rows": self.rows,
            "columns": self.columns,
            "tokens": self.bucket,
            "variant": variant,
            "config": dict(config),
        }


def tasks(
    ops: Iterable[str],
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    dtypes: Iterable[str],
) -> list[Task]:
    """Return what is to be measured for down projections of `shapes`, each task once.

    Args:
        ops: of `OPERATIONS`.
        shapes: (rows, columns) of weights.
        tokens: numbers of rows of the activations; of several in one bucket the largest counts.
        dtypes: of `DTYPES`; "tfloat32" concerns `linear_absmax` only.

    Raises:
        InvalidInput: an operation or a dtype is unknown, or a size is below 1.
    """
    ops, shapes, tokens, dtypes = list(ops), list(shapes), list(tokens), list(dtypes)
    _check_known("operation", ops, OPERATIONS)
    _check_known("dtype", dtypes, DTYPES)
    smallest = min([*tokens, *(side for shape in shapes for side in shape)], default=1)
    if smallest < 1:
        raise InvalidInput(f"rows, columns and tokens must be at least 1, got {smallest}")
    buckets = {tuning.token_bucket(count): count for count in sorted(tokens)}
    found = [
        Task(op, *shape, count, dtype)
        for dtype in dtypes
        for weight in shapes
        for count in buckets.values()
        for op, serves in _SERVES.items()
        if op in ops and (dtype != "tfloat32" or op == "linear_absmax")
        for shape in serves(*weight)
    ]
    return list(dict.fromkeys(found))


def _check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise InvalidInput(f"unknown {what} {name!r}: expected one of {', '.join(known)}")
