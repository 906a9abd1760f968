"""Reads a command as it stands on the web or in a ticket: which engine, which model, which flags, in which container.

Understands line continuations, several commands in one text, `docker run`, shells around a command, modules run by
Python, aliases of flags, and the typographic dashes and quotes that pages put in.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from stepladder.request import Parallel

LONGEST_COMMAND = 32_768
Severity = Literal["error", "warning", "note"]

VLLM_ALIASES = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local",
    "-dpr": "--data-parallel-start-rank",
    "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend",
    "-dpn": "--data-parallel-rank",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb",
    "-ep": "--enable-expert-parallel",
    "-n": "--nnodes",
    "-r": "--node-rank",
    "-q": "--quantization",
    "-sc": "--speculative-config",
    "-asc": "--api-server-count",
    "--device-memory-utilization": "--gpu-memory-utilization",
}
SGLANG_ALIASES = {
    "--tp-size": "--tp",
    "--tensor-parallel-size": "--tp",
    "--pipeline-parallel-size": "--pp-size",
    "--pp": "--pp-size",
    "--dp-size": "--dp",
    "--data-parallel-size": "--dp",
    "--ep-size": "--ep",
    "--expert-parallel-size": "--ep",
    "--nccl-init-addr": "--dist-init-addr",
    "--model": "--model-path",
}
ALIASES = {"vllm": VLLM_ALIASES, "sglang": SGLANG_ALIASES, "tensorrt_llm": {}}
LAYOUT_FLAGS = {
    "vllm": ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size", "--enable-expert-parallel"),
    "sglang": ("--tp", "--pp-size", "--dp", "--ep"),
    "tensorrt_llm": ("--tp-size", "--pp-size", "", "--ep-size"),
}
MODEL_FLAGS = ("--model", "--model-path")
MODULES = {
    "vllm.entrypoints.openai.api_server": "vllm",
    "sglang.launch_server": "sglang",
}
# What may differ between the nodes of one replica; of the rest vLLM compares a hash.
PER_NODE_FLAGS = frozenset(
    ["--node-rank", "--headless", "--host", "--port", "--data-parallel-start-rank", "--data-parallel-rank"]
) | {"--api-server-count", "--shutdown-timeout", "--served-model-name"}
SWITCH_PREFIXES = ("--enable-", "--disable-", "--no-", "--skip-", "--trust-")
SWITCHES = frozenset(
    ["--headless", "--language-model-only", "--async-scheduling", "--enforce-eager", "--data-parallel-hybrid-lb"]
) | {"--data-parallel-external-lb", "--use-ray", "--help", "--version"}
TAKES_A_VALUE = frozenset(["--disable-access-log-for-endpoints"])
CONTAINER_PROGRAMS = frozenset(["docker", "podman", "nerdctl"])
CONTAINER_SWITCHES = frozenset(["-i", "-t", "-d", "-it", "-ti", "-dit", "-itd", "--rm", "--init", "--privileged"]) | {
    "--detach",
    "--interactive",
    "--tty",
}
BEFORE_A_PROGRAM = frozenset(("sudo", "nohup", "exec", "time", "env", "export", "$"))
SEPARATORS = frozenset(";&|\n()")
TEMPORARY_TAG = re.compile(r":(dev[-_].*|stepfun\d+|nightly.*|latest)$|^[^:@]*$")
HOST_NAME = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9.\-]*[A-Za-z0-9])?$")
NO_PROGRAM_OF_OURS = (
    "Expected one of: vllm serve, sglang serve, python -m sglang.launch_server, "
    "python -m vllm.entrypoints.openai.api_server, trtllm-serve, or docker run with one of them."
)


INSTALLERS = ("pip install", "pip3 install", "uv pip", "python -m pip", "pip config")
SHELLS = ("bash", "sh")
PULLS = ("docker pull", "podman pull")
NO_ENGINE = (
    (INSTALLERS, "installs packages, others every day,", "Install from a lock, as bin/stepladder deploy does."),
    (PULLS, "pulls an image", "See the images of bin/stepladder plan."),
    (SHELLS, "opens a shell in the container", "Give the command that is run in it too."),
    (("modelscope download", "snapshot_download"), "downloads weights", "Keep it, with a folder of its own."),
    (
        ("python -m sglang.bench_serving", "python -m sglang.test.few_shot_gsm8k", "vllm bench"),
        "measures a server that runs already",
        "Keep it; --port is 30000 for SGLang.",
    ),
    (("ray start",), "joins a node to Ray", "See its ports and token in bin/stepladder plan."),
)


class Flag(NamedTuple):
    """A flag with its value; `typed` as it stood there, `name` as the engine's documentation writes it."""

    typed: str
    name: str
    value: str | None

    def __str__(self) -> str:
        return self.typed if self.value is None else f"{self.typed} {self.value}"


