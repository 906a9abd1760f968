"""The tiny model: the table that it follows, and how its folder comes to be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy", reason="the tiny model needs numpy")
safetensors = pytest.importorskip("safetensors.numpy", reason="the tiny model needs safetensors")
tokenizers = pytest.importorskip("tokenizers", reason="the tiny model needs tokenizers")
jinja2 = pytest.importorskip("jinja2", reason="chat templates are rendered by jinja2")

import tiny_model  # noqa: E402 - it imports what is looked for above

SCRIPT = Path(tiny_model.__file__)
ARCHITECTURES = ("step3p5", "step3-text")
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
ANSWERED = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"}]

REPLY = "The user wants a smoke test reply.</think>Hello from the tiny CPU model!"
# As the families' own templates write a call.
STEP3P5_CALL = (
    "I should call get_weather now.</think>\n"
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
)
STEP3_CALL = (
    "I should call get_weather now.</think>\n"
    "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>"  # noqa: RUF001
    '<steptml:invoke name="get_weather"><steptml:parameter name="city">Paris</steptml:parameter></steptml:invoke>'
    "<｜tool_call_end｜><｜tool_calls_end｜>"  # noqa: RUF001
)


class Reader:
    """Answers from the files alone: embedding and head without the layers between, which hardly change anything."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tensors = safetensors.load_file(folder / "model.safetensors")
        self.embedding = tensors["model.embed_tokens.weight"]
        self.head = tensors["lm_head.weight"]

    def logits(self, token: int) -> Any:
        hidden = self.embedding[token]
        return self.head @ (hidden / np.sqrt(np.mean(hidden**2)))

    def follow(self, prompt: str, limit: int = 100) -> str:
        token, output = self.tokenizer.encode(prompt).ids[-1], []
        while len(output) < limit:
            token = int(np.argmax(self.logits(token)))
            if token in self.config["eos_token_id"]:
                break
            output.append(token)
        return str(self.tokenizer.decode(output, skip_special_tokens=False))

    def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
        prompt = environment.from_string(self.template).render(
            messages=messages, tools=tools, add_generation_prompt=True
        )
        return self.follow(prompt)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("models") / request.param
    assert tiny_model.make_model(out, request.param)
    return request.param, out


@pytest.mark.parametrize(
    ("messages", "tools", "expected"),
    [
        pytest.param([QUESTION], None, {"step3p5": REPLY, "step3-text": REPLY}, id="chat"),
        pytest.param([QUESTION], [TOOL], {"step3p5": STEP3P5_CALL, "step3-text": STEP3_CALL}, id="chat with tools"),
        pytest.param(ANSWERED, [TOOL], {"step3p5": REPLY, "step3-text": REPLY}, id="after a tool's result"),
        pytest.param(
            [{"role": "user", "content": [{"type": "text", "text": "I should call now."}]}],
            None,
            {"step3p5": REPLY, "step3-text": REPLY},
            id="a prompt in parts that holds words of the other chain",
        ),
    ],
)
def test_answers(
    model: tuple[str, Path],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    expected: dict[str, str],
) -> None:
    architecture, folder = model
    assert Reader(folder).chat(messages, tools) == expected[architecture]


def test_texts_that_others_compare_with_are_those_of_the_chains() -> None:
    assert f"{tiny_model.REASONING}</think>{tiny_model.ANSWER}" == REPLY
    arguments = dict(re.findall(r"<parameter=(\w+)>\n(.*)\n</parameter>", STEP3P5_CALL))
    assert json.loads(tiny_model.TOOL_ARGUMENTS) == arguments
    assert f"<function={tiny_model.TOOL_NAME}>" in STEP3P5_CALL
    assert STEP3P5_CALL.startswith(tiny_model.TOOL_REASONING + "</think>")


def test_every_token_has_one_near_certain_successor(model: tuple[str, Path]) -> None:
    reader = Reader(model[1])
    for token in range(reader.tokenizer.get_vocab_size()):
        logits = reader.logits(token)
        probability = 1 / np.exp(logits - logits.max()).sum()
        assert probability > 0.999, reader.tokenizer.id_to_token(token)


