"""What an engine, a GPU and a layout have to keep, one function a rule, each with its source.

A rule looks at a setting and a layout and returns what is wrong, or none. Those that do not look at the layout are in
`SETTING_RULES`; they would refuse every layout alike and are asked first.
"""

from __future__ import annotations

from collections.abc import Callable

from stepladder.environment import node_helper
from stepladder.errors import Violation
from stepladder.memory import GIGA
from stepladder.request import Parallel
from stepladder.setting import Setting, memory_budget
from stepladder.versions import older, version_key

Rule = Callable[[Setting, Parallel], Violation | None]
MTP_SINCE = "0.33.0"
# Flags that a variable stands for; given beside it they would make the plan untrue.
OWN_VARIABLES = {
    "--host": "deployment_bind_address",
    "--port": "deployment_port",
    "--served-model-name": "deployment_served_name",
    "--max-model-len": "deployment_context_length",
    "--context-length": "deployment_context_length",
    "--tensor-parallel-size": "deployment_parallel",
    "--pipeline-parallel-size": "deployment_parallel",
    "--data-parallel-size": "deployment_parallel",
    "--enable-expert-parallel": "deployment_parallel",
    "--tp": "deployment_parallel",
    "--tp-size": "deployment_parallel",
    "--ep": "deployment_parallel",
    "--ep-size": "deployment_parallel",
    "--dp": "deployment_parallel",
    "--dp-size": "deployment_parallel",
    "--nnodes": "deployment_topology",
    "--node-rank": "deployment_topology",
    "--distributed-executor-backend": "deployment_topology",
    # Engines are asked over plain HTTP, inside; TLS is the gateway's.
    "--ssl-certfile": "gateway_certificate_file",
    "--ssl-keyfile": "gateway_private_key_file",
}
# vLLM reads underscores in flags as dashes, SGLang's parser takes dashes alone.
KEY_FLAGS = {"--api-key", "--admin-api-key"}
KEY_VARIABLES = {"VLLM_API_KEY", "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"}
# What is never all usable: fragments, communication buffers. A layout with less to spare fails sooner or later.
MINIMUM_MARGIN = 1_000_000_000


def number_format_supported(setting: Setting, parallel: Parallel) -> Violation | None:
    """The GPU computes in the checkpoint's number format; NVFP4 is for Blackwell alone (vLLM recipes)."""
    found = setting.variant.quantisation.format
    if found in setting.gpu.formats:
        return None
    mend = f"Choose a variant in one of: {', '.join(setting.gpu.formats)}."
    return Violation("number format", f"{setting.gpu.title} does not compute in {found}", mend)


def engine_supports_model(setting: Setting, parallel: Parallel) -> Violation | None:
    """The engine's release knows the model (`engine_support` of the model in the catalogue)."""
    support = setting.model.engine_support.get(setting.engine.name)
    name = f"{setting.engine.title} and {setting.model.title}"
    if support is None:
        return None
    if support.never:
        return Violation(name, support.never, f"Choose one of: {', '.join(sorted(setting.engines_that_serve))}.")
    if support.since and older(setting.release.version, support.since):
        found = f"{setting.engine.title} {setting.release.version} does not support it"
        return Violation(name, found, f"Set deployment_engine_version to {support.since} or newer.")
    return None


def release_is_safe(setting: Setting, parallel: Parallel) -> Violation | None:
    """The release has no known hole that matters here (`security_floor` of the engine), unless that is accepted."""
    floor = setting.engine.security_floor
    if floor is None or not older(setting.version, floor.version) or setting.deployment.accept_unsafe_version:
        return None
    found = f"{setting.engine.title} {setting.version} is older than {floor.version} ({floor.source})"
    return Violation("security", found, "Use a newer release, or set deployment_accept_unsafe_version to true.")


