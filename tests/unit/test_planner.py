"""Plans against the commands that the engines take today, and refusals with their exact reasons."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from stepladder.catalogue import Catalogue
from stepladder.errors import PlanRefusedError
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import parse_request
from stepladder.show import human
from stepladder.units import release_processes

CATALOGUE = Catalogue()
VLLM = "/var/lib/stepladder/venvs/vllm-0.33.0-cuda-"
STEP3 = "/var/lib/stepladder/models/stepfun-ai--step3/master"
STEP3_FLAGS = "--reasoning-parser step3 --enable-auto-tool-choice --tool-call-parser step3 --trust-remote-code"
VLLM_MEMORY = "--max-num-batched-tokens 8192 --gpu-memory-utilization 0.9 --shutdown-timeout 120"


def nodes(count: int, gpu: str = "h20-96", **more: Any) -> list[dict[str, Any]]:
    return [
        {"name": f"n{i}", "address": f"198.18.0.{i + 1}", "gpu": gpu, "interface": "eth1", **more} for i in range(count)
    ]


def plan_for(count: int = 2, gpu: str = "h20-96", **deployment: Any) -> Plan:
    wish = {"model": "step3", "engine": "vllm", **deployment}
    return make_plan(parse_request({"deployment": wish, "nodes": nodes(count, gpu)}), CATALOGUE)


def command(plan: Plan, node: int, process: int) -> str:
    """A process's command without the directory of its environment."""
    argv = plan.nodes[node].processes[process].argv
    return " ".join([argv[0].rsplit("/", 1)[-1], *argv[1:]])


COMMANDS = [
    pytest.param(
        {}, 0, -1,
        f"vllm serve {STEP3} --served-model-name step3 --host 0.0.0.0 --port 8000 --tensor-parallel-size 16 "
        f"--distributed-executor-backend ray {STEP3_FLAGS} {VLLM_MEMORY}",
        id="step3-bf16-ray-tp16",
    ),
    pytest.param(
        {"parallel": "TP8xDP2"}, 0, -1,
        f"vllm serve {STEP3} --served-model-name step3 --host 0.0.0.0 --port 8000 --tensor-parallel-size 8 "
        "--data-parallel-size 2 --data-parallel-size-local 1 --data-parallel-backend ray "
        f"--data-parallel-address 198.18.0.1 --api-server-count 4 {STEP3_FLAGS} {VLLM_MEMORY}",
        id="step3-bf16-ray-dp2-tp8",
    ),
    pytest.param(
        {"topology": "mp"}, 1, 0,
        f"vllm serve {STEP3} --served-model-name step3 --headless --tensor-parallel-size 16 --nnodes 2 --node-rank 1 "
        f"--master-addr 198.18.0.1 --master-port 29501 {STEP3_FLAGS} "
        "--max-num-batched-tokens 8192 --gpu-memory-utilization 0.9",
        id="step3-bf16-mp-follower",
    ),
    pytest.param(
        {"topology": "mp", "parallel": "TP8xDP2"}, 1, 0,
        f"vllm serve {STEP3} --served-model-name step3 --headless --tensor-parallel-size 8 --data-parallel-size 2 "
        "--data-parallel-size-local 1 --data-parallel-address 198.18.0.1 --data-parallel-rpc-port 13345 "
        f"--data-parallel-start-rank 1 {STEP3_FLAGS} --max-num-batched-tokens 8192 --gpu-memory-utilization 0.9",
        id="step3-bf16-mp-data-parallel-follower",
    ),
    pytest.param(
        {"engine": "sglang"}, 1, 0,
        f"sglang serve --model-path {STEP3} --served-model-name step3 --tp-size 16 --nnodes 2 --node-rank 1 "
        "--dist-init-addr 198.18.0.1:5000 --dist-timeout 3600 --host 0.0.0.0 --port 30000 --trust-remote-code "
        "--tool-call-parser step3 --reasoning-parser step3 --mem-fraction-static 0.783 --enable-metrics "
        "--watchdog-timeout 900",
        id="step3-bf16-sglang-dist-init-rank-1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wish", "node", "process", "expected"), COMMANDS)
def test_command(wish: dict[str, Any], node: int, process: int, expected: str) -> None:
    assert command(plan_for(**wish), node, process) == expected


