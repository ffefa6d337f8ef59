"""The text form of passes: `quantize{bits=4,group=64}`; reading and writing it round-trips."""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from graphrewrite.errors import RuleError
from graphrewrite.registry import Kind, find, load

_NAME = re.compile(r"\s*([A-Za-z_][\w-]*)\s*")
_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],]')
_JSON_WORDS = ("true", "false", "null", "NaN", "Infinity")
_WORD = re.compile(r"[A-Za-z_][\w.*/:\-]*")


def split_commas(text: str) -> list[str]:
    """The parts between commas that are in no braces, brackets or strings."""
    parts, depth, start = [], 0, 0
    for token in _MARK.finditer(text):
        mark = token[0]
        depth += (mark in "{[") - (mark in "}]")
        if mark == "," and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def split_text(text: str) -> tuple[str, dict[str, Any]]:
    """`"name{a=1,b=word}"` -> `("name", {"a": 1, "b": "word"})`. Values are JSON; a bare word is a string."""
    match = _NAME.match(text)
    if not match:
        raise RuleError(f"{text!r} is no name", remedy="write name or name{option=value,...}")
    name, rest = match[1].replace("-", "_"), text[match.end() :].strip()
    if not rest:
        return name, {}
    if not (rest.startswith("{") and rest.endswith("}")):
        raise RuleError(f"cannot read {text!r}", remedy="write options in braces: name{option=value,...}")
    return name, _options(rest[1:-1], text)


def _options(body: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    decoder = json.JSONDecoder()
    i = 0
    while body[i:].strip():
        key = re.match(r"\s*([A-Za-z_]\w*)\s*=\s*", body[i:])
        if not key:
            raise RuleError(f"cannot read the options of {text!r} at {body[i:]!r}", remedy="write option=value")
        i += key.end()
        word = _WORD.match(body, i)
        if word and word[0] not in _JSON_WORDS:
            value: Any = word[0]
            i = word.end()
        else:
            try:
                value, i = decoder.raw_decode(body, i)
            except json.JSONDecodeError as error:
                raise RuleError(
                    f"cannot read the value of {key[1]!r} in {text!r}", remedy="values are JSON or a bare word"
                ) from error
        options[key[1]] = value
        comma = re.match(r"\s*(,|$)", body[i:])
        if not comma:
            raise RuleError(f"expected a comma in {text!r} at {body[i:]!r}")
        i += comma.end()
    return options


def build(kind: Kind, what: Any) -> Any:
    """A pass object from a name, a text form, or an object that is one already."""
    if not isinstance(what, str):
        return what() if isinstance(what, type) else what
    name, options = split_text(what)
    factory = find(kind, name)
    if not dataclasses.is_dataclass(factory):
        if options:
            return factory(**options)
        return factory()
    fields = {f.name: f for f in dataclasses.fields(factory) if f.init}
    hints = typing.get_type_hints(factory)
    for option, given in options.items():
        if option not in fields:
            raise RuleError(
                f"{kind} {name!r} has no option {option!r}",
                remedy=f"its options are: {', '.join(fields) or 'none'}",
            )
        try:
            options[option] = _coerce(hints[option], given)
        except (TypeError, ValueError) as error:
            raise RuleError(
                f"{kind} {name!r}: option {option}={json.dumps(given)} does not fit: {error}",
                remedy=f"{option} is {fields[option].type}",
            ) from error
    make: Any = factory
    try:
        return make(**options)
    except (TypeError, ValueError) as error:
        raise RuleError(f"{kind} {name!r}: {error}") from error


def _coerce(wanted: Any, given: Any) -> Any:
    """A JSON value as an option's type.

    Raises:
        ValueError: It does not fit.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return _first_fit(arguments, given)
    if origin is typing.Literal:
        return given  # rules name the words they know themselves
    if wanted is collections.abc.Callable or origin is collections.abc.Callable:
        return _callable(given)
    if origin is tuple and isinstance(given, (list, tuple)):
        kinds = [arguments[0]] * len(given) if arguments[1:] == (...,) else list(arguments)
        if len(kinds) != len(given):
            raise ValueError(f"{len(kinds)} values are due")
        return tuple(_coerce(kind, one) for kind, one in zip(kinds, given, strict=True))
    if wanted is float and type(given) is int:
        return given
    if wanted in (int, float, bool, str, type(None)) and type(given) is not wanted:
        raise ValueError(f"expected {wanted.__name__}, got {type(given).__name__}")
    if origin in (tuple, list, dict) and not isinstance(given, origin):
        raise ValueError(f"expected {origin.__name__}, got {type(given).__name__}")
    return given


def _first_fit(kinds: Sequence[Any], given: Any) -> Any:
    if given is not None:
        kinds = [kind for kind in kinds if kind is not types.NoneType]
    exact = [kind for kind in kinds if type(given) is kind]
    problem: Exception = ValueError("no type fits")
    for kind in (*exact, *kinds):
        try:
            return _coerce(kind, given)
        except ValueError as error:
            problem = error
    raise problem


def _callable(given: Any) -> Any:
    if callable(given):
        return given
    if not isinstance(given, str) or ":" not in given:
        raise ValueError('a callable is written "package.module:qualname"')
    try:
        found = load(given)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{given}: {error}") from error
    if not callable(found):
        raise ValueError(f"{given} cannot be called")
    return found


def to_text(thing: Any) -> str:
    """The text form of a pass object: its name and the options that differ from their defaults."""
    name = getattr(thing, "name", type(thing).__name__)
    if not dataclasses.is_dataclass(thing):
        return str(name)
    shown = []
    for field in dataclasses.fields(thing):
        held = getattr(thing, field.name)
        if not field.init or not field.repr or held == _default(field):
            continue
        shown.append(f"{field.name}={_value_text(held, f'{name}.{field.name}')}")
    return f"{name}{{{','.join(shown)}}}" if shown else str(name)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


def _value_text(held: Any, where: str) -> str:
    if isinstance(held, str):
        plain = _WORD.fullmatch(held) and held not in _JSON_WORDS
        return held if plain else json.dumps(held)
    if callable(held):
        return _callable_text(held, where)
    if isinstance(held, tuple):
        return json.dumps(_plain(held))
    try:
        return json.dumps(held)
    except TypeError:
        return str(held)


def _plain(held: Any) -> Any:
    """Tuples as lists, and what has a text form of its own as that text."""
    if isinstance(held, (tuple, list)):
        return [_plain(one) for one in held]
    return held if held is None or isinstance(held, (str, int, float, dict)) else to_text(held)


def _callable_text(held: Callable[..., Any], where: str) -> str:
    qualname = getattr(held, "__qualname__", "")
    if not qualname or "<" in qualname:
        return f"<{where} has no text form: {qualname or type(held).__name__}>"
    return f"{held.__module__}:{qualname}"
