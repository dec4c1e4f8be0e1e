"""Fields of dataclasses that carry their help text and the values that they may have, and the check of a value."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from contextlib import suppress
from typing import Any, TypeVar, cast

T = TypeVar("T")

MOST = 2**53  # JSON readers and floats do not hold every larger integer
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", tuple: "positive integers"}


def field(
    default: T,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: float = 0,
    most: int = MOST,
    kind: type | None = None,
    bound_to: str = "",
    metavar: str = "",
) -> T:
    """Declare a field with its help text and the values that it may have. `most` is for integers.

    Its type is that of the default, or `kind` if the default is "auto". A value that is `bound_to` its "environment"
    or to "Atari" games is reset when another environment is chosen: see `pydqn.presets.preset`.
    """
    limits = {"help": help, "choices": choices, "least": least, "most": most, "metavar": metavar}
    metadata = {**limits, "kind": kind or type(default), "bound_to": bound_to}
    value: Any = dataclasses.field(default=default, metadata=metadata)
    return cast(T, value)


def json_object(name: str, value: Any) -> str:
    """Return an object as JSON in one form, so that equal arguments are equal settings."""
    with suppress(TypeError, ValueError, RecursionError):
        plain = json.loads(value) if isinstance(value, str) else value
        if isinstance(plain, dict) and all(isinstance(key, str) for key in plain):
            return json.dumps(plain, sort_keys=True, allow_nan=False)
    raise ValueError(f'{name}: expected a JSON object, such as {{"size": 8}}, got {value!r}')


def checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` as the field's type, or raise a ValueError that names the field."""
    kind: Any = field.metadata["kind"]
    if value == field.default == "auto":
        return value
    least, choices = field.metadata["least"], field.metadata["choices"]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number and (abs(value) <= sys.float_info.max or abs(value) == math.inf):
        value = float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    elif kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        raise ValueError(f"{field.name}: expected {_KINDS[kind]}, got {value!r}")
    if choices and value not in choices:
        raise ValueError(f"{field.name}: expected one of {', '.join(choices)}, got {value!r}")
    parts = value if kind is tuple else (value,)
    if kind is tuple and not all(type(part) is int for part in parts):
        raise ValueError(f"{field.name}: expected {_KINDS[kind]}, got {value!r}")
    if kind in (int, float, tuple) and not all(part >= least for part in parts):  # also catches NaN
        raise ValueError(f"{field.name}: expected at least {least:g}, got {value!r}")
    if kind in (int, tuple) and any(part > field.metadata["most"] for part in parts):
        raise ValueError(f"{field.name}: expected at most {field.metadata['most']}, got {value!r}")
    return value
