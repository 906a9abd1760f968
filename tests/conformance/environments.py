"""Where the judges run: made on first use below `.cache/conformance`, from hash-pinned locks and pip's own indexes.

One environment, the rehearsal's (vLLM for the CPU: PyTorch and what the engines import), and beside it a folder for
each judged release, put before it on Python's path. Of a release's wheel only what judging needs is unpacked, and the
wheel is not kept: of vLLM's 336 MB that is 57 MB of Python files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.stepladder.core.plugins.module_utils import pip_config, python_venv, watched

from stepladder.catalogue import Catalogue

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "conformance"
LOCK_WAIT_S = 1200.0
UNREACHABLE = re.compile(
    r"failed to fetch|connection (error|refused|reset|timed out)|timed out|dns error|name resolution|network is unreach"
    r"|newconnectionerror|max retries|certificate",
    re.IGNORECASE,
)


class OfflineError(Exception):
    """The package index could not be reached."""


PIP = (sys.executable, "-m", "pip")


@dataclass(frozen=True)
class Overlay:
    """Distributions of a lock that are unpacked into a folder of their own.

    Args:
        name: of the folder.
        lock: text in pip's requirements format.
        names: which of the lock's distributions; empty for all.
        left_out: pattern of the files inside the wheels that are not unpacked.
    """

    name: str
    lock: str
    names: tuple[str, ...] = ()
    left_out: str = r"(?!)"

    @property
    def requirements(self) -> str:
        """The lock's entries for this overlay."""
        if self.names:
            return "".join(pip_config.lock_entry(self.lock, name) for name in self.names)
        return "".join(entry.text for entry in pip_config.lock_entries(self.lock))

    @property
    def folder(self) -> Path:
        """Where it is unpacked; another lock or pattern is another folder."""
        content = "\0".join([self.requirements, self.left_out, python_series()])
        return CACHE / f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def python_series() -> str:
    """This Python's version such as 3.11: the judges run under the same."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def release_lock(catalogue: Catalogue, engine: str, version: str) -> str | None:
    """The lock that pins an engine's release, made for whichever platform; none where no platform has one."""
    for release in catalogue.engines[engine].releases:
        if release.version == version and release.lock:
            return catalogue.lock_path(release.lock).read_text()
    return None


def vllm_overlay(catalogue: Catalogue, version: str) -> Overlay:
    """A vLLM release's Python files, and what they import that the base lacks."""
    lock = release_lock(catalogue, "vllm", version)
    assert lock is not None
    return Overlay(f"vllm-{version}", lock, ("vllm", "orjson"), left_out=r"vllm/.*(?<!\.py)$")


def sglang_overlay(catalogue: Catalogue, version: str) -> Overlay:
    """An SGLang release without its kernels, and what importing its argument modules needs that the base lacks."""
    lock = release_lock(catalogue, "sglang", version)
    assert lock is not None
    names = ("sglang", "orjson", "ipython", "traitlets", "gguf")
    return Overlay(f"sglang-{version}", lock, names, left_out=r"sglang/.*\.so$")


def ray_overlay(catalogue: Catalogue) -> Overlay:
    """The Ray release that the catalogue pins beside vLLM; its servers' programs and libraries are left out."""
    release = next(r for r in catalogue.engines["vllm"].releases if r.platform == "cuda" and r.lock)
    lock = catalogue.lock_path(release.lock or "").read_text()
    left_out = r".*\.(jar|map|js|woff2?)$|ray/core/src/|ray/core/libjemalloc|ray/(rllib|tune|data|serve|train)/"
    return Overlay("ray", lock, ("ray", "msgpack"), left_out)


def ensure_base(catalogue: Catalogue) -> Path:
    """The rehearsal's environment; returns its Python.

    Raises:
        OfflineError: it has to be made and the index cannot be reached.
        python_venv.VenvError: it cannot be made for another reason.
    """
    install = next(release for release in catalogue.engines["vllm"].releases if release.platform == "cpu")
    assert install.lock
    wanted = python_venv.Wanted(
        path=CACHE / "base",
        requirements=catalogue.lock_path(install.lock).read_text(),
        extra_packages=install.packages,
        shims=tuple(python_venv.Shim(shim.name, shim.version) for shim in install.metadata_shims),
        forbidden=install.forbidden_packages,
    )
    with _exclusive("base"):
        digest = wanted.digest(python_series())
        if python_venv.plan(python_venv.read_current(wanted.path), digest):
            uv = python_venv.Uv(Path(sys.executable).with_name("uv"), "of this environment")
            options = pip_config.configured_options(PIP, os.environ)
            sources = python_venv.Sources(extra_packages_index=install.package_index)
            builder = python_venv.Builder(uv, os.environ, options, sources, report=lambda _line: None)
            try:
                builder.build(wanted, python_venv.find_interpreter(os.path.realpath(sys.executable)))
            except python_venv.VenvError as error:
                raise _offline_or(error, str(error)) from None
    return Path(wanted.path) / "bin" / "python"


def ensure_overlay(overlay: Overlay) -> Path:
    """An overlay's folder, downloaded and unpacked where it is not there yet.

    Raises:
        OfflineError: it has to be made and the index cannot be reached.
        RuntimeError: pip could not download it for another reason.
    """
    with _exclusive(overlay.name):
        if overlay.folder.exists():
            return overlay.folder
        with tempfile.TemporaryDirectory(prefix=f"{overlay.name}-", dir=CACHE) as scratch:
            wheels, fresh = Path(scratch, "wheels"), Path(scratch, "fresh")
            fresh.mkdir()
            (Path(scratch) / "lock.txt").write_text(overlay.requirements)
            pip = [
                *PIP,
                "download",
                "--progress-bar",
                "off",
                "--no-deps",
                "--require-hashes",
                "--no-cache-dir",
                "--only-binary",
                ":all:",
            ]
            done = subprocess.run(
                [*pip, "--disable-pip-version-check", "-d", wheels, "-r", Path(scratch) / "lock.txt"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,  # where pip says what it could not reach differs from release to release
                text=True,
                check=False,
            )
            if done.returncode != 0:
                message = pip_config.redact(done.stdout[-3000:])
                raise _offline_or(RuntimeError(f"pip could not download {overlay.name}:\n{message}"), message)
            for wheel in sorted(wheels.glob("*.whl")):
                _unpack(wheel, fresh, re.compile(overlay.left_out))
            fresh.rename(overlay.folder)  # last, so that an interrupted run leaves nothing that looks finished
        for stale in CACHE.glob(f"{overlay.name}-????????"):
            if stale != overlay.folder:
                shutil.rmtree(stale)
    return overlay.folder


def _unpack(wheel: Path, folder: Path, left_out: re.Pattern[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            metadata = ".dist-info/" in member.filename
            if metadata or not left_out.match(member.filename):
                archive.extract(member, folder)


@contextlib.contextmanager
def _exclusive(name: str) -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with watched.exclusive(CACHE / f"{name}.lock", LOCK_WAIT_S):
        yield


def _offline_or(error: Exception, message: str) -> Exception:
    if not UNREACHABLE.search(message):
        return error
    last = [line for line in message.splitlines() if UNREACHABLE.search(line)][-1].strip()
    return OfflineError(f"the package index cannot be reached: {last[:300]}")


def megabytes(folder: Path) -> int:
    """What a folder occupies, in units of a million bytes."""
    return int(python_venv.tree_bytes(folder)) // 1_000_000
