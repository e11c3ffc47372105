"""How a checkpoint's weights are packed, what is unpacked while loading, and what a report says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.structure import base_of

UNPACKED = "dequantized while loading"

# Unpacked while loading, on any device: their layers have no rows that a scan could read.
_CONFIGS = {
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
_LIBRARIES = {
    "aqlm": "'aqlm[gpu,cpu]'",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm-gpu",
    "fp8": "accelerate",
    "gptq": "optimum gptqmodel",
    "hqq": "hqq",
    "mxfp4": "accelerate",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "vptq": "vptq",
}
_READ = ("bitsandbytes", "swkernels", *_CONFIGS)  # a scan reads these
# Tensors that give packed weights their values; a model that leaves them out computes nonsense.
_SCALES = (
    ".absmax", ".g_idx", ".quant_map", ".qweight", ".qzeros", ".SCB", ".scales", ".weight_packed",
    ".weight_scale", "_scale_inv",
)  # fmt: skip

_unpacked: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()


def packing(config: object) -> dict:
    """The ``quantization_config`` of a transformers configuration as a dict; {} without one."""
    found = getattr(config, "quantization_config", None)
    if found is None and hasattr(config, "get_text_config"):
        found = getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return {}
    found = found if isinstance(found, dict) else found.to_dict()
    method = found.get("quant_method")
    return {**found, "quant_method": str(getattr(method, "value", method))}


def unpacking(name: str, packed: dict) -> dict:
    """The options that make transformers unpack a checkpoint while loading; {} to keep it packed.

    Raises:
        InvalidInput: transformers does not know the method. It would load such weights as if
            they were plain.
    """
    import transformers
    from transformers.quantizers.auto import AutoHfQuantizer

    if not packed:
        return {}
    method = packed["quant_method"]
    old = packed.get("load_in_4bit") or packed.get("load_in_8bit")  # of bitsandbytes, no method
    if not old and not AutoHfQuantizer.supports_quant_method(packed):
        hint = "give the model it was quantized from"
        if method == "swkernels":
            hint = "import swkernels.integrations.transformers first"
        raise InvalidInput(
            f"{name} is quantized by {method!r}, which transformers does not know: {hint}"
        )
    if method not in _CONFIGS:
        return {}
    with explained(name, packed):
        return {"quantization_config": getattr(transformers, _CONFIGS[method])(dequantize=True)}


@contextmanager
def explained(name: str, packed: dict) -> Iterator[None]:
    """Say what is missing where a quantized checkpoint cannot be loaded."""
    try:
        yield
    except (ImportError, NameError, ValueError, RuntimeError) as error:
        method = packed.get("quant_method")
        own = not packed or method == "swkernels" or isinstance(error, InvalidInput)
        if own or "out of memory" in str(error):
            raise
        install = _LIBRARIES.get(method)
        if isinstance(error, ImportError) and install is not None:
            hint = "" if method in _READ else "; a scan needs the model it was quantized from"
            raise InvalidInput(
                f"cannot load {name}: it is quantized by {method}, which needs a library: "
                f"pip install {install}{hint}"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidInput(
            f"cannot load {name}: it is quantized by {method}: {lines[0][:200].rstrip('.')}; give "
            "the model it was quantized from"
        ) from error


def check_leftovers(name: str, left: Iterable[str]) -> None:
    """Refuse a checkpoint whose scales no layer has taken.

    Args:
        left: names of the tensors of a checkpoint that the model has no place for.

    Raises:
        InvalidInput: one of them is a scale or a packed weight.
    """
    scales = sorted(key for key in left if key.endswith(_SCALES))
    if scales:
        raise InvalidInput(
            f"{name} holds {scales[0]} and {len(scales) - 1} more tensors of packed weights, but "
            "config.json has no quantization_config that says how to unpack them: get the "
            "complete checkpoint"
        )


def note(model: nn.Module, packed: dict) -> None:
    """Remember that the plain weights of ``model`` were packed in the checkpoint."""
    entry = _entry(packed)
    entry["method"] += f", {UNPACKED}"
    _unpacked[model] = entry


def stored_as(model: nn.Module) -> dict | None:
    """How the weights are, or were, packed: a report's ``model.quantization``; None: they are not.

    Returns:
        ``method``, and where they are known ``bits``, ``code`` and ``block``.
    """
    root = base_of(model)[0]
    if root in _unpacked:
        return dict(_unpacked[root])
    packed = packing(getattr(root, "config", None))
    states = (getattr(getattr(m, "weight", None), "quant_state", None) for m in root.modules())
    state = next((state for state in states if state is not None), None)
    if state is not None:
        return {
            "method": "bitsandbytes", "bits": 4, "code": state.quant_type, "block": state.blocksize,
        }  # fmt: skip
    return _entry(packed) if packed else None


def _entry(packed: dict) -> dict:
    method = packed["quant_method"]
    entry: dict = {"method": method}
    if packed.get("load_in_8bit"):
        return {"method": "bitsandbytes", "bits": 8, "code": "int8", "block": "row"}
    if method == "swkernels":
        code = packed["code"]
        entry.update(bits=8 if code == "int8" else 4, code=code, block=packed["block_size"])
    elif method in ("fp8", "mxfp8"):
        block = packed.get("weight_block_size") or "tensor"
        entry.update(bits=8, code=packed.get("fmt") or "e4m3", block=block)
    elif isinstance(packed.get("bits"), int):
        entry.update(bits=packed["bits"], block=packed.get("group_size"))
    block = entry.get("block")
    if isinstance(block, (list, tuple)):
        entry["block"] = "x".join(map(str, block))
    return {key: value for key, value in entry.items() if value is not None}
