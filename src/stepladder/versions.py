"""Which of two versions comes first: engines', drivers', ROCm's, Docker's."""

from __future__ import annotations

import re

from packaging.version import InvalidVersion, Version


def parsed(version: str) -> Version | None:
    """A version as PEP 440 has it; none for one that is not of its form (`580.126.20-1ubuntu1`)."""
    try:
        return Version(version)
    except InvalidVersion:
        return None


def older(version: str, than: str) -> bool:
    """Whether one version comes before another: 0.31.0.dev42 and 0.31.0rc1 come before 0.31.0."""
    return version_key(version) < version_key(than)


def version_key(version: str) -> Version:
    """What versions are compared by.

    The local part (`+cpu`) is left out: it names a build of the version. Of what is no version the first numbers
    count; what has none is older than all.
    """
    public = version.partition("+")[0]
    numbers = re.search(r"\d+(\.\d+)*", public)
    return parsed(public) or Version(numbers[0] if numbers else "0")
