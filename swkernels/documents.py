"""Our JSON documents as tables of what each field must be, and the check of one against its table.

    CANDIDATE = Fields({"row": COUNT, "expert": Maybe(COUNT), "verdict": OneOf(VERDICTS)})
    check_document(document, Fields({"candidates": ListOf(CANDIDATE)}), path)

Fields that a table does not name are let through: a later version of a schema may add some.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from swkernels.errors import InvalidInput

_MOST = 2**63 - 1


class _Wrong(Exception):
    """What was expected, what came, and where, from the inside out."""

    def __init__(self, expected: str, got: str):
        super().__init__(expected)
        self.expected, self.got, self.path = expected, got, ""


@dataclass(frozen=True)
class Text:
    """A string of at most ``longest`` characters, at least ``shortest``."""

    longest: int = 1 << 16
    shortest: int = 0

    def check(self, value: object) -> None:
        if not isinstance(value, str) or not self.shortest <= len(value) <= self.longest:
            raise _Wrong(f"a text of {self.shortest} to {self.longest} characters", _show(value))


@dataclass(frozen=True)
class Integer:
    """An integer from ``least`` to ``most``; true and false are none."""

    least: int = 0
    most: int = _MOST

    def check(self, value: object) -> None:
        if type(value) is not int or not self.least <= value <= self.most:
            raise _Wrong(f"an integer from {self.least} to {self.most}", _show(value))


@dataclass(frozen=True)
class Number:
    """An integer or a float from ``least`` to ``most``; ``special`` lets NaN through as well."""

    least: float = -math.inf
    most: float = math.inf
    special: bool = True

    def check(self, value: object) -> None:
        good = type(value) in (int, float) and (
            self.special if value != value else self.least <= value <= self.most
        )
        if not good or (not self.special and math.isinf(value)):
            raise _Wrong(f"a number from {self.least:g} to {self.most:g}", _show(value))


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def check(self, value: object) -> None:
        if not isinstance(value, bool):
            raise _Wrong("true or false", _show(value))


@dataclass(frozen=True)
class OneOf:
    """One of some strings."""

    choices: tuple[str, ...]

    def check(self, value: object) -> None:
        if not isinstance(value, str) or value not in self.choices:
            raise _Wrong(f"one of {', '.join(self.choices)}", _show(value))


@dataclass(frozen=True)
class Maybe:
    """null, or what ``of`` says."""

    of: object

    def check(self, value: object) -> None:
        if value is not None:
            self.of.check(value)


@dataclass(frozen=True)
class Either:
    """What one of ``of`` says."""

    of: tuple[object, ...]

    def check(self, value: object) -> None:
        expected = []
        for option in self.of:
            try:
                return option.check(value)
            except _Wrong as wrong:
                expected.append(wrong.expected)
        raise _Wrong(" or ".join(expected), _show(value))


@dataclass(frozen=True)
class ListOf:
    """A list of ``shortest`` to ``longest`` of ``item``."""

    item: object
    shortest: int = 0
    longest: int = _MOST

    def check(self, value: object) -> None:
        if not isinstance(value, list) or not self.shortest <= len(value) <= self.longest:
            some = f" of {self.shortest} to {self.longest}" if self.longest < _MOST else ""
            raise _Wrong(f"a list{some}", _show(value))
        for place, item in enumerate(value):
            _check_part(self.item, item, f"[{place}]")


@dataclass(frozen=True)
class Row:
    """A list of exactly these."""

    items: tuple[object, ...]

    def check(self, value: object) -> None:
        if not isinstance(value, list) or len(value) != len(self.items):
            raise _Wrong(f"a list of {len(self.items)}", _show(value))
        for place, (schema, item) in enumerate(zip(self.items, value)):
            _check_part(schema, item, f"[{place}]")


@dataclass(frozen=True)
class MapOf:
    """An object of any keys whose values are all ``value``."""

    value: object

    def check(self, value: object) -> None:
        if not isinstance(value, Mapping):
            raise _Wrong("an object", _show(value))
        for key, item in value.items():
            _check_part(self.value, item, f".{_name(key)}")


@dataclass(frozen=True)
class Fields:
    """An object that has the ``required`` fields, may have the ``optional`` ones, and others."""

    required: Mapping[str, object]
    optional: Mapping[str, object] = field(default_factory=dict)

    def check(self, value: object) -> None:
        if not isinstance(value, Mapping):
            raise _Wrong("an object", _show(value))
        for name, schema in self.required.items():
            if name not in value:
                raise _Wrong(f"the field {name}", f"only {_names(value)}")
            _check_part(schema, value[name], f".{name}")
        for name, schema in self.optional.items():
            if name in value:
                _check_part(schema, value[name], f".{name}")


COUNT = Integer()
NUMBER = Number()
SHARE = Number(0, 1)
MAGNITUDE = Number(0)
TEXT = Text()
FLAG = Flag()


def check_document(document: object, schema: object, where: object) -> None:
    """Check a JSON value against a table of fields.

    Args:
        document: as ``swkernels.files.read_json`` gives it.
        schema: ``Fields``, ``ListOf``, ``MapOf``, ``Text`` ... of this module.
        where: what the document is called in messages, mostly its path.

    Raises:
        InvalidInput: the first thing that is wrong: what was expected, where, and what came.
    """
    try:
        schema.check(document)
    except _Wrong as wrong:
        path = f" at {wrong.path.removeprefix('.')}" if wrong.path else ""
        raise InvalidInput(
            f"{where} is damaged: expected {wrong.expected}{path}, got {wrong.got}; take an "
            "undamaged copy or make it again"
        ) from None


def _check_part(schema: object, value: object, step: str) -> None:
    try:
        schema.check(value)
    except _Wrong as wrong:
        wrong.path = step + wrong.path
        raise


def _show(value: object) -> str:
    """A value in a message: short, on one line, nothing of it steers a terminal."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"{value!r:.80}"


def _name(key: object) -> str:
    return key if isinstance(key, str) and key.isidentifier() and len(key) < 80 else _show(key)


def _names(value: Mapping) -> str:
    names: Iterable[str] = sorted(map(_name, value))
    return ", ".join(names)[:200] or "nothing"
