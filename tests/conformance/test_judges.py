"""The judges can say no: removed, misspelt and contradictory flags, and what was found out about each engine's flags.

The messages are the engines' own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judging import Judge, Question, Verdict
from programs import PROGRAMS

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]

H20 = (("compute_capability", "9.0"), ("count", 8), ("memory_mib", 97871), ("platform", "cuda"))
STEP3, FLASH, FLASH_FP8 = "stepfun-ai--step3", "stepfun-ai--Step-3.5-Flash", "stepfun-ai--Step-3.5-Flash-FP8"
VLLM, VLLM_CPU, SGLANG, RAY = "vllm-0.33.0", "vllm-0.32.0", "sglang-0.5.23", "ray-for-vllm-0.33.0"
MTP = '{"method":"%s","num_speculative_tokens":3}'
EAGLE = (
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4 --enable-multi-layer-eagle"
)
DATA_PARALLEL = (
    "--tensor-parallel-size 8 --data-parallel-size 2 --data-parallel-size-local 1 --data-parallel-address 198.18.0.1"
)
JOIN = "--node-ip-address 198.18.0.2 --address 198.18.0.1:6379"


class Case:
    """One line: what is asked of whom, and what has to be in the error, in the warnings and in the facts."""

    def __init__(
        self, judge: str, flags: str, *, says: str | None = None, warns: str | None = None, model: str = FLASH,
        **facts: Any,
    ) -> None:  # fmt: skip
        self.judge, self.flags, self.says, self.warns, self.model, self.facts = judge, flags, says, warns, model, facts

    def __str__(self) -> str:
        return f"{self.judge} {self.flags or 'without a flag'}".replace(" --", " ")[:110]

    def question(self, state: Path) -> Question:
        """The line with the model's folder in its place."""
        model = str(state / "models" / self.model / "master")
        start = {
            "vllm": ["serve", model],
            "sglang": ["serve", "--model-path", model, "--trust-remote-code"],
            "ray": ["start"],
        }[self.judge.partition("-")[0]]
        gpu = (("count", 1), ("platform", "cpu")) if self.judge == VLLM_CPU else H20
        return Question((*start, *self.flags.split()), (), gpu, str(self))


