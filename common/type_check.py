"""Settings of the wrong type, in one line: configs and command lines give any JSON value to any argument."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import SettingError

UNMADE = re.compile(r"Failed to (?:instantiate component '([\w.]+)'|evaluate ConfigExpression:\s*\"\$(.*)\")")
RUNS = ("run_or_exit", ".run()")  # what fails in there has other reasons than a setting
NAMES = {float: "a number", int: "an integer", bool: "true or false", str: "text", type(None): "null"}


def setting_error(error: BaseException) -> SettingError | None:
    """What MONAI raised because an object of a config cannot be made of its settings, in one line; None for another."""
    while (cause := error.__cause__) is not None:
        found = UNMADE.match(str(error))
        if found and not UNMADE.match(str(cause)) and isinstance(cause, (TypeError, ValueError, RuntimeError)):
            what = re.sub(r"__local_refs\['([^']*)'\]", r"@\1", found[1] or found[2])
            if what.endswith(RUNS):
                return None
            fact = f"cannot be made of the given settings ({type(cause).__name__}: {cause})"
            return SettingError(what, fact, "give values of the types that configs/inference.json has")
        error = cause
    return None


def check_types(cls: type, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Raises SettingError for the first argument whose value cannot be what its parameter's annotation says.

    Looks at numbers, texts, choices, and sequences of these; objects are not looked at.
    """
    for name, value in given.items():
        if name in parameters and not fits(value, hint := _hint(cls, name, parameters[name])):
            fact, remedy = f"{name} = {value!r}", f"give {describe_type(hint)}"
            raise SettingError(cls.__name__, fact, remedy)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value can be what a type hint says; True where it says nothing that JSON could hold."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint in (str, type(None)):
        return isinstance(value, hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin in (Sequence, list, tuple):
        elements = [argument for argument in arguments if argument is not ...]
        items = value if isinstance(value, (list, tuple)) else ()
        is_other = value is None or isinstance(value, (bool, int, float, str, Mapping))
        return not is_other and all(any(fits(item, element) for element in elements) for item in items)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping)
    if hint is Any or not isinstance(hint, type) or not isinstance(value, (bool, int, float, str)):
        return True
    return not getattr(hint, "_is_protocol", False) and isinstance(value, hint)  # a protocol asks for an object


def describe_type(hint: Any) -> str:
    """A type hint in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin in (Sequence, list, tuple):
        return f"a list, each item {describe_type(arguments[0])}"
    return NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}")


def _hint(cls: type, name: str, parameter: inspect.Parameter) -> Any:
    """The annotation as a type, from the constructor that has it."""
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is not None and inspect.signature(init).parameters.get(name) == parameter:
            return _hints(inspect.unwrap(init)).get(name, Any)
    return Any


@functools.cache
def _hints(init: Callable[..., None]) -> dict[str, Any]:
    """The annotations of a constructor as types; none where a name in them is known to type checkers only."""
    try:
        return get_type_hints(init)
    except (NameError, TypeError):
        return {}
