"""The command line: verbs, inventories and what is run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepladder import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with two playbooks and two inventories."""
    root = tmp_path / "clone"
    for folder in ("playbooks", "inventories/local", "inventories/h20"):
        (root / folder).mkdir(parents=True)
    (root / "playbooks/deploy.yml").write_text("# deploy: From servers to an endpoint\n---\n")
    (root / "playbooks/stop.yml").write_text("---\n")
    (root / "playbooks/_part.yml").write_text("# not a verb\n")
    return root


@pytest.mark.parametrize(
    ("line", "summary"),
    [
        ("# deploy: From servers to an endpoint\n", "From servers to an endpoint"),
        ("# verb: From servers to an endpoint", "From servers to an endpoint"),
        ("#  Two rules: stop, then start", "Two rules: stop, then start"),
        ("---\n", ""),
        ("", ""),
    ],
)
def test_summary_is_the_first_comment(line: str, summary: str) -> None:
    assert cli.playbook_summary(line, "deploy") == summary


def test_verbs_are_the_playbooks_and_the_python_ones(clone: Path) -> None:
    assert list(cli.known_verbs(clone)) == ["deploy", "lab", "lint-command", "smoke", "stop", "test", "weights"]
    assert "  deploy        From servers to an endpoint\n" in cli.help_text(cli.known_verbs(clone))


def test_every_playbook_of_this_tree_says_what_it_does() -> None:
    assert [name for name, verb in cli.known_verbs(ROOT).items() if not verb.summary] == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("depoly", "There is no verb 'depoly'. Did you mean 'deploy'?\nVerbs: deploy, stop"),
        ("xyzzy", "There is no verb 'xyzzy'.\nVerbs: deploy, stop"),
    ],
)
def test_unknown_verb(found: str, message: str) -> None:
    assert cli.unknown_verb(found, ["stop", "deploy"]) == message


@pytest.mark.parametrize("form", [["-i", "{}"], ["-i{}"], ["--inventory={}"], ["--inventory", "{}"]])
def test_inventory_of_the_clone_is_found_from_anywhere(clone: Path, tmp_path: Path, form: list[str]) -> None:
    def typed(place: object) -> list[str]:
        return ["--check", *(part.format(place) for part in form), "-e", "a=b"]

    found = cli.resolve_inventories(typed("inventories/local"), tmp_path, clone)
    assert found == typed(clone / "inventories/local")


def test_inventory_where_the_user_stands_comes_first(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "inventories/local").mkdir(parents=True)
    assert cli.resolve_inventories(["-i", "inventories/local"], tmp_path, clone) == ["-i", "inventories/local"]


@pytest.mark.parametrize("arguments", [["-i", "a,b"], ["-ilocalhost,"], ["-i"], ["--limit", "inventories/x"]])
def test_what_is_no_inventory_file_stays(clone: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert cli.resolve_inventories(arguments, tmp_path, clone) == arguments


def test_unknown_inventories_are_told_all_at_once(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(cli.UsageError) as caught:
        cli.resolve_inventories(["-i", "inventories/h2O", "--inventory=x.yml"], tmp_path, clone)
    assert str(caught.value) == (
        f"There is no inventory 'inventories/h2O' in {tmp_path} or {clone}.\n"
        f"There is no inventory 'x.yml' in {tmp_path} or {clone}.\n"
        "Inventories: inventories/h20, inventories/local"
    )


@pytest.mark.parametrize(
    ("codeset", "expected"),
    [("UTF-8", "de_DE.UTF-8"), ("utf8", "de_DE.UTF-8"), ("ANSI_X3.4-1968", "C.UTF-8"), (None, "C.UTF-8")],
)
def test_ansible_gets_a_locale_that_it_takes(codeset: str | None, expected: str) -> None:
    environ = cli.command_environment({"PATH": "/bin", "LC_ALL": "de_DE.UTF-8"}, Path("/clone"), codeset)
    assert environ["LC_ALL"] == expected


@pytest.mark.parametrize(("path", "expected"), [("/bin", "/clone/.venv/bin:/bin"), ("", "/clone/.venv/bin")])
def test_the_environments_programs_come_first(path: str, expected: str) -> None:
    given = {"PATH": path, "PYTHONHOME": "/x", "PYTHONDONTWRITEBYTECODE": "1", "KEPT": "1"}
    environ = cli.command_environment(given, Path("/clone"), "UTF-8")
    assert environ == {
        "PATH": expected,
        "KEPT": "1",
        "VIRTUAL_ENV": "/clone/.venv",
        "ANSIBLE_CONFIG": "/clone/ansible.cfg",
    }


def test_playbook_command() -> None:
    expected = ["/clone/.venv/bin/ansible-playbook", "/clone/playbooks/deploy.yml", "-i", "x"]
    assert cli.playbook_command(Path("/clone"), "deploy", ["-i", "x"]) == expected


def test_python_verb_calls_its_function_with_the_arguments() -> None:
    _python, *rest = cli.entry_command(Path("/clone"), "json:dumps", ["-v", "x"])
    result = subprocess.run([sys.executable, *rest], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, '["-v", "x"]\n')


def test_tests_are_named_from_where_the_user_stands(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").touch()
    found = cli.pytest_command(clone, ["-k", "b", "test_a.py::test_x", "tests/unit"], tmp_path)
    assert found[1:] == ["-m", "pytest", "-k", "b", f"{tmp_path}/test_a.py::test_x", "tests/unit"]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], ["-n2"]),
        (["-v", "--durations=40"], ["-n2", "-v", "--durations=40"]),
        (["-n0"], ["-n2", "-n0"]),
        (["--pdb"], ["--pdb"]),
        (["tests/unit"], ["tests/unit"]),
        (["-m", "nightly"], ["-m", "nightly"]),
    ],
)
def test_the_whole_suite_has_two_lanes(clone: Path, words: list[str], given: list[str]) -> None:
    assert cli.pytest_command(clone, words, clone)[3:] == given


def run_stepladder(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "bin/stepladder"), *arguments]
    environ = {**os.environ, **variables}
    return subprocess.run(argv, cwd=cwd, env=environ, capture_output=True, text=True, check=False)


def test_help_and_mistakes_need_no_environment(tmp_path: Path) -> None:
    """Run with a Python that has nothing but itself."""
    alone = {"PYTHONNOUSERSITE": "1", "PYTHONPATH": ""}
    shown = run_stepladder(cwd=tmp_path, **alone)
    assert shown.returncode == 0
    assert shown.stdout.startswith("Usage: bin/stepladder VERB")
    wrong = run_stepladder("tset", cwd=tmp_path, **alone)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("There is no verb 'tset'. Did you mean 'test'?\n")
    missing = run_stepladder("smoke", "-i", "inventories/nowhere", cwd=tmp_path, **alone)
    assert missing.returncode == 2
    assert "There is no inventory 'inventories/nowhere' in " in missing.stderr


def test_command_line_is_read_with_the_standard_library_alone() -> None:
    code = "import sys; sys.path.insert(0, 'src'); import stepladder.cli; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    foreign = {name.partition(".")[0] for name in result.stdout.split()} - set(sys.stdlib_module_names)
    assert foreign <= {"stepladder", "__main__"}
