"""The environment in <repository>/.venv: made once, checked in a millisecond, remade when it does not fit.

Runs before anything is installed: the standard library only, and on the way to a ready environment as little of that
as possible.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from stepladder.errors import StepladderError

CONTROLLER = "controller"
TEST = "test"
_LOCK_WAIT_S = 1800.0


class SetupError(StepladderError):
    """The environment cannot be made: what stopped it and what to do."""


def node_helper(name: str) -> ModuleType:
    """A file of plugins/module_utils, loaded by its place: nodes and controller share one copy of it."""
    import importlib.util  # noqa: PLC0415 - not on the way to a ready environment

    qualified = f"stepladder_module_utils_{name}"
    if qualified not in sys.modules:
        place = Path(__file__).resolve().parents[2] / "plugins" / "module_utils" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(qualified, place)
        if spec is None or spec.loader is None:
            raise SetupError(f"{place} is missing; the clone is incomplete: `git status` tells what is gone")
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)
    return sys.modules[qualified]


def stamp_text(lock: bytes, interpreter: str, repository: str) -> str:
    """What a finished environment's stamp says.

    Args:
        lock: the bytes of the requirements lock.
        interpreter: the Python that the environment's own leads to, every link followed.
        repository: where the clone is; the environment's scripts carry that path.
    """
    digest = hashlib.sha256(lock).hexdigest()
    return f"format 1\nlock {digest}\npython {interpreter}\nrepository {repository}\n"


def misfit(stamp: str | None, wanted: str, lock_name: str) -> tuple[str, bool] | None:
    """Why an environment cannot be used as it is.

    Args:
        stamp: what its stamp says; None without one.
        wanted: what it has to say.
        lock_name: the lock's name for the message, such as `requirements/controller.txt`.

    Returns: None when it fits; else the reason, and whether it has to be made from nothing.
    """
    if stamp == wanted:
        return None
    if stamp is None:
        return "an earlier run did not finish it", True
    found = dict(line.split(" ", 1) for line in stamp.splitlines() if " " in line)
    due = dict(line.split(" ", 1) for line in wanted.splitlines())
    if found.get("format") != due["format"]:
        return "another release of stepladder made it", True
    if found.get("repository") != due["repository"]:
        return f"the clone was at {found.get('repository')} when it was made", True
    if found.get("python") != due["python"]:
        return f"it was made with {found.get('python')}, which is now {due['python']}", True
    return f"{lock_name} has changed", False


def venv_package(interpreter: str, system: str, version: tuple[int, int]) -> str:
    """The distribution's package that gives a Python its `venv`.

    Args:
        interpreter: the running Python, every link followed.
        system: the distribution's own /usr/bin/python3, every link followed.
        version: of the running Python.
    """
    return "python3-venv" if interpreter == system else f"python{version[0]}.{version[1]}-venv"


def apt_commands(package: str, root: bool, sudo: bool, lists: bool) -> list[list[str]]:
    """The commands that install a package.

    Args:
        package: its name.
        root: whether they run as root already.
        sudo: whether sudo works without a password.
        lists: whether the package lists are there; an image often comes without.

    Returns: nothing where neither root nor sudo is to be had.
    """
    if not root and not sudo:
        return []
    prefix = [] if root else ["sudo", "-n"]
    update = [] if lists else [[*prefix, "apt-get", "update", "-q"]]
    return [*update, [*prefix, "apt-get", "install", "-y", "-q", "--no-install-recommends", package]]


def failure_text(step: str, status: int, tail: Sequence[str]) -> str:
    """The message of a failed step, with the program's last lines."""
    lines = "".join(f"    {line}\n" for line in tail)
    return (
        f"{step} failed with exit status {status}. Its last lines:\n{lines}\n"
        "If an index or a mirror could not be reached, mend the network or pip's configuration (`pip config list`).\n"
        "Then run the same command again: it goes on from there, what was downloaded is kept."
    )


