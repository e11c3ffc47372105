"""The configuration of a masked LoRA, and the ordinary one that its files have."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig

from swkernels.documents import (
    COUNT,
    FLAG,
    SHARE,
    TEXT,
    Either,
    Fields,
    Integer,
    ListOf,
    MapOf,
    Number,
    OneOf,
    Row,
    check_document,
)
from swkernels.errors import InvalidInput
from swkernels.files import read_json, write_atomically
from swkernels.ops.lora_mask import check_scale
from swkernels.train.coordinates import Coordinates
from swkernels.train.lora_masks import LayerCoordinates

from ..registry import peft_type
from .mask import MODES, FactorMask

NAME = "SWKERNELS_LORA"
FILE = "swkernels_mask.json"
_FORMAT = "swkernels.lora_mask/1"
_OWN = ("coordinates", "mask", "mask_scale", "hold", "strict")
_FINITE = Number(-1e30, 1e30, special=False)
_DOCUMENT = Fields(
    {
        "format": OneOf((_FORMAT,)),
        "mask": OneOf(tuple(MODES)),
        "mask_scale": SHARE,
        "hold": FLAG,
        "strict": FLAG,
        "rank_pattern": MapOf(Integer(1, 2**31)),
        "alpha_pattern": MapOf(_FINITE),
        "coordinates": ListOf(Row((Either((COUNT, TEXT)), ListOf(Row((COUNT, COUNT)), 1)))),
    }
)


@dataclass
class MaskedLoraConfig(LoraConfig):
    """LoRA with dW = (B * M) A * alpha / r, masked around coordinates.

    All arguments of PEFT's ``LoraConfig`` besides. Without coordinates nothing is masked, and the
    adapter is a plain LoRA that computes as ``accelerate_lora`` makes one.

    Args:
        coordinates: a ``Coordinates``, the path of its file or of a scan's report, or a dict
            {module or layer: [[row, column], ...]}. Those of a module that is adapted count for
            it; others, such as super weights of down projections, count for every adapted module
            of their layer, as far as they lie inside its weight.
        mask: "rows" of B, "columns" of A, "rows and columns", or the exact "positions" of dW.
        mask_scale: s in [0, 1], what the masked entries are multiplied by.
        hold: the masked entries keep the values that they have at the start, or in the adapter
            that is loaded; ``mask_scale`` is not used.
        strict: a coordinate outside a weight is an error; otherwise it is passed over.

    Raises:
        InvalidInput: an unknown mask, s outside [0, 1], r below 1, or a variant of LoRA that has
            another formula.
    """

    coordinates: Coordinates | str | os.PathLike | dict | None = field(default=None, repr=False)
    mask: str = field(default="rows", metadata={"help": f"one of {', '.join(MODES)}"})
    mask_scale: float = field(default=0.0, metadata={"help": "s in [0, 1]"})
    hold: bool = field(default=False, metadata={"help": "hold the masked entries still"})
    strict: bool = field(default=False, metadata={"help": "no coordinate outside a weight"})

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise InvalidInput(f"r must be an integer from 1, got {self.r!r}")
        super().__post_init__()
        if self.mask not in MODES:
            raise InvalidInput(f"mask must be one of {', '.join(MODES)}, got {self.mask!r}")
        check_scale(self.mask_scale)
        self._check_formula()
        self.peft_type = peft_type(NAME)
        self._listed = None if self.coordinates is None else LayerCoordinates(self.coordinates)
        self._adapted: set[str] = set()
        self._ranks: dict[str, tuple[int, float, int]] = {}

    def place(self, name: str, shape: tuple[int, int]):
        """The coordinates of one adapted module; see ``LayerCoordinates.place``."""
        return self._listed.place(name, shape, self._adapted)

    def set_adapted(self, names: set[str]) -> None:
        """Say which modules of the model are adapted."""
        self._adapted, self._ranks = set(names), {}

    @property
    def is_masked(self) -> bool:
        """Whether there are coordinates."""
        return self._listed is not None

    def mask_of(self, name: str, shape: tuple[int, int]) -> FactorMask | None:
        """The mask of one module's factors; None where nothing of it is masked."""
        inside = self.place(name, shape).inside if self.is_masked else ()
        if not len(inside):
            return None
        return FactorMask(self.mask, inside, shape, self.mask_scale, self.hold)

    def note_rank(self, name: str, r: int, scaling: float, extra: int) -> None:
        """Remember the rank that a module has in files, r + extra, for the same scaling."""
        self._ranks[name] = (r, scaling, extra)

    def to_dict(self) -> dict:
        """What is written to ``adapter_config.json``: the configuration of an ordinary LoRA."""
        plain = copy.copy(self)
        plain.coordinates = None  # not copied entry by entry
        values = {k: v for k, v in LoraConfig.to_dict(plain).items() if k not in _OWN}
        values["peft_type"] = "LORA"
        if any(extra for _, _, extra in self._ranks.values()):
            # By the full name of every module: the file is sorted, and the first match counts.
            root = math.sqrt if self.use_rslora else float
            ranks = {name: r + extra for name, (r, _, extra) in self._ranks.items()}
            scalings = {name: scaling for name, (_, scaling, _) in self._ranks.items()}
            values["rank_pattern"] = ranks
            values["alpha_pattern"] = {n: s * root(ranks[n]) for n, s in scalings.items()}
        return values

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write ``adapter_config.json``, and the mask beside it."""
        super().save_pretrained(save_directory, **kwargs)
        if not self.is_masked:
            return
        document = {
            "format": _FORMAT,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            **{name: getattr(self, name) for name in _OWN[1:]},
            "coordinates": [[key, pairs.tolist()] for key, pairs in self._listed.listed.items()],
        }
        text = json.dumps(document) + "\n"
        write_atomically(Path(save_directory) / FILE, text.encode())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder=None, **kwargs):
        """Read the configuration of a folder that was saved with a mask, or of a plain LoRA's.

        Raises:
            InvalidInput: the mask's file is damaged.
        """
        plain = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        fields = dataclasses.fields(LoraConfig)
        values = {f.name: getattr(plain, f.name) for f in fields if f.init}
        del values["peft_type"]
        path = Path(pretrained_model_name_or_path, subfolder or "", FILE)
        if path.exists():
            values.update(_read(path))
        return cls(**values)

    def _check_formula(self) -> None:
        fields = dataclasses.fields(LoraConfig)
        variants = [f.name for f in fields if f.metadata.get("is_lora_variant")]
        used = [name for name in variants if getattr(self, name)]
        for name in ("lora_bias", "target_parameters", "layer_replication", "megatron_config"):
            if getattr(self, name, None):
                used.append(name)
        if self.init_lora_weights == "mica":
            used.append("init_lora_weights='mica'")
        if used:
            raise InvalidInput(
                f"masked LoRA does not combine with {', '.join(used)}: leave it out, or take "
                "PEFT's LoraConfig"
            )


def _read(path: Path) -> dict:
    document = read_json(path)
    found = document.get("format") if isinstance(document, dict) else _FORMAT
    if found not in (None, _FORMAT):
        raise InvalidInput(f"{path} is no file of {_FORMAT}, but {found!r:.80}")
    check_document(document, _DOCUMENT, path)
    values = {name: document[name] for name in (*_OWN[1:], "rank_pattern", "alpha_pattern")}
    listed = {key: torch.tensor(pairs) for key, pairs in document["coordinates"]}
    if len(listed) != len(document["coordinates"]):
        raise InvalidInput(f"{path} is damaged: it lists a module twice; take an undamaged copy")
    return values | {"coordinates": listed}
