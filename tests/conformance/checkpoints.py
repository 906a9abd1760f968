"""Checkpoints without weights: the few files that an engine reads before it starts a process.

The dimensions come from the catalogue, so what an engine works out from them (heads per rank, layers per stage,
context length, quantisation) is worked out from the figures that the plan was made from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from stepladder.catalogue import Attention, Model, Variant

# What the reasoning and tool call parsers look up by id, besides a stop token.
MARKS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<｜tool_calls_begin｜>",  # noqa: RUF001 - the wide bar is the family's own
    "<｜tool_calls_end｜>",  # noqa: RUF001
    "<｜tool_call_begin｜>",  # noqa: RUF001
    "<｜tool_call_end｜>",  # noqa: RUF001
    "<｜tool_sep｜>",  # noqa: RUF001
)


def step3_text(model: Model) -> dict[str, Any]:
    """What config.json of Step3 says about its language model."""
    (attention,) = model.shape.attention
    return {
        **common(model, attention),
        "model_type": "step3_text",
        "architectures": ["Step3TextForCausalLM"],
        "num_attention_groups": attention.kv_heads,
        "share_q_dim": attention.query_rank,
        "max_position_embedding": model.context_length,
    }


def step3(model: Model) -> dict[str, Any]:
    """What config.json of Step3 says; the vision tower's dimensions are the engines' own defaults."""
    return {"model_type": "step3_vl", "text_config": step3_text(model), "vision_config": {}}


def step3p5(model: Model) -> dict[str, Any]:
    """What config.json of Step-3.5-Flash says: per-layer lists go on over the layers for multi-token prediction."""
    full, sliding = model.shape.attention
    layers = model.shape.layers + model.mtp_layers
    period = round(model.shape.layers / full.layers)
    kinds = ["sliding_attention" if layer % period else "full_attention" for layer in range(layers)]
    return {
        **common(model, full),
        "model_type": "step3p5",
        "num_attention_groups": full.kv_heads,
        "layer_types": kinds,
        "sliding_window": sliding.window,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": sliding.query_heads,
            "num_attention_groups": sliding.kv_heads,
            "head_dim": sliding.head_dim,
        },
        "rope_theta": [10000.0] * layers,
        "use_rope_layers": [True] * layers,
        "partial_rotary_factors": [1.0] * layers,
        "swiglu_limits": [0.0] * layers,
        "swiglu_limits_shared": [0.0] * layers,
        "use_head_wise_attn_gate": True,
        "use_moe": True,
        "moe_every_n_layer": 1,
        "moe_router_activation": "sigmoid",
        "use_moe_router_bias": True,
        "num_nextn_predict_layers": model.mtp_layers,
    }


def step3p7(model: Model) -> dict[str, Any]:
    """What config.json of Step-3.7-Flash says; the vision tower's dimensions are the engines' own defaults."""
    return {"model_type": "step3p7", "text_config": step3p5(model), "vision_config": {}}


def common(model: Model, attention: Attention) -> dict[str, Any]:
    """The fields that all families share."""
    shape, moe = model.shape, model.shape.moe
    assert moe is not None
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.dense.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": attention.query_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": model.context_length,
        "max_seq_len": model.context_length,
        "moe_layers_enum": ",".join(str(layer) for layer in range(shape.dense.layers, shape.layers)),
        "moe_num_experts": moe.experts,
        "moe_top_k": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_width,
        "share_expert_dim": moe.shared_width,
        "norm_expert_weight": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": [1],
        "pad_token_id": 0,
    }


# Stands in for the configuration class that a checkpoint brings along (--trust-remote-code): it keeps what it is given.
# SGLang reads Step-3.5's and 3.7's through it, before it puts a class of its own in its place, as vLLM does at once.
REMOTE_CONFIGURATION = """from transformers import PretrainedConfig


class StandInConfig(PretrainedConfig):
    model_type = "{model_type}"

    def __init__(self, **fields):
        if "layer_types" in fields:
            fields["layer_types"] = fields["layer_types"][: fields["num_hidden_layers"]]
        if "text_config" in fields:
            fields["text_config"] = StandInConfig(**fields["text_config"])
        super().__init__(**fields)
"""
BRINGS_ITS_OWN_CLASS = ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration")

CONFIGURATIONS: dict[str, Callable[[Model], dict[str, Any]]] = {
    "Step3VLForConditionalGeneration": step3,
    "Step3TextForCausalLM": step3_text,
    "Step3p5ForCausalLM": step3p5,
    "Step3p7ForConditionalGeneration": step3p7,
}
QUANTISATIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {
        "quantization_config": {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
        }
    },
    "nvfp4": {
        "quantization_config": {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
            "ignore": ["lm_head"], "producer": {"name": "modelopt", "version": "0.40.0"},
        }
    },
}  # fmt: skip


def write(folder: Path, model: Model, variant: Variant) -> None:
    """Write configuration and tokenizer of a variant into a folder, and no weights.

    Raises:
        KeyError: for an architecture or number format that this file does not know yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [model.architecture],
        **CONFIGURATIONS[model.architecture](model),
        **QUANTISATIONS[variant.quantisation.format],
    }
    config["architectures"] = [model.architecture]  # and not those of its language model alone
    if model.architecture in BRINGS_ITS_OWN_CLASS:
        config["auto_map"] = {"AutoConfig": "configuration_stand_in.StandInConfig"}
        text = REMOTE_CONFIGURATION.format(model_type=config["model_type"])
        (folder / "configuration_stand_in.py").write_text(text)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = Tokenizer(models.WordLevel({mark: place for place, mark in enumerate(MARKS)}, unk_token=MARKS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": MARKS[0], "eos_token": MARKS[1]})
    )
