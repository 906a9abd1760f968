"""Rules of this tree that no linter knows: what must never land in it, and the shape of roles."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIGGEST_BYTES = 512 * 1024

# Put together from parts, so that this file names none of them.
REGISTRY_HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "registry.npm" + "js.org",
    *(f"{name}.deb" + "ian.org" for name in ("deb", "security", "ftp", "httpredir")),
]

ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())
ROLES_WITH_SPECS = [role for role in ROLES if (role / "tasks").is_dir()]

pytestmark = pytest.mark.lint


def tracked() -> list[Path]:
    """The files that a commit of everything would hold; all but the ignored ones where there is no git."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        ignored = {".git", ".venv", ".cache", "__pycache__", ".ansible"}
        return [p for p in ROOT.rglob("*") if p.is_file() and not ignored & set(p.relative_to(ROOT).parts)]
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file() and not path.is_symlink()]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.exists() else None


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_no_registry_is_named() -> None:
    named = re.compile("|".join(map(re.escape, REGISTRY_HOSTS)).encode(), re.IGNORECASE)
    found = [path for path in tracked() if named.search(path.read_bytes())]
    assert relative(found) == [], "pip's configuration says where packages come from, not this tree"


def test_no_file_is_big() -> None:
    found = [path for path in tracked() if path.stat().st_size > BIGGEST_BYTES]
    assert relative(found) == [], "weights, wheels and images do not belong here"


def locks() -> list[Path]:
    return [*sorted((ROOT / "requirements").glob("*.txt")), *sorted((ROOT / "catalog" / "locks").glob("*.txt"))]


@pytest.mark.parametrize("lock", locks(), ids=lambda path: path.name)
def test_lock_pins_every_package_with_hashes_and_names_no_place(lock: Path) -> None:
    text = "\n".join(line for line in lock.read_text().splitlines() if not line.startswith("#"))
    entries = [entry for entry in re.split(r"(?m)^(?=\S)", text) if entry.strip()]
    assert entries
    loose = [entry.splitlines()[0] for entry in entries if not re.match(r"[\w.\[\],-]+==[^\s*]+", entry)]
    assert loose == [], "not of the form name==version"
    bare = [entry.splitlines()[0] for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)]
    assert bare == [], "no hash"
    assert re.findall(r"\S*://\S*|^-\S*|\s@\s", text, re.MULTILINE) == [], "a place or an option"


def test_test_lock_agrees_with_controller_lock() -> None:
    def pins(name: str) -> dict[str, str]:
        return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", (ROOT / "requirements" / name).read_text()))

    controller, tests = pins("controller.txt"), pins("test.txt")
    differing = {name: (version, tests.get(name)) for name, version in controller.items() if tests.get(name) != version}
    assert differing == {}, "make the locks again, as requirements/README.md says"


def test_direct_dependencies_are_explained() -> None:
    told = set(re.findall(r"(?m)^\| ([\w-]+) \| \S", (ROOT / "requirements" / "README.md").read_text())) - {"package"}
    inputs = "\n".join(path.read_text() for path in (ROOT / "requirements").glob("*.in"))
    assert told == set(re.findall(r"(?m)^([A-Za-z][\w-]*)", inputs))


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_task_files_are_read_at_a_glance(role: Path) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (role / "tasks").glob("**/*.yml")}
    limits = {path: 75 if path.name == "main.yml" else 80 for path in lengths}
    long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length >= limits[path]}
    assert long == {}


def entry_points(role: Path) -> dict[str, dict[str, Any]]:
    return (load(role / "meta" / "argument_specs.yml") or {}).get("argument_specs") or {}


def options(spec: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every option of an entry point with its place, those inside other options too."""
    for name, option in (spec.get("options") or {}).items():
        yield f"{place}.{name}", option
        yield from options(option, f"{place}.{name}")


@pytest.mark.parametrize("role", ROLES_WITH_SPECS, ids=lambda role: role.name)
def test_arguments_have_types_and_descriptions(role: Path) -> None:
    entries = entry_points(role)
    assert entries, f"{role.name} has no meta/argument_specs.yml"
    assert "main" in entries or not (role / "tasks" / "main.yml").exists()
    bad = [f"{name}: no short_description" for name, spec in entries.items() if not spec.get("short_description")]
    for name, spec in entries.items():
        for place, option in options(spec, name):
            bad += [f"{place}: no {key}" for key in ("type", "description") if not option.get(key)]
            if option.get("type") == "list" and not option.get("elements"):
                bad.append(f"{place}: no elements")
    assert bad == []


@pytest.mark.parametrize("role", ROLES_WITH_SPECS, ids=lambda role: role.name)
def test_documented_defaults_are_the_defaults(role: Path) -> None:
    """Keys and values: a default that only one of the two files has is as wrong as another value.

    A default that is a template is documented as the template's text; an empty one, for what is optional, not at all.
    """
    defaults = load(role / "defaults" / "main.yml") or {}
    entries = entry_points(role).values()
    bad = []
    for name, value in defaults.items():
        documented = [spec["options"][name] for spec in entries if name in (spec.get("options") or {})]
        if not documented:
            bad.append(f"{name} is in defaults and in no argument spec")
        for option in documented:
            if value is None and "default" not in option:
                continue
            if "default" not in option:
                bad.append(f"{name} has the default {value!r}, the spec names none")
            elif option["default"] != value or type(option["default"]) is not type(value):
                bad.append(f"{name} has the default {value!r}, the spec says {option['default']!r}")
    for spec in entries:
        for name, option in (spec.get("options") or {}).items():
            if "default" in option and name not in defaults:
                bad.append(f"{name} has the default {option['default']!r} in the spec and none in defaults")
    assert bad == []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_variables_carry_the_roles_name(role: Path) -> None:
    bad = [
        f"{folder}: {name}"
        for folder, prefix in (("defaults", f"{role.name}_"), ("vars", f"__{role.name}_"))
        for path in (role / folder).glob("*.yml")
        for name in load(path) or {}
        if not name.startswith(prefix)
    ]
    for path in (role / "tasks").glob("**/*.yml"):
        for task in walk_tasks(load(path) or []):
            names = [task["register"]] if "register" in task else []
            names += [key for key in task.get("ansible.builtin.set_fact") or {} if key != "cacheable"]
            bad += [
                f"{path.relative_to(ROOT)}: {name}"
                for name in names
                if not name.startswith((f"{role.name}_", f"__{role.name}_"))
            ]
    assert bad == []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_who_is_silent_ends_only_those_that_are_named(role: Path) -> None:
    """Under any_errors_fatal a play ends without a word where an ignored, silent host was asked for another."""
    asks_others = [
        f"{path.relative_to(ROOT)}: {task['name']}"
        for path in (role / "tasks").glob("**/*.yml")
        for task in walk_tasks(load(path) or [])
        if "ignore_unreachable" in task and "delegate_to" in task and task.get("any_errors_fatal") is not False
    ]
    assert asks_others == [], "add: any_errors_fatal: false"


def walk_tasks(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        yield task
        for part in ("block", "rescue", "always"):
            yield from walk_tasks(task.get(part) or [])
