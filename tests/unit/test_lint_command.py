"""Found commands: every published one with its findings, each finding by itself, and input that is no command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.catalogue import DEFAULT_DIRECTORY, Catalogue
from stepladder.errors import PlanRefusedError
from stepladder.found_command import Finding, parse
from stepladder.lint_command import findings, identify, main, todays
from stepladder.planner import make_plan
from stepladder.request import parse_request
from stepladder.show import shell

CATALOGUE = Catalogue()
SEEDS = yaml.safe_load((Path(__file__).resolve().parents[1] / "golden" / "seeds.yml").read_text())["cases"]
NO_ENGINE = "there is nothing to run instead: the text starts no engine."

# A published command's findings, and what would be run today.
SLOW = "warning: VLLM_ENGINE_READY_TIMEOUT_S"
STEP3 = ["warning: --served-model-name", "warning: --max-num-batched-tokens 4096", SLOW]
TWO_NODES = [*STEP3, "warning: VLLM_HOST_IP"]
TP16 = ["error: TP16 on 2 x 8 GPUs", *TWO_NODES, "note: --port $PORT_SERVING"]
DP16 = ["error: a backslash at the end", "error: --data-parallel-size 16"]
SGLANG_NODES = [
    "warning: python -m sglang.launch_server", "warning: --host", "warning: --dist-init-addr",
    "note: stepfun-ai/step3", "note: --dist-timeout",
]  # fmt: skip
COOKBOOK = ["warning: --trust-remote-code", "warning: --host", "note: stepfun-ai/Step-3.5-Flash"]
SELF_LLM = ["warning: /root/autodl-tmp/stepfun-ai/Step-3.5-Flash", "warning: --disable-cascade-attn"]
PUBLISHED: dict[str, tuple[str, list[str]]] = {
    "step3-bf16-vllm-tp16": ("ray TP16, the layout as found", TP16),
    "step3-bf16-vllm-tp16-text-only": ("ray TP16, the layout as found", TP16),
    "step3-ray-head": (NO_ENGINE, ["note: ray start"]),
    "step3-ray-worker": (NO_ENGINE, ["note: ray start"]),
    "step3-bf16-vllm-dp16-h20-96": (
        "ray TP16, the layout chosen by auto", [*DP16, "error: GPU memory", *TWO_NODES],
    ),
    "step3-bf16-vllm-dp16-h20-141": ("ray TP1xDP16, the layout as found", [*DP16, *TWO_NODES]),
    "step3-bf16-vllm-dp16-as-dp2-tp8": (
        "ray TP16, the layout chosen by auto", [*DP16, "error: GPU memory", *TWO_NODES],
    ),
    "step3-fp8-vllm-tp8": ("single TP8, the layout as found", ["error: a backslash at the end", *STEP3]),
    "step3-fp8-vllm-dp8": (
        "single TP1xDP8, the layout as found",
        ["error: a backslash at the end", *STEP3, "note: --api-server-count"],
    ),
    "step3-vllm-install": (NO_ENGINE, ["warning: uv pip of a nightly"]),
    "step3-sglang-install": (NO_ENGINE, ["note: pip3 install"]),
    "step3-bf16-sglang-rank-0": ("dist_init TP16, the layout as found", SGLANG_NODES),
    "step3-bf16-sglang-rank-1": ("dist_init TP16, the layout as found", SGLANG_NODES),
    "step3-fp8-sglang-tp8": (
        "single TP8, the layout as found",
        ["warning: python -m sglang.launch_server", "warning: --served-model-name", "warning: --host"],
    ),
    "flash-pip-upgrade": (NO_ENGINE, ["note: python -m pip"]),
    "flash-pip-mirror": (NO_ENGINE, ["note: pip config"]),
    "flash-modelscope-install": (NO_ENGINE, ["note: pip install"]),
    "flash-vllm-install-nightly": (NO_ENGINE, ["warning: pip install of a nightly"]),
    "flash-vllm-upgrade-nightly": (NO_ENGINE, ["warning: pip install of a nightly"]),
    "flash-download": (NO_ENGINE, ["warning: cache_dir", "note: snapshot_download"]),
    "flash-reference-check": (NO_ENGINE, ["error: python transformers_inference.py"]),
    "flash-fp8-vllm-tp8": (
        "single TP8+EP, the layout with whole experts",
        [*SELF_LLM, "warning: --quantization fp8", SLOW],
    ),
    "flash-bf16-vllm-tp8-ep-mtp": (
        "single TP8+EP, the layout as found",
        [
            *SELF_LLM, "warning: --hf-overrides", "warning: method step3p5_mtp",
            SLOW, "note: num_speculative_tokens 1",
        ],
    ),
    "flash-sglang-pull-nvidia": (NO_ENGINE, ["warning: lmsysorg/sglang:dev-pr-18084"]),
    "flash-sglang-container-nvidia": (NO_ENGINE, ["warning: lmsysorg/sglang:dev-pr-18084", "note: bash"]),
    "flash-sglang-pull-mi300x": (NO_ENGINE, ["note: docker pull"]),
    "flash-sglang-pull-mi300x-same": (NO_ENGINE, ["note: docker pull"]),
    "flash-sglang-pull-mi350x": (NO_ENGINE, ["note: docker pull"]),
    "flash-sglang-container-mi300x": (NO_ENGINE, ["note: bash"]),
    "flash-sglang-container-mi350x": (NO_ENGINE, ["note: bash"]),
    "flash-sglang-reasoning": ("single TP4+EP, the layout as found", [*COOKBOOK, "note: --tool-call-parser"]),
    "flash-sglang-tools": ("single TP4+EP, the layout as found", COOKBOOK),
    "flash-sglang-benchmark": (
        "single TP4+EP, the layout as found", [*COOKBOOK, "note: --reasoning-parser", "note: --tool-call-parser"],
    ),
    "flash37-sglang-pull": (NO_ENGINE, ["warning: lmsysorg/sglang:dev-pr-18084"]),
}  # fmt: skip


def briefly(found: list[Finding]) -> list[str]:
    return [f"{finding.severity}: {finding.what}" for finding in found]


def lint(text: str, gpu: str = "h20-96", nodes: int = 1, catalogue: Catalogue = CATALOGUE) -> list[Finding]:
    return findings(parse(text), gpu, nodes, catalogue)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed["name"])
def test_published_commands(seed: dict[str, Any]) -> None:
    gpu, nodes = seed["where"]["gpu"], seed["where"]["nodes"]
    how, expected = PUBLISHED[seed["name"]]
    assert briefly(lint(seed["command"], gpu, nodes)) == expected
    assert todays(parse(seed["command"]), gpu, nodes, CATALOGUE)[1] == how


def test_no_published_command_is_left_out() -> None:
    assert {seed["name"] for seed in SEEDS} == PUBLISHED.keys()


def test_programs_around_the_published_commands() -> None:
    for client in (
        "python3 -m sglang.bench_serving --backend sglang --num-prompts 10",
        "python3 -m sglang.test.few_shot_gsm8k --num-questions 200",
    ):
        assert briefly(lint(client)) == [f"note: {' '.join(client.split()[:3]).replace('python3', 'python')}"]


# One thing wrong at a time, in a command that is right otherwise.
FLASH = (
    "VLLM_ENGINE_READY_TIMEOUT_S=5400 vllm serve /m/Step-3.5-Flash --served-model-name s -tp 8 -ep "
    "--reasoning-parser step3p5 --enable-auto-tool-choice --tool-call-parser step3p5 --trust-remote-code "
)
FP8 = FLASH.replace("3.5-Flash", "3.5-Flash-FP8").replace("VLLM_ENGINE_READY_TIMEOUT_S=5400 ", "")
SERVE3 = (
    "VLLM_ENGINE_READY_TIMEOUT_S=5400 VLLM_HOST_IP=192.0.2.1 RAY_ADDRESS=192.0.2.1:6379 vllm serve /m/step3 "
    "--served-model-name step3 --reasoning-parser step3 --enable-auto-tool-choice --tool-call-parser step3 "
    "--trust-remote-code "
)
SGLANG = (
    "sglang serve --model-path /m/Step-3.5-Flash --served-model-name s --tp 8 --host 0.0.0.0 --trust-remote-code "
    "--tool-call-parser step3p5 --reasoning-parser step3p5 "
)
SGLANG3 = (
    "sglang serve --model-path /m/step3 --served-model-name s --tp 16 --host 0.0.0.0 --trust-remote-code "
    "--tool-call-parser step3 --reasoning-parser step3 --dist-timeout 3600 "
)
BOX = "docker run --rm --gpus all --ipc=host --network=host -v /m:/m:ro lmsysorg/sglang:v0.5.23 "
CONFIGURATION = "run against vLLM 0.33.0's configuration classes"
ONE = [
    (FLASH, "h20-96", 1, []),
    (FP8, "h20-96", 1, []),
    (SGLANG, "h20-96", 1, []),
    (SERVE3 + "-tp 16 --distributed-executor-backend ray", "h20-96", 2, []),
    (SERVE3 + "-dp 2 -tp 8 -dpl 1 -dpb ray -dpa 192.0.2.1", "h20-96", 2, []),
    (SERVE3 + "-tp 16 -n 2 -r 1 --master-addr 192.0.2.1 --headless", "h20-96", 2, []),
    (SGLANG3 + "--nnodes 2 --node-rank 1 --dist-init-addr 192.0.2.1:5000", "h20-96", 2, []),
    (BOX + SGLANG, "h20-96", 1, []),
    (FLASH + "--swap-space 4", "h20-96", 1, ["error: --swap-space"]),
    (FLASH + "--moe-backend x", "h20-96", 1, ["warning: --moe-backend"]),
    (FLASH + "--moe_backend x", "h20-96", 1, ["warning: --moe_backend"]),
    (FLASH + "-tp 4", "h200", 1, ["warning: -tp 4"]),
    (FLASH + "--headless --api-server-count 4", "h20-96", 1, ["error: --headless with --api-server-count"]),
    (FLASH + "--quantization gguf", "h20-96", 1, ["error: --quantization gguf"]),
    (FLASH + "--quantization fp_quant", "h20-96", 1, ["error: --quantization fp_quant"]),
    (FP8 + "-q fp8", "h20-96", 1, ["note: --quantization fp8"]),
    (FP8.replace("-ep", ""), "h20-96", 1, ["error: quantisation blocks"]),
    (FLASH + "--speculative-config x", "h20-96", 1, ["error: --speculative-config x"]),
    (
        FLASH + """-sc '{"method": "mtp", "num_speculative_tokens": 4}'""", "h20-96", 1,
        ["error: num_speculative_tokens 4"],
    ),
    (FLASH + "--speculative-config.method mtp", "h20-96", 1, []),
    (SERVE3 + "-tp 8 -sc '{}'", "h200", 1, ["error: --speculative-config {}", "error: multi-token prediction"]),
    (FLASH.replace("vllm serve", "python3.12 -m vllm.entrypoints.openai.api_server --model"), "h20-96", 1,
     ["warning: python -m vllm.entrypoints.openai.api_server"]),
    (FLASH.replace("tool-call-parser step3p5", "tool-call-parser step3p7"), "h20-96", 1,
     ["error: --tool-call-parser step3p7"]),
    (FLASH.replace("--enable-auto-tool-choice", ""), "h20-96", 1, ["error: --tool-call-parser"]),
    (FLASH.replace("--tool-call-parser step3p5", ""), "h20-96", 1,
     ["error: --enable-auto-tool-choice", "note: --tool-call-parser"]),
    (FLASH.replace("step3p5 --en", "none --en"), "h20-96", 1, []),
    (FLASH.replace("/m/Step-3.5-Flash", "/m/stepfun-ai/Step-3___5-Flash"), "h20-96", 1,
     ["warning: /m/stepfun-ai/Step-3___5-Flash"]),
    (FLASH.replace("/m/Step-3.5-Flash", "/m/Step-4"), "h20-96", 1, ["error: unknown model"]),
    (FLASH.replace("/m/Step-3.5-Flash", ""), "h20-96", 1, ["error: the model"]),
    ("VLLM_PORT=tcp://10.0.0.1:8000 " + FLASH, "h20-96", 1, ["error: VLLM_PORT"]),
    ("VLLM_SERVER_DEV_MODE=1 HOST_IP=10.0.0.1 " + FLASH, "h20-96", 1,
     ["warning: VLLM_SERVER_DEV_MODE=1", "warning: HOST_IP"]),
    ("VLLM_ROCM_USE_AITER=1 " + FP8, "mi300x", 1, ["error: VLLM_ROCM_USE_AITER=1"]),
    ("VLLM_ROCM_USE_AITER=1 VLLM_ROCM_USE_AITER_MOE=0 " + FP8, "mi300x", 1, []),
    ("VLLM_ROCM_USE_AITER=1 " + FLASH, "mi300x", 1, ["warning: VLLM_ROCM_USE_AITER=1"]),
    (FLASH.replace("-ep ", ""), "mi300x", 1, ["error: expert parallelism on AMD"]),
    (FP8, "b200", 1, []),
    ("VLLM_USE_FLASHINFER_MOE_FP8=0 " + FP8, "b200", 1, ["note: VLLM_USE_FLASHINFER_MOE_FP8"]),
    (FLASH, "cpu", 1, ["error: TP8+EP on 1 x 1 GPUs", "error: GPUs"]),
    (SERVE3 + "-tp 16 --distributed-executor-backend ray --nnodes 2 -r 0 --master-addr a", "h20-96", 2,
     ["error: --nnodes with Ray"]),
    (SERVE3 + "-tp 16 --nnodes 2", "h20-96", 2, ["error: --nnodes without --node-rank and --master-addr"]),
    (SERVE3 + "-tp 16 -n 3 -r 0 --master-addr a", "h20-96", 2, ["error: --nnodes 3"]),
    (SERVE3 + "-tp 8 -dp 2 --distributed-executor-backend ray", "h20-96", 2,
     ["error: --distributed-executor-backend ray"]),
    (SERVE3 + "-tp 8 -dp 2 --data-parallel-rank 1 --data-parallel-external-lb", "h20-96", 2, []),
    (SERVE3 + "-tp 8 -dp 2 -dpl 1", "h20-96", 2, ["error: --data-parallel-size-local"]),
    (SERVE3 + "-tp 12 --distributed-executor-backend ray", "h20-96", 2, ["error: GPUs", "error: attention heads"]),
    (SERVE3.replace("RAY_ADDRESS=192.0.2.1:6379 ", "") + "-tp 16 --distributed-executor-backend ray", "h20-96", 2,
     ["warning: RAY_ADDRESS"]),
    (SGLANG + "--enable-ep-moe --enable_dp_attention", "h20-96", 1,
     ["error: --enable-ep-moe", "warning: --enable_dp_attention"]),
    (SGLANG3, "h20-96", 2, ["error: --tp 16"]),
    (SGLANG3 + "--nnodes 2 --node-rank 0", "h20-96", 2, ["error: --nnodes without --dist-init-addr"]),
    (SGLANG.replace("--tp 8", "--tp 4 --dp 2"), "h200", 1, ["error: data parallel"]),
    ("trtllm-serve /m/Step-3.5-Flash --tp_size 8 --trust_remote_code", "mi300x", 1, ["error: trtllm-serve"]),
    ("trtllm-serve /m/Step-3.5-Flash --tp_size 8 --trust_remote_code", "h200", 1, []),
    ("trtllm-serve /m/step3 --tp_size 8 --trust_remote_code", "h200", 1, ["error: TensorRT-LLM and stepfun-ai/step3"]),
    (BOX.replace("--gpus all", "") + SGLANG, "h20-96", 1, ["error: --gpus"]),
    (BOX.replace("--ipc=host", "").replace("--network=host", "") + SGLANG, "h20-96", 1,
     ["warning: --ipc", "warning: --network"]),
    (BOX.replace("v0.5.23", "latest") + SGLANG, "h20-96", 1, ["warning: lmsysorg/sglang:latest"]),
    (BOX.replace(":v0.5.23", "") + SGLANG, "h20-96", 1, ["warning: lmsysorg/sglang"]),
    (BOX.replace("-v /m:/m:ro", "") + SGLANG, "h20-96", 1, ["error: /m/Step-3.5-Flash"]),
    (BOX + SGLANG3 + "--nnodes 2 --node-rank 0 --dist-init-addr h:5000", "h20-96", 2, ["warning: --ulimit"]),
    (BOX.replace("--gpus all", "--device=/dev/kfd") + SGLANG + "--ep 8", "mi300x", 1, ["error: --device"]),
    ("modelscope download a/b --cache_dir /x", "h20-96", 1, ["warning: --cache-dir"]),
    ("modelscope download a/b --local-dir /x", "h20-96", 1, ["note: modelscope download"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "gpu", "nodes", "expected"), ONE)
def test_each_finding(text: str, gpu: str, nodes: int, expected: list[str]) -> None:
    assert briefly(lint(text, gpu, nodes)) == expected


FULL = [
    (
        SERVE3 + "-tp 16", 2,
        Finding(
            "error", "TP16 on 2 x 8 GPUs",
            "vLLM stops: 'World size (16) is larger than the number of available GPUs (8) in this node'",
            "Add --nnodes, --node-rank and --master-addr on each node, or --distributed-executor-backend ray.",
            CONFIGURATION,
        ),
    ),
    (
        SERVE3 + "-tp 8 -dp 2 --distributed-executor-backend ray", 2,
        Finding(
            "error", "--distributed-executor-backend ray",
            "with the data parallel backend mp the ranks wait 601 s for each other on 127.0.0.1, then DistStoreError",
            "Write --data-parallel-backend ray instead of it, with --data-parallel-size-local 1 and "
            "--data-parallel-address HEAD.",
            "vllm issue 44878",
        ),
    ),
    (
        FP8.replace("-ep", ""), 1,
        Finding(
            "error", "quantisation blocks",
            "expert width 1280 over 8 ranks is 160, not a multiple of the fp8 block of 128",
            "Set expert parallelism: experts stay whole then.", "the planner's rules",
        ),
    ),
    (
        FLASH.replace("/m/Step-3.5-Flash", "stepfun-ai/Step-3.5-Flahs"), 1,
        Finding(
            "error", "unknown model", "'stepfun-ai/Step-3.5-Flahs'",
            "Did you mean 'stepfun-ai/Step-3.5-Flash'? Known: stepfun-ai/Step-3.5-Flash, "
            "stepfun-ai/Step-3.5-Flash-FP8, stepfun-ai/Step-3.5-Flash-INT8, stepfun-ai/Step-3.5-Flash-Int4, "
            "stepfun-ai/Step-3.7-Flash, "
            "stepfun-ai/Step-3.7-Flash-FP8, stepfun-ai/Step-3.7-Flash-GGUF, stepfun-ai/Step-3.7-Flash-NVFP4, "
            "stepfun-ai/step3, stepfun-ai/step3-fp8, stepladder/tiny-step3p5.",
            "catalog/models",
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "nodes", "expected"), FULL, ids=[case[2].what for case in FULL])
def test_a_finding_says_what_why_and_how_to_mend_it(text: str, nodes: int, expected: Finding) -> None:
    assert lint(text, nodes=nodes)[0] == expected


def rank(number: int, more: str = "") -> str:
    return SGLANG3 + f"--nnodes 2 --node-rank {number} --dist-init-addr 192.0.2.1:5000 {more}\n"


FOLLOWERS = [
    ("# node 1\n" + rank(0) + "\n# node 2\n" + rank(1), []),
    (rank(0) + rank(1, "--context-length 4096"), ["error: --context-length"]),
    (rank(0) + rank(1).replace("/m/", "/n/"), ["error: the model"]),
    (rank(0) + rank(0), ["error: --node-rank 0"]),
    (rank(0) + rank(1).replace("--tool-call-parser step3", ""), ["error: --tool-call-parser"]),
]


@pytest.mark.parametrize(("text", "expected"), FOLLOWERS)
def test_commands_of_one_replica_differ_in_rank_alone(text: str, expected: list[str]) -> None:
    assert briefly(lint(text, nodes=2)) == expected


def test_a_command_is_read_however_it_is_written() -> None:
    plain = "vllm serve M --tensor-parallel-size 8 --enable-expert-parallel --hf-overrides '{\"a b\": 1}'"
    for text in (
        "$ vllm serve M -tp 8 -ep --hf_overrides='{\"a b\": 1}'",
        "/opt/v/bin/vllm serve --tensor_parallel_size=8 M --enable_expert_parallel --hf-overrides '{\"a b\": 1}'",
        "vllm serve M \\\n  -tp 8 \\\n  # a comment\n",
        'docker run -it --gpus all vllm/vllm-openai:v0.33.0 M -tp 8 -ep --hf-overrides "{\\"a b\\": 1}"',
        "docker run --entrypoint vllm x:1 serve M -tp 8 -ep --hf-overrides '{\"a b\": 1}'",
        "docker run x:1 bash -lc 'vllm serve M -tp 8 -ep'",
        "sudo -E vllm serve M --host $(hostname -I | cut -d ' ' -f 1) -tp 8 -ep --hf-overrides '{\"a b\": 1}'",
        "cd /x && export A=1; A=2 nohup vllm serve M -tp 8 -ep > log 2>&1 &",
        "python -m vllm.entrypoints.openai.api_server --model M -tp 8 -ep",
    ):
        found, expected = parse(text), parse(plain)
        assert (found.engine, found.model, found.parallel.tensor) == ("vllm", "M", 8), text
        common = {flag.name: flag.value for flag in found.flags if flag.name not in {"--model", "--host"}}
        assert common.items() <= {flag.name: flag.value for flag in expected.flags}.items(), text


def test_environment_before_the_command_is_read() -> None:
    text = "export A=1 B=2\nB=3\nenv C=4 D='5 6' sglang serve M"
    assert parse(text).environment == {"A": "1", "B": "3", "C": "4", "D": "5 6"}
    assert parse("E=7 docker run -e E -e F=8 --env G x:1 sglang serve M").environment == {"E": "7", "F": "8", "G": ""}


REFERENCES = [
    ("stepfun-ai/Step-3.5-Flash", "step-3.5-flash/bf16"),
    ("/x/stepfun-ai/Step-3___5-Flash-FP8/", "step-3.5-flash/fp8"),
    ("/x/models/stepfun-ai--Step-3.7-Flash-NVFP4/snapshots/master", "step-3.7-flash/nvfp4"),
    (f"/hub/models--stepfun-ai--step3/snapshots/{'a1' * 20}", "step3/bf16"),
    ("step3-fp8", "step3/fp8"),
    ("/x/step3-old", None),
    ("/", None),
    ("", None),
]


@pytest.mark.parametrize(("reference", "expected"), REFERENCES)
def test_a_model_is_known_by_its_id_or_folder(reference: str, expected: str | None) -> None:
    found = identify(reference, CATALOGUE)
    assert (f"{found[0].name}/{found[1]}" if found else None) == expected


BROKEN = [
    ("", ["error: the command"]),
    ("   \n\n# nothing\n", ["error: the command"]),
    ("\\", ["error: a backslash at the end", "error: the command"]),
    ("A=1", ["error: the command"]),
    ("sudo", ["error: the command"]),
    ("hello world", ["error: hello world"]),
    ("vllm", ["error: vllm"]),
    ("vllm serve 'x", ["error: quotes"]),
    ('vllm serve "', ["error: quotes"]),
    ("x" * 100_000, ["error: the command"]),
    ("vllm serve \\\n" * 8_000, ["error: the command"]),
    ("bash -c 'vllm serve \"'", ["error: quotes"]),
    ("python -m", ["error: python"]),
    ("bash -c", ["error: bash"]),
    ("docker run", ["error: docker run"]),
    ("docker run --gpus", ["error: docker run"]),
    ("docker run --gpus all --ipc=host --network=host x:1", ["error: docker run"]),
    ("\x1b[31m\x00 \udcff 日本語", ["error: [31m ?"]),
    (FLASH.replace("--trust", "\u2013trust"), ["error: \u2013trust-remote-code"]),
    (FLASH.replace(" --trust", " \\ \n --trust"), ["error: a space after a backslash at a line's end"]),
    (FLASH.replace(" --trust", " \\n --trust"), ["error: a backslash followed by n"]),
    (FLASH + "--hf-overrides \u201c{}\u201d", ["error: \u201c"]),
    (FLASH + "--max-num-batched-tokens many --port", []),
    (FLASH + "--speculative-config " + "[" * 3_000, None),
    (FLASH + "-dp 999999999 -pp 999999999", None),
    ("; ; && || ()", ["error: the command"]),
]


@pytest.mark.parametrize(("text", "expected"), BROKEN, ids=[repr(case[0][:24]) for case in BROKEN])
def test_what_is_no_command_is_said_and_never_raises(text: str, expected: list[str] | None) -> None:
    found = briefly(lint(text))
    assert todays(parse(text), "h20-96", 1, CATALOGUE)[1]
    assert any(line.startswith("error: ") for line in found) if expected is None else found == expected


def own_commands() -> list[tuple[str, int, str]]:
    """Our own plans as a shell would run them; Ray's processes are left out, they start no engine."""
    texts = []
    for model in CATALOGUE.models.values():
        for variant, engine, gpu, nodes, topology in [
            (v, e, g, n, t)
            for v in model.variants
            for e, topologies in (("vllm", ("auto", "mp")), ("sglang", ("auto",)), ("tensorrt_llm", ("auto",)))
            for g in ("h20-96", "h200", "b200", "gb300", "mi355x")
            for n in (1, 2)
            for t in topologies
        ]:
            wish = {"model": model.name, "variant": variant, "engine": engine, "topology": topology}
            where = [{"name": f"n{i}", "address": f"192.0.2.{i + 1}", "gpu": gpu} for i in range(nodes)]
            try:
                plan = make_plan(parse_request({"deployment": wish, "nodes": where}), CATALOGUE)
            except PlanRefusedError:
                continue
            commands = [shell(node.processes[-1]) for node in plan.nodes]
            texts.append((gpu, len(plan.nodes), "\n".join(c for c in commands if " start" not in c)))
    return texts