def test_ray_runs_on_every_node_and_the_server_on_the_head_alone() -> None:
    plan = plan_for()
    assert [[p.name for p in node.processes] for node in plan.nodes] == [["ray-0", "vllm-0"], ["ray-0"]]
    head, worker = (node.processes[0] for node in plan.nodes)
    assert head.argv[0].startswith(VLLM)
    assert "--head --port 6379 --dashboard-host 127.0.0.1 --num-gpus 8" in " ".join(head.argv)
    assert "--address 198.18.0.1:6379" in " ".join(worker.argv)
    assert (head.env["RAY_AUTH_MODE"], head.env["VLLM_HOST_IP"], worker.env["VLLM_HOST_IP"]) == (
        "token", "198.18.0.1", "198.18.0.2",
    )  # fmt: skip
    assert plan.nodes[0].processes[1].env["RAY_ADDRESS"] == "198.18.0.1:6379"


def test_ci_smoke_of_step_3_5_flash_fp8() -> None:
    plan = plan_for(1, "h200", model="step-3.5-flash", variant="fp8", parallel="TP4+EP")
    text = command(plan, 0, 0)
    assert "--tensor-parallel-size 4 --enable-expert-parallel" in text
    assert "--reasoning-parser step3p5 --enable-auto-tool-choice --tool-call-parser step3p5" in text
    assert "--quantization" not in text  # the checkpoint says what it is
    assert "--disable-cascade-attn" not in text
    assert plan.nodes[0].processes[0].env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert plan.not_deployable is None


def test_data_parallel_ranks_of_experts_are_refused_on_the_cpu() -> None:
    with pytest.raises(PlanRefusedError) as refused:
        plan_for(2, "cpu", model="tiny-step3p5", parallel="TP1xDP2")
    assert [str(violation) for violation in refused.value.violations] == [
        "data parallel: TP1xDP2 on vLLM 0.32.0 (cpu): its CPU communicator has no all_gatherv, with which the ranks "
        "share their tokens. Use deployment_replicas instead of data parallel ranks.",
        "nearest layout: instead of TP1xDP2. TP2 works here.",
    ]


def test_two_replicas_share_a_node() -> None:
    plan = plan_for(1, "h200", model="step-3.5-flash", variant="fp8", parallel="TP4+EP", replicas=2)
    first, second = plan.nodes[0].processes
    assert (first.name, second.name) == ("vllm-0", "vllm-1")
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in (first, second)] == ["0,1,2,3", "4,5,6,7"]
    assert [endpoint.base_url[-7:] for endpoint in plan.endpoints] == ["8000/v1", "8001/v1"]


def test_replicas_that_share_a_node_need_memory_each() -> None:
    def needed(replicas: int) -> tuple[int, int]:
        wish = {"model": "tiny-step3p5", "engine": "vllm", "parallel": "TP1", "replicas": replicas}
        found = [{**node, "gpus": 3} for node in nodes(1, "cpu")]
        asked = make_plan(parse_request({"deployment": wish, "nodes": found}), CATALOGUE).nodes[0].requirements
        return asked.minimum_memory_bytes, asked.minimum_shared_memory_bytes

    one = needed(1)
    assert all(one)
    assert needed(3) == (3 * one[0], 3 * one[1])


def test_the_reference_server_parses_nothing_and_the_plan_says_so() -> None:
    plan = plan_for(1, "cpu", model="tiny-step3p5", engine="transformers")
    node = plan.nodes[0]
    assert plan.deployment.features == ()
    assert "without reasoning and tool_calls" in {note.topic for note in plan.notes}
    assert (plan.not_deployable, plan.verification.level) == (None, "cpu")
    assert node.processes[0].argv[1] == node.programs[0] == "/var/lib/stepladder/programs/default/reference_server.py"
    ours = (Path(__file__).parents[2] / "roles/transformers/files").glob("*.py")
    assert {program.rpartition("/")[2] for program in node.programs} == {path.name for path in ours}
    (written,) = release_processes(plan.slices()["n0"]["node"])
    assert set(node.programs) <= set(written["started_from"]), "another program has to be started anew"


def test_multi_token_prediction_uses_todays_method() -> None:
    plan = plan_for(1, "h200", model="step-3.5-flash", features=["mtp"])
    argv = plan.nodes[0].processes[0].argv
    assert json.loads(argv[argv.index("--speculative-config") + 1]) == {"method": "mtp", "num_speculative_tokens": 3}


def test_memory_of_step3_bf16_on_two_nodes_of_h20() -> None:
    memory = plan_for().memory
    assert (round(memory.weights / 1e9, 1), round((memory.limit or 0) / 1e9, 1)) == (40.2, 92.4)
    assert (memory.kv_bytes_per_token, memory.full_sequences) == (62_464, 10)


