"""Stands in for the compiled half of torchvision, whose build in package indexes is the one for CUDA.

It does not load beside PyTorch for the CPU, and importing torchvision then fails for want of two operators. They are
declared here, without an implementation, just before torchvision is imported: calling one raises NotImplementedError.
"""

import importlib.abc
import sys
from typing import Any

declared: list[Any] = []  # a library's operators are there for as long as it lives


class _Declarer(importlib.abc.MetaPathFinder):
    """Finds nothing itself; it is asked first, and takes the chance once."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch  # noqa: PLC0415 - every start of Python reads this file, and most need no PyTorch

        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.append(library)


sys.meta_path.insert(0, _Declarer())
