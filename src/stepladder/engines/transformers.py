"""Transformers as the reference: one process that gives the answers which other engines' are held against."""

from __future__ import annotations

from stepladder.engines.common import Rendered, Replica, launched, visible_gpus
from stepladder.plan import Health, Note, Port
from stepladder.setting import Setting

PROGRAM = "reference_server.py"
IMPORTED = ("reference_generation.py", "reference_model.py")


def render(setting: Setting, replica: Replica) -> Rendered:
    """Render a replica: the toolkit's own server, which loads the model as the published check does."""
    program = f"{replica.programs_path}/{PROGRAM}"
    arguments = [program, "--model-path", replica.model_path, "--served-model-name", replica.served_name]
    arguments += ["--host", replica.bind_address, "--port", str(replica.port)]
    arguments += ["--context-length", str(setting.context_length)]
    arguments += ["--device-map", "auto"] if setting.gpu.platform != "cpu" else []
    arguments += ["--trust-remote-code"] if setting.model.trust_remote_code else []
    arguments += setting.deployment.extra_arguments
    environment = {"HF_HOME": f"{replica.cache_path}/huggingface", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = launched(
        setting,
        replica,
        name=f"transformers-{replica.index}",
        purpose="gives reference answers",
        program="python",
        arguments=arguments,
        env=environment | visible_gpus(setting, replica) | setting.deployment.extra_environment,
        ports=[Port(port=replica.port, host=replica.bind_address, purpose="OpenAI-compatible API", scope="clients")],
        health=Health(kind="vllm", host=replica.probe_host, port=replica.port, path="/health"),
        stop_seconds=setting.engine.defaults.stop_seconds,
        programs=replica.programs_path,
    )
    programs = (program, *(f"{replica.programs_path}/{name}" for name in IMPORTED))
    return Rendered(((process,),), tuple(_notes(setting)), programs)


def _notes(setting: Setting) -> list[Note]:
    text = (
        "One request at a time, greedy whatever temperature is asked for; over several GPUs the model is cut by layers "
        "and one GPU works at a time. For comparing answers, not for load."
    )
    notes = [
        Note(
            kind="note",
            topic="reference answers",
            text=text,
            source="Step-3.5-Flash guide for vLLM, transformers_inference.py",
        )
    ]
    if setting.model.modality == "vision":
        text = "The reference server takes text only; the vision tower is loaded and not used."
        notes.append(Note(kind="warning", topic="images", text=text))
    return notes