def tiny_plan(**deployment: Any) -> Plan:
    return plan_for(2, "cpu", model="tiny-step3p5", parallel="TP2", **deployment)


def test_what_only_ray_needs_is_in_rays_environment_alone() -> None:
    ray, mp = (tiny_plan(topology=topology).nodes[0].venv for topology in ("ray", "mp"))
    assert ray
    assert mp
    assert (mp.name, mp.extra_locks, mp.stand_ins) == ("vllm-0.32.0-cpu", (), ())
    assert (ray.name, ray.extra_locks) == ("vllm-0.32.0-cpu-ray", ("ray-2.60.0-cpu.txt",))
    assert [(each.name, each.version) for each in ray.stand_ins] == [("vllm_cpu_ray", "1")]
    text = human(tiny_plan(topology="ray"))
    assert "stand-in: vllm_cpu_ray 1, rehearsal only: vLLM's CPU platform asks Ray for no device;" in text
    assert "stand-in" not in human(tiny_plan(topology="mp"))


TINY = "/var/lib/stepladder/models/stepladder--tiny-step3p5/master"


def test_sglang_on_the_cpu() -> None:
    plan = plan_for(1, "cpu", model="tiny-step3p5", engine="sglang", context_length=1024, concurrency=8)
    assert command(plan, 0, 0) == (
        f"sglang serve --model-path {TINY} --served-model-name tiny-step3p5 --tp-size 1 --host 0.0.0.0 --port 30000 "
        "--trust-remote-code --tool-call-parser step3p5 --reasoning-parser step3p5 --context-length 1024 --device cpu "
        "--attention-backend torch_native --sampling-backend pytorch --disable-overlap-schedule --disable-radix-cache "
        "--sleep-on-idle --max-total-tokens 8192 --enable-metrics --watchdog-timeout 900"
    )
    environment = plan.nodes[0].processes[0].env
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in environment
    assert environment.items() >= {
        "SGLANG_USE_CPU_ENGINE": "1", "TORCH_COMPILE_DISABLE": "1",
        "SGLANG_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
    }.items()  # fmt: skip
    venv = plan.nodes[0].venv
    assert venv
    assert [each.name for each in venv.stand_ins] == [
        "sglang_cpu_kernels", "sglang_cpu_triton", "sglang_cpu_torchvision",
    ]  # fmt: skip
    assert human(plan).count("rehearsal only: ") == 3


def test_sglang_on_the_cpus_of_two_nodes() -> None:
    plan = plan_for(2, "cpu", model="tiny-step3p5", engine="sglang", parallel="TP2")
    head, follower = (node.processes[0] for node in plan.nodes)
    joining = "--tp-size 2 --nnodes 2 --node-rank {} --dist-init-addr 198.18.0.1:5000"
    assert joining.format(0) in " ".join(head.argv)
    assert joining.format(1) in " ".join(follower.argv)
    names = ("SGLANG_HOST_IP", "GLOO_SOCKET_IFNAME", "SGLANG_CPU_OMP_THREADS_BIND")
    assert [head.env[name] for name in names] == ["198.18.0.1", "eth1", "0"]
    assert [follower.env[name] for name in names] == ["198.18.0.2", "eth1", "0"]
    assert (head.health.kind, follower.health.kind) == ("sglang", "none")


@pytest.mark.parametrize(
    ("gpu", "wish", "share"),
    [
        ("h100", {"model": "step-3.5-flash"}, 1),
        ("h200", {"model": "step3"}, 1),
        ("mi355x", {"model": "step-3.5-flash"}, 0.85),
        ("mi355x", {"model": "step-3.5-flash", "context_length": 8193}, 0.85),
        ("mi355x", {"model": "step-3.5-flash", "context_length": 8192}, 1),
    ],
)
def test_sglang_gets_what_the_memory_table_gives_weights_and_kv_cache(
    gpu: str, wish: dict[str, Any], share: float
) -> None:
    """`share` is what SGLang leaves of the fraction: with AITER it keeps some back for a long context."""
    plan = plan_for(1, gpu, **wish, engine="sglang", variant="fp8")
    argv, memory = plan.nodes[0].processes[0].argv, plan.memory
    assert memory.limit
    assert memory.gpu_bytes
    left = share * float(argv[argv.index("--mem-fraction-static") + 1]) * memory.gpu_bytes
    assert 0 <= left - (memory.limit - memory.runtime) < memory.gpu_bytes / 1000


