"""What `reference_server.py` asks of a loaded model, and what it gets: the seam to `reference_model.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol


class Ended(NamedTuple):
    """How a generation ended: OpenAI's reason, and the tokens that it took."""

    reason: str
    tokens: int


class Generation(Protocol):
    """An answer in the making: its pieces of text, in their order."""

    def __iter__(self) -> Iterator[str]: ...

    def cancel(self) -> None:
        """End it early; nothing where it has ended."""

    def wait(self) -> None:
        """Wait until it has ended."""

    @property
    def ended(self) -> Ended:
        """How it ended; waits for that."""
        ...


class Model(Protocol):
    """What the server asks of a loaded model."""

    context_length: int

    def encode_chat(self, messages: list[Any], tools: list[Any] | None, options: dict[str, Any]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins; raises what the template raises."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def generate(self, prompt: list[int], limit: int) -> Generation:
        """Begin to generate at most `limit` tokens."""
        ...
