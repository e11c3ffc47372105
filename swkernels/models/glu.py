"""Recognise gated MLPs by what their forward says: down(act(gate(x)) * up(x)), and nothing else.

The source of the forward is read, not run: a class that was never heard of is recognised if it
computes just this, and one that adds a dropout, a scale or a slice is not, whatever its name.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

_ACTIVATION_CLASSES = {
    "SiLU": "silu", "SiLUActivation": "silu", "ReLU": "relu", "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
}  # fmt: skip
_ACTIVATION_FUNCTIONS = {F.silu: "silu", F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}
# A forward may call the function itself, of one argument, under one of these names.
_FUNCTIONS = {
    f"{module}.{name}": getattr(F, name)
    for module in ("F", "nn.functional", "torch.nn.functional")
    for name in ("silu", "relu", "gelu")
}


class NotGated(ValueError):
    """A module is no gated MLP that is known; the message says why."""


@dataclass(frozen=True)
class GatedMLP:
    """A module that computes down(act(gate(x)) * up(x)).

    Attributes:
        gate, up: names of its children; equal where one child computes both, gate first.
        down: the name of the down projection.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
    """

    gate: str
    up: str
    down: str
    activation: str


def gated_mlp(module: nn.Module) -> GatedMLP:
    """Read the forward of ``module``'s class.

    Raises:
        NotGated: it computes something else, or cannot be read, or its activation is none that
            ``ops.glu_absmax`` has.
    """
    if "forward" in module.__dict__:
        raise NotGated("its forward is replaced on the instance")
    gate, act, up, down = _read(type(module))
    activation = _FUNCTIONS[act] if act in _FUNCTIONS else getattr(module, act, None)
    if isinstance(activation, nn.Module) and _has_hooks(activation):
        raise NotGated("its activation has hooks")
    return GatedMLP(gate, up, down, _activation_name(activation))


def _activation_name(activation: object) -> str:
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    name = _ACTIVATION_CLASSES.get(type(activation).__name__)
    if name is None and not isinstance(activation, nn.Module) and callable(activation):
        name = _ACTIVATION_FUNCTIONS.get(activation)
    # GELU classes hold the function; one written out in Python may be another.
    inner = getattr(activation, "act", F.gelu)
    if name is None or getattr(inner, "func", inner) is not F.gelu:
        raise NotGated(f"its activation is {activation!r}: expected silu, gelu, gelu_tanh or relu")
    return name


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@lru_cache(maxsize=256)
def _read(cls: type) -> tuple[str, str, str, str]:
    """Names of gate, activation, up and down in the forward of a class."""
    try:
        source = textwrap.dedent(inspect.getsource(cls.forward))
        (function,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise NotGated(f"the source of {cls.__name__}.forward cannot be read") from error
    try:
        names = _names(_returned(function))
        if names[1] in _FUNCTIONS and _resolve(names[1], cls) is not _FUNCTIONS[names[1]]:
            raise _Unknown
        return names
    except (_Unknown, KeyError) as error:
        raise NotGated(
            f"{cls.__name__}.forward is not known to be down(act(gate(x)) * up(x))"
        ) from error


def _resolve(path: str, cls: type) -> object:
    """What a dotted name means where the forward of ``cls`` was written."""
    first, *rest = path.split(".")
    found = cls.forward.__globals__.get(first)
    for name in rest:
        found = getattr(found, name, None)
    return found


class _Unknown(Exception):
    """A statement or an expression that is not part of a plain gated MLP."""


# Values are tuples: ("x",), ("call", name, value), ("mul", a, b), ("halves", value),
# ("half", 0 or 1, value).


def _returned(function: ast.FunctionDef) -> tuple:
    """What the forward returns, in terms of its one argument."""
    arguments = function.args
    if len(arguments.args) != 2 or arguments.vararg or arguments.kwarg or arguments.kwonlyargs:
        raise _Unknown
    if function.decorator_list:
        raise _Unknown
    self_name, x = (argument.arg for argument in arguments.args)
    values = {x: ("x",)}
    for statement in function.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        if isinstance(statement, ast.Return) and statement.value is not None:
            return _value(statement.value, values, self_name)
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise _Unknown
        value = _value(statement.value, values, self_name)
        (target,) = statement.targets
        if isinstance(target, ast.Name):
            values[target.id] = value
        elif isinstance(target, ast.Tuple) and value[0] == "halves" and len(target.elts) == 2:
            for place, element in enumerate(target.elts):
                values[element.id] = ("half", place, value[1])
        else:
            raise _Unknown
    raise _Unknown


def _value(node: ast.expr, values: dict[str, tuple], self_name: str) -> tuple:
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = (_value(side, values, self_name) for side in (node.left, node.right))
        return ("mul", left, right)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        raise _Unknown
    function, owner = node.func, node.func.value
    if isinstance(owner, ast.Name) and owner.id == self_name:
        if len(node.args) != 1 or node.keywords:
            raise _Unknown
        return ("call", function.attr, _value(node.args[0], values, self_name))
    if ast.unparse(function) in _FUNCTIONS and len(node.args) == 1 and not node.keywords:
        return ("call", ast.unparse(function), _value(node.args[0], values, self_name))
    if function.attr == "chunk" and _is_last_in_two(node):
        return ("halves", _value(owner, values, self_name))
    raise _Unknown


def _is_last_in_two(node: ast.Call) -> bool:
    """Whether a call of chunk is chunk(2, dim=-1)."""
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    named = [keyword.arg for keyword in node.keywords]
    return [ast.unparse(value) for value in given] == ["2", "-1"] and named in ([], ["dim"])


def _names(returned: tuple) -> tuple[str, str, str, str]:
    kind, down, product = returned
    if kind != "call" or product[0] != "mul":
        raise _Unknown
    for activated, up in (product[1:], product[:0:-1]):
        if activated[0] != "call":
            continue
        _, act, gate = activated
        if gate[0] == up[0] == "call" and gate[2] == up[2] == ("x",):
            return gate[1], act, up[1], down
        if (gate[:2], up[:2]) == (("half", 0), ("half", 1)) and gate[2] == up[2]:
            both = gate[2]
            if both[0] == "call" and both[2] == ("x",):
                return both[1], act, both[1], down
    raise _Unknown