@pytest.mark.parametrize("changed", ["stand_ins/vllm_cpu_ray/vllm_cpu_ray/platform.py", "locks/ray-2.60.0-cpu.txt"])
def test_an_environments_path_follows_its_stand_ins_and_further_locks(tmp_path: Path, changed: str) -> None:
    directory = Path(shutil.copytree(CATALOGUE.directory, tmp_path / "catalog"))
    wish = {"model": "tiny-step3p5", "engine": "vllm", "parallel": "TP2", "topology": "ray"}
    request = parse_request({"deployment": wish, "nodes": nodes(2, "cpu")})

    def path() -> str:
        venv = make_plan(request, Catalogue(directory)).nodes[0].venv
        assert venv
        return venv.path

    before = path()
    assert path() == before
    (directory / changed).write_text((directory / changed).read_text() + "# changed\n")
    assert path() != before


AUTO = [
    (2, "h20-96", {}, "TP16"),
    (1, "h20-141", {}, "TP8"),
    (1, "h20-96", {"variant": "fp8"}, "TP8"),
    (1, "h200", {"model": "step-3.5-flash"}, "TP4"),
    (1, "h20-96", {"model": "step-3.5-flash"}, "TP8"),
    (1, "h100", {"model": "step-3.5-flash", "variant": "fp8"}, "TP4+EP"),
    (1, "cpu", {"model": "tiny-step3p5"}, "TP1"),
]


@pytest.mark.parametrize(("count", "gpu", "wish", "expected"), AUTO)
def test_auto_takes_the_smallest_layout_that_works(count: int, gpu: str, wish: dict[str, Any], expected: str) -> None:
    assert str(plan_for(count, gpu, **wish).deployment.parallel) == expected


