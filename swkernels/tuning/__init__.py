"""Launch choices as data: which variant of a kernel, in which configuration, on which GPU.

A file is JSON of schema "swkernels.tuning/1":

    {"schema": "swkernels.tuning/1", "device": "NVIDIA H100 80GB HBM3", "measured": true,
     "records": [{"op": "linear_absmax", "architectures": ["sm_90"], "dtypes": ["bfloat16"],
                  "rows": 4096, "columns": 14336, "tokens": 1024,
                  "variant": "descriptors", "config": {"BLOCK_T": 128, ...}}, ...]}

`device` is the name that PyTorch reports, or null for any. In a record, `rows` and `columns` are
those of the weight (both C for an operation on [T, C]), `tokens` is a bucket (see
`token_bucket`; for `block_quantize` of the elements of a block), `architectures` are patterns
such as "sm_*"; what is null or left out matches anything. The first record that matches wins, in
this order of files: the user's
(`$SWKERNELS_TUNING`, a file or a directory, else `~/.config/swkernels/tuning`), those shipped
for this GPU, and `default.json`, whose records nobody has measured. Before all of them come the
records of a `use` block. `swkernels tune` measures records and writes files (docs/tuning.md).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from swkernels.errors import InvalidInput

SCHEMA = "swkernels.tuning/1"
USER_DIRECTORY = Path("~/.config/swkernels/tuning")

_SHIPPED = Path(__file__).parent
_DEFAULT = "default.json"
_SMALLEST_BUCKET = 16
_LARGEST_BUCKET = 65536

_used: ContextVar[tuple[Mapping, ...]] = ContextVar("swkernels_tuning", default=())


@dataclass(frozen=True)
class Choice:
    """What to launch: a variant of the operation, its configuration, and where that comes from."""

    variant: str
    config: Mapping[str, int]
    measured: bool
    source: str


def token_bucket(tokens: int) -> int:
    """Round a number of tokens up to 16, 64, 256, ... 65536; larger ones share the last bucket.

    Records and compiled kernels depend on the bucket only, so a new batch size never tunes or
    compiles anything anew.
    """
    bucket = _SMALLEST_BUCKET
    while bucket < min(tokens, _LARGEST_BUCKET):
        bucket *= 4
    return bucket


def lookup(
    op: str,
    device_name: str,
    rows: int,
    columns: int,
    tokens: int,
    dtype: str,
    *,
    architecture: str,
    variant: str | None = None,
) -> Choice:
    """Return the first record that matches, restricted to `variant` if one is given.

    Args:
        op: name of the operation.
        device_name: as `torch.cuda.get_device_name` gives it.
        rows, columns: shape of the weight; the number of channels for both on [T, C].
        tokens: number of rows of the activation; only its bucket counts.
        dtype: "float32", "bfloat16", "float16", or "tfloat32": float32 multiplied as TF32.
        architecture: "sm_90", "gfx942", ...: what decides in `default.json`.
        variant: only records of this variant.

    Raises:
        InvalidInput: no record matches, or a tuning file is not what it should be.
    """
    wanted = (op, rows, columns, token_bucket(tokens), dtype, architecture, variant)
    for record in _used.get():
        if _matches(record, *wanted):
            return _choice(record, measured=False, source="tuning.use")
    return _lookup(user_place(), device_name, *wanted)


@contextmanager
def use(*records: Mapping) -> Iterator[None]:
    """Put records before those of all files inside the ``with`` block, in this thread or task.

    This is how a choice is forced while it is measured or tested. The records have the form and
    match by the rules of a file's; the inner of two blocks comes first.

    Args:
        records: each with "op", "variant" and "config" at least; what is left out matches anything.

    Raises:
        InvalidInput: a record lacks one of them.
    """
    for record in records:
        missing = _missing(record)
        if missing:
            raise InvalidInput(f"a tuning record needs op, variant and config, it lacks {missing}")
    token = _used.set((*records, *_used.get()))
    try:
        yield
    finally:
        _used.reset(token)


def paths() -> list[Path]:
    """Return the files that `lookup` reads, in their order."""
    return _files(user_place())


def user_place() -> str:
    """Return the user's file or directory: $SWKERNELS_TUNING, else `USER_DIRECTORY`."""
    return os.environ.get("SWKERNELS_TUNING") or str(USER_DIRECTORY)


def read(path: Path) -> dict:
    """Return the content of a tuning file.

    Raises:
        InvalidInput: it cannot be read, or is not what it should be.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema is {content['schema']!r}, expected {SCHEMA!r}")
        for record in content["records"]:
            missing = _missing(record)
            if missing:
                raise ValueError(f"a record lacks {missing}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(
            f"cannot read the tuning file {path} ({error}): correct it, delete it, or point "
            "SWKERNELS_TUNING elsewhere"
        ) from error
    return content


def clear_cache() -> None:
    """Forget what has been read, after a tuning file was written."""
    _lookup.cache_clear()
    _read.cache_clear()


@lru_cache(maxsize=4096)
def _lookup(user, device_name, op, rows, columns, bucket, dtype, architecture, variant) -> Choice:
    for path in _files(user):
        content = _read(path)
        if content.get("device") not in (None, device_name):
            continue
        for record in content["records"]:
            if _matches(record, op, rows, columns, bucket, dtype, architecture, variant):
                return _choice(record, bool(content.get("measured")), str(path))
    raise InvalidInput(
        f"no tuning record for {op}{f' ({variant})' if variant else ''} in {dtype} on "
        f"{device_name} ({architecture}): add one to {user} or choose another backend"
    )


def _files(user: str) -> list[Path]:
    chosen = Path(user).expanduser()
    users = [chosen] if chosen.is_file() else sorted(chosen.glob("*.json"))
    shipped = sorted(path for path in _SHIPPED.glob("*.json") if path.name != _DEFAULT)
    return [*users, *shipped, _SHIPPED / _DEFAULT]


def _matches(record, op, rows, columns, bucket, dtype, architecture, variant) -> bool:
    return (
        record["op"] == op
        and variant in (None, record["variant"])
        and dtype in (record.get("dtypes") or [dtype])
        and record.get("rows") in (None, rows)
        and record.get("columns") in (None, columns)
        and record.get("tokens") in (None, bucket)
        and any(
            fnmatchcase(architecture, pattern) for pattern in record.get("architectures") or ["*"]
        )
    )


def _choice(record: Mapping, measured: bool, source: str) -> Choice:
    return Choice(record["variant"], MappingProxyType(record["config"]), measured, source)


def _missing(record: Mapping) -> str:
    return ", ".join(sorted({"op", "variant", "config"} - record.keys()))


_read = lru_cache(maxsize=64)(read)