def test_our_own_commands_have_nothing_wrong_with_them() -> None:
    own = own_commands()
    assert len(own) > 100
    bad = {text: found for gpu, nodes, text in own if (found := briefly(lint(text, gpu, nodes)))}
    assert bad == {}


@pytest.fixture
def listed(tmp_path: Path) -> Catalogue:
    """A catalogue with a list of vLLM's flags."""
    for path in DEFAULT_DIRECTORY.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if (tmp_path / "flags").exists():
        (tmp_path / "flags").unlink()
    (tmp_path / "flags").mkdir()
    known = "--served-model-name -tp --enable-expert-parallel -ep --reasoning-parser --enable-auto-tool-choice"
    known += " --tool-call-parser --trust-remote-code --max-model-len --speculative-config"
    (tmp_path / "flags" / "vllm-0.33.0.txt").write_text("# from its parser\n" + known.replace(" ", "\n") + "\n")
    return Catalogue(tmp_path)


UNKNOWN = [
    (FLASH, []),
    (FLASH + "--speculative-config.method mtp --max_model_len 4096", []),
    (FLASH + "--swap-space 4", ["error: --swap-space"]),
    (FLASH + "--max-modellen 4096", ["error: --max-modellen"]),
    (FLASH + "--zzz", ["error: --zzz"]),
    (SGLANG + "--zzz", []),
]