REFUSALS = [
    pytest.param(
        {"model": "step35", "engine": "vlm", "features": ["toolcalls"]},
        ["unknown model: 'step35'. Did you mean 'step3'?", "unknown engine: 'vlm'. Did you mean 'vllm'?",
         "unknown feature: 'toolcalls'. Did you mean 'tool_calls'? Known: mtp, reasoning, text_only, tool_calls."],
        id="names",
    ),
    pytest.param(
        {"variant": "bf61"}, ["unknown variant of Step3: 'bf61'. Did you mean 'bf16'? Known: bf16, fp8."], id="variant"
    ),
    pytest.param(
        {"topology": "rai"}, ["unknown topology for vLLM: 'rai'. Did you mean 'ray'? Known: auto, mp, ray, single."],
        id="topology",
    ),
    pytest.param(
        {"model": "step-3.5-flash", "variant": "int4"},
        ["it is a GGUF file (Q4_K_S) for llama.cpp; neither vLLM nor SGLang serves it. "
         "Choose one of: bf16 (vllm, sglang, tensorrt_llm, transformers), fp8 (vllm, sglang, tensorrt_llm)."],
        id="gguf",
    ),
    pytest.param(
        {"parallel": "DP16"},
        ["GPU memory: TP1xDP16 needs 101.8 GB per GPU (weights 87.7, runtime 10.0, KV cache 4.1)",
         "nearest layout: instead of TP1xDP16. TP2xDP8 works here."],
        id="published-dp16-does-not-fit",
    ),
    pytest.param(
        {"model": "step-3.5-flash", "variant": "fp8", "parallel": "TP8"},
        ["expert width 1280 over 8 ranks is 160, not a multiple of the fp8 block of 128",
         "nearest layout: instead of TP8. TP8+EP works here."],
        id="fp8-block",
    ),
    pytest.param({"parallel": "TP24"}, ["TP24 takes 24 GPUs, the inventory has 2 x 8"], id="too-many"),
    pytest.param({"parallel": "TP12"}, ["TP12 takes 12 GPUs, which is not a whole number of nodes of 8"], id="ragged"),
    pytest.param(
        {"parallel": "TP12", "features": ["mtp"]},
        ["multi-token prediction: Step3 has no such layers", "not a whole number",
         "64 heads over tensor parallel size 12"],
        id="all-at-once",
    ),
    pytest.param({"topology": "single"}, ["'single', but TP16 takes 16 GPUs and a node has 8"], id="single-too-big"),
    pytest.param({"replicas": 2}, ["2 replicas of TP16; 2 x 8 GPUs hold 1"], id="replicas"),
    pytest.param({"engine": "sglang", "parallel": "TP8xDP2"}, ["Use deployment_replicas instead"], id="sglang-dp"),
    pytest.param(
        {"model": "step-3.7-flash", "engine": "transformers", "features": ["mtp", "text_only"]},
        ["multi-token prediction: not offered with Transformers", "text_only: not offered with Transformers. Leave"],
        id="features-of-another-engine",
    ),
    pytest.param(
        {"parallel": "foo", "port": 99999},
        ["variable deployment_parallel: found 'foo'. Value error, expected auto, a text such as TP8xPP2xDP2+EP",
         "variable deployment_port: found 99999. Input should be less than 65536."],
        id="values",
    ),
    pytest.param(
        {"model": "step-3.5-flash", "variant": "fp8", "parallel": "TP4+EP", "replicas": 4, "port": 65535},
        ["1. ports: vllm-1 (OpenAI-compatible API) would listen on 65536, the highest is 65535. Set deployment_port"],
        id="no-such-port",
    ),
    pytest.param(
        {"port": 6381},
        ["ports: ray-0 (Ray) and vllm-0 (OpenAI-compatible API) would both listen on 6381 of n0. Set deployment_port"],
        id="one-port-twice",
    ),
    pytest.param(
        {"context_length": 65537},
        ["context: 65,537 tokens, Step3 reads 65,536. Set deployment_context_length to at most 65536, or leave it"],
        id="context-of-another-model",
    ),
    pytest.param(
        {
            "extra_arguments": ["--api-key", "first-secret", "--admin_api_key=second-secret"],
            "extra_environment": {"VLLM_API_KEY": "third-secret", "SITE_API_KEY": "x"},
        },
        ["an API key of the engine's own: --api-key, --admin_api_key in deployment_extra_arguments; VLLM_API_KEY in "
         "deployment_extra_environment. Leave it out and give keys to the gateway (gateway_api_keys_file): health is "
         "asked without a key, so the engine would never count as healthy, and a secret given here stands in plans."],
        id="own-api-key",
    ),
    pytest.param(
        {"engine": "sglang", "extra_environment": {"SGLANG_API_KEY": "s"}},
        ["an API key of the engine's own: SGLANG_API_KEY in deployment_extra_environment. Leave it out and give keys"],
        id="own-api-key-in-sglangs-environment",
    ),
    pytest.param(
        {
            "extra_arguments": ["--proxy=http://me:first-secret@proxy:3128"],
            "extra_environment": {"HTTPS_PROXY": "http://me:second-secret@proxy:3128", "NO_PROXY": "a:1/b@c"},
        },
        ["a password in an address: HTTPS_PROXY in deployment_extra_environment, an argument in "
         "deployment_extra_arguments. Leave it out: what stands here is in plans and releases."],
        id="a-proxys-password",
    ),
    pytest.param(
        {"weights_endpoint": "https://me:third-secret@hub.internal"},
        ["a password in an address: deployment_weights_endpoint. Leave it out"],
        id="a-hubs-password",
    ),
    pytest.param(
        {"extra_arguments": ["--ssl-certfile=/c", "--port=1"]},
        ["deployment_extra_arguments: --ssl-certfile=/c (set gateway_certificate_file instead, so that the plan "
         "reckons with it); --port=1 (set deployment_port instead"],
        id="what-a-variable-stands-for",
    ),
    pytest.param(
        {"extra_arguments": ["a\0b", " "], "extra_environment": {"A": "\0"}},
        ["variable deployment_extra_arguments.0: found 'a\\x00b'.", "variable deployment_extra_arguments.1: found ' '.",
         "variable deployment_extra_environment.A: found '\\x00'."],
        id="what-no-process-can-be-given",
    ),
    pytest.param(
        {"extra_environment": {"STEPLADDER_X": "1"}, "served_name": "a" * 5000},
        ["STEPLADDER_X: the run scripts set what begins with STEPLADDER_ themselves.", "aaa.... String should match"],
        id="names-and-lengths",
    ),
    pytest.param({"nmae": "x"}, ["variable deployment_nmae: found 'x'. Extra inputs are not permitted."], id="extra"),
]  # fmt: skip


@pytest.mark.parametrize(("wish", "reasons"), REFUSALS)
def test_refusal_names_every_reason(wish: dict[str, Any], reasons: list[str]) -> None:
    with pytest.raises(PlanRefusedError) as caught:
        plan_for(**wish)
    missing = [reason for reason in reasons if reason not in str(caught.value)]
    assert not missing, str(caught.value)
    assert "-secret" not in str(caught.value)


