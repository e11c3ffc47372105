"""What tracking costs: SmolLM2's base model on 8 x 512 tokens, plain, tracked, with hooks.

    python -m benchmarks.tracking [--dtype float32] [--rounds 5] [--batch 8] [--length 512]

Prints medians of interleaved runs and their ratios to the plain base model.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM

import swkernels
from benchmarks.models import smollm2
from benchmarks.timing import interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.prepare(), dtype=getattr(torch, options.dtype)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    shape = options.batch, options.length
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)

    def plain():
        model.model(input_ids=ids, use_cache=False)

    def with_head():
        model(input_ids=ids, use_cache=False)

    def tracked():
        with swkernels.track(model):
            plain()

    def hooked():
        hooks = [
            layer.mlp.down_proj.register_forward_hook(_keep_peaks) for layer in model.model.layers
        ]
        plain()
        for hook in hooks:
            hook.remove()

    variants = {
        "base model": plain,
        "base model, tracked": tracked,
        "base model, hooks with abs().max(0)": hooked,
        "full model with its head": with_head,
    }
    with torch.no_grad():
        medians = interleaved(variants, options.rounds)
    base = medians["base model"]
    print(f"{options.batch} x {options.length} tokens, {options.dtype}")
    print(f"{torch.get_num_threads()} threads, medians of {options.rounds} interleaved runs")
    for name, seconds in medians.items():
        print(f"{name:40s} {seconds:8.3f} s   x{seconds / base:.3f}")
    ratio = medians["base model, tracked"] / medians["full model with its head"]
    print(f"tracked without the head over the full forward: {ratio:.3f}")


def _keep_peaks(module, arguments, output):
    for tensor in (arguments[0], output):
        tensor.flatten(0, -2).abs().max(0)


if __name__ == "__main__":
    main()
