"""Transformers as the reference check: one process that prints an answer and ends."""

from __future__ import annotations

from stepladder.engines.common import Rendered, Replica, launched, visible_gpus
from stepladder.plan import Health, Note
from stepladder.setting import Setting

PROMPT = "Explain the significance of the number 42."
NEW_TOKENS = 128
SAMPLING = ("--temperature", "0.7", "--top-p", "0.9")


def render(setting: Setting, replica: Replica) -> Rendered:
    """Render the reference check of the published guide: load, apply the chat template, generate, print."""
    program = f"{replica.deployment_path}/programs/reference_check.py"
    arguments = [program, "--model-path", replica.model_path, "--prompt", PROMPT]
    arguments += ["--max-new-tokens", str(NEW_TOKENS), *SAMPLING, "--device-map", "auto"]
    arguments += ["--trust-remote-code"] if setting.model.trust_remote_code else []
    arguments += setting.deployment.extra_arguments
    environment = {"HF_HOME": f"{replica.cache_path}/huggingface", "HF_HUB_OFFLINE": "1"}
    process = launched(
        setting,
        replica,
        name=f"transformers-{replica.index}",
        purpose="prints a reference answer and ends",
        program="python",
        arguments=arguments,
        env=environment | visible_gpus(setting, replica) | setting.deployment.extra_environment,
        ports=(),
        health=Health(kind="none", host=replica.probe_host, port=replica.port, path=""),
        stop_seconds=setting.engine.defaults.stop_seconds,
    )
    note = Note(
        kind="note",
        topic="reference check",
        text="No server: the model is cut by layers over the GPUs, so that one works at a time. Its answers are what "
        "the other engines' are held against.",
        source="Step-3.5-Flash guide for vLLM, transformers_inference.py",
    )
    return Rendered(((process,),), (note,))
