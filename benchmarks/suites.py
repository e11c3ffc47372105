"""What each suite measures, in the order of its importance: time may run out before the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from benchmarks.case import Case
from benchmarks.models import mlp
from benchmarks.ops import (
    block_dequantize,
    block_quantize,
    column_absmax,
    glu_absmax,
    linear_absmax,
    lora_linear,
    quant_linear,
    sampled_grad,
    sparse_linear,
    topk_abs,
    topk_low_rank,
)
from benchmarks.shapes import MODELS, TOKENS, projections
from swkernels.errors import InvalidInput

OPERATIONS = (
    "column_absmax",
    "linear_absmax",
    "glu_absmax",
    "sampled_grad",
    "sparse_linear",
    "lora_linear",
    "topk_low_rank",
    "topk_abs",
    "block_quantize",
    "block_dequantize",
    "quant_linear",
    "tracked_mlp",
    "tracked_model",
    "sparse_training",
    "quant_generation",
    "perplexity",
    "choices",
    "ablation",
    "streamed_scan",
    "shared_scan",
    "guard_verify",
)
SUITES = ("cpu", "gpu", "models")

_QUICK_MODELS = ("Llama-3-8B", "Llama-3-70B", "SmolLM2-135M")
_QUICK_TOKENS = {"cpu": (16, 512, 4096), "gpu": (4096, 16384, 16)}
_DRY_TOKENS = (5, 33)
_DTYPES = {"cpu": ("float32", "bfloat16", "float16"), "gpu": ("bfloat16", "float16", "float32")}


def cases(
    suite: str, device: torch.device, *, ops: tuple[str, ...] = (), quick=False, dry=False
) -> Iterator[Case]:
    """The cases of a suite, those of ``quick`` first, each once.

    Args:
        suite: "cpu" or "gpu", the operations there, or "models", a whole model.
        ops: only these operations.
        quick: only a few models and token counts.
        dry: tiny sizes, to exercise the code; on a machine without a GPU in the interpreter.

    Raises:
        InvalidInput: an operation or suite that is not there.
    """
    unknown = set(ops) - set(OPERATIONS)
    if unknown or suite not in SUITES:
        raise InvalidInput(
            f"expected operations of {', '.join(OPERATIONS)} and a suite of {', '.join(SUITES)}, "
            f"got {', '.join(sorted(unknown)) or suite}"
        )
    ops = ops or OPERATIONS
    if suite == "models":
        if "tracked_model" in ops:
            from benchmarks.models import tracking

            for dtype in ("float32", "bfloat16"):
                yield tracking.case(dtype, device)
        if "sparse_training" in ops:
            from benchmarks.models import sparse_training

            yield sparse_training.case(device)
        if "quant_generation" in ops:
            from benchmarks.models import quant_generation

            yield quant_generation.case(device)
        if "perplexity" in ops:
            from benchmarks.models import perplexity

            for dtype in ("float32", "bfloat16"):
                yield from perplexity.cases(dtype, device)
        if "choices" in ops:
            from benchmarks.models import choices

            yield from choices.cases(device)
        if "ablation" in ops:
            from benchmarks.models import ablation

            yield ablation.case(device)
        if "streamed_scan" in ops:
            from benchmarks.models import streamed_scan

            for dtype in ("float32", "bfloat16"):
                yield streamed_scan.case(dtype, device)
        if "shared_scan" in ops and device.type == "cpu":
            from benchmarks.models import ranks

            yield ranks.case()
        if "guard_verify" in ops and device.type == "cpu":
            from benchmarks.models import guard

            yield from (guard.case(cold=cold) for cold in (False, True))
        if "topk_abs" in ops and device.type == "cpu":
            from benchmarks.models import topk_checkpoint

            yield topk_checkpoint.case()
        if device.type == "cpu":  # rounds too long for the suite cpu
            yield from _low_rank("cpu", device, ops)
            yield from _packed("models", device, ops)
        return
    if dry:
        yield from _dry(suite, device, ops)
        return
    seen = set()
    for case in _sized(suite, device, ops, quick):
        key = case.op, case.label
        if key not in seen:
            seen.add(key)
            yield case


def _sized(suite, device, ops, quick) -> Iterator[Case]:
    tokens = _QUICK_TOKENS[suite]
    first = _DTYPES[suite][0]
    yield from _of(suite, device, ops, _QUICK_MODELS, tokens, (first,), ("down_proj",))
    if suite == "cpu" and "column_absmax" in ops:  # the shape that the target names
        for dtype in ("float32", "bfloat16"):
            yield column_absmax.case(("OLMo-1B",), "down_proj output", 8192, 2048, dtype, device)
    yield from _at_coordinates(suite, device, ops)
    yield from _packed(suite, device, ops, quick=True)
    if "topk_abs" in ops:
        for given in _WEIGHTS[suite]:
            for dtype in _DTYPES[suite][:2]:
                yield topk_abs.case(*given, dtype, device)
    if suite == "gpu":
        yield from _low_rank(suite, device, ops)
    others = _DTYPES[suite][1:2]
    yield from _of(suite, device, ops, _QUICK_MODELS, tokens[:2], others, ("down_proj",))
    if quick:
        return
    yield from _packed(suite, device, ops)
    names = tuple(model.name for model in MODELS)
    everything = ("down_proj", "gate_proj, up_proj", "q_proj, o_proj", "k_proj, v_proj")
    yield from _of(suite, device, ops, names, TOKENS, _DTYPES[suite], everything)


def _of(suite, device, ops, models, tokens, dtypes, names) -> Iterator[Case]:
    for dtype in dtypes:
        for count in tokens:
            for projection in projections(names):
                if not set(models) & set(projection.models):
                    continue
                given = projection.models, projection.name, count, projection.rows
                given = *given, projection.columns, dtype, device
                if "linear_absmax" in ops:
                    yield linear_absmax.case(*given)
                if projection.name != "down_proj":
                    continue
                if "tracked_mlp" in ops:
                    yield mlp.case(*given)
                if "glu_absmax" in ops:
                    columns = projection.columns
                    yield glu_absmax.case(
                        projection.models, "down_proj input", count, columns, dtype, device
                    )
            if "column_absmax" in ops:
                for found, name, columns in column_absmax.sizes():
                    if set(models) & set(found):
                        yield column_absmax.case(found, name, count, columns, dtype, device)


# (models, rows, columns, tokens): the shape that the target names, and a large one.
_SPARSE_SHAPES = {
    "cpu": [(("OLMo-1B",), 2048, 8192, 1024)],
    "gpu": [(("Llama-3-8B",), 4096, 14336, 8192), (("OLMo-1B",), 2048, 8192, 1024)],
}


# (models, hidden size, size of keys and values, tokens): attention projections with a LoRA.
_ATTENTIONS = {
    "cpu": [(("OLMo-1B",), 2048, 2048, 1024)],
    "gpu": [(("Llama-3-8B",), 4096, 1024, tokens) for tokens in (4096, 8192, 16384)],
}
_MODULES = 128
# (models, projection, matrices, rows, columns): weights of which the largest are looked for.
_WEIGHTS = {
    "cpu": [(("Llama-3-8B",), "q_proj", 1, 4096, 4096)],
    "gpu": [(("Llama-3-8B",), "down_proj", 32, 4096, 14336)],
}


def _low_rank(suite, device, ops) -> Iterator[Case]:
    if "lora_linear" in ops:
        for given in _ATTENTIONS[suite]:
            for dtype in _DTYPES[suite][:2]:
                yield lora_linear.case(*given, dtype, device)
    if "topk_low_rank" in ops:
        yield topk_low_rank.case(("Llama-3-8B",), 4096, _MODULES, "float32", device)


def _at_coordinates(suite, device, ops) -> Iterator[Case]:
    for name, module in (("sampled_grad", sampled_grad), ("sparse_linear", sparse_linear)):
        if name not in ops:
            continue
        for models, rows, columns, tokens in _SPARSE_SHAPES[suite]:
            for dtype in _DTYPES[suite][:2]:
                for k in sampled_grad.COUNTS:
                    yield module.case(models, "down_proj", tokens, rows, columns, k, dtype, device)


@dataclass(frozen=True)
class _Packed:
    """Weights (models, projection, rows, columns), what they are packed to, tokens of a product."""

    weights: tuple[tuple[tuple[str, ...], str, int, int], ...]
    quantized: tuple[str, ...]
    dequantized: tuple[str, ...]
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]


_LLAMA_8B = (("Llama-3-8B",), "down_proj", 4096, 14336)
# The suite cpu leaves what takes seconds to the suite models.
_PACKED = {
    "cpu": _Packed((_LLAMA_8B,), ("int4", "int8"), ("nf4", "int4", "int8"), (1, 16), (64,)),
    "models": _Packed((_LLAMA_8B,), ("nf4",), (), (256,), (64,)),
    "gpu": _Packed(
        (
            (("Llama-3-70B",), "q_proj, o_proj", 8192, 8192),
            _LLAMA_8B,
            (("Llama-3-8B",), "gate_proj, up_proj", 14336, 4096),
            (("Llama-3-70B",), "down_proj", 8192, 28672),
        ),
        ("int4", "nf4", "int8"),
        ("int4", "nf4", "int8"),
        (1, 16, 2, 4, 8, 256, 4096),
        (64, 128, 16384),
    ),
}


def _packed(suite, device, ops, *, quick=False) -> Iterator[Case]:
    packed = _PACKED[suite]
    tokens = packed.tokens[:2] if quick else packed.tokens
    blocks = packed.blocks[:1] if quick else packed.blocks
    dtypes = {"gpu": ("bfloat16",)}.get(suite, ("float32", "bfloat16"))
    for weight, dtype in product(packed.weights, dtypes):
        for module, codes in (
            (block_quantize, packed.quantized), (block_dequantize, packed.dequantized)
        ):  # fmt: skip
            if module.OP in ops:
                for code in codes:
                    yield module.case(*weight, code, blocks[0], dtype, device)
    if "quant_linear" in ops:
        for block, count in product(blocks, tokens):
            for (models, name, *sizes), dtype in product(packed.weights, dtypes):
                yield quant_linear.case(models, name, count, *sizes, "int4", block, dtype, device)


def _dry(suite, device, ops) -> Iterator[Case]:
    """Tiny sizes. Triton's interpreter multiplies no bfloat16, so float32 it is."""
    options = {"interpreted": suite == "gpu" and device.type != "cuda", "dry": True}
    if "lora_linear" in ops:
        yield lora_linear.case(("tiny",), 48, 24, 33, "float32", device, **options)
    if "topk_low_rank" in ops:
        yield topk_low_rank.case(("tiny",), 48, 3, "float32", device, **options)
    if "topk_abs" in ops:  # no kernel of Triton, so nothing for its interpreter
        yield topk_abs.case(("tiny",), "down_proj", 3, 24, 48, "float32", device, dry=True)
    for module in (block_quantize, block_dequantize):
        if module.OP in ops:
            for code in ("int4", "nf4"):
                given = ("tiny",), "down_proj", 24, 64, code, 32, "float32", device
                yield module.case(*given, **options)
    if "quant_linear" in ops:
        for count in _DRY_TOKENS:
            given = ("tiny",), "down_proj", count, 24, 64, "int4", 32, "float32", device
            yield quant_linear.case(*given, **options)
    for count in _DRY_TOKENS:
        given = ("tiny",), "down_proj", count, 24, 48, "float32", device
        if "linear_absmax" in ops:
            yield linear_absmax.case(*given, **options)
        if "sampled_grad" in ops:
            yield sampled_grad.case(*given[:5], 18, *given[5:], **options)
        if "sparse_linear" in ops:
            yield sparse_linear.case(*given[:5], 18, *given[5:], **options)
        if "tracked_mlp" in ops:
            yield mlp.case(*given, **options)
        if "glu_absmax" in ops:
            yield glu_absmax.case(
                ("tiny",), "down_proj input", count, 48, "float32", device, **options
            )
        if "column_absmax" in ops:
            yield column_absmax.case(
                ("tiny",), "down_proj input", count, 48, "float32", device, **options
            )