def mtp_supported(setting: Setting, parallel: Parallel) -> Violation | None:
    """Multi-token prediction: models that have the layers; vLLM from 0.33.0; not with NVFP4 on SGLang."""
    if not setting.wants_mtp:
        return None
    rule, mend = "multi-token prediction", "Leave the feature mtp out."
    if not setting.model.mtp_layers:
        return Violation(rule, f"{setting.model.title} has no such layers", mend)
    if "mtp" not in setting.engine.features:
        return Violation(rule, f"not offered with {setting.engine.title}", mend)
    if setting.engine.name == "vllm" and older(setting.release.version, MTP_SINCE):
        return Violation(rule, f"vLLM {setting.release.version} fails on it at load", f"{mend} It needs {MTP_SINCE}.")
    if setting.engine.name == "sglang" and setting.variant.quantisation.format == "nvfp4":
        return Violation(rule, "SGLang does not support it with NVFP4", mend)
    return None


def features_apply(setting: Setting, parallel: Parallel) -> Violation | None:
    """`text_only` is for models that see, with engines that can leave the vision tower out."""
    if "text_only" not in setting.deployment.features:
        return None
    if setting.model.modality != "vision":
        return Violation("text_only", f"{setting.model.title} is text only", "Leave the feature text_only out.")
    if "text_only" not in setting.engine.features:
        found = f"not offered with {setting.engine.title}"
        return Violation("text_only", found, "Leave the feature text_only out.")
    return None


def installable(setting: Setting, parallel: Parallel) -> Violation | None:
    """There is a lock or an image for this GPU's platform, architecture and machine."""
    method = setting.deployment.install
    image = setting.known_image
    if method == "venv" and not setting.has_lock:
        mend = "Set deployment_install to container." if image else "Choose another engine release."
        return Violation("install", f"no lock for {setting.release_name} on {setting.gpu.title}", mend)
    if method == "container" and not image:
        found = f"no image of {setting.release_name} for {setting.gpu.architecture} on {setting.gpu.machine}"
        return Violation("install", found, "Choose another engine or engine release, or set deployment_image.")
    if setting.own_lock and setting.in_container:
        mend = "Leave one of deployment_lock and deployment_image out, and deployment_install with it."
        return Violation("install", "deployment_lock is for an environment, and the engine runs in a container", mend)
    if setting.deployment.image and not setting.in_container:
        found = f"deployment_image is {setting.deployment.image}, and the engine runs in an environment"
        return Violation("install", found, "Set deployment_install to container, or leave deployment_image out.")
    if method == "auto" and not image and not setting.has_lock:
        found = f"neither lock nor image of {setting.release_name} for {setting.gpu.title}"
        return Violation("install", found, "Choose another engine or engine release.")
    return None


def context_is_the_models(setting: Setting, parallel: Parallel) -> Violation | None:
    """Sequences are no longer than the model can read (the engines refuse a longer `--max-model-len`)."""
    wished, own = setting.deployment.context_length, setting.model.context_length
    if wished is None or wished <= own:
        return None
    found = f"{wished:,} tokens, {setting.model.title} reads {own:,}"
    return Violation("context", found, f"Set deployment_context_length to at most {own}, or leave it out.")


def driver_new_enough(setting: Setting, parallel: Parallel) -> Violation | None:
    """Declared drivers are what the release needs at least (`minimum_driver` in the catalogue)."""
    floor = setting.release.minimum_driver
    old = [f"{driver} on {name}" for name, driver in setting.drivers if floor and older(driver, floor)]
    if not floor or not old:
        return None
    kind = "driver" if setting.gpu.vendor == "nvidia" else "ROCm"
    oldest = min((driver for _, driver in setting.drivers), key=version_key)
    others = [
        release.version
        for release in setting.engine.releases
        if release.platform == setting.release.platform and not older(oldest, release.minimum_driver or "0")
    ]
    mend = f"Install {kind} {floor} or newer there"
    mend += f", or set deployment_engine_version to {' or '.join(others)}." if others else "."
    return Violation(kind, f"{', '.join(old)}; {setting.release_name} needs {floor} or newer", mend)


