"""Stands in for `sgl_kernel`, SGLang's compiled kernels, whose build for the CPU is in no package index.

Every name can be imported. What is not written out here raises NotImplementedError when it is called, so that SGLang's
own PyTorch code is what computes, or nothing is.
"""

import ctypes
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__version__ = "0.4.10"


def copy_all_layer_kv_cache_cpu(pointers: "Tensor", row_bytes: "Tensor", targets: "Tensor", sources: "Tensor") -> None:
    """Copy rows of the KV cache within every layer's buffer.

    Args:
        pointers: address of each buffer.
        row_bytes: size of one row of each buffer.
        targets: rows to write.
        sources: rows to read, as they were before anything was written.
    """
    rows = sources.tolist()
    for address, size in zip(pointers.tolist(), row_bytes.tolist(), strict=True):
        contents = [ctypes.string_at(address + row * size, size) for row in rows]
        for row, content in zip(targets.tolist(), contents, strict=True):
            ctypes.memmove(address + row * size, content, size)


def __getattr__(name: str) -> "Callable[..., NoReturn]":
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel is a stand-in here; it has no {name}")

    return missing