class Finding(NamedTuple):
    """Something about a command: what was found, why it matters, how to mend it, and who says so."""

    severity: Severity
    what: str
    why: str
    mend: str
    source: str


@dataclass(frozen=True)
class Container:
    """The `docker run` around a command."""

    image: str
    options: tuple[Flag, ...]

    def has(self, *names: str) -> bool:
        """Whether one of the options was given."""
        return any(option.name in names for option in self.options)

    def values(self, *names: str) -> list[str]:
        """What the options were given."""
        return [option.value or "" for option in self.options if option.name in names]


@dataclass(frozen=True)
class FoundCommand:
    """A command as it was found.

    `engine` is a name of the catalogue, none where no engine is started; `words` belong to no flag; `problems` were
    seen while reading; `others` are further commands of the same text that start an engine too, as those of a replica's
    other nodes do.
    """

    program: str
    engine: str | None = None
    model: str | None = None
    flags: tuple[Flag, ...] = ()
    words: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    container: Container | None = None
    problems: tuple[Finding, ...] = ()
    others: tuple[FoundCommand, ...] = ()

    def get(self, name: str) -> str | None:
        """The value of a flag, the last one as the engines take it; none also for a flag without one."""
        return next((flag.value for flag in reversed(self.flags) if flag.name == name), None)

    def has(self, name: str) -> bool:
        """Whether a flag was given."""
        return any(flag.name == name for flag in self.flags)

    def number(self, name: str, default: int) -> int:
        """A flag's whole number (8k is 8000, as vLLM reads it); the default where there is none that can be read."""
        match = re.fullmatch(r"(\d{1,9})([kK])?", self.get(name) or "")
        return int(match[1]) * (1000 if match[2] else 1) if match else default

    @property
    def parallel(self) -> Parallel:
        """The layout that the flags ask for."""
        tensor, pipeline, data, expert = LAYOUT_FLAGS[self.engine or "vllm"]
        whole = self.has(expert) if self.engine == "vllm" else self.number(expert, 1) > 1
        sizes = [max(1, self.number(name, 1)) for name in (tensor, pipeline, data)]
        return Parallel(tensor=sizes[0], pipeline=sizes[1], data=sizes[2], expert=whole)


def parse(text: str) -> FoundCommand:
    """Read a command line, or the text of a code block with one in it.

    Understands continued lines, comments, assignments before the command, `docker run` around it, `bash -c`, flags
    with `=`, underscores and the engines' short names. Never raises: what cannot be read is in `problems`.
    """
    if len(text) > LONGEST_COMMAND:
        why = f"it has {len(text):,} characters, and no serving command has more than {LONGEST_COMMAND:,}"
        return FoundCommand("", problems=(Finding("error", "the command", why, "Give one command.", "this tool"),))
    readable, problems = _joined(text)
    try:
        segments = _segments(readable)
    except ValueError as error:
        problems.append(
            Finding("error", "quotes", str(error).lower(), "Close the quote; put JSON into single quotes.", "sh(1)")
        )
        return FoundCommand("", problems=tuple(problems))
    environment: dict[str, str] = {}
    commands = [found for words in segments if (found := _command(words, environment))]
    if not commands:
        problems.append(Finding("error", "the command", "there is none in the text", NO_PROGRAM_OF_OURS, "this tool"))
        return FoundCommand("", environment=environment, problems=tuple(problems))
    serving = [command for command in commands if command.engine]
    first, *others = serving or commands[:1]
    return replace(first, problems=(*problems, *first.problems), others=(*first.others, *others))


