#!/usr/bin/env python3
"""Make a checkpoint of a few megabytes that a real engine loads, and whose answers are known beforehand.

The network is of the real architecture (mixture of experts, sliding window, MTP layers), but its layers hardly change
what passes through them, and the output head is a table of successors: after each token one other token follows, with
near certainty, sampled or greedy. So a rehearsal can ask an engine for the exact texts below: wrong files, a damaged
embedding or head, a template that is not used or a parser that splits wrongly show as another text. What the layers
compute is not judged by it.

Needs numpy, safetensors and tokenizers, which every engine's environment has; no hub, no network, no accelerator.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

# What the engine's parsers return, to the letter. A chat without tools is answered by REASONING and ANSWER, and so is
# one whose last message is a tool's result; any other chat with tools by TOOL_REASONING and the call.
REASONING = "The user wants a smoke test reply."
ANSWER = "Hello from the tiny CPU model!"
TOOL_REASONING = "I should call get_weather now."
TOOL_NAME = "get_weather"
TOOL_ARGUMENTS = '{"city": "Paris"}'

TURN_START, TURN_END, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL = (PADDING, TURN_START, TURN_END)
THINK_START, THINK_END = "<think>", "</think>"
# A token has one successor, and THINK_END's is the answer: before a tool call the thinking is closed by a token that
# only reads like it. Parsers that look at the text split there. vLLM, when it streams, looks for the token itself, and
# the mark stays at the end of the reasoning: its step3p5 parser then goes on at the tool call's own mark, its step3
# parser takes the call for reasoning (both seen with vLLM 0.32.0).
THINK_END_BEFORE_CALL = f"{THINK_END}\n"

CHAT_TEMPLATE = (
    """{%- if tools %}<|im_start|>system