NEAREST = [
    pytest.param(2, "h20-96", {"parallel": "DP16"}, "TP2xDP8 works here.", id="data-parallel-stays-data-parallel"),
    pytest.param(
        2, "h20-141", {"parallel": "TP4xDP2", "concurrency": 10}, "TP8xDP2 works here.", id="rather-than-as-many-gpus"
    ),
    pytest.param(2, "h20-96", {"parallel": "TP4xDP3"}, "TP4xDP4 works here.", id="no-whole-number-of-nodes"),
    pytest.param(2, "h20-96", {"parallel": "TP3xPP5"}, "TP4xPP4 works here.", id="pipeline-stays-a-pipeline"),
    pytest.param(1, "h20-96", {"variant": "fp8", "parallel": "TP16"}, "TP8 works here.", id="fewer-gpus"),
    pytest.param(
        1, "h20-96", {"parallel": "TP8"}, "No layout works on 1 x 8 GPUs; on 2 nodes TP16 does.", id="more-nodes"
    ),
    pytest.param(1, "h20-96", {}, "instead of auto. No layout works on 1 x 8 GPUs; on 2 nodes TP16 does.", id="auto"),
    pytest.param(
        1, "h100", {"engine": "transformers"},
        "instead of auto. No layout works on nodes of 8 x NVIDIA H100 SXM (80 GB), however many were tried.", id="none",
    ),
    pytest.param(
        2, "h20-96", {"topology": "single", "variant": "fp8", "parallel": "TP16"}, "TP8 works here.", id="topology"
    ),
    pytest.param(
        2, "h20-141", {"replicas": 2, "parallel": "TP16"}, "TP8 works here.", id="replicas"
    ),
    pytest.param(
        2, "h20-96", {"parallel": "TP12", "features": ["mtp"]}, "TP16 works here, once the above is mended.",
        id="with-another-fault",
    ),
    pytest.param(
        3, "h20-96", {"replicas": 2}, "instead of auto. No layout works on 3 x 8 GPUs; on 4 nodes TP16 does.",
        id="more-nodes-for-all-replicas",
    ),
    pytest.param(2, "mi300x", {"parallel": "TP8xDP2"}, "TP8xDP2+EP works here.", id="whole-experts"),
]  # fmt: skip


@pytest.mark.parametrize(("count", "gpu", "wish", "expected"), NEAREST)
def test_a_refusal_names_the_layout_that_is_most_like_the_wished_one(
    count: int, gpu: str, wish: dict[str, Any], expected: str
) -> None:
    with pytest.raises(PlanRefusedError) as caught:
        plan_for(count, gpu, **wish)
    last = caught.value.violations[-1]
    assert last.rule == "nearest layout"
    assert f"{last.found}. {last.mend}".endswith(expected)


def with_drivers(gpu: str, *drivers: str | None, **deployment: Any) -> Plan:
    declared = [node | ({"driver": d} if d else {}) for node, d in zip(nodes(len(drivers), gpu), drivers, strict=True)]
    wish = {"model": "step-3.5-flash", "engine": "vllm", **deployment}
    return make_plan(parse_request({"deployment": wish, "nodes": declared}), CATALOGUE)


@pytest.mark.parametrize(
    ("gpu", "drivers", "wish", "expected"),
    [
        pytest.param(
            "h20-96", ["570.86.10", "580.95.05", "535.54", None], {},
            "driver: 570.86.10 on n0, 535.54 on n2; vLLM 0.33.0 needs 580 or newer. Install driver 580 or newer there.",
            id="nvidia",
        ),
        pytest.param(
            "mi300x", ["7.0.2"], {"engine": "sglang"},
            "ROCm: 7.0.2 on n0; SGLang 0.5.23 needs 7.2 or newer. Install ROCm 7.2 or newer there, or set "
            "deployment_engine_version to 0.5.9.",
            id="amd-with-an-older-release",
        ),
    ],
)  # fmt: skip
def test_a_declared_driver_that_is_too_old_is_refused(
    gpu: str, drivers: list[str | None], wish: dict[str, Any], expected: str
) -> None:
    with pytest.raises(PlanRefusedError) as caught:
        with_drivers(gpu, *drivers, **wish)
    assert [str(violation) for violation in caught.value.violations] == [expected]


def test_a_declared_driver_that_is_new_enough_changes_no_plan() -> None:
    assert with_drivers("h20-96", "580", "581.1").id == with_drivers("h20-96", None, None).id
    with pytest.raises(PlanRefusedError, match=r"nodes\.0\.driver: found 'R580'"):
        with_drivers("h20-96", "R580")


def refusal_of(node_list: list[dict[str, Any]]) -> str:
    with pytest.raises(PlanRefusedError) as caught:
        make_plan(parse_request({"deployment": {"model": "step3", "engine": "vllm"}, "nodes": node_list}), CATALOGUE)
    return str(caught.value)