def _joined(text: str) -> tuple[str, list[Finding]]:
    """The text with continued lines joined, and what is wrong with how they are continued."""
    problems = []

    def problem(what: str, why: str, mend: str) -> None:
        problems.append(Finding("error", what, why, mend, "sh(1)"))

    text = text.replace("\r\n", "\n").encode(errors="replace").decode()
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    if re.search(r"snapshot_download\([^)]*\bcache_dir\s*=", text):
        problems.append(moved_cache("cache_dir"))
    if re.search(r"\\\s*\Z", text):
        problem("a backslash at the end", "the shell waits for another line", "Remove the last backslash.")
        text = re.sub(r"[\\\s]+\Z", "", text)
    if re.search(r"(?m)\\[ \t]+$", text):
        problem(
            "a space after a backslash at a line's end",
            "it continues no line: what follows is run as another command",
            "Remove the space.",
        )
    if re.search(r"(?<=\s)\\n(?=\s)", text):
        problem(
            "a backslash followed by n", "a page lost a line break there; the shell reads the word n", "Break the line."
        )
        text = re.sub(r"(?<=\s)\\n(?=\s)", " ", text)
    if found := re.search(r"(?<=\s)[\u2010-\u2015\u2212]+\w[\w-]*|[\u2018\u2019\u201c\u201d]", text):
        problem(
            f"{found[0]}", "a page made a typographic character of it", "Type plain hyphens and straight quotes there."
        )
        text = re.sub(r"(?<=\s)[\u2010-\u2015\u2212]+(?=\w)", "--", text)
        text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    text = re.sub(r"\$\([^()\n]*\)|`[^`\n]*`", "$@", text)  # what another command prints is not known
    return re.sub(r"\\[ \t]*\n", " ", text), problems


def _segments(text: str) -> list[list[str]]:
    """The words of each command in the text.

    Raises:
        ValueError: where a quote is not closed.
    """
    # A comment takes the rest of its line with the line break, so that each break is there twice.
    lexer = shlex.shlex(text.replace("\n", "\n\n"), posix=True, punctuation_chars="".join(SEPARATORS))
    lexer.whitespace, lexer.whitespace_split = " \t\r", True
    segments: list[list[str]] = [[]]
    for word in lexer:
        if word and set(word) <= SEPARATORS:
            segments.append([])
        else:
            segments[-1].append(word)
    return [words for words in segments if words]


def _command(words: list[str], environment: dict[str, str]) -> FoundCommand | None:
    """One command; assignments and exports alone go into the environment of those that follow."""
    own: dict[str, str] = {}
    rest = list(words)
    exported = rest[0] == "export"
    while rest and (rest[0] in BEFORE_A_PROGRAM or re.match(r"[A-Za-z_]\w*=|-", rest[0])):
        name, equals, value = rest.pop(0).partition("=")
        own |= {name: value} if equals else {}
    if not rest or exported:
        environment |= own
        return None
    seen = {**environment, **own}
    program, arguments = rest[0].rsplit("/", 1)[-1], rest[1:]
    if program in CONTAINER_PROGRAMS and arguments[:1] == ["run"]:
        return _contained(program, arguments[1:], seen)
    script = next((place for place, word in enumerate(arguments[:-1], 1) if re.fullmatch(r"-[a-z]*c", word)), None)
    if program in SHELLS and script:
        inner = parse(arguments[script])
        return replace(inner, environment={**seen, **inner.environment})
    return _started(program, arguments, seen)


