"""Mixtures of experts computed by hand: each expert on the tokens that the router gave it.

The model runs untracked; of each mixture only the hidden states and the router's choice are taken,
and one expert after another is computed from its weights in float64.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack

import torch

from swkernels import find_down_projections
from tests.models.tiny import run


def by_hand(model, ids, **keywords) -> dict:
    """{(module's name, expert): (x [n, H], y [n, D], flat tokens [n])} for experts with tokens."""
    seen = {}
    with ExitStack() as hooks, torch.no_grad():
        for p in find_down_projections(model):
            if p.scope is not None:
                _listen(model, p, hooks, seen)
        run(model, ids, **keywords)
        return {
            (p.name, e): (*_through(p, e, hidden[tokens].double()), tokens)
            for p, hidden, chosen in seen.values()
            for e in ([p.expert] if p.experts is None else range(p.experts))
            for tokens in [(chosen == e).any(1).nonzero().flatten()]
            if len(tokens)
        }


def _listen(model, p, hooks, seen) -> None:
    """Put (projection, hidden [T, D], chosen [T, k]) into ``seen`` when the model runs."""
    kind = type(p.scope).__name__

    def router(module, args, output):
        hidden = args[0].reshape(-1, args[0].shape[-1])
        k = 2 if kind == "JetMoeMoE" else 1
        chosen = output[-1].topk(k).indices
        if kind == "Llama4TextMoe":  # the router's weight is on the expert's input
            hidden = hidden * output[-1].amax(1, keepdim=True).sigmoid()
        seen[p.name] = p, hidden, chosen

    def experts(module, args, kwargs):
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        _, hidden, chosen, *_ = bound.arguments.values()
        if kind == "SwitchTransformersLayerFF":  # one-hot, [T, 1, E]
            chosen = chosen.argmax(-1).masked_fill(chosen.sum(-1) == 0, -1)
        seen[p.name] = p, hidden.reshape(-1, hidden.shape[-1]), chosen

    if kind in ("JetMoeMoE", "Llama4TextMoe"):
        hooks.callback(p.scope.router.register_forward_hook(router).remove)
        return
    path = p.name
    while not path.endswith("experts"):
        path = path.rpartition(".")[0]
    module = model.get_submodule(path)
    hooks.callback(module.register_forward_pre_hook(experts, with_kwargs=True).remove)


def _through(p, e: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of expert ``e``'s down projection, float64."""
    module, kind = p.module, type(p.module).__name__
    if kind == "Linear":  # an expert that is a module of its own
        inner = _sibling(p).weight.double()
        return _down(torch.relu(hidden @ inner.T), p.matrix().double())
    down = p.matrix(e).double()
    if kind == "DbrxExpertGLU":
        gate, up = (
            hidden @ w.view(p.experts, p.columns, p.rows)[e].double().T
            for w in (module.w1, module.v1)
        )
        return _down(module.activation_fn(gate) * up, down)
    if kind == "JetMoeParallelExperts":
        gate, up = (hidden @ p.scope.input_linear.weight[e].double().T).chunk(2, -1)
        return _down(p.scope.activation(gate) * up, down)
    if hasattr(module, "up_proj"):
        return _down(module.act_fn(hidden @ module.up_proj[e].double().T), down)
    weight = module.gate_up_proj[e].double()
    inner = hidden @ (weight if p.layout == "eio" else weight.T)
    if kind == "GptOssExperts":
        inner = inner + module.gate_up_proj_bias[e].double()
        bias = module.down_proj_bias[e].double()
        return _down(module._apply_gate(inner), down, bias)
    gate, up = inner.chunk(2, -1)
    return _down(module.act_fn(gate) * up, down)


def _sibling(p):
    """The projection before ``p`` in an expert of two layers and a ReLU (Switch)."""
    path = p.name.removeprefix(f"{p.block_name}.").rpartition(".")[0]
    return p.block.get_submodule(path).wi


def _down(x, matrix, bias=0):
    return x, x @ matrix.T + bias
