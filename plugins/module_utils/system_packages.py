"""Makes a node's repositories, packages and holds as they are wanted: looks, plans, tries, and only then writes.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import apt, dnf, package_plan, package_sources
from ansible_collections.stepladder.core.plugins.module_utils.apt import PackagesError
from ansible_collections.stepladder.core.plugins.module_utils.package_plan import Foreseen, Package, Spec
from ansible_collections.stepladder.core.plugins.module_utils.package_sources import Pin, Repository


@dataclass(frozen=True)
class Wanted:
    """What the node shall have; the fields are the module's parameters.

    Args:
        name: what the file of pins is called after.
        packages: to be installed. hold: to be held, of what is installed; with the shell's wild cards.
        module_streams: of dnf.
        allow_change: whether a package asked for may go from one version to another, and a pinned one go away for it.
    """

    name: str = "node"
    repositories: Sequence[Repository] = ()
    pins: Sequence[Pin] = ()
    packages: Sequence[Spec] = ()
    hold: Sequence[Spec] = ()
    module_streams: Sequence[str] = ()
    allow_change: bool = False


@dataclass
class Outcome:
    """What was, or would be, done."""

    actions: list[str] = field(default_factory=list)
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def as_result(self) -> dict[str, Any]:
        """The module's answer."""
        diff = {"before": _listed(self.before), "after": _listed(self.after)}
        changed = bool(self.actions)
        return {"changed": changed, "actions": self.actions, "diff": diff, "versions": self.versions}


def _listed(items: Mapping[str, str]) -> str:
    return "".join(f"{name}: {value}\n" for name, value in sorted(items.items()))