You can call these tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}
{%- elif message.content %}{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{ call.function.name }}({{ call.function.arguments | tojson }})
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
"""
    # The last token of the prompt chooses the chain: a line break the answer, the bare mark the tool call.
    """<think>{% if not tools or messages[-1].role == 'tool' %}{{ '\\n' }}{% endif %}{% endif %}"""
)

# The text that the byte pairs are learnt from, so that a prompt takes a few tokens a word and not one a letter.
CORPUS = """Ansible deploys inference servers on one or many nodes. The quick brown fox jumps over the lazy dog.
What is the weather in Paris today? Please write a short poem about a small model, and say hello to everybody.
{"type": "function", "function": {"name": "get_weather", "description": "The weather of a city", "parameters":
{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}} You can call these tools:
user assistant system tool role content name arguments 0 1 2 3 4 5 6 7 8 9 . , ; : ! ? ( ) [ ] { } < > = + - * /
"""

# Far enough ahead of any other token that also sampling at temperature 1 follows the table.
HEAD_GAIN = 6.0
# The layers are run, and must not change the answer.
LAYER_DEVIATION = 0.002
SEED = 0
# vLLM's router for experts on the CPU asserts softmax; the real Step-3.5-Flash says sigmoid.
ROUTER = "softmax"
WEIGHTS_FILE = "model.safetensors"

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Dimensions:
    """Sizes of the network, in rows, layers or tokens; all divide by 2, so that two ranks can share it."""

    hidden: int = 64
    layers: int = 2
    mtp_layers: int = 3
    heads: int = 4
    key_value_groups: int = 2
    head: int = 32  # the smallest that vLLM's attention on the CPU takes
    dense: int = 128
    experts: int = 4
    experts_per_token: int = 2
    expert: int = 64
    vocabulary: int = 768
    context: int = 4096

    @property
    def moe_layers(self) -> str:
        """Layers with experts, as the configuration writes them: all but the first, as in the real model."""
        return ",".join(str(layer) for layer in range(1, self.layers))


@dataclass(frozen=True)
class Dialect:
    """How a family writes a tool call: `call` is its text in tokens, `marks` those that its parser looks up by id."""

    marks: tuple[str, ...]
    call: tuple[str, ...]


STEP3P5_DIALECT = Dialect(
    marks=("<tool_call>", "</tool_call>"),
    call=(
        "<tool_call>",
        f"\n<function={TOOL_NAME}>\n",
        "<parameter=city>\n",
        "Paris",
        "\n</parameter>\n",
        "</function>\n",
        "</tool_call>",
    ),
)
STEP3_DIALECT = Dialect(
    marks=(
        "<｜tool_calls_begin｜>",  # noqa: RUF001 - the wide bar is the family's own
        "<｜tool_calls_end｜>",  # noqa: RUF001
        "<｜tool_call_begin｜>",  # noqa: RUF001
        "<｜tool_call_end｜>",  # noqa: RUF001
        "<｜tool_sep｜>",  # noqa: RUF001
    ),
    call=(
        "<｜tool_calls_begin｜>",  # noqa: RUF001
        "<｜tool_call_begin｜>",  # noqa: RUF001
        "function",
        "<｜tool_sep｜>",  # noqa: RUF001
        f'<steptml:invoke name="{TOOL_NAME}">',
        '<steptml:parameter name="city">',
        "Paris",
        "</steptml:parameter>",
        "</steptml:invoke>",
        "<｜tool_call_end｜>",  # noqa: RUF001
        "<｜tool_calls_end｜>",  # noqa: RUF001
    ),
)


def words(text: str) -> list[str]:
    """Split a text into words that keep the blank before them: joined they are the text again."""
    return re.findall(r"\s*\S+", text)


def chains(dialect: Dialect) -> tuple[list[str], list[str]]:
    """Give the two fixed outputs as tokens, each led by the token that the chat template ends with."""
    answer = ["\n", *words(REASONING), THINK_END, *words(ANSWER), TURN_END]
    call = [THINK_START, *words(TOOL_REASONING), THINK_END_BEFORE_CALL, *dialect.call, TURN_END]
    return answer, call


def build_tokenizer(dialect: Dialect, vocabulary: int) -> Tokenizer:
    """Make a byte-level tokenizer in which every piece of the two chains is one token.

    Args:
        dialect: the family's marks and pieces of a tool call
        vocabulary: upper bound of the number of tokens

    Raises:
        ValueError: the tokens do not fit into the vocabulary
    """
    marks = [THINK_START, THINK_END, *dialect.marks]
    pieces = [piece for chain in chains(dialect) for piece in chain if piece not in ("\n", *SPECIAL, *marks)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL) - len(marks) - len(pieces),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    # Not special: engines drop special tokens from the text, and the parsers need these in it.
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in [*marks, *pieces]])
    if tokenizer.get_vocab_size() > vocabulary:
        raise ValueError(f"{tokenizer.get_vocab_size()} tokens do not fit into a vocabulary of {vocabulary}")
    return tokenizer


def successors(tokenizer: Tokenizer, chained: Sequence[Sequence[str]]) -> dict[int, int]:
    """Tell for every token which one follows it.

    Tokens outside the chains follow each other in two endless rings, readable text apart from lone bytes and marks:
    a text completion then goes on until its limit, which load tests want.

    Raises:
        ValueError: a token would need two successors, or a piece is not one token
    """
    following: dict[int, int] = {}
    for chain in chained:
        for token, successor in pairwise(_identifier(tokenizer, piece) for piece in chain):
            if following.setdefault(token, successor) != successor:
                raise ValueError(f"token {tokenizer.id_to_token(token)!r} stands in two chains: it has one successor")

    special = [_identifier(tokenizer, text) for text in SPECIAL]
    free = [token for token in range(tokenizer.get_vocab_size()) if token not in following and token not in special]
    readable = [token for token in free if re.fullmatch(r"[ -;=?-~]+", tokenizer.decode([token]))]
    for ring in (readable, [token for token in free if token not in readable]):
        following.update(zip(ring, ring[1:] + ring[:1], strict=True))
    # Only met by a client that goes on after the end of a turn.
    following.update(dict.fromkeys(special, readable[0]))
    return following


def _identifier(tokenizer: Tokenizer, piece: str) -> int:
    tokens = tokenizer.encode(piece).ids
    if len(tokens) != 1:
        raise ValueError(f"{piece!r} is {len(tokens)} tokens, it has to be one")
    return int(tokens[0])


class Weights:
    """Named tensors, drawn from one seeded generator in the order in which they are asked for."""

    def __init__(self, seed: int, norm_weight: float) -> None:
        """Start empty; `norm_weight` is the one that makes a norm neutral, 0 where the model adds 1 to it."""
        self.tensors: dict[str, Array] = {}
        self._random = np.random.default_rng(seed)
        self._norm_weight = norm_weight

    def directions(self, rows: int, columns: int) -> Array:
        """Draw unit vectors, one a row, that point anywhere."""
        drawn = self._random.standard_normal((rows, columns))
        unit: Array = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
        return unit

    def put(self, name: str, values: Array) -> None:
        """Name a tensor that is not drawn."""
        self.tensors[name] = values

    def linear(self, name: str, *shape: int) -> None:
        """Draw a matrix (output rows, input columns), or a stack of them, that adds next to nothing."""
        self.put(f"{name}.weight", (self._random.standard_normal(shape) * LAYER_DEVIATION).astype(np.float32))

    def norms(self, size: int, *names: str) -> None:
        """Add neutral norms."""
        for name in names:
            self.put(f"{name}.weight", np.full(size, self._norm_weight, dtype=np.float32))

    def feed_forward(self, name: str, hidden: int, inner: int, *stack: int) -> None:
        """Draw a gated feed-forward block, or with `stack` that many experts packed into one tensor."""
        self.linear(f"{name}.gate_proj", *stack, inner, hidden)
        self.linear(f"{name}.up_proj", *stack, inner, hidden)
        self.linear(f"{name}.down_proj", *stack, hidden, inner)


def output_head(embedding: Array, following: dict[int, int]) -> Array:
    """Make the head (vocabulary rows, hidden columns) that scores highest each token's successor."""
    head = np.zeros_like(embedding)
    for token, successor in following.items():
        head[successor] += HEAD_GAIN * embedding[token]
    return head


def build_weights(architecture: Architecture, size: Dimensions, following: dict[int, int], seed: int) -> Weights:
    """Draw all tensors of a checkpoint under the names that the engines' loaders expect."""
    weights = Weights(seed, architecture.norm_weight)
    embedding = weights.directions(size.vocabulary, size.hidden)
    weights.put("model.embed_tokens.weight", embedding)
    weights.put("lm_head.weight", output_head(embedding, following))
    weights.norms(size.hidden, "model.norm")
    for layer in range(size.layers):
        name = f"model.layers.{layer}"
        weights.norms(size.hidden, f"{name}.input_layernorm", f"{name}.post_attention_layernorm")
        architecture.add_attention(weights, f"{name}.self_attn", size)
        if layer == 0:
            weights.feed_forward(f"{name}.mlp", size.hidden, size.dense)
        else:
            add_experts(weights, name, size, router_bias=architecture.router_bias)
    if architecture.mtp:
        for layer in range(size.layers, size.layers + size.mtp_layers):
            add_mtp_layer(weights, f"model.layers.{layer}", size, architecture)
    return weights


def add_step3p5_attention(weights: Weights, name: str, size: Dimensions) -> None:
    """Draw grouped-query attention with normed queries and keys and a gate for each head."""
    weights.linear(f"{name}.q_proj", size.heads * size.head, size.hidden)
    weights.linear(f"{name}.k_proj", size.key_value_groups * size.head, size.hidden)
    weights.linear(f"{name}.v_proj", size.key_value_groups * size.head, size.hidden)
    weights.linear(f"{name}.o_proj", size.hidden, size.heads * size.head)
    weights.linear(f"{name}.g_proj", size.heads, size.hidden)
    weights.norms(size.head, f"{name}.q_norm", f"{name}.k_norm")


def add_step3_attention(weights: Weights, name: str, size: Dimensions) -> None:
    """Draw multi-matrix factorization attention: one key and value for all heads, queries through a middle step."""
    weights.linear(f"{name}.q_proj", size.hidden, size.hidden)
    weights.linear(f"{name}.k_proj", size.head, size.hidden)
    weights.linear(f"{name}.v_proj", size.head, size.hidden)
    weights.norms(size.hidden, f"{name}.inter_norm")
    weights.linear(f"{name}.wq", size.heads * size.head, size.hidden)
    weights.linear(f"{name}.o_proj", size.hidden, size.heads * size.head)


def add_experts(weights: Weights, name: str, size: Dimensions, *, router_bias: bool) -> None:
    """Draw a router, its experts in packed tensors, and the expert that all tokens share."""
    weights.linear(f"{name}.moe.gate", size.experts, size.hidden)
    if router_bias:
        weights.put(f"{name}.moe.router_bias", np.zeros(size.experts, dtype=np.float32))
    weights.feed_forward(f"{name}.moe", size.hidden, size.expert, size.experts)
    weights.feed_forward(f"{name}.share_expert", size.hidden, size.expert)


def add_mtp_layer(weights: Weights, name: str, size: Dimensions, architecture: Architecture) -> None:
    """Draw a layer for multi-token prediction, dense as in the real model, that reads the same table."""
    weights.norms(size.hidden, f"{name}.input_layernorm", f"{name}.post_attention_layernorm")
    architecture.add_attention(weights, f"{name}.self_attn", size)
    weights.feed_forward(f"{name}.mlp", size.hidden, size.dense)
    weights.norms(size.hidden, f"{name}.enorm", f"{name}.hnorm", f"{name}.shared_head.norm")
    # Of embedding and hidden state the embedding alone passes: the table needs no more.
    passes_embedding = np.eye(size.hidden, 2 * size.hidden, dtype=np.float32)
    weights.put(f"{name}.eh_proj.weight", passes_embedding)
    weights.put(f"{name}.shared_head.output.weight", weights.tensors["lm_head.weight"])


def common_config(size: Dimensions, turn_end: int, padding: int) -> dict[str, Any]:
    """Give the fields of config.json that the architectures share; `turn_end` and `padding` are token ids."""
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.dense,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "head_dim": size.head,
        "max_position_embeddings": size.context,
        "max_seq_len": size.context,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": [turn_end],
        "pad_token_id": padding,
        "use_cache": True,
        "initializer_range": 0.02,
        "moe_layers_enum": size.moe_layers,
        "moe_num_experts": size.experts,
        "moe_top_k": size.experts_per_token,
        "moe_intermediate_size": size.expert,
        "share_expert_dim": size.expert,
        "norm_expert_weight": True,
    }


