"""What all judges share: lines of JSON in, lines of JSON out, one start of the engine's modules for all of them.

A line that comes in is `{"argv": [...], "env": {...}, "gpu": {...}}`, the command's own arguments without the program.
The first line that goes out names the program and its version; each further one is a verdict, in the order of the
questions: `{"accepted": bool, "error": str | null, "warnings": [...], "facts": {...}}`. The arguments `["flags"]` are a
question of their own, whose facts list all flags that the program's parser knows.

Runs in the engine's environment: the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

Examine = Callable[[list[str], dict[str, Any]], dict[str, Any]]


class Recorder(logging.Handler):
    """Keeps what an engine's loggers say from WARNING on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.messages.append(record.getMessage())


class Rejected(Exception):  # noqa: N818 - a verdict
    """The engine would not start from this line."""


def surroundings(gpu: dict[str, Any]) -> str:
    """The variables and the GPUs, from which a parser's defaults follow: neighbours among the questions share them."""
    return json.dumps([dict(os.environ), gpu], sort_keys=True)


def warn_of_abbreviations(argv: list[str], parser: argparse.ArgumentParser) -> None:
    """argparse takes a flag's beginning for the flag, until a second one begins alike: that is worth a warning.

    Args:
        argv: arguments of the command.
        parser: the engine's, with all of its flags.
    """
    known = {option.replace("_", "-") for action in parser._actions for option in action.option_strings}
    for argument in argv:
        flag = argument.partition("=")[0].partition(".")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            warnings.warn(f"{flag} is no flag, but the beginning of one", stacklevel=2)


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Every flag that a parser knows, by all its names, with hyphens."""
    names = {option.replace("_", "-") for action in parser._actions for option in action.option_strings}
    return sorted(names - {"-h"})


def answer_all(program: str, version: str, loggers: list[str], examine: Examine, clear: Callable[[], None]) -> None:
    """Examine every line of standard input.

    Args:
        program: the command that is judged, such as `vllm serve`.
        version: of the program.
        loggers: names of the loggers whose warnings count; the root logger's always do.
        examine: takes the arguments and the GPUs, gives facts; raises what the engine raises.
        clear: makes the engine say again what it says once in a process.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is no verdict
    sys.stdout = sys.stderr
    recorder = Recorder()
    print(json.dumps({"program": program, "version": version}), file=out, flush=True)
    before = dict(os.environ)
    for line in sys.stdin:
        question = json.loads(line)
        os.environ.clear()
        os.environ.update(before | question["env"])
        clear()
        recorder.messages.clear()
        for name in ["", *loggers]:
            logger = logging.getLogger(name)
            if recorder not in logger.handlers and (logger.handlers or not name):
                logger.addHandler(recorder)
            if not name and logger.level > logging.WARNING:
                logger.setLevel(logging.WARNING)
        print(json.dumps(_verdict(question, examine, recorder)), file=out, flush=True)


def _verdict(question: dict[str, Any], examine: Examine, recorder: Recorder) -> dict[str, Any]:
    printed = io.StringIO()
    error, facts = None, {}
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(printed):
        warnings.simplefilter("always")
        try:
            facts = examine(question["argv"], question.get("gpu") or {})
        except SystemExit as exit_:
            said = [text for text in printed.getvalue().splitlines() if text.strip()]
            error = f"exit {exit_.code}: {said[-1] if said else ''}"
        except Exception as failure:  # whatever the engine raises is its verdict
            place = traceback.extract_tb(failure.__traceback__)[-1]
            error = f"{type(failure).__name__}: {failure} ({os.path.basename(place.filename)}:{place.lineno})"  # noqa: PTH119
    said = [f"{w.category.__name__}: {w.message}" for w in warned] + recorder.messages
    return {"accepted": error is None, "error": error, "warnings": list(dict.fromkeys(said)), "facts": facts}
