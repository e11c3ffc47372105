"""Read the structure of a model: its lists of blocks, its linear layers, its token mixers.

A module is judged by what it holds (shapes, children, attributes) and by what it is (its class).
Nothing here runs the model or looks at the values of a weight, so meta weights are fine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

# A class name begins with its model's (RobertaPreLayerNormOutput, Qwen3NextMoeGatedDeltaNet), so
# words that occur in the names of models count only at the end.
_ATTENTION = re.compile(r"attention|attn", re.I)
_MIXER = re.compile(
    r"mamba|recurrent|rglru|deltanet|lstm|retention|rotary|router|shortconv|convolution"
    r"|(mixer|conv|conv\dd|convmodule|norm)$",
    re.I,
)
_FEED_FORWARD = re.compile(r"(mlp|ffn|feed_?forward|moe|experts?)(block|layer)?$", re.I)
_LAYER = re.compile(r"(decoder|encoder)layer$", re.I)  # JambaAttentionDecoderLayer holds an MLP
_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "head_dim")
_ATTENTION_WORDS = {
    "q", "k", "v", "qk", "kv", "qkv", "wq", "wk", "wv", "wqkv", "query", "key", "value",
    "queries", "keys", "values", "attn", "attention",
}  # fmt: skip
_OTHER_TOWER = re.compile(
    r"(^|[._])(vision|visual|image|video|audio|speech|acoustic|qformer|perceiver|resampler)", re.I
)
_TEXT_INPUTS = {"input_ids", "inputs_embeds", "decoder_input_ids"}


@dataclass(frozen=True)
class Stack:
    """An outermost list of blocks.

    Attributes:
        name: its path in the model.
        blocks: (index in the list, path, block) of each block that holds linear layers.
        width: the width of the residual stream.
        tower: None for text, else the reason why it is taken for another modality's.
    """

    name: str
    blocks: tuple[tuple[int, str, nn.Module], ...]
    width: int
    tower: str | None


def stacks(root: nn.Module) -> list[Stack]:
    """Return the outermost lists of blocks of ``root``, in the order of their definition.

    A list of blocks is an ``nn.ModuleList`` or ``nn.Sequential`` whose members hold linear layers
    and are none themselves (or the model itself, where that is an ``nn.Sequential``).
    """
    found: list[Stack] = []
    for name, module in root.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        if any(name.startswith(f"{outer.name}.") or not outer.name for outer in found):
            continue
        if module is not root and any(features(member) is not None for member in module):
            continue
        blocks = tuple(
            (index, f"{name}.{index}" if name else str(index), member)
            for index, member in enumerate(module)
            if features(member) is None and _holds_weights(member)
        )
        if blocks:
            found.append(Stack(name, blocks, _width(root, blocks), _tower(root, name)))
    return found


def text_stacks(every: list[Stack]) -> list[Stack]:
    """Those of ``every`` that are text's; all of them where none is."""
    return [stack for stack in every if stack.tower is None] or every


def tower_named(name: str) -> str | None:
    """The modality other than text ("vision", "audio", ...) that a name says, or None."""
    match = _OTHER_TOWER.search(name)
    return match[2].lower() if match else None


def base_of(module: nn.Module) -> tuple[nn.Module, str]:
    """Look through adapters (PEFT's ``base_layer``) and ``torch.compile``: (module, path to it)."""
    prefix = ""
    while True:
        for wrapped in ("base_layer", "_orig_mod"):
            inner = module._modules.get(wrapped)
            if inner is not None:
                module, prefix = inner, f"{prefix}{wrapped}."
                break
        else:
            return module, prefix


