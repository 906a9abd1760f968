"""What Triton can compile for: nothing, and PyTorch's compiler asks."""

import sys
from typing import Any

from triton import absent

backends: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    return absent(sys.modules[__name__], name)
