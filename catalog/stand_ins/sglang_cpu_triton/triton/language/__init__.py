"""The language of kernels: only what definitions use outside of kernels."""

import sys
from typing import Any

from triton import absent


class constexpr:  # noqa: N801 - Triton's name
    """A constant of a kernel, as annotation and as value."""

    def __init__(self, value: object) -> None:
        self.value = value


def __getattr__(name: str) -> Any:
    return absent(sys.modules[__name__], name)
