"""The Docker engine of labs: the machine's own where it answers, else a daemon that belongs to the labs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stepladder.lab.places import LabError, Places

USUAL_HOST = "unix:///var/run/docker.sock"
START_SECONDS = 60.0
END_SECONDS = 30.0
# dockerd 20.10 waits 15 s for a containerd that has ended; nothing runs on either, and their data is deleted next.
PATIENCE_SECONDS = 3.0
CALL_SECONDS = 120.0
TAIL_LINES = 15
Say = Callable[[str], None]


class Engine:
    """One Docker engine, asked through its command line.

    Args:
        host: its address, `unix://...`.
        own: whether it is the labs' own daemon.
    """

    def __init__(self, host: str, own: bool) -> None:
        self.host = host
        self.own = own

    def command(self, *arguments: str) -> list[str]:
        """The argument list of a docker command."""
        return ["docker", "--host", self.host, *arguments]

    def call(self, *arguments: str, data: bytes = b"", seconds: float = CALL_SECONDS) -> str:
        """What a docker command prints.

        Raises:
            LabError: it failed or did not end in time, with its own message.
        """
        return run(self.command(*arguments), data=data, seconds=seconds)

    def answers(self) -> bool:
        """Whether the engine is there."""
        try:
            self.call("version", "--format", "{{.Server.Version}}", seconds=10)
        except LabError:
            return False
        return True

    def inside(self, container: str, *arguments: str, seconds: float = CALL_SECONDS) -> str:
        """What a program prints that runs in a container."""
        return self.call("exec", container, *arguments, seconds=seconds)


def run(argv: Sequence[str], data: bytes = b"", seconds: float = CALL_SECONDS) -> str:
    """What a program prints.

    Raises:
        LabError: it failed or did not end in time, with its own message.
    """
    try:
        done = subprocess.run(list(argv), input=data, capture_output=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise LabError(f"there is no program '{argv[0]}'") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"`{_short(argv)}` did not end within {seconds:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or done.stdout.decode(errors="replace").strip()
        raise LabError(f"`{_short(argv)}` ended with {done.returncode}: {said}")
    return done.stdout.decode(errors="replace").strip()


def machines_own(environ: Mapping[str, str]) -> Engine:
    """The engine that `docker` on this machine talks to; one on another machine cannot make a lab here."""
    named = environ.get("DOCKER_HOST", "")
    return Engine(named if named.startswith("unix://") else USUAL_HOST, own=False)


def find(places: Places) -> Engine | None:
    """The engine that answers: the machine's own, or the labs' where that one runs already."""
    for engine in (machines_own(os.environ), own(places)):
        if Path(engine.host.removeprefix("unix://")).exists() and engine.answers():
            return engine
    return None


def own(places: Places) -> Engine:
    """The labs' own engine, whether it runs or not."""
    return Engine(f"unix://{places.run}/docker.sock", own=True)


def start(places: Places, say: Say) -> Engine:
    """Start the labs' own engine and wait until it answers.

    It has no bridge and sets no firewall rule: each lab brings its own, so that two never mend each other's.

    Raises:
        LabError: it ended or did not answer in time; with the last lines of its log.
    """
    engine = own(places)
    data, log = places.state / "engine", places.state / "engine.log"
    for folder in (data, places.run):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)
    command = [
        "dockerd", "--host", engine.host, "--data-root", str(data), "--exec-root", str(places.run / "exec"),
        "--pidfile", str(places.run / "docker.pid"), "--bridge", "none", "--iptables=false", "--ip-masq=false",
        "--ip-forward=false", "--containerd-namespace", f"lab-{places.run.name}",
        "--containerd-plugins-namespace", f"lab-{places.run.name}-plugins",
    ]  # fmt: skip
    say(f"starting a Docker engine of the labs' own (log: {log})")
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + START_SECONDS
    while not engine.answers():
        if process.poll() is not None:
            raise LabError(f"dockerd ended with {process.returncode}. The end of {log}:\n{tail(log)}")
        if time.monotonic() > deadline:
            process.terminate()
            raise LabError(f"dockerd did not answer within {START_SECONDS:.0f} s. The end of {log}:\n{tail(log)}")
        time.sleep(0.1)
    return engine


def stop(places: Places, say: Say) -> None:
    """End the labs' own engine, if it runs, and everything below its folders for sockets.

    Raises:
        LabError: it is still there after its time.
    """
    pid = _pid(places.run / "docker.pid", places)
    if not pid:
        return
    say("ending the labs' Docker engine")
    os.kill(pid, signal.SIGTERM)
    started = time.monotonic()
    deadline = started + END_SECONDS
    while is_dockerd(pid, places):
        if time.monotonic() > started + PATIENCE_SECONDS:
            containerd = _pid(places.run / "exec" / "containerd" / "containerd.pid", places)
            for left in filter(None, (containerd, pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabError(f"dockerd (pid {pid}) has not ended within {END_SECONDS:.0f} s; `kill -9 {pid}` ends it")
        time.sleep(0.1)


def remove(places: Places) -> None:
    """Delete the data of the labs' own engine, which has ended; images are made again from the cache.

    Raises:
        LabError: something in it is in use or cannot be deleted.
    """
    for folder in (places.run, places.state / "engine"):
        # An engine that was killed leaves mounts: its data on itself, nodes' file systems below.
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for place in reversed(mounts):
            if place == str(folder) or place.startswith(f"{folder}/"):
                unmount(place)
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LabError(f"{error.filename} cannot be deleted: {error.strerror}") from None
    (places.state / "engine.log").unlink(missing_ok=True)


def unmount(place: str, patience: float = END_SECONDS) -> None:
    """Unmount a place; what was killed lets go of it a moment later.

    Raises:
        LabError: it is in use after so many seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            run(["umount", place])
        except LabError as error:
            if time.monotonic() > deadline:
                raise LabError(f"{error} (`fuser -vm {place}` shows who uses it)") from None
            time.sleep(0.2)
        else:
            return


def _pid(pidfile: Path, places: Places) -> int:
    """The process that a file names, if it is the labs' own; 0 where it is gone."""
    try:
        pid = int(pidfile.read_text())
    except (OSError, ValueError):
        return 0
    return pid if is_dockerd(pid, places) else 0


def is_dockerd(pid: int, places: Places) -> bool:
    """Whether a process is the labs' daemon or its containerd; numbers are given anew after a restart."""
    try:
        return str(places.run).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()  # a dead process has none
    except OSError:
        return False


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented."""
    try:
        text = log.read_text(errors="replace")
    except OSError as error:
        return f"  ({error.strerror})"
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or "  (empty)"


def _short(argv: Sequence[str]) -> str:
    text = " ".join(argv)
    return text if len(text) <= 120 else f"{text[:117]}..."