def extra_arguments_are_taken(setting: Setting, parallel: Parallel) -> Violation | None:
    """Arguments of the operator's own are not ones that the engine refuses, warns of, or chokes on."""
    bad = []
    for argument in setting.deployment.extra_arguments:
        flag = argument.partition("=")[0]
        if change := setting.engine.flags.get(flag):
            bad.append(f"{argument} ({change.status}: {change.instead})")
        elif flag in OWN_VARIABLES:
            bad.append(f"{argument} (set {OWN_VARIABLES[flag]} instead, so that the plan reckons with it)")
    if not bad:
        return None
    return Violation("deployment_extra_arguments", "; ".join(bad), "Change them as the brackets say.")


def no_key_of_its_own(setting: Setting, parallel: Parallel) -> Violation | None:
    """An engine answers without a key: `one_token` asks with none, and takes a refusal for ill health."""
    flags = [argument.partition("=")[0] for argument in setting.deployment.extra_arguments]
    given = {
        "deployment_extra_arguments": [flag for flag in flags if flag.replace("_", "-") in KEY_FLAGS],
        "deployment_extra_environment": sorted(KEY_VARIABLES & setting.deployment.extra_environment.keys()),
    }
    if not any(given.values()):
        return None
    return Violation(
        "an API key of the engine's own",
        "; ".join(f"{', '.join(names)} in {variable}" for variable, names in given.items() if names),
        "Leave it out and give keys to the gateway (gateway_api_keys_file): health is asked without a key, so the "
        "engine would never count as healthy, and a secret given here stands in plans.",
    )


def no_password_in_addresses(setting: Setting, parallel: Parallel) -> Violation | None:
    """A proxy's or a hub's address with a password in it would stand in plans, releases and their diffs."""
    carries = node_helper("pip_config").carries_login
    environment, arguments = setting.deployment.extra_environment, setting.deployment.extra_arguments
    found = [f"{name} in deployment_extra_environment" for name, value in environment.items() if carries(value)]
    found += ["an argument in deployment_extra_arguments"] if any(map(carries, arguments)) else []
    found += ["deployment_weights_endpoint"] if carries(setting.deployment.weights_endpoint or "") else []
    if not found:
        return None
    return Violation(
        "a password in an address",
        ", ".join(sorted(found)),
        "Leave it out: what stands here is in plans and releases. A hub's token goes into the file that "
        "model_weights_token_file names; let a proxy know nodes by their addresses, or give its login to one on the "
        "node that asks the other.",
    )


def whole_nodes(setting: Setting, parallel: Parallel) -> Violation | None:
    """A replica fills part of one node, or several nodes to the last GPU."""
    world, size = parallel.world_size, setting.gpus_per_node
    if world > setting.nodes * size:
        return Violation(
            "GPUs",
            f"{parallel} takes {world} GPUs, the inventory has {setting.nodes} x {size}",
            f"Choose at most {setting.nodes * size} GPUs a replica, or add nodes.",
        )
    if world > size and world % size:
        return Violation(
            "GPUs",
            f"{parallel} takes {world} GPUs, which is not a whole number of nodes of {size}",
            f"Choose a multiple of {size}, or at most {size}.",
        )
    return None


def nodes_can_join(setting: Setting, parallel: Parallel) -> Violation | None:
    """An engine without a topology for several nodes stays on one."""
    if parallel.world_size <= setting.gpus_per_node or setting.engine.default_multi_node:
        return None
    found = f"{parallel} takes more than the {setting.gpus_per_node} GPUs of a node"
    return Violation(f"{setting.engine.title} on several nodes", found, "Choose vLLM or SGLang, or fewer GPUs.")


def topology_reaches(setting: Setting, parallel: Parallel) -> Violation | None:
    """A wished topology holds the layout; vLLM's image has no Ray in it since 0.19 (lws 835)."""
    wished, engine = setting.deployment.topology, setting.engine
    if parallel.world_size <= setting.gpus_per_node or not engine.default_multi_node:
        return None
    if wished == "ray" and setting.in_container:
        found = "vLLM's image has no Ray in it since 0.19 (lws 835)"
        mend = "Set deployment_topology to mp, or deployment_install to venv."
        return Violation("topology ray in a container", found, mend)
    if wished == "single":
        return Violation(
            "topology",
            f"'single', but {parallel} takes {parallel.world_size} GPUs and a node has {setting.gpus_per_node}",
            f"Set deployment_topology to auto or {engine.default_multi_node}.",
        )
    return None


