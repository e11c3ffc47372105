"""Plain PyTorch: the definition of every operation. Runs on any device, needs nothing."""

from __future__ import annotations


def available() -> str | None:
    """Return None: the reference backend is always usable."""
    return None
