"""How the commands load a model."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(text: str) -> int:
    """Bytes from "500MB", "8GB", "1.5g" (powers of 1,000) or "4GiB" (of 1,024).

    Raises:
        InvalidInput: no size.
    """
    from swkernels.errors import InvalidInput

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip(), re.I)
    if not found:
        raise InvalidInput(f"expected a size such as 500MB, 8GB or 4GiB, got {text!r}")
    number, unit, binary = found.groups()
    factor = _UNITS[unit.lower()]
    if binary:
        factor = 1024 ** list(_UNITS).index(unit.lower())
    return int(float(number) * factor)


def load_model(name: str, **options):
    """Load a model, which may be a checkpoint that ``swkernels quantize`` wrote.

    Args:
        name, options: of ``swkernels.detect.loading.load_model``.

    Raises:
        InvalidInput: as it does.
    """
    import swkernels.integrations.transformers  # noqa: F401  which makes the method known
    from swkernels.detect import loading

    return loading.load_model(name, **options)


def load_quantized(name: str, config, super_weights, progress, **options):
    """Load a model and quantize it: while it is loaded, or, a .gguf file, after that.

    Args:
        name, options: of ``load_model``.
        config: a QuantConfig.
        super_weights: Coordinates or None.
        progress: called with (stage, done, total).

    Returns:
        (model, tokenizer, fingerprint, QuantReport).

    Raises:
        InvalidInput: the model cannot be loaded, or not be quantized so.
    """
    from swkernels.quant import quantize

    if name.lower().endswith(".gguf"):
        progress("loading the model", 0, 1)
        model, tokenizer, fingerprint = load_model(name, **options)
        progress("loading the model", 1, 1)
        show = lambda stage, *count: progress("packing", *count)  # noqa: E731
        report = quantize(model, config, super_weights, progress=show)
        return model, tokenizer, fingerprint, report
    from swkernels.integrations.transformers import SuperWeightQuantConfig

    method = SuperWeightQuantConfig(config, super_weights=super_weights, progress=progress)
    model, tokenizer, fingerprint = load_model(name, quantization_config=method, **options)
    return model, tokenizer, fingerprint, model.hf_quantizer.report(model)
