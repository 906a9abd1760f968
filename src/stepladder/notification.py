"""Telling a chat that a run begins, fails, goes back and ends: messages, the formats of four webhooks, and sending.

A webhook's address is a secret: it is never in a message of this module. Formats and answers, as of 2026-11:
Slack, "Sending messages using incoming webhooks" (docs.slack.dev): `{"text"}`, answered by 200 and `ok`.
Feishu, "Custom bot usage guide" (open.feishu.cn/document/client-docs/bot-v3/add-custom-bot): the body's signature is
Base64(HMAC-SHA256(key = seconds, newline, secret; message = "")); errors such as 19021 come with status 200.
DingTalk, "Custom robot access" (open.dingtalk.com/document/robots/custom-robot-access): the address's signature is
Base64(HMAC-SHA256(key = secret; message = milliseconds, newline, secret)); `errcode` is 0 when it worked.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stepladder.durations import duration
from stepladder.errors import StepladderError
from stepladder.exit_status import ExitStatus

FORMATS = ("json", "slack", "feishu", "dingtalk")
SIGNED = ("feishu", "dingtalk")
EVENTS = ("start", "green", "red", "back", "end")
TRIES = 3
PAUSE_SECONDS = 0.5
ANSWER_BYTES = 65536
# A part of the address's path that is as long may be its secret; shorter ones are words.
SHORTEST_TOKEN = 8
# Chats cut or refuse long messages; what is left out stands on the screen and in the evidence.
LONGEST_TEXT = 2000
ENDINGS: dict[int, str] = {
    ExitStatus.WENT_BACK: "the new release failed, the one before serves again",
    ExitStatus.NO_WAY_BACK: "the new release failed, and none was brought back",
    ExitStatus.NOT_DRAINED: "a replica could not be taken out of rotation, those after it run on as they did",
}


class NotifyError(StepladderError):
    """Settings that cannot be used, or a message that did not arrive; in one line and without the address."""


@dataclass(frozen=True)
class Settings:
    """Where and how to tell.

    seconds: that all tries of one message may take together. run: what the run said of itself when it began.
    """

    format: str
    url: str = field(repr=False)
    secret: str = field(default="", repr=False)
    seconds: float = 5.0
    events: tuple[str, ...] = EVENTS
    run: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Keep them for the rest of the run, for its owner alone."""
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Settings | None:
        """Those that were kept; none where nobody is to be told."""
        try:
            kept = json.loads(path.read_text())
            return cls(**{**kept, "events": tuple(kept["events"])})
        except FileNotFoundError:
            return None


def check(given: Mapping[str, Any]) -> Settings:
    """Settings from `format url secret seconds events`.

    Raises:
        NotifyError: with all that is wrong.
    """
    form, url, secret = str(given["format"]), str(given["url"]).strip(), str(given.get("secret") or "").strip()
    faults = []
    if form not in FORMATS:
        faults.append(f"notify_format '{form}' is unknown, choose one of: {', '.join(FORMATS)}")
    if wrong := [event for event in given["events"] if event not in EVENTS]:
        faults.append(f"notify_events '{', '.join(wrong)}' is unknown, choose of: {', '.join(EVENTS)}")
    if not 0 < float(given["seconds"]) <= 60:
        faults.append(f"notify_seconds is {given['seconds']}, give 1 to 60")
    parts = urllib.parse.urlsplit(url) if url.isprintable() and " " not in url else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        faults.append("the address is not one line that begins with https:// or http://")
    if secret and form not in SIGNED and form in FORMATS:
        faults.append(f"notify_format {form} has no signature: take notify_secret_file out")
    if faults:
        raise NotifyError("; ".join(faults))
    return Settings(form, url, secret, float(given["seconds"]), tuple(given["events"]))


def message(event: str, run: Mapping[str, Any]) -> str:
    """What is told, in a few lines.

    Args:
        event: one of `EVENTS`.
        run: `deployment verb who origin why plan_id nodes`, and of what failed `reason`, of an end `outcome`,
            `exit_status` and `seconds`.
    """
    what = f"[{run.get('deployment') or '-'}] {run.get('verb') or 'deploy'}"
    release = f" of release {run['plan_id']}" if run.get("plan_id") else ""
    nodes = f" on {', '.join(run['nodes'])}" if run.get("nodes") else ""
    who = f"{run.get('who', '?')} from {run.get('origin', '?')}"
    why = f"\nwhy: {run['why']}" if run.get("why") else ""
    if event == "start":
        text = f"{what}{release} begins{nodes}, by {who}{why}"
    elif event == "green":
        text = f"{what}{release} is green{nodes}: it gave the right answers\n{run.get('reason', '')}"
    elif event == "red":
        text = f"{what}{release} is RED{nodes}\n{run.get('reason', '')}"
    elif event == "back":
        text = f"{what}: {run.get('reason', '')}"
    else:
        status = int(run.get("exit_status") or 0)
        words = ENDINGS.get(status, "")
        ended = f"{run.get('outcome', '?')}{f', {words}' if words else ''}"
        mark = "ended" if run.get("outcome") == "done" and not status else "ended RED"
        text = f"{what}{release} {mark}{nodes} after {duration(run.get('seconds'))}: {ended}; by {who}{why}"
    text = text.strip()
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."


