"""Which projection a weight is, by the names that transformers' architectures give tensors."""

from __future__ import annotations

import re

from .structure import tower_named

KINDS = ("q", "k", "v", "kv", "qkv", "o", "gate", "up", "gate_up", "down")

# The last part of a name, wherever it stands.
_ANYWHERE = {
    "q": "q_proj q_lin q_attn wq q_a_proj q_b_proj",
    "k": "k_proj k_lin wk",
    "v": "v_proj v_lin wv",
    "kv": "kv_proj kv_a_proj_with_mqa kv_b_proj",
    "qkv": "qkv_proj qkv query_key_value c_attn w_pack wqkv",
    "o": "o_proj",
    "gate": "gate_proj w1 wi_0",
    "up": "up_proj w3 v1 wi wi_1 c_fc fc1 fc_in lin1 dense_h_to_4h",
    "gate_up": "gate_up_proj",
    "down": "down_proj w2 fc2 fc_out lin2 dense_4h_to_h",
}
# Names that mean one thing in attention and another, or nothing, elsewhere. The input and output of
# the experts of attention (JetMoE) are its queries and its output.
_IN_ATTENTION = {
    "q": "q query input_linear",
    "k": "k key",
    "v": "v value",
    "o": "o out out_proj out_lin output_linear dense c_proj wo proj",
}
_IN_FEED_FORWARD = {
    "gate_up": "input_linear",
    "down": "c_proj wo output_linear",
}

_ATTENTION = re.compile(r"attn$|attention$|^attn|^attention")
_MIXER = re.compile(r"^(linear_attn|mamba\w*|conv\w*|ssm|rg_lru)$")
_EXPERT = re.compile(r"(?<!shared_)experts?[._](\d+)\.")
_REASONS = (  # of a name that is no projection's
    ("head", re.compile(r"(^|\.)(lm_head|output|score|embed_out)$|^cls\.")),
    ("embedding", re.compile(r"emb|(^|\.)(wte|wpe|shared)$")),
    ("router", re.compile(r"router|(^|\.)(\w*expert_)?gate(\.|$)")),
)


def _table(names: dict[str, str]) -> dict[str, str]:
    return {name: kind for kind, listed in names.items() for name in listed.split()}


_ANYWHERE, _IN_ATTENTION, _IN_FEED_FORWARD = map(
    _table, (_ANYWHERE, _IN_ATTENTION, _IN_FEED_FORWARD)
)


def projection_kind(name: str) -> str | None:
    """Return which projection of a block the tensor ``name`` is, one of ``KINDS``, or None.

    "kv", "qkv" and "gate_up" are projections that one weight holds together. Where an architecture
    factors a projection (DeepSeek's q_a_proj, q_b_proj), both factors count.

    Args:
        name: of a tensor of a checkpoint or of a parameter of a model; a weight of experts may be
            split ("experts.3.w2.weight") or fused ("experts.down_proj").
    """
    stem = module_of(name)
    *above, last = stem.lower().split(".")
    if not block_of(stem) or tower_named(name) is not None:
        return None
    if last in _ANYWHERE:
        return _ANYWHERE[last]
    if any(_MIXER.match(part) for part in above):
        return None
    if any(_ATTENTION.search(part) for part in above):
        return _IN_ATTENTION.get(last)
    if last == "dense":  # of BERT and its kin
        return {"intermediate": "up", "output": "down"}.get(above[-1])
    return _IN_FEED_FORWARD.get(last)


def expert_named(name: str) -> int | None:
    """The expert whose own tensor ``name`` is; None where experts are fused, or there are none."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def block_of(name: str) -> str:
    """A name up to its first number: the block that it lies in; empty where there is none."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else ""


def module_of(name: str) -> str:
    """The path of the module, or of the fused parameter, that the weight ``name`` belongs to."""
    return name.removesuffix(".weight").removesuffix(".base_layer")


def why_left_out(name: str, shape: tuple[int, ...]) -> str:
    """Say what a tensor is that is no projection: "vector", "embedding", "router", ..."""
    tower = tower_named(name)
    if tower is not None:
        return f"{tower} tower"
    stem = module_of(name).lower()
    if len(shape) < 2 or stem.endswith("bias"):
        return "vector"
    return next((reason for reason, words in _REASONS if words.search(stem)), "other")
