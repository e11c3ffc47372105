"""The case of ``sparse_training``: a training step of SmolLM2-135M, 2 x 512 tokens, k = 4,096.

k weights over all down projections are trained with AdamW. PEFT's SHiRA cannot train fewer than
D + H of each layer (63,360 here), Super-Tuning takes the largest magnitudes; both build the dense
gradient. The bare work is the forward and the gradient of the activations, which every way needs.
"""

from __future__ import annotations

import warnings

import torch
from transformers import AutoModelForCausalLM

from benchmarks.case import Case, Error, Provider, lazily, relative_error
from benchmarks.expected import ITEM, Work
from benchmarks.models import smollm2
from swkernels.train import Coordinates, sparse

OP = "sparse_training"
BATCH, LENGTH, COUNT = 2, 512, 4096
_MEASURE = "||gradient - exact|| / ||exact|| at the coordinates"
_RATE = 1e-6


def case(device: torch.device, dtype: str = "float32") -> Case:
    """One step: forward, backward, optimizer; every provider with a model of its own."""

    def load(cast=dtype):
        path = smollm2.prepare()
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, cast)).to(device)

    config_of = load()
    coordinates = Coordinates.random(config_of, COUNT, seed=0)
    config = config_of.config
    matrices = sum(p.numel() for n, p in config_of.named_parameters() if p.dim() == 2)
    del config_of

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH), generator=generator)
        return {"ids": ids.to(device)}

    def step(model, parameters):
        optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)

        def call(inputs):
            ids = inputs["ids"]
            with torch.enable_grad():
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
            return {}

        return call

    def ours():
        model = load()
        handle = sparse(model, coordinates)
        run = step(model, handle.parameters())

        def call(inputs):
            run(inputs)
            return {"gradient": torch.cat([value.grad for value in handle.parameters()])}

        return call

    def bare():
        model = load().requires_grad_(False)

        def call(inputs):
            with torch.enable_grad():
                embedded = model.get_input_embeddings()(inputs["ids"]).requires_grad_()
                model(inputs_embeds=embedded, labels=inputs["ids"], use_cache=False).loss.backward()
            return {}

        return call

    def dense():
        model = load().requires_grad_(False)
        parameters = [layer.mlp.down_proj.weight.requires_grad_() for layer in model.model.layers]
        for parameter, listed in zip(parameters, coordinates.weights.values()):
            mask = torch.zeros_like(parameter)
            mask[listed[:, 0].long(), listed[:, 1].long()] = 1
            parameter.register_hook(lambda grad, mask=mask: grad * mask)
        return step(model, parameters)

    def with_peft(make_config):
        def made():
            from peft import get_peft_model

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(load(), make_config())
            return step(model, [p for p in model.parameters() if p.requires_grad])

        return lazily(made)

    def shira():
        from peft import ShiraConfig

        return ShiraConfig(r=1, target_modules=["down_proj"], random_seed=0)

    def super_tuning():
        from peft import SupertuningConfig

        entries = config.num_hidden_layers * config.hidden_size * config.intermediate_size
        return SupertuningConfig(target_modules=["down_proj"], sparsity=1 - COUNT / entries)

    def providers():
        return [
            Provider("forward and activation gradient", "bare", lazily(bare)),
            Provider("swkernels", "ours", lazily(ours)),
            Provider("dense gradient, masked", "eager", lazily(dense)),
            Provider("PEFT Super-Tuning", "peer", with_peft(super_tuning)),
            Provider("PEFT SHiRA, r = 1", "peer", with_peft(shira)),
        ]

    def judge(inputs):
        exact = _gradients(load("float64"), inputs["ids"], coordinates)
        limit = 2 * relative_error(_gradients(load(), inputs["ids"], coordinates), exact)

        def error(outputs):
            value = 0.0
            if "gradient" in outputs:
                value = relative_error(outputs["gradient"][None], exact)
            return Error(value, limit, _MEASURE)

        return error

    tokens = BATCH * LENGTH
    work = (Work(4 * matrices * tokens, 2 * matrices * ITEM[dtype], 0),)
    columns, rows = config.intermediate_size, config.hidden_size
    shape = {"tokens": tokens, "columns": columns, "rows": rows, "k": COUNT}
    return Case(
        OP, ("SmolLM2-135M",), f"all down_proj, k = {COUNT}", shape, dtype, work, 8, make, judge,
        providers, seconds=120.0,
    )  # fmt: skip


def _gradients(model, ids, coordinates) -> torch.Tensor:
    """The dense gradient's entries at the coordinates, [1, k]."""
    model.requires_grad_(False)
    modules = {site: model.get_submodule(site.name) for site in coordinates.weights}
    for module in modules.values():
        module.weight.requires_grad_()
    with torch.enable_grad():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    parts = []
    for site, module in modules.items():
        rows, cols = coordinates.weights[site].long().unbind(1)
        parts.append(module.weight.grad[rows, cols])
    return torch.cat(parts)[None]
