"""What bitsandbytes gets: exact super weights in its layers, and its format from and to ours.

``restore_super_weights`` puts super weights back in a model that bitsandbytes quantized.
``from_bitsandbytes`` and ``to_bitsandbytes`` exchange packed matrices, byte for byte.
"""

from __future__ import annotations

try:
    import bitsandbytes  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "swkernels.integrations.bitsandbytes needs bitsandbytes: pip install "
        "'swkernels[bitsandbytes]'",
        name="bitsandbytes",
    ) from error

from .convert import from_bitsandbytes, to_bitsandbytes
from .restore import Restored, RestoreHandle, restore_super_weights

__all__ = [
    "RestoreHandle",
    "Restored",
    "from_bitsandbytes",
    "restore_super_weights",
    "to_bitsandbytes",
]