def replicas_fit(setting: Setting, parallel: Parallel) -> Violation | None:
    """All replicas find GPUs: several on a node, or each on whole nodes."""
    wished, world, size = setting.deployment.replicas, parallel.world_size, setting.gpus_per_node
    capacity = setting.nodes * (size // world) if world <= size else setting.nodes // (world // size)
    if wished <= capacity or not capacity:  # a single one that has no room is `whole_nodes`' to refuse
        return None
    found = f"{wished} replicas of {parallel}; {setting.nodes} x {size} GPUs hold {capacity}"
    return Violation("replicas", found, f"Set deployment_replicas to at most {capacity}.")


def heads_divide(setting: Setting, parallel: Parallel) -> Violation | None:
    """Every attention group's query heads are shared out evenly over tensor parallel ranks (engines' own assertion)."""
    for group in setting.model.shape.attention:
        if group.query_heads % parallel.tensor:
            return Violation(
                "attention heads",
                f"{group.query_heads} heads over tensor parallel size {parallel.tensor}",
                f"Choose a tensor parallel size that divides {group.query_heads}.",
            )
    return None


def experts_divide(setting: Setting, parallel: Parallel) -> Violation | None:
    """With expert parallelism whole experts are shared out over tensor times data parallel ranks."""
    moe = setting.model.shape.moe
    ranks = parallel.tensor * parallel.data
    if not parallel.expert:
        return None
    if moe is None:
        return Violation("expert parallelism", f"{setting.model.title} has no experts", "Leave expert out.")
    if moe.experts % ranks:
        return Violation(
            "experts",
            f"{moe.experts} experts over {ranks} ranks",
            f"Choose tensor x data parallel ranks that divide {moe.experts}, or leave expert parallelism out.",
        )
    return None


def quantisation_blocks_fit(setting: Setting, parallel: Parallel) -> Violation | None:
    """An expert's shard is a whole number of quantisation blocks (vLLM recipes: FP8 at TP4 and TP8 needs EP)."""
    block, moe = setting.variant.quantisation.block, setting.model.shape.moe
    if block is None or moe is None or parallel.expert:
        return None
    ranks = parallel.tensor * parallel.data
    width, rest = divmod(moe.expert_width, ranks)
    if rest or width % block:
        return Violation(
            "quantisation blocks",
            f"expert width {moe.expert_width} over {ranks} ranks is {moe.expert_width / ranks:g}, "
            f"not a multiple of the {setting.variant.quantisation.format} block of {block}",
            "Set deployment_parallel.expert to true: experts stay whole then.",
        )
    return None


def amd_experts_are_whole(setting: Setting, parallel: Parallel) -> Violation | None:
    """AMD's kernels fail on cut experts, in BF16 and FP8 alike (SGLang cookbook, Step-3.5 page; aiter 5049)."""
    cut = setting.model.shape.moe and parallel.tensor * parallel.data > 1 and not parallel.expert
    if setting.gpu.vendor != "amd" or not cut:
        return None
    found = f"{parallel} cuts experts on {setting.gpu.title}"
    return Violation("expert parallelism on AMD", found, "Set deployment_parallel.expert to true.")


def nvfp4_experts_are_whole(setting: Setting, parallel: Parallel) -> Violation | None:
    """Every published NVFP4 layout has expert parallelism; at TP8 without it no backend works (vLLM 48921)."""
    cut = parallel.tensor * parallel.data > 1 and not parallel.expert
    if setting.variant.quantisation.format != "nvfp4" or not cut:
        return None
    return Violation(
        "expert parallelism with NVFP4", f"{parallel} cuts experts", "Set deployment_parallel.expert to true."
    )


def data_parallel_placed(setting: Setting, parallel: Parallel) -> Violation | None:
    """Data parallel ranks are whole on a node; SGLang's repeat the experts, so replicas are the better way there."""
    if parallel.data == 1:
        return None
    if setting.engine.name != "vllm":
        found = f"{parallel} on {setting.engine.title}"
        return Violation("data parallel", found, "Use deployment_replicas instead of data parallel ranks.")
    nodes, rest = divmod(parallel.world_size, setting.gpus_per_node)
    if not rest and nodes > 1 and parallel.data % nodes:
        return Violation(
            "data parallel",
            f"{parallel.data} data parallel ranks over {nodes} nodes",
            f"Choose a multiple of {nodes}: a rank that spans nodes is not supported.",
        )
    return None


def data_parallel_experts_meet(setting: Setting, parallel: Parallel) -> Violation | None:
    """Data parallel ranks share their tokens before the experts, which not every build can (the release says why)."""
    reason = setting.release.no_data_parallel_experts
    if parallel.data == 1 or setting.model.shape.moe is None or not reason:
        return None
    found = f"{parallel} on {setting.release_name} ({setting.gpu.platform}): {reason}"
    return Violation("data parallel", found, "Use deployment_replicas instead of data parallel ranks.")


def pipeline_allowed(setting: Setting, parallel: Parallel) -> Violation | None:
    """Pipeline stages: not with multi-token prediction, not with data parallel ranks, not in TensorRT-LLM here."""
    if parallel.pipeline == 1:
        return None
    if setting.wants_mtp:
        return Violation("pipeline parallel", f"{parallel} with multi-token prediction", "Leave one of them out.")
    if parallel.data > 1 or setting.engine.name == "tensorrt_llm":
        return Violation("pipeline parallel", f"{parallel} on {setting.engine.title}", "Use tensor parallel ranks.")
    if parallel.pipeline > setting.model.shape.layers:
        found = f"{parallel.pipeline} stages for {setting.model.shape.layers} layers"
        return Violation("pipeline parallel", found, "Choose fewer stages.")
    return None


def transformers_cuts_by_layers(setting: Setting, parallel: Parallel) -> Violation | None:
    """Transformers' device map places whole layers: it is a pipeline without overlap, and nothing else."""
    if setting.engine.name != "transformers" or parallel.tensor * parallel.data == 1:
        return None
    return Violation("Transformers", f"{parallel}", f"Set deployment_parallel to TP1xPP{parallel.world_size}.")


def fits_in_memory(setting: Setting, parallel: Parallel) -> Violation | None:
    """Weights, runtime and the wanted KV cache fit into the engine's share of the GPU, with a gigabyte to spare."""
    budget = memory_budget(setting, parallel)
    if budget.margin is None or budget.margin >= MINIMUM_MARGIN:
        return None
    return Violation(
        "GPU memory",
        f"{parallel} needs {budget.needed / GIGA:.1f} GB per GPU (weights {budget.weights / GIGA:.1f}, runtime "
        f"{budget.runtime / GIGA:.1f}, KV cache {budget.kv_wanted / GIGA:.1f}), the engine's share of "
        f"{setting.gpu.title} is {(budget.limit or 0) / GIGA:.1f} GB",
        "Use more GPUs, a smaller variant, a shorter deployment_context_length or less deployment_concurrency.",
    )


SETTING_RULES: tuple[Rule, ...] = (
    number_format_supported,
    engine_supports_model,
    release_is_safe,
    mtp_supported,
    features_apply,
    installable,
    context_is_the_models,
    driver_new_enough,
    extra_arguments_are_taken,
    no_key_of_its_own,
    no_password_in_addresses,
)
LAYOUT_RULES: tuple[Rule, ...] = (
    whole_nodes,
    nodes_can_join,
    topology_reaches,
    replicas_fit,
    heads_divide,
    experts_divide,
    quantisation_blocks_fit,
    amd_experts_are_whole,
    nvfp4_experts_are_whole,
    data_parallel_placed,
    data_parallel_experts_meet,
    pipeline_allowed,
    transformers_cuts_by_layers,
    fits_in_memory,
)


def violations(setting: Setting, parallel: Parallel) -> list[Violation]:
    """Every rule that a setting with a layout breaks."""
    return [found for rule in (*SETTING_RULES, *LAYOUT_RULES) if (found := rule(setting, parallel))]
