"""The projections of real models: what the operations are measured on."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = (1, 16, 512, 4096, 16384)


@dataclass(frozen=True)
class Model:
    """Sizes from a model's published configuration."""

    name: str
    hidden: int
    intermediate: int  # of one expert, in a mixture
    kv: int  # key-value heads times head size


@dataclass(frozen=True)
class Projection:
    """A weight [rows, columns] and the models that have it."""

    name: str  # "down_proj", "gate_proj, up_proj", "q_proj, o_proj" or "k_proj, v_proj"
    rows: int
    columns: int
    models: tuple[str, ...]

    @property
    def label(self) -> str:
        """Names the projection by the first of its models."""
        return f"{self.models[0]} {self.name}"


MODELS = (
    Model("SmolLM2-135M", 576, 1536, 192),
    Model("OLMo-1B", 2048, 8192, 2048),
    Model("Phi-3-mini", 3072, 8192, 3072),
    Model("Llama-3-8B", 4096, 14336, 1024),
    Model("Mistral-7B", 4096, 14336, 1024),
    Model("Mixtral-8x7B", 4096, 14336, 1024),
    Model("Llama-3-70B", 8192, 28672, 1024),
)

_SIZES = {
    "down_proj": lambda model: (model.hidden, model.intermediate),
    "gate_proj, up_proj": lambda model: (model.intermediate, model.hidden),
    "q_proj, o_proj": lambda model: (model.hidden, model.hidden),
    "k_proj, v_proj": lambda model: (model.kv, model.hidden),
}


def projections(names: tuple[str, ...] = tuple(_SIZES)) -> list[Projection]:
    """Each different weight once, with all the models that have it."""
    found: dict[tuple, list[str]] = {}
    for name in names:
        for model in MODELS:
            found.setdefault((name, *_SIZES[name](model)), []).append(model.name)
    return [Projection(*key, tuple(models)) for key, models in found.items()]
