"""Stand-ins for modules that cannot be had without a GPU: they can be imported and named, and compute nothing.

Runs in the engine's environment: the standard library only.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

# transformers asks for it and compares.
VERSION = "0.29.0"


class StandInType(type):
    """A class whose attributes are their own names, as an enumeration's members would print."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class StandInModule(types.ModuleType):
    """A module that has every attribute: a class where the name is capitalised, else something to call."""

    __version__ = VERSION

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = StandInModule(f"{self.__name__}.{name}")
        if name[0].isupper():
            made = StandInType(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made

    def __call__(self, *positional: Any, **named: Any) -> Any:
        """As a decorator: hand the function back as it is."""
        bare = len(positional) == 1 and not named and callable(positional[0])
        return positional[0] if bare else lambda function: function


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install(*names: str) -> None:
    """Let packages of these names be imported where the environment lacks them."""
    sys.meta_path.append(_Finder(names))
