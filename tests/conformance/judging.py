"""Questions for judges and their verdicts: a process for each core, or one where there are few lines."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

JUDGES = Path(__file__).with_name("judges")
DEADLINE_S = 900.0
# A judge takes ten to twenty seconds to import its engine, and a line 25 to 65 ms.
WORTH_A_PROCESS = 500


@dataclass(frozen=True)
class Question:
    """A command line with what decides about it; `label` says where it comes from."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    gpu: tuple[tuple[str, Any], ...] = ()
    label: str = field(default="", compare=False)

    def as_json(self) -> str:
        """The judge's line."""
        return json.dumps({"argv": self.argv, "env": dict(self.env), "gpu": dict(self.gpu)})


@dataclass(frozen=True)
class Verdict:
    """What an engine said to a question."""

    question: Question
    accepted: bool
    error: str | None
    warnings: tuple[str, ...]
    facts: Mapping[str, Any]

    def __str__(self) -> str:
        said = self.error or "accepted"
        warned = "".join(f"\n    warns: {text}" for text in self.warnings)
        return f"{self.question.label}\n  {' '.join(self.question.argv)}\n    {said}{warned}"


@dataclass(frozen=True)
class Judge:
    """A program of `judges/` in its environment.

    Args:
        script: its file.
        python: the environment's.
        path: folders that come before the environment's own packages.
        environ: variables for the whole process.
    """

    script: str
    python: Path
    path: tuple[Path, ...] = ()
    environ: tuple[tuple[str, str], ...] = ()

    def ask(self, questions: Sequence[Question]) -> Answers:
        """Put all questions to this judge, with so many processes as there are cores and lines enough.

        Raises:
            AssertionError: one ended before it had answered all of its own; with its last lines.
        """
        start = time.monotonic()
        # What is asked under the same variables stands together: a judge makes its parser once for them.
        ordered = sorted(questions, key=lambda question: (question.env, str(question.gpu)))
        parts = max(1, min(len(os.sched_getaffinity(0)), len(questions) // WORTH_A_PROCESS))
        with ThreadPoolExecutor(parts) as pool:
            heard = list(pool.map(self._said, (ordered[part::parts] for part in range(parts))))
        said = {verdict.question: verdict for _, verdicts in heard for verdict in verdicts}
        header = heard[0][0]
        return Answers(
            program=header["program"],
            version=header["version"],
            seconds=time.monotonic() - start,
            verdicts=tuple(said[question] for question in questions),
        )

    def _said(self, questions: Sequence[Question]) -> tuple[dict[str, str], list[Verdict]]:
        """What one process says: of itself, and to each question."""
        environ = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        environ["PYTHONPATH"] = os.pathsep.join(map(str, self.path))
        environ |= dict(self.environ)
        done = subprocess.run(
            [self.python, JUDGES / self.script],
            input="".join(f"{question.as_json()}\n" for question in questions),
            env=environ,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(lines) == len(questions) + 1, (
            f"{self.script} answered {max(0, len(lines) - 1)} of {len(questions)} and ended with {done.returncode}:\n"
            + done.stderr[-3000:]
        )
        return lines[0], [
            Verdict(question, said["accepted"], said["error"], tuple(said["warnings"]), said["facts"])
            for question, said in zip(questions, lines[1:], strict=True)
        ]


@dataclass(frozen=True)
class Answers:
    """All verdicts of one judge, in the order of the questions."""

    program: str
    version: str
    seconds: float
    verdicts: tuple[Verdict, ...]

    @cached_property
    def by_question(self) -> dict[Question, Verdict]:
        """Verdicts by what was asked."""
        return {verdict.question: verdict for verdict in self.verdicts}


def unique(questions: Iterable[Question]) -> list[Question]:
    """Each question once, with the label of its first asker."""
    return list({question: question for question in reversed(list(questions))}.values())[::-1]
