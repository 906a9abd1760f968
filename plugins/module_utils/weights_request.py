"""What is wanted of a model's weights, and what is wrong with the wish. Standard library, Python 3.9."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

BOOKKEEPING = ".stepladder"
DEFAULT_ENDPOINTS = {"modelscope": "https://www.modelscope.cn", "huggingface": "https://huggingface.co"}
DEFAULT_ENDPOINT = DEFAULT_ENDPOINTS["modelscope"]
# Parameters that say which weights, from where: those of every module that asks for some.
SOURCE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "model_id": {"type": "str", "required": True},
    "revision": {"type": "str", "default": "master"},
    "path": {"type": "path", "required": True},
    "endpoint": {"type": "str", "default": ""},
    "token_file": {"type": "path", "default": "", "no_log": False},
    "include": {"type": "list", "elements": "str", "default": []},
    "exclude": {"type": "list", "elements": "str", "default": []},
    "full_check_below_bytes": {"type": "int", "default": 0},
    "source": {
        "type": "str",
        "choices": ["modelscope", "huggingface", "directory", "archive"],
        "default": "modelscope",
    },
    "source_path": {"type": "path", "default": ""},
    "listing": {"type": "list", "elements": "dict", "default": []},
    "seen": {"type": "list", "elements": "dict", "default": []},
}


class WeightsError(Exception):
    """The weights are not there as asked; the message says what is wrong, what was found and how to mend it."""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


def split_patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    """Split at commas, as the client does (cli/compat.py, normalize_patterns)."""
    return tuple(part.strip() for pattern in patterns for part in pattern.split(",") if part.strip())


@dataclass(frozen=True)
class Request:
    """What is wanted; the fields are the module's parameters (sizes in bytes, times in seconds)."""

    model_id: str
    path: str
    revision: str = "master"
    client: str = "modelscope"
    endpoint: str = ""
    token_file: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_workers: int = 8
    expected_bytes: int = 0
    total_timeout: int = 14400
    retries: int = 3
    patience: float = 600
    deadline: float = 86400
    verify: str = "cheap"
    full_check_below_bytes: int = 0
    progress_file: str = ""
    lock_timeout: float = 600
    source: str = "modelscope"
    source_path: str = ""
    bytes_per_second: int = 0
    spread: dict[str, Any] = field(default_factory=dict)
    listing: tuple[dict[str, Any], ...] = ()
    seen: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, params: dict[str, Any]) -> Request:
        """From the module's parameters; patterns are split at commas, as the client does."""
        patterns = {name: split_patterns(params[name]) for name in ("include", "exclude")}
        more = {name: tuple(params.get(name) or ()) for name in ("listing", "seen")}
        return cls(**{**params, **patterns, **more, "spread": params.get("spread") or {}})

    @property
    def name(self) -> str:
        """`owner/name@revision`, as it stands in messages."""
        return f"{self.model_id}@{self.revision}"

    @property
    def bookkeeping(self) -> Path:
        """The directory of the manifest, the quarantine and the client's own cache."""
        return Path(self.path) / BOOKKEEPING

    @property
    def manifest(self) -> Path:
        """What was proven of every file."""
        return self.bookkeeping / "manifest.json"

    @property
    def marker(self) -> Path:
        """The last thing written: with it the directory is complete, and the manifest is the one that it names."""
        return self.bookkeeping / "complete"

    @property
    def journal(self) -> Path:
        """A line for each file as soon as it is proven, so that no later run reads it again."""
        return self.bookkeeping / "proven.jsonl"

    @property
    def incoming(self) -> Path:
        """Where a file lies while it comes from other nodes."""
        return self.bookkeeping / "incoming"

    @property
    def lists_hashes(self) -> bool:
        """Whether the source is a hub, which is asked for its listing."""
        return self.source in DEFAULT_ENDPOINTS


def problems(request: Request) -> list[str]:
    """Say everything that is wrong with the parameters, one line each."""
    found = []
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", request.model_id):
        found.append(f"model_id is {request.model_id!r}: give it as owner/name, for example stepfun-ai/Step-3.5-Flash")
    if not request.revision or request.revision.startswith("-"):
        found.append(f"revision is {request.revision!r}: give a branch, a tag or a commit, for example master")
    if not request.path.startswith("/") or len(PurePosixPath(request.path).parts) < 3:
        found.append(
            f"path is {request.path!r}: give an absolute path of its own for the model, at least two levels deep"
        )
    if request.endpoint and not re.match(r"https?://[^/]+", request.endpoint):
        found.append(f"endpoint is {request.endpoint!r}: give a full URL, for example {DEFAULT_ENDPOINT}")
    if not request.lists_hashes and not request.source_path.startswith("/"):
        found.append(
            f"source is {request.source!r} and source_path is {request.source_path!r}: give the absolute path "
            f"{'of the directory' if request.source == 'directory' else 'of the archive'} on the node"
        )
    for name in ("max_workers", "retries", "total_timeout"):
        if getattr(request, name) < 1:
            found.append(f"{name} is {getattr(request, name)}: give 1 or more")
    return found


def endpoint_of(request: Request) -> str:
    """The hub that both the listing and the client are asked at, without a slash at the end."""
    return (request.endpoint or DEFAULT_ENDPOINTS.get(request.source, "")).rstrip("/")
