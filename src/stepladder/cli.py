"""The command line of `bin/stepladder`: verbs, inventories, and the argument lists of what it runs.

Imported before the environment exists: the standard library only.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder.environment import CONTROLLER, TEST, Environment
from stepladder.errors import StepladderError

USAGE = 2
INTERRUPTED = 130


class UsageError(StepladderError):
    """A command line that cannot be run as it was typed."""


class Verb(NamedTuple):
    """What a verb does, in a line, and what runs it.

    Args:
        name: as typed.
        summary: one line for the list of verbs.
        entry: `module:function` for a Python verb, called with the arguments, its result the exit status;
            empty for a playbook.
        lock: the requirements that it needs.
        makes_inventories: whether an inventory named need not be there yet.
    """

    name: str
    summary: str
    entry: str = ""
    lock: str = CONTROLLER
    makes_inventories: bool = False


PYTHON_VERBS = (
    Verb(
        "lab",
        "a cluster of real nodes on this machine, and faults for it: `lab up`, `lab cut node2`, `lab down`",
        "stepladder.lab:main",
        makes_inventories=True,
    ),
    Verb(
        "lint-command",
        "say what is wrong with a serving command found somewhere, and what to run today",
        "stepladder.lint_command:main",
    ),
    Verb("smoke", "deploy, verify, deploy again and remove on one node, in a time budget", "stepladder.smoke:main"),
    Verb(
        "weights",
        "bring the model's weights to every node and prove them; starts nothing",
        "stepladder.weights_live:main",
    ),
    Verb("test", "run the tests, or those named; the whole suite checks style and deploys for real", "pytest", TEST),
)

# Verbs whose output is read as it is, by people and programs: no play names, no recap.
READING_VERBS = frozenset({"acceptance", "diagnose", "drift", "lease", "logs", "plan", "preflight", "status", "verify"})
QUIET = "stepladder.core.quiet"


def playbook_summary(first_line: str, verb: str) -> str:
    """A playbook's line in the list of verbs, from its first line: `# deploy: text` or `# text`."""
    text = first_line.strip()
    if not text.startswith("#"):
        return ""
    label, colon, rest = text.lstrip("# ").partition(":")
    return rest.strip() if colon and label.strip() in {verb, "verb"} else text.lstrip("# ").strip()


def known_verbs(repository: Path) -> dict[str, Verb]:
    """Every verb by name, in the order of the alphabet; a playbook whose name starts with `_` is none."""
    verbs = {verb.name: verb for verb in PYTHON_VERBS}
    for playbook in (repository / "playbooks").glob("*.yml"):
        if not playbook.stem.startswith("_"):
            with playbook.open(encoding="utf-8") as lines:
                verbs.setdefault(playbook.stem, Verb(playbook.stem, playbook_summary(next(lines, ""), playbook.stem)))
    return dict(sorted(verbs.items()))


def help_text(verbs: Mapping[str, Verb]) -> str:
    """What `bin/stepladder` says when it is asked for nothing."""
    width = max(map(len, verbs))
    lines = "\n".join(f"  {name:<{width}}  {verb.summary}".rstrip() for name, verb in verbs.items())
    return (
        "Usage: bin/stepladder VERB [arguments of ansible-playbook]\n"
        "       bin/stepladder test [arguments of pytest]\n\n"
        f"Verbs:\n{lines}\n\n"
        "Example: bin/stepladder deploy -i inventories/local\n"
        "The first use makes an environment in .venv; nothing is installed anywhere else."
    )


def unknown_verb(found: str, verbs: Sequence[str]) -> str:
    """The message for a verb that is none, with the nearest one."""
    import difflib  # noqa: PLC0415 - only on the way out

    nearest = difflib.get_close_matches(found, verbs, n=1, cutoff=0.5)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return f"There is no verb '{found}'.{hint}\nVerbs: {', '.join(sorted(verbs))}"


