"""Damage to files and documents, drawn from a seeded generator: chance and malice both."""

from __future__ import annotations

import copy
import json
import random

NUMBERS = (-1, 0, 1, 2, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5,
           -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))  # fmt: skip
TEXTS = ("", "\0", "..", "../model.safetensors", "/etc/passwd", "C:\\x.safetensors", "a/b",
         "x" * 300, "\x1b[31m", "<script>alert(1)</script>", "[bold]", "\u202e", "\ud800", "é",
         "F32", "F4", "NaN", "Infinity", "-Infinity", "None", "0", "__metadata__",
         "{{ 7 * 6 }}")  # fmt: skip
# Written into the text where a string of this name stands: no object of Python gives it.
RAW = {
    "@1@": "1e999", "@2@": "-1e999", "@3@": "9" * 5000, "@4@": "[" * 2000 + "]" * 2000,
    "@5@": "1.0", "@6@": "-0", "@7@": "01", "@8@": '"\\ud800"', "@9@": "1e2", "@10@": "0x10",
    "@11@": "tru", "@12@": '{"a":' * 500 + "1" + "}" * 500, "@13@": "[1,]", "@14@": "'a'",
}  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to three changes: bits, bytes, truncation, repetition, removal, a splice of ``other``."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        size = len(changed)
        if not size:
            break
        a = rng.randrange(size)
        b = min(size, a + rng.choice((1, 2, 8, 64, 512)))
        kind = rng.randrange(8)
        if kind == 0:
            changed[a] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[a] = rng.choice(b'\x00\xff"\\[]{},:0919-+.eE \n\x1b')
        elif kind == 2:
            del changed[a:]
        elif kind == 3:
            changed[a:a] = changed[a:b] * rng.choice((1, 2, 50))
        elif kind == 4:
            del changed[a:b]
        elif kind == 5:
            start = rng.randrange(len(other))
            changed[a:b] = other[start : start + rng.choice((4, 64, 512))]
        elif kind == 6:
            changed[a:b] = rng.randbytes(b - a)
        else:
            changed[:] = changed[:a] + other[rng.randrange(len(other)) :]
    return bytes(changed)


def mutate_json(rng: random.Random, document: object, other: object) -> bytes:
    """One to three changes of values, keys and structure, or at times of the writing alone."""
    if rng.random() < 0.06:
        return json.dumps(_shuffled(rng, document), indent=rng.choice((None, 0, 3))).encode()
    changed = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changed = _change(rng, changed, other)
    text = json.dumps(changed)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    if rng.random() < 0.05:
        key = rng.choice(TEXTS[1:])
        text = text.replace("{", f"{{{json.dumps(key)}: 1, {json.dumps(key)}: 2, ", 1)
    return text.encode("utf-8", "surrogatepass")


def _change(rng: random.Random, document: object, other: object) -> object:
    places = list(_places(document))
    if not places:
        return _hostile(rng, document, other)
    parent, key = rng.choice(places)
    value = parent[key]
    kind = rng.randrange(9)
    if kind >= 6:
        parent[key] = _of_its_kind(rng, value)
    elif kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice((*TEXTS, *map(str, parent)))] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
        parent[key:key] = [copy.deepcopy(value)] * rng.choice((1, 3))
    elif kind == 3:  # two values of this document change places
        other_parent, other_key = rng.choice(places)
        taken = copy.deepcopy(other_parent[other_key])
        other_parent[other_key] = copy.deepcopy(value)
        parent[key] = taken  # in a part that is perhaps cut off now
    else:
        parent[key] = _hostile(rng, value, other)
    return document


def _of_its_kind(rng: random.Random, value: object) -> object:
    """A change that leaves the type alone: most pass, so that what reads the value meets it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, max(0, value - 1), 0, 1, 7, 10**6, 2**31, 2**53, 2**63 - 1))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, 0.0, 1.0, 1e-300, 1e300, 5e-324, "Infinity", "NaN"))
    if isinstance(value, str):
        return rng.choice((*TEXTS, value[:-1], value * 2, value.upper(), value.swapcase()))
    if isinstance(value, list):
        return rng.choice((value[::-1], value[:1], value * 2, value[1:]))
    if isinstance(value, dict):
        return dict(reversed(value.items())) | {"added": rng.choice((None, 1, "x", [1]))}
    return rng.choice((0, 1, 2, 0.5, "text"))


def _hostile(rng: random.Random, value: object, other: object) -> object:
    kind = rng.randrange(8)
    if kind == 0 and type(value) in (int, float):
        return value + rng.choice((-1, 1, 0.5)) if rng.random() < 0.7 else -value
    if kind in (0, 1):
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.choice(list(RAW))
    if kind == 4:
        return rng.choice((None, True, False, [], {}, [[]], {"": None}))
    if kind == 5:
        return [value] if rng.random() < 0.5 else {"a": value}
    if kind == 6:
        places = list(_places(other))
        parent, key = rng.choice(places)
        return copy.deepcopy(parent[key])
    return str(value)[:1000] if not isinstance(value, str) else len(value)


def _shuffled(rng: random.Random, document: object) -> object:
    if isinstance(document, dict):
        items = rng.sample(list(document.items()), len(document))
        return {key: _shuffled(rng, value) for key, value in items}
    if isinstance(document, list):
        return [_shuffled(rng, value) for value in document]
    return document


def _places(document: object):
    """Every (container, key or index) of a document."""
    items = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield document, key
        yield from _places(value)