def files_to_write(wanted: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those files that are not there with that content."""
    return {path: content for path, content in wanted.items() if read(path) != content}


def read(path: str) -> bytes | None:
    """A file's content; none where there is no such file."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def write(files: Mapping[str, bytes]) -> None:
    """Write files by rename, readable by all: they hold no secrets.

    Raises:
        PackagesError: one cannot be written.
    """
    for path, content in files.items():
        target = Path(path)
        fresh = target.with_name(f".{target.name}.stepladder")
        try:
            _make_folder(target.parent)
            fresh.write_bytes(content)
            fresh.chmod(0o644)
            fresh.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            mend = "free some space there" if error.errno == 28 else "see who owns its folder"
            raise PackagesError(f"{path} cannot be written: {error.strerror}; {mend}, then run again") from error


def _make_folder(folder: Path) -> None:
    """Make a folder that all may enter, whatever root's umask: apt reads keys as its user _apt."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)


def converge(wanted: Wanted, check: bool, report: Callable[[str], object], lock_seconds: float) -> Outcome:
    """Make the node equal to what is wanted, or say what that would take.

    Args:
        wanted: what the node shall have.
        check: only look.
        report: takes a line on where it stands.
        lock_seconds: how long to wait for another package manager.

    Raises:
        PackagesError: it cannot be done, with everything that is wrong with the repositories at once.
    """
    if apt.is_there():
        return _AptRun(wanted, apt.Apt(report, lock_seconds), check).run()
    if dnf.is_there():
        return _DnfRun(wanted, dnf.Dnf(report, lock_seconds), check).run()
    raise PackagesError("neither apt-get nor dnf is on this node; Debian, Ubuntu and Red Hat's family are supported")


class _Run:
    """What apt and dnf have in common: one look, one plan, and what came of it."""

    def __init__(self, wanted: Wanted, check: bool) -> None:
        self.wanted = wanted
        self.check = check
        self.outcome = Outcome()

    def _checked_files(self, render: Callable[[Repository, bytes], dict[str, bytes]]) -> dict[str, bytes]:
        """The repositories' files that are to be written; no key but the pinned one gets so far."""
        keys, wrong = package_sources.checked_keys(self.wanted.repositories)
        if wrong:
            raise PackagesError("\n".join(wrong))
        files: dict[str, bytes] = {}
        for repository in self.wanted.repositories:
            files.update(render(repository, keys[repository.name]))
        return files

    def _tell_files(self, fresh: Mapping[str, bytes]) -> None:
        for path, content in fresh.items():
            old = read(path)
            self.outcome.actions.append(f"{'change' if old is not None else 'write'} {path}")
            if path.endswith((".asc", ".gpg")) or "RPM-GPG-KEY" in path:
                continue  # a key says nothing to people; its fingerprint was compared
            self.outcome.before[path] = "\n" + old.decode(errors="replace") if old is not None else "none"
            self.outcome.after[path] = "\n" + content.decode()

    def _tell_packages(self, installed: Mapping[str, Package], foreseen: Foreseen, hold: Sequence[str]) -> None:
        for name, version in sorted(foreseen.installs.items()):
            old = installed.get(name)
            self.outcome.actions.append(f"install {name} {version}" + (f" over {old.version}" if old else ""))
            self.outcome.before[name] = old.version if old else "none"
            self.outcome.after[name] = version
        for name in sorted(foreseen.removes):
            self.outcome.actions.append(f"remove {name}")
            self.outcome.before[name] = installed[name].version if name in installed else "unknown"
            self.outcome.after[name] = "none"
        if hold:
            self.outcome.actions.append(f"hold {' '.join(hold)}")
            self.outcome.before |= {f"hold of {name}": "no" for name in hold}
            self.outcome.after |= {f"hold of {name}": "yes" for name in hold}

    def _refuse(self, installed: Mapping[str, Package], foreseen: Foreseen, done: Sequence[str] = ()) -> None:
        """End where what would be done is refused; `done` is what was done before that could be known."""
        pinned = [name for pin in self.wanted.pins for name in pin.packages]
        refused = package_plan.refusals(self.wanted.packages, installed, foreseen, self.wanted.allow_change, pinned)
        if refused:
            before = f"Done before: {', '.join(done)}; nothing else was changed" if done else "Nothing was changed"
            raise PackagesError(f"{before}: {'; '.join(refused)}")

    def _tell_versions(self, installed: Mapping[str, Package], foreseen: Foreseen) -> None:
        there = {name: one.version for name, one in installed.items()} | dict(foreseen.installs)
        specs = [*self.wanted.packages, *self.wanted.hold]
        self.outcome.versions = {n: v for n, v in sorted(there.items()) if any(spec.matches(n, v) for spec in specs)}


class _AptRun(_Run):
    def __init__(self, wanted: Wanted, manager: apt.Apt, check: bool) -> None:
        super().__init__(wanted, check)
        self.manager = manager

    def run(self) -> Outcome:
        files = self._checked_files(package_sources.apt_files)
        files |= package_sources.apt_pin_file(self.wanted.name, self.wanted.pins)
        files |= self._priorities()
        fresh = files_to_write(files)
        sources = [path for path in files if path.endswith(".sources")]
        installed = self.manager.installed()
        if self.manager.interrupted(installed):
            half = package_plan.half_done(installed)
            self.outcome.actions.append(f"finish what an earlier dpkg left{': ' if half else ''}{' '.join(half)}")
        missing = package_plan.missing(self.wanted.packages, installed)
        foreseen = self._try(fresh, sources, missing, installed) if missing or fresh else Foreseen({})
        hold = package_plan.to_hold(self.wanted.hold, installed, foreseen, self.manager.held())
        self._tell_files(fresh)
        first = [*self.outcome.actions]
        self._tell_packages(installed, foreseen, hold)
        self._tell_versions(installed, foreseen)
        if self.outcome.actions and not self.check:
            self._apply(fresh, sources, missing, hold, first)
        return self.outcome

    def _priorities(self, root: Path | None = None) -> dict[str, bytes]:
        """The files of the repositories' priorities, by what apt's lists, or those of a copy, tell of them."""
        prioritised = [one for one in self.wanted.repositories if one.priority is not None]
        releases = self.manager.releases(root) if prioritised else []
        files: dict[str, bytes] = {}
        for one in prioritised:
            path = next(iter(package_sources.apt_priority_file(one, ())))
            files |= package_sources.apt_priority_file(one, releases, read(path))
        return files

    def _apply(
        self,
        fresh: Mapping[str, bytes],
        sources: Sequence[str],
        missing: Sequence[Spec],
        hold: Sequence[str],
        first: Sequence[str],
    ) -> None:
        self.manager.wait()  # before a file is written: who holds apt is told while nothing is changed
        if self.manager.interrupted(self.manager.installed()):
            self.manager.finish_interrupted()
        if fresh:
            write(fresh)
            if sources:
                self.manager.update(sources)
        if missing:
            # After an interruption this is the first look that apt lets one have.
            foreseen = self._foresee(missing, [None] if fresh else [sources, None])
            self._refuse(self.manager.installed(), foreseen, first)
            self.manager.install(missing, self.wanted.allow_change)
        # After an interruption more is there than could be foreseen.
        due = package_plan.to_hold(self.wanted.hold, self.manager.installed(), Foreseen({}), self.manager.held())
        if due:
            self.manager.hold(due)
        if more := sorted(set(due) - set(hold)):
            self.outcome.actions.append(f"hold {' '.join(more)}")

    def _try(
        self,
        fresh: dict[str, bytes],
        sources: Sequence[str],
        missing: Sequence[Spec],
        installed: Mapping[str, Package],
    ) -> Foreseen:
        """Ask the repositories, in a copy of apt's world, for what is wanted, before a file is written.

        What they call themselves is known only then; the files that go by it are changed in `fresh`.
        """
        with apt.scratch(fresh) as root:
            copies = [str(root / "sources" / Path(path).name) for path in sources]
            if fresh and copies:
                self.manager.update(copies, root)
                known = self._priorities(root)
                apt.place(known, root)
                due = files_to_write(known)
                for path in known:
                    fresh.pop(path, None)
                fresh.update(due)
            try:
                foreseen = self._foresee(missing, [None] if fresh else [copies, None], root)
            except PackagesError:
                if self.manager.interrupted(installed):
                    return Foreseen({})  # apt plans nothing before that is mended
                raise
        self._refuse(installed, foreseen)
        return foreseen

    def _foresee(
        self, missing: Sequence[Spec], updates: Sequence[Sequence[str] | None], root: Path | None = None
    ) -> Foreseen:
        """What installing would do; lists that may be old or missing are fetched where it cannot be told without.

        Args:
            missing: what to install.
            updates: whose lists to fetch, one after the other until it can be told: sources, or none for all. One
                that does not answer is no error: without a way out only the mirror does.
            root: a scratch folder; none for the node itself.

        Raises:
            PackagesError: it cannot be done with what the sources have.
        """
        try:
            return self.manager.simulate(missing, self.wanted.allow_change, root)
        except PackagesError as error:
            reason = error
        for sources in updates:
            with contextlib.suppress(PackagesError):
                self.manager.update(sources, root)
            try:
                return self.manager.simulate(missing, self.wanted.allow_change, root)
            except PackagesError as error:
                reason = error
        raise reason


class _DnfRun(_Run):
    def __init__(self, wanted: Wanted, manager: dnf.Dnf, check: bool) -> None:
        super().__init__(wanted, check)
        self.manager = manager

    def run(self) -> Outcome:
        fresh = files_to_write(self._checked_files(package_sources.dnf_files))
        streams = self.manager.enabled_modules(self.wanted.module_streams) if self.wanted.module_streams else []
        installed = self.manager.installed()
        missing = package_plan.missing(self.wanted.packages, installed)
        # dnf has no copy to try in: a repository that is not there yet cannot be asked.
        blind = bool(fresh or streams)
        foreseen = Foreseen({str(s): s.version for s in missing}) if blind else self.manager.simulate(missing)
        if not blind:
            self._refuse(installed, foreseen)
        hold = package_plan.to_hold(self.wanted.hold, installed, foreseen, self.manager.held(installed))
        self._tell_files(fresh)
        self.outcome.actions += [f"enable module stream {stream}" for stream in streams]
        first = [*self.outcome.actions]
        self._tell_packages(installed, foreseen, [] if blind else hold)
        self._tell_versions(installed, Foreseen({}) if blind else foreseen)
        if self.outcome.actions and not self.check:
            write(fresh)
            if streams:
                self.manager.enable_modules(streams)
            if missing:
                self._refuse(installed, self.manager.simulate(missing), first)
                self.manager.install(missing, self.wanted.allow_change)
            there = self.manager.installed()
            self._tell_versions(there, Foreseen({}))
            late = package_plan.to_hold(self.wanted.hold, there, Foreseen({}), self.manager.held(there))
            if late:
                self.manager.hold(late)
        return self.outcome


def not_root() -> str:
    """Why packages cannot be touched by this user; empty for root."""
    if os.geteuid() == 0:
        return ""
    return (
        f"packages and settings of the system need root, and this is user {os.geteuid()}: set ansible_become: true "
        "(and --ask-become-pass where sudo asks), or log in as root"
    )