def _inventory_arguments(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Position, what stands before the value in the same argument, and the value, of each inventory named."""
    takes_next = False
    for position, argument in enumerate(arguments):
        if takes_next:
            yield position, "", argument
            takes_next = False
        elif argument in {"-i", "--inventory", "--inventory-file"}:
            takes_next = True
        elif found := re.match(r"(--inventory(?:-file)?=|-i)(.+)", argument):
            yield position, found[1], found[2]


def resolve_inventories(arguments: Sequence[str], cwd: Path, repository: Path) -> list[str]:
    """The arguments, with each inventory that is only there relative to the repository named by its full path.

    Args:
        arguments: of ansible-playbook; a value with a comma is a list of hosts and stays as it is.
        cwd: where the user stands; what is there wins.
        repository: the clone's root.

    Raises:
        UsageError: inventories that are in neither place; all of them at once.
    """
    resolved = list(arguments)
    missing = []
    for position, prefix, value in _inventory_arguments(arguments):
        place = Path(value).expanduser()
        if "," in value or (cwd / place).exists():
            continue
        if (repository / place).exists():
            resolved[position] = f"{prefix}{repository / place}"
        else:
            missing.append(value)
    if missing:
        places = " or ".join(dict.fromkeys((str(cwd), str(repository))))
        there = sorted(entry.name for entry in (repository / "inventories").glob("[!._]*"))
        raise UsageError(
            "\n".join(f"There is no inventory '{value}' in {places}." for value in missing)
            + "\nInventories: "
            + ", ".join(f"inventories/{name}" for name in there)
        )
    return resolved


def terminal_codeset() -> str | None:
    """The character set of the user's locale; None where the locale is not installed."""
    import locale  # noqa: PLC0415 - needed here only

    try:
        locale.setlocale(locale.LC_ALL, "")
    except locale.Error:
        return None
    return locale.nl_langinfo(locale.CODESET)


def command_environment(environ: Mapping[str, str], repository: Path, codeset: str | None) -> dict[str, str]:
    """The environment of a verb.

    Args:
        environ: the user's own.
        repository: the clone's root.
        codeset: of the user's locale; Ansible stops at anything but UTF-8.
    """
    result = dict(environ)
    result["PATH"] = os.pathsep.join(filter(None, (str(repository / ".venv" / "bin"), environ.get("PATH", ""))))
    result["VIRTUAL_ENV"] = str(repository / ".venv")
    result["ANSIBLE_CONFIG"] = str(repository / "ansible.cfg")
    result.pop("PYTHONHOME", None)
    # Images of containers set it; each start of Ansible would compile all that it imports, and take twice as long.
    result.pop("PYTHONDONTWRITEBYTECODE", None)
    if codeset is None or codeset.upper().replace("-", "") != "UTF8":
        result["LC_ALL"] = "C.UTF-8"
    return result


def playbook_command(repository: Path, verb: str, arguments: Sequence[str]) -> list[str]:
    """ansible-playbook with a verb's playbook."""
    program = repository / ".venv" / "bin" / "ansible-playbook"
    return [str(program), str(repository / "playbooks" / f"{verb}.yml"), *arguments]


def entry_command(repository: Path, entry: str, arguments: Sequence[str]) -> list[str]:
    """A Python verb's function, called with the arguments in the environment's Python."""
    module, _, function = entry.partition(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}(sys.argv[1:]))"
    return [str(repository / ".venv" / "bin" / "python"), "-c", code, *arguments]


def pytest_command(repository: Path, arguments: Sequence[str], cwd: Path) -> list[str]:
    """pytest, run from the repository's root; tests named relative to where the user stands are found."""
    found = []
    for argument in arguments:
        path, colons, test = argument.partition("::")
        here = not argument.startswith("-") and not (repository / path).exists() and (cwd / path).exists()
        found.append(f"{cwd / path}{colons}{test}" if here else argument)
    # Two lanes (tests/conftest.py) for all of it, unless the words ask for something to look at; `-n0` takes them back.
    whole = all(argument.startswith("-") for argument in found) and not {"-s", "--pdb"} & set(found)
    return [str(repository / ".venv" / "bin" / "python"), "-m", "pytest", *(["-n2"] if whole else []), *found]


def run(arguments: Sequence[str], repository: Path) -> None:
    """Do what the command line says; a verb replaces this process, only the help comes back.

    Raises:
        StepladderError: with what stopped it.
    """
    verbs = known_verbs(repository)
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(help_text(verbs))
        return
    name, *rest = arguments
    if name not in verbs:
        raise UsageError(unknown_verb(name, list(verbs)))
    verb = verbs[name]
    cwd = Path.cwd()
    if verb.lock == TEST:
        command = pytest_command(repository, rest, cwd)
    else:
        if not verb.makes_inventories:
            rest = resolve_inventories(rest, cwd, repository)
        command = playbook_command(repository, name, rest)
        if verb.entry:
            command = entry_command(repository, verb.entry, rest)
    environment = Environment(
        repository, os.environ, lambda line: print(line, file=sys.stderr, flush=True), terminal=sys.stderr.isatty()
    )
    environment.ensure(verb.lock)
    if verb.lock == TEST:
        os.chdir(repository)
    sys.stdout.flush()
    environ = command_environment(os.environ, repository, terminal_codeset())
    if name in READING_VERBS:
        environ.setdefault("ANSIBLE_STDOUT_CALLBACK", QUIET)
    os.execve(command[0], command, environ)  # noqa: S606 - no shell is the point


def main(arguments: Sequence[str], repository: Path) -> int:
    """Run `bin/stepladder`.

    Args:
        arguments: after the program's name.
        repository: the clone's root, every link followed.

    Returns: 0, 1 for an environment that cannot be made, 2 for a command line that cannot be run, 130 after Ctrl-C.
    """
    try:
        run(arguments, repository)
    except UsageError as error:
        print(error, file=sys.stderr)
        return USAGE
    except StepladderError as error:
        print(f"stepladder: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"stepladder: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstepladder: interrupted; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    return 0
