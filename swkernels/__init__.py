"""Kernels for super weights: find the few scalars of a language model whose loss ruins it.

``import swkernels`` is light: it needs PyTorch and nothing else, no GPU, compiler or Triton, and
what it exports is loaded at first use.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "ops": "swkernels.ops",
    "use_backend": "swkernels.backends:use_backend",
    "find_down_projections": "swkernels.models:find_down_projections",
    "track": "swkernels.detect.tracking:track",
    "scan": "swkernels.detect.scan:scan",
    "ScanConfig": "swkernels.detect.scan:ScanConfig",
    "ScanReport": "swkernels.detect.report:ScanReport",
    "Yardstick": "swkernels.evidence.yardstick:Yardstick",
    "rank": "swkernels.evidence.rank:rank",
    "ablate": "swkernels.evidence.ablate:ablate",
    "scale": "swkernels.evidence.scale:scale",
    "evaluate": "swkernels.evidence.evaluate:evaluate",
    "analyze": "swkernels.evidence.analyze:analyze",
    "compare": "swkernels.evidence.compare:compare",
    "verify_catalogue": "swkernels.evidence.verify_catalogue:verify_catalogue",
    "train": "swkernels.train",
    "quantize": "swkernels.quant:quantize",
    "QuantConfig": "swkernels.quant:QuantConfig",
    "QuantReport": "swkernels.quant:QuantReport",
    "SuperWeightQuantConfig": "swkernels.integrations.transformers:SuperWeightQuantConfig",
    "accelerate_lora": "swkernels.integrations.peft:accelerate_lora",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'swkernels' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return __all__
