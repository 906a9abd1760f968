"""A checkpoint as Transformers loads it, asked for one answer at a time: what `reference_server.py` serves."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel

from reference_generation import Ended, Generation


class Loaded:
    """A model and its tokenizer."""

    def __init__(self, path: str, context_length: int, *, trust_remote_code: bool, device_map: str | None) -> None:
        """Load; `device_map` auto cuts the model by layers over all GPUs, none leaves it on the CPU."""
        self.context_length = context_length
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        self.model = load_model(path, trust_remote_code=trust_remote_code, device_map=device_map)
        self.model.eval()
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.end_tokens = set(ends) if isinstance(ends, list) else {ends} - {None}

    def encode_chat(self, messages: list[Any], tools: list[Any] | None, options: dict[str, Any]) -> list[int]:
        """Token ids of a conversation in the model's own template, up to where the answer begins."""
        text = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self.tokenizer(text)["input_ids"])

    def generate(self, prompt: list[int], limit: int) -> Generation:
        """Begin to generate at most `limit` tokens."""
        return Running(self, prompt, limit)


class Running:
    """A generation in a thread of its own."""

    def __init__(self, loaded: Loaded, prompt: list[int], limit: int) -> None:
        """Start it."""
        self.cancelled = threading.Event()
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.tokens: list[int] = []
        self._loaded = loaded
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(prompt, limit), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        """Texts as they become final; the failure of the model, where it fails."""
        while (piece := self.pieces.get()) is not None:
            yield piece
        self.pieces.put(None)  # whoever looks again finds the end again
        if self._failure:
            raise self._failure

    def cancel(self) -> None:
        """End it after the next token."""
        self.cancelled.set()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    @property
    def ended(self) -> Ended:
        """How it ended; waits for that."""
        self.wait()
        natural = bool(self.tokens) and self.tokens[-1] in self._loaded.end_tokens
        return Ended("stop" if natural else "length", len(self.tokens))

    def _run(self, prompt: list[int], limit: int) -> None:
        model = self._loaded.model
        try:
            ids = torch.tensor([prompt], device=model.device)
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=limit,
                    eos_token_id=sorted(self._loaded.end_tokens) or None,
                    stopping_criteria=StoppingCriteriaList([_Watch(self, len(prompt))]),
                    streamer=_Texts(self),
                )
        except Exception as error:  # handed to whoever reads the pieces
            self._failure = error
        finally:
            self.pieces.put(None)

    @property
    def tokenizer(self) -> Any:
        """What makes text of tokens."""
        return self._loaded.tokenizer


class _Watch(StoppingCriteria):
    """Notes the tokens after each step, and ends a generation that is cancelled."""

    def __init__(self, running: Running, prompt_length: int) -> None:
        self.running, self.prompt_length = running, prompt_length

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        self.running.tokens[:] = input_ids[0, self.prompt_length :].tolist()
        return torch.full((len(input_ids),), self.running.cancelled.is_set(), device=input_ids.device)


class _Texts(TextStreamer):
    """Hands on the text that no later token changes."""

    def __init__(self, running: Running) -> None:
        super().__init__(running.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.running = running

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand it on."""
        if text:
            self.running.pieces.put(text)


class Step3p5ForCausalLM(Step3p7PreTrainedModel, GenerationMixin):
    """Step-3.5 for text: the decoder that Transformers has as part of Step-3.7, under a head of its own."""

    config_class = Step3p7TextConfig

    def __init__(self, config: Any) -> None:
        """Make it without weights."""
        super().__init__(config)
        self.model = Step3p7TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Any = None, logits_to_keep: int = 0, **more: Any) -> Any:
        """Logits of the last `logits_to_keep` positions, of all with 0."""
        output = self.model(input_ids=input_ids, **more)
        states = output.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else output.last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(states), past_key_values=output.past_key_values)


# Step-3.7's renames without those of its prefixes, which a model without a vision tower has not.
register_checkpoint_conversion_mapping(
    Step3p5ForCausalLM.__name__,
    [
        rename
        for rename in get_checkpoint_conversion_mapping("step3p7")
        if not any(pattern.startswith("^") for pattern in rename.source_patterns)
    ],
    overwrite=True,
)


def load_model(path: str, *, trust_remote_code: bool, device_map: str | None) -> Any:
    """Load a checkpoint by what this release of Transformers has for it; the checkpoint's own code is the last way.

    Raises:
        ValueError: for an architecture that neither has.
        RuntimeError: for a checkpoint with weights missing: they would be random.
    """
    options: dict[str, Any] = {"dtype": "auto", "local_files_only": True, "output_loading_info": True}
    options |= {"device_map": device_map} if device_map else {}
    config = _config(path, trust_remote_code=trust_remote_code)
    loader: Any = AutoModelForCausalLM
    if config.model_type == "step3p5":
        loader = Step3p5ForCausalLM
    elif type(config) in AutoModelForImageTextToText._model_mapping:
        loader = AutoModelForImageTextToText
    if loader is AutoModelForCausalLM and trust_remote_code:
        options["trust_remote_code"] = True
    model, found = loader.from_pretrained(path, config=config, **options)
    if missing := sorted(found["missing_keys"]):
        raise RuntimeError(f"{path} lacks weights of the model: {', '.join(missing[:5])} ({len(missing)} in all)")
    return model


def _config(path: str, *, trust_remote_code: bool) -> Any:
    """The configuration by Transformers' own class where it has one: a checkpoint's may be older than this release."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except ValueError:
        if not trust_remote_code:
            raise
    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=True)