def features(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of any kind: plain, Conv1D, quantized, wrapped; else None."""
    base, _ = base_of(module)
    # What trains beside a layer (swkernels.nn) is a child of it, but no part of its structure.
    children = [c for c in base._modules.values() if not getattr(c, "trains_beside_parent", False)]
    if children or isinstance(base, nn.Embedding) or has_expert_stack(base):
        return None
    weight = base._parameters.get("weight")
    dense = weight is not None and weight.dim() == 2
    if type(base).__name__ == "Conv1D" and dense:
        return weight.shape[1], weight.shape[0]
    out, into = getattr(base, "out_features", None), getattr(base, "in_features", None)
    if isinstance(out, int) and isinstance(into, int) and (base._parameters or base._buffers):
        return out, into
    if dense and weight.is_floating_point():
        return weight.shape[0], weight.shape[1]
    return None


def weight_name(module: nn.Module) -> str:
    """The attribute path of a linear layer's weight; of its largest tensor where it is packed."""
    base, prefix = base_of(module)
    tensors = {**base._buffers, **base._parameters}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if "weight" in tensors:
        return f"{prefix}weight"
    return prefix + max(tensors, key=lambda name: tensors[name].numel())


def linear_children(module: nn.Module) -> dict[str, tuple[int, int]]:
    """The (out, in) features of each direct child that is a linear layer, but q, k and v."""
    own = not _FEED_FORWARD.search(type(module).__name__)
    return {
        name: shape
        for name, child in module.named_children()
        if (shape := features(child)) is not None and not (own and _is_qkv(name))
    }


def feed_forward_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The block and the modules below it, without token mixers and linear layers (and adapters)."""
    pending = [("", block)]
    while pending:
        name, module = pending.pop(0)
        yield name, module
        below = [
            (f"{name}.{child_name}" if name else child_name, child)
            for child_name, child in module.named_children()
            if features(child) is None and not is_mixer(child)
        ]
        pending[:0] = below


def is_mixer(module: nn.Module) -> bool:
    """Whether a module below a block mixes tokens (attention, state space, convolution)."""
    name = type(module).__name__
    if _FEED_FORWARD.search(name):
        return False
    if (_ATTENTION.search(name) or _MIXER.search(name)) and not _LAYER.search(name):
        return True
    own = [child for child, member in module.named_children() if features(member) is not None]
    if any(_is_qkv(child) for child in own):
        return True
    return bool(own) and any(isinstance(getattr(module, heads, None), int) for heads in _HEADS)


def matrices_of(module: nn.Module) -> dict[str, nn.Parameter | nn.Module]:
    """The parameters of a module, and the packed experts that stand in the place of one.

    Those have ``shape`` and ``dim()`` too (``swkernels.nn.quant_experts``).
    """
    held = {name: p for name, p in module._parameters.items() if p is not None}
    stacks = {n: m for n, m in module._modules.items() if getattr(m, "is_expert_stack", False)}
    return held | stacks


def has_expert_stack(module: nn.Module) -> bool:
    """Whether a module holds a parameter with a matrix per expert, or per anything."""
    return any(weight.dim() == 3 for weight in matrices_of(module).values())


def routed_scope(block: nn.Module, name: str) -> nn.Module:
    """The outermost module on the way to ``name`` that is called with the hidden states.

    Lists and dictionaries of modules have no forward of their own. It is the block itself where
    there is no other.
    """
    module = block
    for part in name.split(".") if name else ():
        module = module.get_submodule(part)
        if type(module).forward is not nn.Module.forward and part != "_orig_mod":
            return module
    return block


def expert_of(block: nn.Module, name: str) -> tuple[int, nn.Module] | None:
    """(index, scope) of the expert that the module at ``name`` lies in; None if it lies in none.

    A list of experts holds modules of one class, and is called so or has a router beside it: a
    weight with as many outputs as the list has members. Other lists (stages, towers) do not.
    """
    module, owner, path = block, block, ""
    for part in name.split("."):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            members = {key: m for key, m in module.named_children() if _holds_weights(m)}
            if len(members) > 1 and len({type(member) for member in members.values()}) == 1:
                above, _, own_name = path.rpartition(".")
                called = "expert" in f"{own_name} {type(module).__name__}".lower()
                if called or _has_router(owner, len(members)):
                    return list(members).index(part), routed_scope(block, above)
        owner, module = module, module.get_submodule(part)
        path = f"{path}.{part}" if path else part
    return None


def _has_router(owner: nn.Module, count: int) -> bool:
    for child in owner.children():
        shape = features(child)
        if shape is not None and shape[0] == count:
            return True
    return False


def _is_qkv(name: str) -> bool:
    return bool(_ATTENTION_WORDS & set(name.lower().split("_")))


def _holds_weights(member: nn.Module) -> bool:
    return any(features(m) is not None or has_expert_stack(m) for m in member.modules())


def _width(root: nn.Module, blocks: tuple[tuple[int, str, nn.Module], ...]) -> int:
    """The width of the residual stream: the one that most of the stack's weights read or write.

    Only widths of a norm in the stack, or of an embedding of the model, come into question; any
    width does where there is neither. Of equals the smaller is taken (an MLP reads and writes its
    intermediate width as often as the residual one).
    """
    touched: Counter[int] = Counter()
    known = {module.embedding_dim for module in root.modules() if isinstance(module, nn.Embedding)}
    for _, _, block in blocks:
        for module in block.modules():
            shape = features(module)
            if shape is not None:
                touched.update(set(shape))
                continue
            for weight in matrices_of(module).values():
                if weight.dim() == 3:
                    touched.update(set(weight.shape[1:]))
            if "norm" in type(module).__name__.lower():
                known.update(_norm_widths(module))
    candidates = {width: n for width, n in touched.items() if width in known} or touched
    return max(candidates, key=lambda width: (candidates[width], -width), default=0)


def _norm_widths(norm: nn.Module) -> set[int]:
    shape = getattr(norm, "normalized_shape", None)
    widths = {shape[-1]} if isinstance(shape, (tuple, list, torch.Size)) and shape else set()
    weights = [p for p in norm._parameters.values() if p is not None and p.dim() == 1]
    return widths | {len(weight) for weight in weights}


def _tower(root: nn.Module, name: str) -> str | None:
    """Why the list of blocks at ``name`` belongs to another modality than text, or None."""
    named = tower_named(name)
    if named is not None:
        return f"its name says {named}"
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        owner = root.get_submodule(".".join(parts[:end]))
        modalities = getattr(owner, "input_modalities", None)
        if modalities is None:
            continue
        if "text" not in modalities:
            named = modalities if isinstance(modalities, str) else ", ".join(modalities)
            return f"{type(owner).__name__} reads {named}"
        main_input = getattr(owner, "main_input_name", "input_ids")
        if main_input not in _TEXT_INPUTS:
            return f"{type(owner).__name__} reads {main_input}"
        return None
    return None
