"""Cases of ``tracked_mlp``: SwiGLU MLPs of real sizes, plain, tracked, with hooks.

Four layers one after the other, so that their weights are not in a cache and what ``track`` does
once a forward weighs as it does in a model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import swkernels
from benchmarks import expected
from benchmarks.case import Case, Error, Provider, compiled, lazily, normal, relative_error

OP = "tracked_mlp"
LAYERS = 4
_MEASURE = "the larger relative error of the output and of the peaks"


class Block(nn.Module):
    """A residual block that is an MLP and nothing else."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Stack(nn.Module):
    """What ``track`` takes for a model: a list of blocks."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(LlamaMLP(config)) for _ in range(LAYERS))
        self.load_state_dict(weights, assign=True)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            inputs_embeds = block(inputs_embeds)
        return inputs_embeds


def case(models, projection, tokens, rows, columns, dtype, device, *, interpreted=False, dry=False):
    """One case on x [1, tokens, rows] and MLPs with ``columns`` intermediate channels."""
    with torch.device("meta"):
        sizes = {"hidden_size": rows, "intermediate_size": columns}
        config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, num_attention_heads=1)
        shapes = {
            f"layers.{layer}.mlp.{name}.weight": size
            for layer in range(LAYERS)
            for name, size in {
                "gate_proj": (columns, rows),
                "up_proj": (columns, rows),
                "down_proj": (rows, columns),
            }.items()
        }
    weights: dict[str, torch.Tensor] = {}

    def stack(cast=None):
        with torch.device("meta"):
            given = weights if cast is None else {k: v.to(cast) for k, v in weights.items()}
            return Stack(config, given).eval()

    def make(seed):
        for place, (name, size) in enumerate(shapes.items(), 1):
            weights[name] = normal(
                seed + place, *size, dtype=dtype, device=device, scale=size[1] ** -0.5
            )
        return {"x": normal(seed, 1, tokens, rows, dtype=dtype, device=device)}

    def providers():
        backend = "triton" if interpreted else None
        return [
            Provider("plain MLP", "bare", lazily(lambda: _plain(stack()))),
            Provider("swkernels", "ours", lazily(lambda: _tracked(stack(), backend=backend))),
            Provider(
                "swkernels (fused)",
                "ours",
                lazily(lambda: _tracked(stack(), backend=backend, fused=True)),
            ),
            Provider("hooks with abs().max(0)", "eager", lazily(lambda: _hooked(stack()))),
            compiled(lambda: _with_peaks(stack()), dry=dry),
        ]

    def judge(inputs):
        exact = _with_peaks(stack(torch.float64))({"x": inputs["x"].double()})
        plain = _with_peaks(stack())(inputs)
        limit = 2 * max(relative_error(plain[name], exact[name]) for name in exact)

        def error(outputs):
            outputs = dict(outputs)
            if "handle" in outputs:
                outputs["peaks"] = tracked_peaks(outputs.pop("handle"))
            value = max(relative_error(outputs[name], exact[name]) for name in outputs)
            return Error(value, limit, _MEASURE)

        return error

    shape = {"tokens": tokens, "columns": columns, "rows": rows}
    work = LAYERS * expected.swiglu_mlp(tokens, rows, columns, dtype)
    return Case(OP, models, projection, shape, dtype, work, 6, make, judge, providers)


def _plain(stack: Stack):
    return lambda inputs: {"y": stack(inputs["x"])[0]}


def _tracked(stack: Stack, **options):
    handle = swkernels.track(stack, **options)
    return lambda inputs: {"y": stack(inputs["x"])[0], "handle": handle}


def tracked_peaks(handle: swkernels.TrackHandle) -> torch.Tensor:
    """The values of all peaks of a handle, [1, channels]: inputs of all layers, then outputs."""
    sites = handle.peaks()
    peaks = [site.inputs.values for site in sites] + [site.outputs.values for site in sites]
    return torch.cat(peaks)[None]


def _hooked(stack: Stack):
    found: list[torch.Tensor] = []

    def keep(module, arguments, output):
        found.extend(tensor.flatten(0, -2).abs().max(0)[0] for tensor in (arguments[0], output))

    for block in stack.layers:
        block.mlp.down_proj.register_forward_hook(keep)

    def call(inputs):
        found.clear()
        y = stack(inputs["x"])[0]
        return {"y": y, "peaks": torch.cat(found[0::2] + found[1::2])[None]}

    return call


def _with_peaks(stack: Stack):
    """The stack and its peaks written out: what ``torch.compile`` is given, and the definition."""

    def call(inputs):
        x, of_inputs, of_outputs = inputs["x"], [], []
        for block in stack.layers:
            mlp = block.mlp
            h = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            y = mlp.down_proj(h)
            of_inputs.append(h.flatten(0, -2).abs().max(0)[0])
            of_outputs.append(y.flatten(0, -2).abs().max(0)[0])
            x = x + y
        return {"y": x[0], "peaks": torch.cat(of_inputs + of_outputs)[None]}

    return call
