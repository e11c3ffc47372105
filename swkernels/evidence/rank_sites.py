"""What the matrices of a checkpoint's files are called in the model that is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from swkernels.models import ProjectionNotFound
from swkernels.models.kinds import block_of
from swkernels.models.stored import StoredProjection
from swkernels.models.structure import base_of, features
from swkernels.train.weights import Site, Weight, down_projection_weights


def skeleton(folder: Path) -> nn.Module | None:
    """The language model of a checkpoint on the meta device, by its config.json.

    None where there is no such file, or transformers does not know what it describes: nothing
    depends on it but names.
    """
    if not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from swkernels.detect.loading import quiet

    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder)
            encoder_decoder = getattr(config, "is_encoder_decoder", False)
            loader = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
            with torch.device("meta"):
                return loader.from_config(config)
        except Exception:  # of many kinds: no such architecture, a field that it lacks, remote code
            return None


def in_model(matrices: Sequence[StoredProjection], model: nn.Module) -> list[Site | None]:
    """The site of each matrix in ``model``; None where it has none that coordinates can name.

    A linear layer is found by its name; by what follows its block where the block's name differs;
    and a down projection by its layer and expert.
    """
    linear: dict[str, tuple[int, int]] = {}
    for name, module in base_of(model)[0].named_modules():
        shape = features(module)
        if shape is not None and not name.endswith(("base_layer", "_orig_mod")):
            linear[name] = shape
    alike: dict[tuple, list[str]] = {}
    for name, shape in linear.items():
        alike.setdefault((*_inside(name), shape), []).append(name)
    try:
        weights = down_projection_weights(model)
    except ProjectionNotFound:
        weights = []
    down: dict[tuple, list[Weight]] = {}
    for weight in weights:
        own = weight.projection.expert
        expert = weight.site.expert if own is None else own
        down.setdefault((weight.projection.layer, expert, weight.shape), []).append(weight)
    return [_find(found, linear, alike, down) for found in matrices]


def _find(found: StoredProjection, linear: dict, alike: dict, down: dict) -> Site | None:
    if not found.fused:
        if linear.get(found.module) == found.shape:
            return Site(found.module)
        named = alike.get((*_inside(found.module), found.shape), [])
        if len(named) == 1:
            return Site(named[0])
    if found.kind != "down":
        return None
    fitting = down.get((found.layer, found.expert, found.shape), [])
    here = [weight for weight in fitting if weight.projection.block_name == found.block]
    for weights in (here, fitting):
        if len(weights) == 1:
            return weights[0].site
    return None


def _inside(name: str) -> tuple[int, str]:
    """The number of the block that a module lies in (-1 for none), and its path there."""
    block = block_of(name)
    number = block.rpartition(".")[2]
    return (int(number) if number else -1), name.removeprefix(block)