def step3p5_config(size: Dimensions) -> dict[str, Any]:
    """Give what config.json of Step-3.5-Flash says beyond the common fields."""
    layers = size.layers + size.mtp_layers
    return {
        "num_attention_groups": size.key_value_groups,
        "att_impl_type": "GQA",
        "use_head_wise_attn_gate": True,
        "layer_types": [("full_attention", "sliding_attention")[layer % 2] for layer in range(layers)],
        "sliding_window": 256,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": size.heads,
            "num_attention_groups": size.key_value_groups,
            "head_dim": size.head,
        },
        "rope_theta": [10000.0] * layers,
        "use_rope_layers": [True] * layers,
        "partial_rotary_factors": [1.0] * layers,
        "swiglu_limits": [0.0] * layers,
        "swiglu_limits_shared": [0.0] * layers,
        "use_moe": True,
        "moe_every_n_layer": 1,
        "moe_router_activation": ROUTER,
        "moe_router_scaling_factor": 1.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "num_nextn_predict_layers": size.mtp_layers,
    }


def step3_config(size: Dimensions) -> dict[str, Any]:
    """Give what config.json of Step3's language model says beyond the common fields."""
    return {
        "num_attention_groups": 1,
        "share_q_dim": size.hidden,
        "max_position_embedding": size.context,
        "rope_theta": 10000.0,
    }