UNRECOGNISED = "exit 2: vllm: error: unrecognized arguments: "
CASES = [
    # vLLM: what is gone
    Case(VLLM, "--swap-space 4", says=UNRECOGNISED + "--swap-space 4"),
    Case(VLLM, "--enable-reasoning", says=UNRECOGNISED + "--enable-reasoning"),
    Case(VLLM, "--guided-decoding-backend xgrammar", says=UNRECOGNISED + "--guided-decoding-backend"),
    Case(VLLM, "--worker-use-ray", says=UNRECOGNISED + "--worker-use-ray"),
    Case(VLLM, "--disable-cascade-attn", warns="--disable-cascade-attn is deprecated and has no effect"),
    Case(VLLM, f"--speculative-config {MTP % 'step3p5_mtp'}", warns="`step3p5_mtp` is deprecated"),
    # vLLM: what is wrong
    Case(VLLM, "--tensor-parallel-sise 8", says=UNRECOGNISED + "--tensor-parallel-sise 8"),
    Case(VLLM, "--tensor-parallel 8", warns="--tensor-parallel is no flag, but the beginning of one"),
    Case(VLLM, "--tensor-parallel-size eight", says="invalid int value: 'eight'"),
    Case(VLLM, "--tool-call-parser step3p7 --enable-auto-tool-choice", says="invalid tool call parser: step3p7"),
    Case(VLLM, "--enable-auto-tool-choice", says="--enable-auto-tool-choice requires --tool-call-parser"),
    Case(VLLM, "--reasoning-parser step3p7", says="Reasoning parser 'step3p7' not found"),
    Case(VLLM, '--speculative-config {"methud":"mtp"}', says="methud\n  Unexpected keyword argument"),
    Case(VLLM, "--gpu-memory-utilization 1.5", says="Input should be less than or equal to 1"),
    Case(VLLM, "--max-model-len 300000", says="is greater than the derived max_model_len"),
    Case(VLLM, "--tensor-parallel-size 16", model=STEP3, says="World size (16) is larger than the number of"),
    Case(
        VLLM,
        "--tensor-parallel-size 16 --nnodes 2 --distributed-executor-backend ray",
        model=STEP3,
        says="nnodes > 1 can only be set when distributed executor backend is mp, uni or external_launcher",
    ),
    Case(
        VLLM,
        f"{DATA_PARALLEL} --data-parallel-start-rank 1 --headless --api-server-count 4",
        says="--api-server-count=4 cannot be used with --headless",
    ),
    # vLLM: what the planner counts on
    Case(VLLM, "", gpu_memory_utilization=0.92, shutdown_timeout=0, max_num_batched_tokens=8192),
    Case(VLLM, "--shutdown-timeout 120", shutdown_timeout=120),
    Case(VLLM, "", model=STEP3, multimodal=True),
    Case(VLLM, "--language-model-only", model=STEP3, multimodal=False),
    Case(VLLM, f"{DATA_PARALLEL} --data-parallel-start-rank 1 --headless", world_size=8),
    Case(VLLM, f"--speculative-config {MTP % 'mtp'}", speculative="mtp"),
    Case(VLLM, "", model=FLASH_FP8, quantization="fp8"),  # the checkpoint says what it is
    Case(VLLM_CPU, "--disable-log-requests", says=UNRECOGNISED + "--disable-log-requests"),
    # SGLang
    Case(SGLANG, "--enable-ep-moe", says="exit 2: sglang serve: error: unrecognized arguments: --enable-ep-moe"),
    Case(SGLANG, "--enable-deepep-moe", says="unrecognized arguments: --enable-deepep-moe"),
    Case(SGLANG, "--tensor-paralel 8", says="unrecognized arguments: --tensor-paralel 8"),
    Case(SGLANG, "--tp 8", warns="--tp is no flag, but the beginning of one", tensor=8),
    Case(SGLANG, "--tp-size eight", says="invalid int value: 'eight'"),
    Case(SGLANG, "--tool-call-parser step3p7", says="invalid choice: 'step3p7'"),
    Case(SGLANG, "--tp-size 8 --enable-dp-attention --dp 8", warns="'--enable-dp-attention' is deprecated"),
    Case(SGLANG, "--tp-size 8 --attn-dp-size 8", tensor=8),
    Case(SGLANG, "--tp-size 8 --attn-dp-size 3", says="AssertionError"),
    Case(SGLANG, "--disable-cuda-graph", warns="'--disable-cuda-graph' is deprecated"),
    Case(SGLANG, f"--tp-size 8 {EAGLE}", tensor=8),
    Case(SGLANG, f"--tp-size 4 --pp-size 2 {EAGLE}", says="Pipeline parallelism currently only supports EAGLE (non-"),
    Case(SGLANG, "--tp-size 4 --pp-size 2", tensor=4, pipeline=2),
    Case(SGLANG, "--tp-size 8 --ep 8", tensor=8, expert=8),
    Case(SGLANG, "", host="127.0.0.1", enable_metrics=False, watchdog_timeout=300),
    Case(SGLANG, "--enable-metrics --watchdog-timeout 900", enable_metrics=True, watchdog_timeout=900),
    Case(
        SGLANG,
        "--tp-size 16 --nnodes 2 --node-rank 1 --dist-init-addr 198.18.0.1:5000 --dist-timeout 3600",
        tensor=16,
        nodes=2,
    ),
    # Ray
    Case(RAY, "--head --num-gpu 8", says="No such option"),
    Case(RAY, "--head --num-gpus eight", says="'eight' is not a valid integer"),
    Case(RAY, f"{JOIN} --port 6379", says="should only be specified when starting head node"),
    Case(RAY, "--num-gpus 8", says="is a required flag unless starting a head node"),
    Case(
        RAY,
        "--head --node-ip-address 198.18.0.1 --node-manager-port 6380 --object-manager-port 6380",
        says="is trying to use a port number 6380 that is used by other components",
    ),
    Case(RAY, "--head --node-ip-address 198.18.0.1 --num-gpus 8", gpus=8, client_port=10001),
]  # fmt: skip


@pytest.fixture(scope="session")
def verdict_on(judge_of: Callable[[str], Judge], state: Path) -> Callable[[Case], Verdict]:
    """Gives the verdict on a case; each judge is started once for all of its own."""
    given: dict[str, dict[Question, Verdict]] = {}

    def find(case: Case) -> Verdict:
        if case.judge not in given:
            lines = [other.question(state) for other in CASES if other.judge == case.judge]
            given[case.judge] = judge_of(case.judge).ask(lines).by_question
        return given[case.judge][case.question(state)]

    return find


@pytest.mark.parametrize("case", CASES, ids=str)
def test_judge_says(case: Case, verdict_on: Callable[[Case], Verdict]) -> None:
    assert case.judge in PROGRAMS
    verdict = verdict_on(case)
    if case.says is not None:
        assert not verdict.accepted, f"accepted, though it is wrong: {verdict}"
        assert case.says in (verdict.error or "")
        return
    assert verdict.accepted, str(verdict)
    found = {key: verdict.facts.get(key) for key in case.facts}
    assert found == case.facts
    deprecated = [text for text in verdict.warnings if "deprecated" in text or "is no flag" in text]
    assert any(case.warns in text for text in deprecated) if case.warns else deprecated == [], str(verdict)