@pytest.mark.parametrize(("text", "expected"), UNKNOWN)
def test_flags_that_the_parser_does_not_have(listed: Catalogue, text: str, expected: list[str]) -> None:
    assert briefly(lint(text, catalogue=listed)) == expected


LISTED = [
    (FLASH + "--tensor-parallel-sise 8", "error: --tensor-parallel-sise", "Did you mean --tensor-parallel-size?"),
    (FLASH + "--max-num 3", "error: --max-num", "Did you mean --max-num-seqs?"),  # several begin so
    (SGLANG + "--contxt-length 4096", "error: --contxt-length", "Did you mean --context-length?"),
    (SGLANG + "--zzz", "error: --zzz", "Leave it out."),
]


@pytest.mark.parametrize(("text", "expected", "mend"), LISTED)
def test_the_catalogues_lists_know_every_flag(text: str, expected: str, mend: str) -> None:
    (finding,) = [found for found in lint(text) if found.what.startswith("--") and found.severity == "error"]
    assert (f"{finding.severity}: {finding.what}", finding.mend) == (expected, mend)


@pytest.mark.parametrize("name", ["a b", "a" * 300, "-x", "\u00fc"])
def test_a_name_that_we_would_not_serve_under_is_left_to_the_model(name: str) -> None:
    assert "error: --served-model-name" not in briefly(lint(f"{FLASH} --served-model-name '{name}'"))


