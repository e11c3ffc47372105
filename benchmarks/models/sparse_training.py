"""The case of ``sparse_training``: a training step of SmolLM2-135M, 2 x 512 tokens, k = 4,096.

    python -m benchmarks.models.sparse_training FOLDER DEVICE DTYPE BATCH LENGTH COUNT WAY

k weights over all down projections are trained with AdamW. PEFT's SHiRA cannot train fewer than
D + H of each layer (63,360 here), Super-Tuning takes the largest magnitudes; both build the dense
gradient. LoRA is that of the published training runs. The bare work is the forward and the gradient
of the activations, which every way needs.

The command takes two steps of one way in this process and prints the bytes that they need at once
beyond the loaded model: activations, gradients, what is trained and the state of its optimizer.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.case import Call, Case, Error, Provider, lazily, relative_error
from benchmarks.expected import ITEM, Work
from benchmarks.measure import peak_memory
from benchmarks.models import smollm2
from swkernels.train import Coordinates, sparse

OP = "sparse_training"
BATCH, LENGTH, COUNT = 2, 512, 4096
LORA = "PEFT LoRA, r = 8"
_MEASURE = "||gradient - exact|| / ||exact|| at the coordinates"
_RATE = 1e-6
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_PROCESSES = 3  # of each way, for its memory

Way = Callable[[nn.Module, Coordinates], Call]


def case(
    device: torch.device,
    dtype: str = "float32",
    *,
    folder: Path | None = None,
    batch: int = BATCH,
    length: int = LENGTH,
    count: int = COUNT,
    alone: Callable[..., int | None] | None = None,
) -> Case:
    """One step: forward, backward, optimizer; every provider with a model of its own.

    Args:
        folder: a checkpoint of Llama; by default SmolLM2.
        batch, length: sequences, and tokens of each.
        count: k.
        alone: called with a provider's name, tells its ``step_memory``; by default
            ``median_alone``.
    """
    folder = folder or smollm2.prepare()
    load = partial(_load, folder, device)
    model = load(dtype)
    coordinates = _coordinates(model, count)
    config = model.config
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    del model
    alone = alone or partial(median_alone, folder, device, dtype, batch, length, count)

    def providers():
        return [
            Provider(
                name, role, lazily(partial(_made, way, load, dtype, coordinates)),
                step_memory=partial(alone, name),
            )
            for name, (role, way) in WAYS.items()
        ]  # fmt: skip

    def judge(inputs):
        exact = _gradients(load("float64"), inputs["ids"], coordinates)
        limit = 2 * relative_error(_gradients(load(dtype), inputs["ids"], coordinates), exact)

        def error(outputs):
            value = 0.0
            if "gradient" in outputs:
                value = relative_error(outputs["gradient"][None], exact)
            return Error(value, limit, _MEASURE)

        return error

    tokens = batch * length
    work = (Work(4 * matrices * tokens, 2 * matrices * ITEM[dtype], 0),)
    columns, rows = config.intermediate_size, config.hidden_size
    shape = {"tokens": tokens, "columns": columns, "rows": rows, "k": count}
    make = partial(_make, config.vocab_size, batch, length, device)
    return Case(
        OP, ("SmolLM2-135M",), f"all down_proj, k = {count}", shape, dtype, work, 8, make, judge,
        providers, seconds=120.0,
    )  # fmt: skip


def median_alone(
    folder: Path, device: torch.device, dtype: str, batch: int, length: int, count: int, way: str
) -> int | None:
    """The median of what the command prints, each time a new process; None where it cannot tell."""
    sizes = [str(device), dtype, str(batch), str(length), str(count)]
    command = [sys.executable, "-m", __name__, str(folder), *sizes, way]
    found = []
    for _ in range(_PROCESSES):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return None if None in found else int(statistics.median(found))


def memory_here(
    folder: Path, device: torch.device, dtype: str, batch: int, length: int, count: int, way: str
) -> int | None:
    """Bytes that two steps of a way need at once beyond the loaded model, in this process."""
    _, make_call = WAYS[way]
    model = _load(folder, device, dtype)
    coordinates = _coordinates(model, count)
    inputs = _make(model.config.vocab_size, batch, length, device, 0)
    for tensor in model.state_dict().values():
        tensor.sum()  # a mapped file is in memory once it was read
    small = _smallest().to(device)  # what is imported and built at first use is no step's
    make_call(small, _coordinates(small, 8))(_make(64, 1, 8, device, 0))

    def steps():
        call = make_call(model, coordinates)
        for _ in range(2):  # AdamW's state comes with the first and lies beside the second
            call(inputs)

    return peak_memory(steps, device)


def _load(folder: Path, device: torch.device, dtype: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)


def _smallest() -> LlamaForCausalLM:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def _coordinates(model: nn.Module, count: int) -> Coordinates:
    return Coordinates.random(model, count, seed=0)


def _make(vocabulary: int, batch: int, length: int, device: torch.device, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return {"ids": ids.to(device)}


def _made(way: Way, load: Callable[[str], nn.Module], dtype: str, coordinates: Coordinates) -> Call:
    return way(load(dtype), coordinates)


def _step(model: nn.Module, parameters: list[nn.Parameter]) -> Call:
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)

    def call(inputs):
        ids = inputs["ids"]
        with torch.enable_grad():
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        return {}

    return call


def _ours(model: nn.Module, coordinates: Coordinates) -> Call:
    handle = sparse(model, coordinates)
    run = _step(model, handle.parameters())

    def call(inputs):
        run(inputs)
        return {"gradient": torch.cat([value.grad for value in handle.parameters()])}

    return call


def _bare(model: nn.Module, coordinates: Coordinates) -> Call:
    model.requires_grad_(False)

    def call(inputs):
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(inputs["ids"]).requires_grad_()
            model(inputs_embeds=embedded, labels=inputs["ids"], use_cache=False).loss.backward()
        return {}

    return call


def _dense(model: nn.Module, coordinates: Coordinates) -> Call:
    model.requires_grad_(False)
    parameters = []
    for site, listed in coordinates.weights.items():
        parameter = model.get_submodule(site.name).weight.requires_grad_()
        mask = torch.zeros_like(parameter)
        mask[listed[:, 0].long(), listed[:, 1].long()] = 1
        parameter.register_hook(lambda grad, mask=mask: grad * mask)
        parameters.append(parameter)
    return _step(model, parameters)


def _peft(model: nn.Module, config) -> Call:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
    return _step(model, [p for p in model.parameters() if p.requires_grad])


def _shira(model: nn.Module, coordinates: Coordinates) -> Call:
    from peft import ShiraConfig

    return _peft(model, ShiraConfig(r=1, target_modules=["down_proj"], random_seed=0))


def _super_tuning(model: nn.Module, coordinates: Coordinates) -> Call:
    from peft import SupertuningConfig

    entries = sum(rows * columns for rows, columns in coordinates.shapes.values())
    sparsity = 1 - len(coordinates) / entries
    return _peft(model, SupertuningConfig(target_modules=["down_proj"], sparsity=sparsity))


def _lora(model: nn.Module, coordinates: Coordinates) -> Call:
    from peft import LoraConfig

    return _peft(model, LoraConfig(r=8, lora_alpha=16, target_modules=_ATTENTION))


def _accelerated_lora(model: nn.Module, coordinates: Coordinates) -> Call:
    from swkernels.integrations.peft import accelerate_lora

    call = _lora(model, coordinates)  # in place: the layers of ``model`` are PEFT's now
    accelerate_lora(model, strict=True)
    return call


WAYS: dict[str, tuple[str, Way]] = {
    "forward and activation gradient": ("bare", _bare),
    "swkernels": ("ours", _ours),
    "dense gradient, masked": ("eager", _dense),
    "PEFT Super-Tuning": ("peer", _super_tuning),
    "PEFT SHiRA, r = 1": ("peer", _shira),
    LORA: ("peer", _lora),
    "accelerate_lora, r = 8": ("ours", _accelerated_lora),
}


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


if __name__ == "__main__":
    folder, device, dtype, *sizes, way = sys.argv[1:]
    print(json.dumps(memory_here(Path(folder), torch.device(device), dtype, *map(int, sizes), way)))
