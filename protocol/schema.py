"""JSON-like data <-> frozen dataclasses, strictly: every key known, every type checked, no value guessed.

One codec for manifests, messages and device profiles, because all three come from outside.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


class SchemaError(ValueError):
    """Data that does not fit the dataclass. The message says what, where and what was wanted, in one line."""

    def __init__(self, message: str) -> None:
        # Parts of it may come from whoever wrote the data.
        super().__init__(" ".join(message[:1000].split()))


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _number(value: Any, where: str, wanted: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if wanted is int else (int, float)):
        raise SchemaError(f"{where}: {type(value).__name__} found, {wanted.__name__} wanted")
    if wanted is int:
        return value
    try:
        number = float(value)
    except OverflowError as error:
        raise SchemaError(f"{where}: number out of range") from error
    if not math.isfinite(number):
        raise SchemaError(f"{where}: {value} found, a finite number wanted")
    return number


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SchemaError(f"{where}: {type(value).__name__} found, list wanted")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise SchemaError(f"{where}: {type(value).__name__} found, table wanted")
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in args:
            raise SchemaError(
                f"{where}: {value!r} found, one of {', '.join(map(str, args))} wanted"
            )
        return value
    if kind in (int, float):
        return _number(value, where, kind)
    if kind is Any:
        return value
    if not isinstance(value, kind):
        raise SchemaError(f"{where}: {type(value).__name__} found, {kind.__name__} wanted")
    return value


def from_dict(cls: type[T], value: Any, where: str) -> T:
    """Build `cls` from a plain dict.

    Parameters
    ----------
    cls : frozen dataclass whose fields are int, float, str, bool, Any, Literal, `X | None`,
        `tuple[X, ...]`, `dict[str, X]` or such dataclasses
    where : str
        Starts every error message: a file name or a message kind.

    Raises
    ------
    SchemaError
        Unknown key (the nearest known one is named), missing key, wrong type, non-finite number.
    """
    if not isinstance(value, dict):
        raise SchemaError(f"{where}: {type(value).__name__} found, table wanted")
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    for key in value:
        if key not in fields:
            raise SchemaError(f"{where}: unknown key '{key}'{_nearest(str(key), list(fields))}")
    filled, hints = {}, _hints(typing.cast(Any, cls))
    for name, field in fields.items():
        if name in value:
            filled[name] = _convert(hints[name], value[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"{where}: key '{name}' is missing")
    return cls(**filled)


def to_dict(value: Any) -> dict[str, Any]:
    """Inverse of `from_dict`, ready for JSON."""
    return dataclasses.asdict(value)
