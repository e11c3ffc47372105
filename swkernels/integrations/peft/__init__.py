"""Sparse coordinates as a PEFT method: ``get_peft_model(model, SparseCoordinateConfig(...))``.

Importing this package registers the method with PEFT. It must be imported before an adapter is
loaded, for PEFT looks methods up by the name in ``adapter_config.json``.
"""

from __future__ import annotations

try:
    import peft  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "swkernels.integrations.peft needs PEFT: pip install 'swkernels[peft]'", name="peft"
    ) from error

from .config import SparseCoordinateConfig
from .layer import SparseCoordinateLayer
from .model import SparseCoordinateModel
from .registry import register

register(SparseCoordinateConfig, SparseCoordinateModel)

__all__ = ["SparseCoordinateConfig", "SparseCoordinateLayer", "SparseCoordinateModel"]