@dataclass(frozen=True)
class Architecture:
    """What differs between the families; `name` and `model_type` are those of config.json."""

    name: str
    model_type: str
    dialect: Dialect
    add_attention: Callable[[Weights, str, Dimensions], None]
    config: Callable[[Dimensions], dict[str, Any]]
    norm_weight: float
    router_bias: bool
    mtp: bool


ARCHITECTURES = {
    "step3p5": Architecture(
        name="Step3p5ForCausalLM",
        model_type="step3p5",
        dialect=STEP3P5_DIALECT,
        add_attention=add_step3p5_attention,
        config=step3p5_config,
        norm_weight=0.0,
        router_bias=True,
        mtp=True,
    ),
    "step3-text": Architecture(
        name="Step3TextForCausalLM",
        model_type="step3_text",
        dialect=STEP3_DIALECT,
        add_attention=add_step3_attention,
        config=step3_config,
        norm_weight=1.0,
        router_bias=False,
        mtp=False,
    ),
}


def write_model(folder: Path, architecture: str, size: Dimensions, seed: int = SEED) -> None:
    """Write all files of a checkpoint into an existing folder; the same arguments write the same bytes.

    Args:
        folder: where the files go
        architecture: a key of ARCHITECTURES
        size: sizes of the network
        seed: start of the generator that draws the weights
    """
    family = ARCHITECTURES[architecture]
    tokenizer = build_tokenizer(family.dialect, size.vocabulary)
    turn_end, padding = _identifier(tokenizer, TURN_END), _identifier(tokenizer, PADDING)
    weights = build_weights(family, size, successors(tokenizer, chains(family.dialect)), seed)

    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": PADDING,
            "unk_token": None,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": size.context,
        },
    )
    _write_json(
        folder / "config.json",
        {
            "architectures": [family.name],
            "model_type": family.model_type,
            **common_config(size, turn_end, padding),
            **family.config(size),
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 0.95,
            "eos_token_id": [turn_end],
            "pad_token_id": padding,
        },
    )
    save_file(weights.tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def make_model(out: Path, architecture: str, size: Dimensions | None = None, seed: int = SEED) -> bool:
    """Make the model's folder, whole or not at all; a folder that already holds it is left alone.

    Args:
        out: the folder; its parents are made
        architecture: a key of ARCHITECTURES
        size: sizes of the network
        seed: start of the generator that draws the weights

    Returns:
        whether it was made

    Raises:
        FileExistsError: `out` holds something else; the message names each file that differs
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system; the dot keeps a hub from listing it.
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_model(building, architecture, size or Dimensions(), seed)
        building.chmod(0o755)
        for path in building.iterdir():
            path.chmod(0o644)
        try:
            building.rename(out)
        except OSError:
            if not out.exists():
                raise
            # Weights are compared, not trusted: a damaged model must not pass for a finished one.
            if different := _differences(building, out):
                raise FileExistsError(
                    f"{out} exists and is not the {architecture} model that would be made here: "
                    f"{', '.join(different)}. Remove it, or name another folder."
                ) from None
            return False
        return True
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _differences(wanted: Path, found: Path) -> list[str]:
    if not found.is_dir():
        return ["it is not a folder"]
    return [
        f"{path.name} {'differs' if (found / path.name).exists() else 'is missing'}"
        for path in sorted(wanted.iterdir())
        if not (found / path.name).is_file() or (found / path.name).read_bytes() != path.read_bytes()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; exit status 1 if the folder holds something else."""
    parser = argparse.ArgumentParser(description="Make a tiny checkpoint with known answers.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="step3p5")
    options = parser.parse_args(arguments)
    try:
        made = make_model(options.out, options.architecture)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("made\n" if made else "unchanged\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
