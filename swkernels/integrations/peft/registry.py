"""Make methods known to PEFT: a type, and the entries that every method has."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def peft_type(name: str) -> PeftType:
    """Return a method's member of ``PeftType``, which is added if it is not there.

    PEFT accepts no other types than members of this enumeration, and has no other way to add one.
    A plain string in its mappings is not enough: transformers asks for ``peft_type.value``.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType.__members__)
        member.__objclass__ = PeftType
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType[name]


def register(name: str, config_cls: type, model_cls: type, prefix: str) -> None:
    """Enter a method in PEFT's registry, once in a process."""
    if peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix
        )