class Environment:
    """The environment of one clone.

    Args:
        repository: the clone's root, every link followed.
        environ: the user's environment variables.
        say: where a line for the user goes.
        terminal: whether stderr is one, where progress may be overwritten.
    """

    def __init__(
        self, repository: Path, environ: Mapping[str, str], say: Callable[[str], None], *, terminal: bool = False
    ) -> None:
        self.repository = repository
        self.root = repository / ".venv"
        self.python = self.root / "bin" / "python"
        self._environ = {
            # a setting for another tool's installs that pip or uv would obey here
            name: value
            for name, value in environ.items()
            if name not in {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "UV_SYSTEM_PYTHON", "PYTHONHOME"}
        }
        self._say = say
        self._terminal = terminal

    def ensure(self, lock: str) -> None:
        """Make the environment hold a lock's packages, or return at once where it does.

        Args:
            lock: CONTROLLER or TEST; the tests' packages come on top of the controller's.

        Raises:
            SetupError: it cannot be made.
        """
        if self._unready(CONTROLLER) is None and (lock == CONTROLLER or self._unready(lock) is None):
            return
        watched = node_helper("watched")
        own = f"{self.repository / '.cache' / 'environment.lock'}"
        try:
            with watched.exclusive(Path(own), _LOCK_WAIT_S, self._say_waiting) as descriptor:
                for name in dict.fromkeys((CONTROLLER, lock)):
                    self._make(name, descriptor)
        except watched.LockTimeoutError as error:
            raise SetupError(str(error)) from None

    def _say_waiting(self, holder: str) -> None:
        self._say(f"stepladder: waiting for {holder}, which is making this environment")

    def _lock_path(self, lock: str) -> Path:
        return self.repository / "requirements" / f"{lock}.txt"

    def _stamp_path(self, lock: str) -> Path:
        return self.root / f".stepladder-{lock}"

    def _wanted(self, lock: str) -> str:
        try:
            content = self._lock_path(lock).read_bytes()
        except OSError as error:
            place = self._lock_path(lock)
            raise SetupError(f"{place} cannot be read ({error.strerror}); is the clone whole?") from None
        return stamp_text(content, os.path.realpath(self.python), str(self.repository))

    def _unready(self, lock: str) -> tuple[str, bool] | None:
        wanted = self._wanted(lock)
        try:
            stamp: str | None = self._stamp_path(lock).read_text()
        except OSError:
            stamp = None
        if stamp is None and not self.root.exists():
            return "there is none yet", True
        if stamp is not None and not self.python.exists():
            return f"its Python, {os.path.realpath(self.python)}, is gone", True
        return misfit(stamp, wanted, f"requirements/{lock}.txt")

    def _make(self, lock: str, descriptor: int) -> None:
        import time  # noqa: PLC0415 - not on the way to a ready environment

        unready = self._unready(lock)
        if unready is None:
            return
        reason, afresh = unready
        start = time.monotonic()
        if lock == TEST:
            # the controller's part was made or checked before; only packages are added
            self._say("stepladder: adding what the tests need to .venv")
        else:
            verb = "making" if afresh else "updating"
            self._say(f"stepladder: {verb} the environment {self.root} ({reason})")
            self._stamp_path(TEST).unlink(missing_ok=True)
            self._stamp_path(CONTROLLER).unlink(missing_ok=True)
            if afresh:
                self._make_venv(descriptor)
        self._install(lock, descriptor)
        self._link()
        fresh = self._stamp_path(lock).with_suffix(".new")
        fresh.write_text(self._wanted(lock))
        fresh.replace(self._stamp_path(lock))
        self._say(f"stepladder: ready after {time.monotonic() - start:.0f} s, {_megabytes(self.root)} MB in .venv")

    def _make_venv(self, descriptor: int) -> None:
        self._clear()
        self._ensure_venv_module(descriptor)
        version = ".".join(map(str, sys.version_info[:3]))
        self._step(
            f"Python {version} environment", [sys.executable, "-m", "venv", str(self.root)], self._environ, descriptor
        )

    def _clear(self) -> None:
        """Empty the environment's directory; the directory itself stays, it may be a link to a bigger disk."""
        import shutil  # noqa: PLC0415 - not on the way to a ready environment

        if not self.root.exists():
            return
        entries = list(self.root.iterdir())
        ours = {"pyvenv.cfg", "bin", "lib"} & {entry.name for entry in entries}
        if entries and not ours:
            raise SetupError(f"{self.root} is there and is no Python environment; move it away and run again")
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _ensure_venv_module(self, descriptor: int) -> None:
        import shutil  # noqa: PLC0415 - not on the way to a ready environment
        import subprocess  # noqa: PLC0415 - as above

        def succeeds(argv: list[str]) -> bool:
            return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0

        def present() -> bool:
            return succeeds([sys.executable, "-c", "import ensurepip, venv; ensurepip.version()"])

        if present():
            return
        package = venv_package(
            os.path.realpath(sys.executable), os.path.realpath("/usr/bin/python3"), sys.version_info[:2]
        )
        by_hand = f"apt-get update && apt-get install -y {package}"
        lacks = f"{sys.executable} comes without the module that makes environments ({package})"
        if shutil.which("apt-get") is None:
            raise SetupError(f"{lacks}; install it with this system's package manager and run again")
        root = os.geteuid() == 0
        sudo = not root and shutil.which("sudo") is not None and succeeds(["sudo", "-n", "true"])
        lists = any(Path("/var/lib/apt/lists").glob("*_Packages*"))
        commands = apt_commands(package, root, sudo, lists)
        if not commands:
            raise SetupError(f"{lacks}. Run:\n    sudo sh -c '{by_hand}'\nand then the same command again.")
        self._say(f"stepladder: {lacks}; installing it with apt-get")
        quiet = {**self._environ, "DEBIAN_FRONTEND": "noninteractive"}
        try:
            for command in commands:
                self._step(" ".join(command), command, quiet, descriptor)
        except SetupError:
            if not lists:
                raise
            for command in apt_commands(package, root, sudo, lists=False):  # the lists may only have been too old
                self._step(" ".join(command), command, quiet, descriptor)
        if not present():
            raise SetupError(f"{lacks}, and {package} did not bring it; run: /usr/bin/python3 {sys.argv[0]}")

    def _install(self, lock: str, descriptor: int) -> None:
        pip_config = node_helper("pip_config")
        content = self._lock_path(lock).read_text()
        pip = [str(self.python), "-m", "pip"]
        options = pip_config.configured_options(pip, self._environ)
        settings: Any = pip_config.uv_settings(options, Path.cwd(), Path.home())
        for note in settings.notes:
            self._say(f"  {note}")
        self._install_uv(content, pip, descriptor)
        uv = [str(self.root / "bin" / "uv"), "pip", "sync", "--python", str(self.python), "--require-hashes"]
        count = len(pip_config.lock_entries(content))
        self._step(
            f"{count} packages of requirements/{lock}.txt",
            [*uv, *settings.arguments, str(self._lock_path(lock))],
            pip_config.merged_environment(self._environ, settings),
            descriptor,
        )

    def _install_uv(self, lock: str, pip: list[str], descriptor: int) -> None:
        pip_config = node_helper("pip_config")
        version = next(entry.version for entry in pip_config.lock_entries(lock) if entry.name == "uv")
        if (self.root / "bin" / "uv").exists() and any(self.root.glob(f"lib/python*/site-packages/uv-{version}.*")):
            return
        pinned = self.root / "uv.txt"
        pinned.write_text(pip_config.lock_entry(lock, "uv"))
        arguments = ["install", "-q", "--require-hashes", "--no-deps", "--disable-pip-version-check", "-r", str(pinned)]
        self._step(f"uv {version}, with pip", [*pip, *arguments], self._environ, descriptor)
        pinned.unlink()

    def _link(self) -> None:
        """Make `stepladder` importable and this clone the collection `stepladder.core`."""
        (site,) = self.root.glob("lib/python*/site-packages")
        (site / "stepladder.pth").write_text(f"{self.repository / 'src'}\n")
        collection = site / "ansible_collections" / "stepladder" / "core"
        collection.parent.mkdir(parents=True, exist_ok=True)
        collection.unlink(missing_ok=True)
        collection.symlink_to(self.repository)

    def _progress(self, text: str) -> None:
        """A line that the next one overwrites on a terminal; elsewhere a line like any other."""
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{text[:78]}\r")
            sys.stderr.flush()
        else:
            self._say(text)

    def _step(self, name: str, argv: list[str], environ: Mapping[str, str], descriptor: int) -> None:
        import time  # noqa: PLC0415 - not on the way to a ready environment

        redact = node_helper("pip_config").redact
        start = time.monotonic()
        last_line = ""

        def hear(line: str) -> None:
            nonlocal last_line
            last_line = redact(line).strip()

        try:
            status, tail = node_helper("watched").run(
                argv,
                environ,
                on_line=hear,
                on_tick=lambda seconds: self._progress(f"  {name}: {seconds:.0f} s  {last_line}".rstrip()),
                tick_s=1.0 if self._terminal else 10.0,
                keep_open=(descriptor,),
            )
        except OSError as error:
            raise SetupError(f"{name}: {argv[0]} cannot be run ({error.strerror})") from None
        if status != 0:
            raise SetupError(failure_text(f"{name}: {Path(argv[0]).name}", status, [redact(line) for line in tail]))
        clear = "\x1b[K" if self._terminal else ""
        self._say(f"{clear}  {name}: {time.monotonic() - start:.1f} s")


def _megabytes(root: Path) -> int:
    return sum(Path(folder, name).lstat().st_size for folder, _, names in os.walk(root) for name in names) // 1_000_000
