"""What an adapter belongs to: its coordinates, and the base's values there."""

from __future__ import annotations

import hashlib

import torch

from swkernels.errors import InvalidInput
from swkernels.train.fingerprint import fingerprint
from swkernels.train.sites import Target

_BYTES = 64  # of every origin, whatever the name of the dtype


def base_of_target(target: Target, pairs: torch.Tensor) -> str | None:
    """Return "dtype:fingerprint" of a base weight at coordinates [k, 2]; None where it is packed.

    A base that is loaded in another dtype has rounded values: those fingerprints say nothing of
    each other, so the dtype stands before them.
    """
    found = fingerprint(target, pairs)
    return None if found is None else f"{str(target.matrix().dtype).split('.')[1]}:{found}"


def check_base(name: str, expected: str | None, found: str | None) -> None:
    """Raise InvalidInput if the adapter was trained on another base than the one found."""
    if not expected or not found or expected == found:
        return
    if expected.split(":")[0] == found.split(":")[0]:
        raise InvalidInput(
            f"the adapter was trained on another base: the weights of {name} at its coordinates "
            "differ; load the model that it was trained on"
        )


def pack_origin(pairs: torch.Tensor, bases: list[str | None]) -> torch.Tensor:
    """Return what an adapter's file keeps of its origin in one module.

    Args:
        pairs: the coordinates, integers [k, 2].
        bases: of each weight of the module, as ``base_of_target`` gives them.

    Returns:
        uint8 [64]: a digest of the coordinates, and the fingerprint of the base if it is known.
    """
    base = ""
    if None not in bases:
        base = bases[0]
        if len(bases) > 1:
            base = f"{base.split(':')[0]}:{_digest(' '.join(bases).encode())}"
    digest = _digest(pairs.to("cpu", torch.int32).contiguous().numpy().tobytes())
    return torch.tensor(list(f"{digest} {base}".ljust(_BYTES).encode()), dtype=torch.uint8)


def check_origin(name: str, stored: torch.Tensor, own: torch.Tensor) -> None:
    """Raise InvalidInput if values from a file are for other coordinates or another base."""
    (digest, base), (own_digest, own_base) = _parts(stored), _parts(own)
    if digest != own_digest:
        raise InvalidInput(
            f"the file has values for other coordinates of {name} than this adapter: load it "
            "under a new adapter name"
        )
    check_base(name, base, own_base)


def _parts(origin: torch.Tensor) -> tuple[str, str]:
    digest, _, base = bytes(origin.tolist()).decode().strip().partition(" ")
    return digest, base


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