def test_the_beginning_of_one_flag_is_that_flag() -> None:
    assert briefly(lint(FLASH + "--max-model 4096")) == briefly(lint(FLASH))


def test_the_nearest_flag_is_suggested(listed: Catalogue) -> None:
    (finding,) = lint(FLASH + "--max-modellen 4096", catalogue=listed)
    assert finding[2:] == (
        "vLLM 0.33.0 has no such flag and stops", "Did you mean --max-model-len?", "catalog/flags/vllm-0.33.0.txt",
    )  # fmt: skip


def test_text_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SGLANG, "--gpu", "h20-96"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("0 errors, 0 warnings, 0 notes\n\nToday: single TP8, the layout as found\n")
    assert "node-1, sglang-0: serves the API\nenv \\\n" in text
    assert main([SGLANG + "--enable-ep-moe", "--gpu", "h20-96"]) == 1
    assert capsys.readouterr().out.startswith(
        "1 error, 0 warnings, 0 notes\n\nerror: --enable-ep-moe\n"
        "  removed. Instead: --ep N. [SGLang 0.5.23 server_args.py]\n"
    )


def test_json_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((BOX + SGLANG).encode() + b"--enable-ep-moe \xff")))
    assert main(["-", "--gpu", "h20-96", "--format", "json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["errors"], told["command"]["image"]) == (1, "lmsysorg/sglang:v0.5.23")
    assert told["findings"][0]["what"] == "--enable-ep-moe"
    assert told["today"]["processes"][0]["argv"][-3:] == ["--enable-metrics", "--watchdog-timeout", "900"]


USAGE = [
    ([], "the following arguments are required: command, --gpu"),
    (["x"], "the following arguments are required: --gpu"),
    (["x", "--gpu", "h200", "--nodes", "0"], "argument --nodes: expected a number from 1 to 999, found '0'"),
    (["x", "--gpu", "h200", "--format", "xml"], "argument --format: invalid choice: 'xml'"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_gpu_is_a_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm serve x", "--gpu", "h20"]) == 2
    assert "unknown GPU type: 'h20'. Did you mean 'h200'?" in capsys.readouterr().err