def request(settings: Settings, event: str, run: Mapping[str, Any], now: float) -> tuple[str, dict[str, Any]]:
    """Address and body of one message.

    Args:
        settings: where and how.
        event: one of `EVENTS`.
        run: as for `message`.
        now: seconds since 1970, for the signature.
    """
    text = message(event, run)
    if settings.format == "slack":
        # The three characters that Slack takes for its own marks.
        return settings.url, {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
    if settings.format == "feishu":
        body: dict[str, Any] = {"msg_type": "text", "content": {"text": text}}
        if settings.secret:
            seconds = str(int(now))
            body |= {"timestamp": seconds, "sign": _sign(f"{seconds}\n{settings.secret}", "")}
        return settings.url, body
    if settings.format == "dingtalk":
        url = settings.url
        if settings.secret:
            milliseconds = str(int(now * 1000))
            sign = _sign(settings.secret, f"{milliseconds}\n{settings.secret}")
            join = "&" if urllib.parse.urlsplit(url).query else "?"
            url += join + urllib.parse.urlencode({"timestamp": milliseconds, "sign": sign})
        return url, {"msgtype": "text", "text": {"content": text}}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    return settings.url, {"format_version": 1, "event": event, "at": at, "text": text, **run}


def _sign(key: str, text: str) -> str:
    return base64.b64encode(hmac.new(key.encode(), text.encode(), hashlib.sha256).digest()).decode()


def fault(form: str, status: int, answer: str) -> str:
    """What an answer complains of; empty where the message arrived."""
    try:
        told = json.loads(answer)
    except ValueError:
        told = None
    told = told if isinstance(told, dict) else {}
    said = str(told.get("errmsg") or told.get("msg") or told.get("StatusMessage") or answer.strip())[:200]
    if not 200 <= status < 300:
        return f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if form == "slack" and answer.strip() != "ok":
        return f"it answers '{said}' where Slack answers 'ok'"
    if form in SIGNED:
        names = ("code", "StatusCode") if form == "feishu" else ("errcode",)
        code = next((told[name] for name in names if name in told), None)
        if code != 0:
            return f"error {code}: {said}" if code is not None else f"it answers '{said}', which is not {form}'s"
    return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Whoever the address leads to elsewhere would get what it says."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none."""
        return


def send(settings: Settings, event: str, run: Mapping[str, Any]) -> None:
    """Send one message, with a few tries within the deadline.

    Raises:
        NotifyError: why it did not arrive, in one line without the address.
    """
    if event not in settings.events:
        return
    problems: list[str] = []
    done = threading.Event()

    def tries() -> None:
        for number in range(TRIES):
            problem, again = _try(settings, event, run)
            if not problem:
                problems.clear()
                break
            problems[:] = [problem]
            if not again or number == TRIES - 1:
                break
            time.sleep(PAUSE_SECONDS)
        done.set()

    # An answer that drips in outlasts every timeout of a socket; the thread ends with this process.
    threading.Thread(target=tries, daemon=True).start()
    if not done.wait(settings.seconds):
        problems.append(f"no answer within {settings.seconds:g} s")
    if problems:
        text = " ".join(problems[-1].split())
        for part in _secret_parts(settings):
            text = text.replace(part, "********")
        raise NotifyError(text)


def _try(settings: Settings, event: str, run: Mapping[str, Any]) -> tuple[str, bool]:
    """What went wrong, empty where nothing did; and whether another try may go better."""
    url, body = request(settings, event, {**settings.run, **run}, time.time())
    headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "stepladder"}
    try:
        asked = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - `check` took http(s) only
        with urllib.request.build_opener(_NoRedirect).open(asked, timeout=settings.seconds) as answer:
            status, text = answer.status, answer.read(ANSWER_BYTES).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        with error:
            problem = fault(settings.format, error.code, error.read(ANSWER_BYTES).decode("utf-8", "replace"))
        return problem, error.code == 429 or error.code >= 500
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return str(getattr(reason, "strerror", None) or reason or type(error).__name__), True
    return fault(settings.format, status, text), False


def _secret_parts(settings: Settings) -> list[str]:
    """What of the address must not be seen; which host it leads to may be."""
    parts = urllib.parse.urlsplit(settings.url)
    values = [settings.url, settings.secret, parts.path, parts.query, parts.password or ""]
    values += [word for words in urllib.parse.parse_qs(parts.query).values() for word in words]
    values += [word for word in parts.path.split("/") if len(word) >= SHORTEST_TOKEN]
    return sorted({value for value in values if len(value) > 3}, key=len, reverse=True)


def not_told(error: Exception) -> str:
    """One line for the screen."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return f"  The chat was not told, the run goes on: {text}"


def tell_end(kept: Path, run: Mapping[str, Any]) -> str:
    """Tell how a run ended by the settings that its beginning kept; the line to show where that failed, else empty."""
    try:
        settings = Settings.read(kept)
        if settings:
            send(settings, "end", run)
    except (NotifyError, OSError, ValueError, TypeError) as error:
        return not_told(error)
    return ""
