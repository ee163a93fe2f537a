"""What an object was made with: a class records the arguments of its constructor itself, so that none is forgotten.

A setting is what JSON can hold. An object of a class that does not record, such as a network of MONAI, is described by
the values that it holds, with those of all its parts in a digest.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from .type_check import check_types

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # `training`, the dictionaries of parts, hooks


class Recorded:
    """Base of the classes whose constructor arguments change a map; put it before their other base.

    `settings` are these arguments, defaults too, and with `**settings` those of the parent classes; but for what is
    named in `unrecorded`: arguments that no result depends on. An argument of the wrong type raises SettingError.
    """

    unrecorded: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__, cls)  # type: ignore[method-assign]

    @property
    def settings(self) -> dict[str, Any]:
        """All of them, what JSON can hold."""
        return dict(vars(self).get("_settings", {}))

    @property
    def changed_settings(self) -> dict[str, Any]:
        """Those that are other than the default: a setting that a later version adds does not change what this is."""
        return dict(vars(self).get("_changed_settings", {}))


def describe(value: Any, only_changed: bool = False) -> Any:
    """A value as a setting: what JSON can hold, equal values alike (0.0 is 0, a tuple is a list)."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, np.number)):
        return int(value) if float(value).is_integer() else float(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item, only_changed) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item, only_changed) for item in value]
    if isinstance(value, Recorded):
        return {"class": type(value).__name__, **(value.changed_settings if only_changed else value.settings)}
    return _describe_module(value) if isinstance(value, nn.Module) else _describe_object(value)


def digest_of(settings: Any) -> str:
    """16 hexadecimal digits that tell settings from others."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _describe_module(module: nn.Module) -> dict[str, Any]:
    """A module that does not record: the arguments that it holds by their names, and a digest of all that it holds."""
    names = inspect.signature(type(module).__init__).parameters
    held = {name: vars(module)[name] for name in names if name in vars(module)}
    parts = []
    for name, part in module.named_modules():
        if isinstance(part, Recorded):
            values: Any = part.settings
        else:
            values = {key: describe(value) for key, value in vars(part).items() if key not in OF_EVERY_MODULE}
        unsaved = {key: describe(part._buffers[key]) for key in sorted(part._non_persistent_buffers_set)}
        parts.append([name, type(part).__name__, values, unsaved])
    return {"class": type(module).__name__, **describe(held), "parts": digest_of(parts)}


def _describe_object(value: Any) -> Any:
    """A function by its name; numbers with 5 digits, which every machine computes alike; else what an object holds."""
    if isinstance(value, Tensor) and value.is_meta:
        return {"class": "Tensor", "shape": list(value.shape)}  # it holds no numbers
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    if isinstance(value, np.ndarray):
        return [f"{item:.5g}" for item in value.ravel().tolist()]
    if isinstance(value, functools.partial):
        return [describe(part) for part in (value.func, value.args, value.keywords)]
    if hasattr(value, "__name__"):
        return value.__name__
    return {"class": type(value).__name__, **describe(vars(value))} if hasattr(value, "__dict__") else str(value)


def _recording(init: Callable[..., None], cls: type[Recorded]) -> Callable[..., None]:
    signature, parameters = inspect.signature(init), _parameters(init, cls)

    @functools.wraps(init)
    def recording(self: Recorded, *args: Any, **kwargs: Any) -> None:
        if "_settings" not in vars(self):  # what a constructor hands to its parents follows from its own arguments
            given = dict(signature.bind(self, *args, **kwargs).arguments)
            for parameter in signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:
                    given |= given.pop(parameter.name, {})
            del given[next(iter(signature.parameters))]  # self
            check_types(cls, parameters, given)
            known = {name: value for name, value in parameters.items() if name not in self.unrecorded}
            vars(self)["_settings"], vars(self)["_changed_settings"] = _settings(known, given)
        init(self, *args, **kwargs)

    return recording


def _settings(
    parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings, and those that are other than the default."""
    every, changed = {}, {}
    for name, parameter in parameters.items():
        has_default = parameter.default is not parameter.empty
        if name not in given and not has_default:
            continue  # the constructor hands it to its parent
        value = given.get(name, parameter.default)
        every[name] = describe(value)
        if name in given and not (has_default and every[name] == describe(parameter.default)):
            changed[name] = describe(value, only_changed=True)
    return every, changed


def _parameters(init: Callable[..., None], cls: type) -> dict[str, inspect.Parameter]:
    """Those of a constructor, by their names; where it takes `**settings`, those of the next constructor too."""
    own = list(inspect.signature(init).parameters.values())[1:]
    found = {parameter.name: parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD}
    if len(found) < len(own):
        parent = next(base for base in cls.__mro__[1:] if "__init__" in vars(base))
        found = _parameters(vars(parent)["__init__"], parent) | found if parent is not object else found
    return found
