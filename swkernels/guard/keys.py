"""The key that seals manifests: from a file or the environment, never from the command line."""

from __future__ import annotations

import os
from pathlib import Path

from swkernels.errors import InvalidInput

from .manifest import SHORTEST_KEY

VARIABLE = "SWKERNELS_GUARD_KEY"
_LONGEST = 1 << 16  # bytes


def read_key(file: str | Path | None = None, variable: str = VARIABLE) -> bytes | None:
    """Return the key, or None where there is none.

    Args:
        file: that holds it; a line break at its end does not belong to it.
        variable: of the environment, which is looked at where no file is given.

    Raises:
        InvalidInput: the file cannot be read, or the key is shorter than 16 bytes or longer than
            64 KiB. No message holds any of it.
    """
    if file is not None:
        where = str(file)
        try:
            with open(file, "rb") as stream:
                key = stream.read(_LONGEST + 3)
        except OSError as error:
            raise InvalidInput(f"cannot read the key {file}: {error.strerror or error}") from error
        key = key.removesuffix(b"\n").removesuffix(b"\r")
    elif variable in os.environ:
        where, key = variable, os.environb[variable.encode()]
    else:
        return None
    if not SHORTEST_KEY <= len(key) <= _LONGEST:
        raise InvalidInput(
            f"{where}: expected a key of {SHORTEST_KEY} to {_LONGEST} bytes, got {len(key)}; "
            "openssl rand -hex 32 makes one"
        )
    return key