def test_hardware_faults_of_all_nodes_are_named() -> None:
    first, second = nodes(2)
    assert "Put at least one host into the group 'engines'" in refusal_of([])
    assert "h100, h20-96 in one deployment" in refusal_of([first, second | {"gpu": "h100"}])
    assert "two nodes share one: 198.18.0.1, 198.18.0.1" in refusal_of([first, second | {"address": "198.18.0.1"}])
    assert "nodes: a name stands twice: n0, n0. Name each node once." in refusal_of([first, second | {"name": "n0"}])
    for address in ("0.0.0.0", "fd00::1"):
        assert f"found '{address}'. Value error, expected the IPv4 address" in refusal_of(
            [first | {"address": address}]
        )
    assert "variable nodes.0.interface: found 'eth0; reboot'" in refusal_of([first | {"interface": "eth0; reboot"}])
    assert "variable nodes.0.gpus: found 1000000" in refusal_of([first | {"gpus": 10**6}])
    assert "GPUs per node: [4, 8] in one deployment" in refusal_of([first, second | {"gpus": 4}])
    assert "unknown GPU type: 'h20'. Did you mean 'h200'?" in refusal_of([first | {"gpu": "h20"}, second])


def needed_gpus(plan: Plan) -> dict[str, Any] | None:
    gpus = plan.nodes[-1].requirements.gpus
    return gpus.model_dump() if gpus else None


def test_a_plan_says_which_gpus_its_nodes_must_have() -> None:
    assert needed_gpus(plan_for()) == {
        "vendor": "nvidia", "count": 8, "model": "H20", "memory_mib": 97871, "minimum_driver": "580",
        "indices": (0, 1, 2, 3, 4, 5, 6, 7),
    }  # fmt: skip
    flash = {"model": "step-3.5-flash", "variant": "fp8", "parallel": "TP4+EP"}
    assert (needed_gpus(plan_for(1, "h200", **flash)) or {})["indices"] == (0, 1, 2, 3)
    assert (needed_gpus(plan_for(1, "h200", **flash, replicas=2)) or {})["indices"] == tuple(range(8))
    assert (needed_gpus(plan_for(1, "mi300x", **flash)) or {})["model"] == "MI300X"
    assert needed_gpus(plan_for(1, "cpu", model="tiny-step3p5")) is None


def test_what_a_node_must_have_is_shown() -> None:
    assert "  hardware     8 x NVIDIA H20 (96 GB), needs driver 580 or newer\n" in human(plan_for())
    assert "x AMD Instinct MI300X, needs ROCm 7.2 or newer\n" in human(plan_for(1, "mi300x", model="step-3.5-flash"))
    assert "  hardware     1 x CPU (rehearsal only)\n" in human(plan_for(1, "cpu", model="tiny-step3p5"))


def test_same_input_gives_the_same_bytes_and_another_input_another_id() -> None:
    first, again, other = plan_for(), plan_for(), plan_for(context_length=4096)
    assert first.to_json() == again.to_json()
    assert first.id != other.id
    assert json.loads(first.to_json())["id"] == first.id
    assert Plan.from_document(json.loads(first.to_json())) == first


def test_what_cannot_be_carried_out_yet_is_said_in_the_plan() -> None:
    assert plan_for().not_deployable is None
    assert plan_for(install="container", topology="mp").not_deployable is None
    assert plan_for(engine="sglang").not_deployable is None
    tensorrt = plan_for(1, "h200", engine="tensorrt_llm", model="step-3.5-flash")
    assert "TensorRT-LLM" in str(tensorrt.not_deployable)


def test_differences_from_the_published_commands_are_explained() -> None:
    topics = {note.topic for note in plan_for().notes}
    assert {"--distributed-executor-backend ray", "--max-num-batched-tokens", "RAY_ADDRESS", "ray start"} <= topics
    flash = {note.topic for note in plan_for(1, "h200", model="step-3.5-flash").notes}
    assert "--disable-cascade-attn" in flash


def test_missing_interface_is_a_warning_only_between_nodes() -> None:
    def warnings(count: int, wish: dict[str, Any]) -> list[str]:
        bare = [{key: value for key, value in node.items() if key != "interface"} for node in nodes(count)]
        plan = make_plan(parse_request({"deployment": {"engine": "vllm", **wish}, "nodes": bare}), CATALOGUE)
        return [note.text for note in plan.notes if note.topic == "network interface"]

    assert "n0, n1" in warnings(2, {"model": "step3"})[0]
    assert warnings(1, {"model": "step3", "variant": "fp8"}) == []


