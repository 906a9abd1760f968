"""Stands in for Triton, which compiles kernels for GPUs only: SGLang imports it and defines kernels on every machine.

Whatever Triton has can be imported and named here, kernels can be defined, and the arithmetic helpers calculate.
Launching a kernel, or calling anything else of Triton, raises NotImplementedError with its name.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "3.9.0"


def cdiv(dividend: int, divisor: int) -> int:
    """Division, rounded up."""
    return -(dividend // -divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


class Config:
    """What a kernel may be tuned with; kept and not used."""

    def __init__(self, kwargs: dict[str, Any], **options: Any) -> None:
        self.kwargs = kwargs
        self.__dict__.update(options)


class Kernel:
    """A kernel that was defined, and cannot run."""

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")
        self.__doc__ = getattr(function, "__doc__", None)

    def __getitem__(self, grid: object) -> NoReturn:
        raise NotImplementedError(f"Triton is a stand-in here; the kernel {self.__name__} cannot be launched")

    def __call__(self, *arguments: object, **options: object) -> NoReturn:
        """Refuse a call from another kernel as well."""
        self[arguments]


def jit(function: Any = None, **options: object) -> Any:
    """Define a kernel; with options only, the decorator that does."""
    return jit if function is None else Kernel(function)


def autotune(*arguments: object, **options: object) -> Callable[[Any], Any]:
    """The decorator that would tune a kernel."""
    return lambda kernel: kernel


heuristics = autotune


class Absent(types.ModuleType):
    """Anything else of Triton: a class where its name is capitalised, else a module that is callable in name only."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        return absent(self, name)

    def __call__(self, *arguments: Any, **options: object) -> Any:
        """Decorate, or refuse."""
        if len(arguments) == 1 and not options and callable(arguments[0]):
            return arguments[0]
        raise NotImplementedError(f"Triton is a stand-in here; {self.__name__} cannot be called")


def absent(parent: types.ModuleType, name: str) -> Any:
    """A name of Triton that is not written out here: an empty class or module, the same one each time."""
    if name.startswith("__"):
        raise AttributeError(name)
    full = f"{parent.__name__}.{name}"
    if name[0].isupper():
        made: Any = type(name, (Exception,) if name.endswith("Error") else (), {"__module__": parent.__name__})
    else:
        made = sys.modules.get(full) or Absent(full)
    setattr(parent, name, made)
    return made


def __getattr__(name: str) -> Any:
    return absent(sys.modules[__name__], name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below this package."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is in it."""


sys.meta_path.append(_Finder())
