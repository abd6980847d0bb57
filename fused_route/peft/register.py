"""Making PEFT know a method that it does not ship."""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


def member(name: str) -> PeftType:
    """`PeftType.<name>`, added where PEFT has none of this name.

    Loading looks a checkpoint's peft_type up by value, transformers asks the member for it, and
    `register_peft_method` refuses what is no member: an enum cannot be extended but from inside.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    added = str.__new__(PeftType, name)
    added._name_, added._value_ = name, name
    added._sort_order_ = len(PeftType._member_names_)
    added.__objclass__ = PeftType
    type.__setattr__(PeftType, name, added)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = added
    PeftType._value2member_map_[name] = added
    return added


def register(name: str, config: Any, tuner: Any) -> None:
    """Once in a process.

    Raises:
        ImportError: PEFT has a method of this name that is not this one.
    """
    kind = member(name.upper())
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if known is None:
        register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=tuner.prefix)
    elif known is not tuner:
        raise ImportError(f"PEFT has a method {name!r} already: {known!r}")
