"""Make the method known to PEFT: its type, and the entries that every method has."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

# Its own name, so that a method that PEFT itself may get one day does not clash with it.
NAME = "SWKERNELS_SPARSE"
# Names of parameters hold it; PEFT and transformers derive it from the name of the type.
PREFIX = f"{NAME.lower()}_"


def peft_type() -> PeftType:
    """Return the method's member of ``PeftType``, which is added if it is not there.

    PEFT accepts no other types than members of this enumeration, and has no other way to add one.
    A plain string in its mappings is not enough: transformers asks for ``peft_type.value``.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member._sort_order_ = len(PeftType.__members__)
        member.__objclass__ = PeftType
        type.__setattr__(PeftType, NAME, member)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
    return PeftType[NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Enter the method in PEFT's registry, once in a process."""
    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX
        )
