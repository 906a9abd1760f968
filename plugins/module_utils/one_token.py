"""Whether an engine that calls itself healthy gives a token: the only proof that all its ranks work together."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping
from typing import Any

METRICS_TIMEOUT = 3.0
# Both engines count what they have read and written; vLLM 0.33.0 and SGLang 0.5.23 name the counters alike.
_TOKENS = re.compile(r"^(?:vllm|sglang):(?:generation|prompt)_tokens_total(?:\{[^}]*\})? (\S+)", re.M)


def ask(health: Mapping[str, Any], timeout: float) -> str:
    """Ask for one token; an engine whose token counters move meanwhile is busy, not broken.

    Args:
        health: host, port and model (the served name) of the process.
        timeout: seconds for the answer.

    Returns: an empty text when it works, else what it did instead, as the end of a sentence about it.
    """
    before = tokens(health)
    fault = _complete(health, timeout)
    if fault and _moved(before, tokens(health)):
        return ""
    return fault


def tokens(health: Mapping[str, Any]) -> float | None:
    """Tokens that the engine has read and written so far; None where its metrics do not say."""
    status, body = _request(health, "GET", "/metrics", None, METRICS_TIMEOUT)
    found = _TOKENS.findall(body) if status == 200 else []
    return sum(float(number) for number in found) if found else None


def _moved(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > before


def _complete(health: Mapping[str, Any], timeout: float) -> str:
    wish = json.dumps({"model": health["model"], "prompt": "a", "max_tokens": 1, "temperature": 0})
    status, body = _request(health, "POST", "/v1/completions", wish, timeout)
    if status is None:
        return f"gave no token: {body}"
    if status != 200:
        return f"answered {status} when asked for a token"
    return ""


def _request(
    health: Mapping[str, Any], method: str, path: str, body: str | None, timeout: float
) -> tuple[int | None, str]:
    """Status and text of an answer; no status, and why, where there was none in time."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(health.get("host") or "", health.get("host"))  # noqa: S104
    connection = http.client.HTTPConnection(str(host), int(health["port"]), timeout=timeout)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except TimeoutError:
        return None, f"no answer within {timeout:.0f} s"
    except (OSError, http.client.HTTPException) as error:
        return None, str(error) or type(error).__name__
    finally:
        connection.close()
