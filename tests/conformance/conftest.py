"""The judges with their environments, and what they say to every line that the planner renders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import checkpoints
import environments
import pytest
from environments import OfflineError
from judging import Answers, Judge, unique
from programs import CATALOGUE, PROGRAMS, overlays, questions

from stepladder.matrix import Case, cases

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node's state directory: every served variant's checkpoint without its weights, and Ray's token."""
    folder = tmp_path_factory.mktemp("state")
    for model in CATALOGUE.models.values():
        for variant in model.variants.values():
            if variant.engines:
                place = folder / "models" / variant.modelscope.replace("/", "--") / variant.revision
                checkpoints.write(place, model, variant)
    secrets = folder / "deployments" / "default" / "secrets"
    secrets.mkdir(parents=True)
    (secrets / "ray-token").write_text(TOKEN)
    return folder


@pytest.fixture(scope="session")
def matrix(state: Path) -> list[Case]:
    """Every case of the catalogue."""
    return list(cases(CATALOGUE, state_directory=str(state)))


@pytest.fixture(scope="session")
def judge_of(state: Path) -> Callable[[str], Judge]:
    """Gives a program's judge; skips where it has to be fetched and there is no network."""

    def judge(name: str) -> Judge:
        program = PROGRAMS[name]
        try:
            python = environments.ensure_base(CATALOGUE)
            path = tuple(environments.ensure_overlay(overlay) for overlay in overlays(program))
        except OfflineError as error:
            pytest.skip(f"{name} cannot be judged: {error}")
        architectures = sorted({model.architecture for model in CATALOGUE.models.values()})
        environ = {
            "HF_HOME": str(state / "huggingface"),
            "VLLM_CACHE_ROOT": str(state / "vllm"),
            "JUDGE_ARCHITECTURES": " ".join([*architectures, "Step3p5MTP"]),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        script = f"judge_{program.executable}.py"
        return Judge(script, python, path, tuple(environ.items()))

    return judge


@pytest.fixture(scope="session")
def answers(judge_of: Callable[[str], Judge], matrix: list[Case]) -> Callable[[str], Answers]:
    """Gives the verdicts on all lines that the planner renders for a program; asked once a session."""
    given: dict[str, Answers] = {}

    def ask(name: str) -> Answers:
        if name not in given:
            given[name] = judge_of(name).ask(unique(questions(PROGRAMS[name], matrix)))
        return given[name]

    return ask


@pytest.fixture(scope="session")
def report(notes: dict[str, list[str]]) -> list[str]:
    """Lines for the end of the run."""
    return notes.setdefault("conformance", [])


def pytest_configure(config: pytest.Config) -> None:
    """Tokenizers of the checkpoints are made in this process; no threads are left behind for the judges."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
