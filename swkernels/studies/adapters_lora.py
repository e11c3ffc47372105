"""The LoRA of a training run, through PEFT, and what is said of it once it is trained.

    {"kind": "lora", "targets": "attention" | "down_proj", "r": 8, "alpha": 16,
     "mask": None, "report": what else the record has, see ``lora_figures.describe``}

With ``mask`` "rows", "columns", "rows and columns" or "positions" there are three more: ``scale``,
``hold`` (the masked entries keep their first values; scale is not used), and ``at``: {"top": k}, or
{"delta_top": k, "of": the key of the run whose largest updates are masked}.
"""

from __future__ import annotations

import hashlib
import json
import warnings

import torch
from torch import nn

from swkernels.models import find_down_projections
from swkernels.models.kinds import projection_kind
from swkernels.models.structure import features
from swkernels.train import Coordinates, LoraMaskReport, lora_mask_report

from .adapters import Adapted
from .lab import Lab, NotInModel
from .lora_figures import describe

_ATTENTION = {"q", "k", "v", "kv", "qkv", "o"}


def lora(lab: Lab, model: nn.Module, adapter: dict, seed: int) -> Adapted:
    """Put a LoRA on ``model``; its first values depend on ``seed`` alone.

    Raises:
        NotInModel: no such modules, or no super weights.
        InvalidInput: no masked position lies in a module.
    """
    from peft import get_peft_model

    from swkernels.integrations.peft import MaskedLoraConfig

    shapes = targets(model, adapter["targets"])
    if "change_at" in adapter["report"]:
        lab.top(max(adapter["report"]["change_at"]))  # what is told of it at the end must be there
    places = None if adapter["mask"] is None else masked_at(lab, adapter["at"])
    masking = {} if places is None else {
        "coordinates": places, "mask": adapter["mask"], "mask_scale": adapter["scale"],
        "hold": adapter["hold"],
    }  # fmt: skip
    config = MaskedLoraConfig(
        r=adapter["r"], lora_alpha=adapter["alpha"], lora_dropout=0.0, target_modules=list(shapes),
        **masking,
    )  # fmt: skip
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lie outside the weights")  # the record counts
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own, of transformers
        get_peft_model(model, config)
    handle = LoraHandle(model, adapter)
    report = places and lora_mask_report(shapes, places, r=adapter["r"])
    count = sum(parameter.numel() for parameter in handle.parameters())
    return Adapted(
        handle,
        count,
        lambda: (
            {"touched": report and touched(report, adapter["r"])}
            | describe(lab, model, adapter["report"])
        ),
    )


class LoraHandle:
    """The factors of a LoRA that PEFT has put into ``model``, as ``fit`` trains them."""

    def __init__(self, model: nn.Module, adapter: dict):
        self.model = model
        digest = hashlib.sha256(json.dumps(adapter, sort_keys=True).encode())
        for parameter in self.parameters():  # as they are before the first step
            digest.update(parameter.detach().cpu().float().numpy().tobytes())
        self._identity = digest.hexdigest()[:16]

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every module, in the order of the model."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def identity(self) -> dict[str, str]:
        """A digest of the configuration and of the first values."""
        return {"adapter": self._identity}


def targets(model: nn.Module, role: str) -> dict[str, tuple[int, int]]:
    """(D, H) of each module that a LoRA adapts, by name.

    Args:
        role: "attention" (the projections of queries, keys, values and the output, whatever the
            architecture calls them) or "down_proj".

    Raises:
        NotInModel: it has none.
    """
    if role == "attention":
        names = [n for n, _ in model.named_modules() if projection_kind(n) in _ATTENTION]
    else:
        names = [projection.name for projection in find_down_projections(model)]
    shapes = {name: features(model.get_submodule(name)) for name in names}
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    if not shapes:
        what = "attention projection" if role == "attention" else "down projection"
        raise NotInModel(
            f"{type(model).__name__} has no {what} that is a linear layer: LoRA cannot be studied "
            "on it"
        )
    return shapes


def masked_at(lab: Lab, at: dict) -> Coordinates | dict[str, list]:
    """The positions that a mask lies on, as ``MaskedLoraConfig`` takes them."""
    return lab.top(at["top"]) if "top" in at else lab.figures(at["of"])["delta_top"]


def touched(report: LoraMaskReport, r: int) -> dict:
    """How many values of a LoRA lie in masked rows of B and columns of A."""
    modules = report.modules
    return {
        "parameters": report.parameters,
        "rows": r * sum(module.rows for module in modules),
        "columns": r * sum(module.columns for module in modules),
        "entries": sum(module.shape[0] * module.shape[1] for module in modules),
        "positions": sum(module.positions for module in modules),
        "outside": report.outside,
    }