def _started(program: str, arguments: list[str], environment: Mapping[str, str]) -> FoundCommand:
    """The engine that a program with its arguments starts."""
    if program in {"vllm", "sglang"} and arguments[:1] == ["serve"]:
        return _serving(f"{program} serve", program, arguments[1:], environment)
    if program == "trtllm-serve":
        rest = arguments[1:] if arguments[:1] == ["serve"] else arguments
        return _serving(program, "tensorrt_llm", rest, environment)
    if re.fullmatch(r"python[\d.]*", program) and "-m" in arguments[:-1]:
        place = arguments.index("-m") + 1
        module, rest = arguments[place], arguments[place + 1 :]
        if module in MODULES:
            return _serving(f"python -m {module}", MODULES[module], rest, environment)
        flags, others = _flags("", rest)
        return FoundCommand(f"python -m {module}", flags=flags, words=tuple(others), environment=environment)
    words = [program, *arguments[:1]] if arguments and not arguments[0].startswith("-") else [program]
    flags, others = _flags("", arguments)
    return FoundCommand(" ".join(words), flags=flags, words=tuple(others), environment=environment)


def _serving(program: str, engine: str, arguments: list[str], environment: Mapping[str, str]) -> FoundCommand:
    flags, others = _flags(engine, arguments)
    named = next((flag.value for flag in flags if flag.name in MODEL_FLAGS and flag.value), None)
    model = named or (others[0] if others else None)
    return FoundCommand(program, engine, model, flags, tuple(others), environment)


def _contained(program: str, words: list[str], environment: Mapping[str, str]) -> FoundCommand:
    """What runs in a container: options up to the image, and a command, or arguments for the image's own program."""
    options: list[Flag] = []
    rest = list(words)
    while rest and rest[0].startswith("-"):
        typed, equals, value = rest.pop(0).partition("=")
        if not equals and typed not in CONTAINER_SWITCHES and rest:
            value, equals = rest.pop(0), "="
        options.append(Flag(typed, typed, value if equals else None))
    if not rest:
        return FoundCommand(f"{program} run", environment=environment)
    image, arguments = rest[0], rest[1:]
    container = Container(image, tuple(options))
    passed = [value.partition("=") for value in container.values("-e", "--env")]
    seen = {name: value if equals else environment.get(name, "") for name, equals, value in passed}
    entry = next(iter(container.values("--entrypoint")), "").rsplit("/", 1)[-1]
    if not entry and "vllm-openai" in image:
        found = _serving("vllm serve", "vllm", arguments, seen)
    elif entry or arguments:
        inner = [entry, *arguments] if entry else arguments
        found = _command(inner, dict(seen)) or FoundCommand(inner[0])
    else:
        found = FoundCommand(f"{program} run")
    return replace(found, container=container)


def _flags(engine: str, words: Sequence[str]) -> tuple[tuple[Flag, ...], list[str]]:
    """Flags with their values, and the words that belong to none."""
    aliases: Mapping[str, str] = ALIASES.get(engine, {})
    flags: list[Flag] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not re.match(r"-{1,2}[A-Za-z]", word):
            others.append(word)
            continue
        typed, equals, value = word.partition("=")
        name = typed.partition(".")[0].replace("_", "-")
        name = aliases.get(name, name)
        switch = name in SWITCHES or (name.startswith(SWITCH_PREFIXES) and name not in TAKES_A_VALUE)
        if not equals and not switch and rest and not re.match(r"-{1,2}[A-Za-z]", rest[0]):
            value, equals = rest.pop(0), "="
        flags.append(Flag(typed, name, value if equals else None))
    return tuple(flags), others


def moved_cache(what: str) -> Finding:
    """What is wrong with a download into a cache directory that is then served from its old path."""
    return Finding(
        "warning",
        what,
        "since ModelScope 1.38 cache_dir=/x puts files below /x/models/OWNER--NAME/snapshots/REVISION, no longer below "
        "/x/OWNER/NAME",
        "Download with --local-dir (local_dir in Python) and serve that folder.",
        "ModelScope 1.40.2 against a hub of ours; DiffSynth-Studio PR 1665",
    )