def test_a_slice_holds_one_node_and_what_all_share() -> None:
    plan = plan_for()
    kept = plan.slices()["n1"]
    assert (kept["plan_id"], kept["node"]["name"], kept["deployment"]["engine"]) == (plan.id, "n1", "vllm")


REVISIONS = {
    "none": ({}, "stepfun-ai/step3", "master", STEP3),
    "pinned": ({"revision": "v1.1"}, "stepfun-ai/step3", "v1.1", STEP3.replace("master", "v1.1")),
    "HuggingFace": ({"weights_source": "huggingface"}, "stepfun-ai/step3", "main", STEP3),
    "HuggingFace, pinned": (
        {"weights_source": "huggingface", "revision": "0a1b2c3"}, "stepfun-ai/step3", "0a1b2c3",
        STEP3.replace("master", "0a1b2c3"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("wish", "model_id", "revision", "path"), REVISIONS.values(), ids=REVISIONS)
def test_the_revision_is_that_of_the_inventory(wish: dict[str, str], model_id: str, revision: str, path: str) -> None:
    plan = plan_for(**wish)
    weights = plan.nodes[0].weights
    assert (weights.model_id, weights.revision, weights.path) == (model_id, revision, path)
    assert (f"stepfun-ai/step3@{revision}" in human(plan)) == ("revision" in wish)
    assert path in command(plan, 0, -1)


def test_huggingfaces_own_name_is_asked_for_there_and_one_that_it_has_not_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = CATALOGUE.models["step3"]
    named = {**model.variants, "bf16": model.variants["bf16"].model_copy(update={"huggingface": "stepfun/Step3"})}
    monkeypatch.setitem(CATALOGUE.models, "step3", model.model_copy(update={"variants": named}))
    weights = plan_for(weights_source="huggingface").nodes[0].weights
    assert (weights.model_id, weights.path) == ("stepfun/Step3", "/var/lib/stepladder/models/stepfun--Step3/master")
    with pytest.raises(PlanRefusedError) as error:
        plan_for(8, model="step-3.5-flash", variant="int8", weights_source="huggingface")
    assert (
        "weights from HuggingFace: the catalogue knows no repository of stepfun-ai/Step-3.5-Flash-INT8 there. Take "
        "model_weights_source: modelscope, or add 'huggingface' to the variant in catalog/models/."
    ) in str(error.value)


@pytest.mark.parametrize("revision", ["refs/pr/1", "--force", "..", "a b", "v1\n"])
def test_what_is_no_revision_is_refused(revision: str) -> None:
    with pytest.raises(PlanRefusedError, match="variable deployment_revision"):
        plan_for(revision=revision)


DIGEST = "0123456789ab"
CACHED = [
    ({}, r"vllm-0\.33\.0-cuda-[0-9a-f]+-h200"),
    ({"gpu": "b200"}, r"vllm-0\.33\.0-cuda-[0-9a-f]+-b200"),
    ({"image": f"my/vllm:v1@sha256:{DIGEST.ljust(64, '0')}"}, rf"vllm-0\.33\.0-image-{DIGEST}-h200"),
    ({"image": "my/vllm:v1"}, r"vllm-0\.33\.0-image-[0-9a-f]{12}-h200"),
    ({"image": "my/vllm:v2"}, r"vllm-0\.33\.0-image-[0-9a-f]{12}-h200"),
    ({"engine": "sglang", "install": "venv"}, r"sglang-0\.5\.23-cuda-[0-9a-f]+-h200"),
]


def test_what_is_compiled_is_kept_by_build_and_gpu() -> None:
    folders = []
    for wish, name in CACHED:
        deployment = {"model": "step-3.7-flash", "engine": "vllm", "parallel": "TP4+EP", "replicas": 2, **wish}
        node = {"name": "n0", "address": "198.18.0.1", "gpu": deployment.pop("gpu", "h200")}
        plan = make_plan(parse_request({"deployment": deployment, "nodes": [node]}), CATALOGUE)
        for process in plan.nodes[0].processes:
            folder = process.env["TRITON_CACHE_DIR"].removesuffix("/triton")
            assert re.fullmatch(f"/var/lib/stepladder/cache/engines/{name}", folder)
            own = "VLLM_CACHE_ROOT" if deployment["engine"] == "vllm" else "SGLANG_CACHE_DIR"
            kept = {"HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "TRITON_CACHE_DIR", own}
            assert {key for key, value in process.env.items() if value.startswith(f"{folder}/")} == kept
            assert not process.image or f"{folder}:{folder}" in process.argv
        folders.append(folder)
    assert len(set(folders)) == len(CACHED)
