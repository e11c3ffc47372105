"""The case of ``quant_generation``: greedy generation of SmolLM2-135M-Instruct, packed and plain.

Everything is packed, embeddings and the head (which are one matrix) too; the super weights are
kept. bitsandbytes leaves both in bfloat16, and its weights are its own: it is not judged.
"""

from __future__ import annotations

from functools import cache

import torch
from transformers import AutoModelForCausalLM

from benchmarks.case import Case, Error, Provider, peer, relative_error
from benchmarks.expected import Work, packed_bytes
from benchmarks.models import smollm2
from swkernels.detect.loading import quiet
from swkernels.nn.packed import PackedModule
from swkernels.quant import QuantConfig, quantize
from swkernels.quant.model import size_of

OP = "quant_generation"
PROMPT, NEW = 32, 32
BLOCK = 64
DTYPE = "bfloat16"
_MEASURE = "||logits - exact|| / ||exact|| of the prompt, exact being the unpacked model in float64"


def case(device: torch.device) -> Case:
    """``NEW`` tokens after a prompt of random ones, each provider with a model of its own."""

    def load(dtype=DTYPE, **options):
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                smollm2.prepare(), dtype=getattr(torch, dtype), **options
            )
        return model.to(device).eval()

    @cache
    def plain():
        return load()

    @cache
    def packed():
        model = load()
        config = QuantConfig(code="int4", block_size=BLOCK, embeddings="int4")
        quantize(model, config, smollm2.SUPER_WEIGHTS, progress=False)
        return model

    @cache
    def theirs():
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return load(quantization_config=config, device_map={"": device})

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        config = plain().config
        ids = torch.randint(0, config.vocab_size, (1, PROMPT), generator=generator)
        return {"ids": ids.to(device)}

    def generate(model):
        def call(inputs):
            ids = inputs["ids"]
            model().generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                min_new_tokens=NEW, pad_token_id=0,
            )  # fmt: skip
            return {"model": model()} if model is packed else {}

        return call

    def providers():
        return [
            Provider("bfloat16 model", "bare", generate(plain), weights=lambda: size_of(plain())),
            Provider("swkernels", "ours", generate(packed), weights=lambda: size_of(packed())),
            peer(
                "bitsandbytes Linear4bit, nf4", "bitsandbytes", device, generate(theirs),
                devices=("cpu", "cuda"), weights=lambda: size_of(theirs()) + _scales(theirs()),
            ),
        ]  # fmt: skip

    def judge(inputs):
        def logits(model):
            return model(inputs["ids"], use_cache=False).logits[0]

        def error(outputs):
            if not outputs:
                return Error(0.0, 0.0, _MEASURE)
            unpacked = load("float64")
            for name, module in outputs["model"].named_modules():
                if isinstance(module, PackedModule):
                    unpacked.get_submodule(name).weight.copy_(module.dequantize(torch.float64))
            exact = logits(unpacked)
            limit = 2 * relative_error(logits(unpacked.to(getattr(torch, DTYPE))), exact)
            return Error(relative_error(logits(outputs["model"]), exact), limit, _MEASURE)

        return error

    config = plain().config
    matrices = sum(p.numel() for p in plain().parameters() if p.dim() == 2)
    work = (Work(2 * matrices * (PROMPT + NEW), NEW * packed_bytes(1, matrices, 4, BLOCK), 0),)
    shape = {"tokens": NEW, "columns": config.intermediate_size, "rows": config.hidden_size}
    return Case(
        OP, ("SmolLM2-135M",), f"int4, blocks of {BLOCK}, after a prompt of {PROMPT}", shape, DTYPE,
        work, 8, make, judge, providers, seconds=60.0,
    )  # fmt: skip


def _scales(model) -> int:
    """Bytes of the scales of bitsandbytes' layers, which are neither parameters nor buffers."""
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    return sum(state.absmax.nbytes for state in states if state is not None)