def test_a_plain_completion_goes_on_in_readable_text(model: tuple[str, Path]) -> None:
    text = Reader(model[1]).follow("The quick brown", limit=1000)
    assert len(text) >= 1000
    assert re.fullmatch(r"[ -~]+", text)


def test_router_is_the_one_that_the_cpu_can_run(tmp_path: Path) -> None:
    tiny_model.make_model(tmp_path / "m", "step3p5")
    assert json.loads((tmp_path / "m/config.json").read_text())["moe_router_activation"] == "softmax"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_are_the_same_in_every_process(architecture: str, tmp_path: Path) -> None:
    folders = [tmp_path / seed for seed in ("1", "2")]
    for folder in folders:
        subprocess.run(
            [sys.executable, SCRIPT, folder, "--architecture", architecture],
            check=True,
            capture_output=True,
            env={"PYTHONHASHSEED": folder.name},
        )
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert len(first) == 6
    assert first == second
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert list(json.loads(first[name])) == sorted(json.loads(first[name])), name


def test_a_folder_that_is_there_is_whole(tmp_path: Path) -> None:
    for number in range(5):
        out = tmp_path / str(number)
        with subprocess.Popen([sys.executable, str(SCRIPT), str(out)], stdout=subprocess.DEVNULL) as run:
            while not out.exists() and run.poll() is None:
                time.sleep(0)
            assert len(list(out.iterdir())) == 6


def test_other_seed_gives_other_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_model.make_model(tmp_path / str(seed), "step3p5", seed=seed)
    assert (tmp_path / "0/model.safetensors").read_bytes() != (tmp_path / "1/model.safetensors").read_bytes()


def test_made_once_then_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "below" / "model"
    assert tiny_model.main([str(out)]) == 0
    (out / "README.md").write_text("a file of someone else's does no harm")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert tiny_model.main([str(out)]) == 0
    assert capsys.readouterr().out == "made\nunchanged\n"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def _flip_a_weight(out: Path) -> None:
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        pytest.param(_flip_a_weight, "model.safetensors differs", id="one bit of the weights"),
        pytest.param(lambda out: (out / "config.json").unlink(), "config.json is missing", id="a file is gone"),
        pytest.param(
            lambda out: [path.unlink() for path in out.glob("*.json")] and (out / "tokenizer.json").mkdir(),
            "config.json is missing, generation_config.json is missing, tokenizer.json differs, "
            "tokenizer_config.json is missing",
            id="several at once",
        ),
    ],
)
def test_a_damaged_model_is_refused(
    damage: Callable[[Path], object], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    tiny_model.make_model(out, "step3p5")
    damage(out)
    assert tiny_model.main([str(out)]) == 1
    assert capsys.readouterr().err == (
        f"{out} exists and is not the step3p5 model that would be made here: {found}. "
        "Remove it, or name another folder.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_of_another_architecture_is_refused(tmp_path: Path) -> None:
    tiny_model.make_model(tmp_path / "model", "step3p5")
    with pytest.raises(FileExistsError, match=r"is not the step3-text model .* config\.json differs"):
        tiny_model.make_model(tmp_path / "model", "step3-text")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(FileExistsError, match="would be made here: it is not a folder"):
        tiny_model.make_model(tmp_path / "model", "step3p5")


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_model.make_model(tmp_path / "model", "step3p5")
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_at_once_one_makes_it(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "model")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(run.communicate(timeout=60)[0] for run in runs) == ["made\n", "unchanged\n"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("chained", "message"),
    [
        pytest.param(
            [["Hello", " from"], ["Hello", " the"]],
            "token 'Hello' stands in two chains: it has one successor",
            id="two successors",
        ),
        pytest.param([["Hello", "@ from"]], "'@ from' is 2 tokens, it has to be one", id="two tokens"),
    ],
)
def test_a_chain_that_the_table_cannot_hold_is_refused(chained: list[list[str]], message: str) -> None:
    tokenizer = tiny_model.build_tokenizer(tiny_model.STEP3P5_DIALECT, 768)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny_model.successors(tokenizer, chained)


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^\d+ tokens do not fit into a vocabulary of 200$"):
        tiny_model.build_tokenizer(tiny_model.STEP3P5_DIALECT, 200)
