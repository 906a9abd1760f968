"""What is to be done about a node's packages: pure, the same for apt and dnf.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WHOLE = frozenset({"ii", "hi"})  # dpkg-query(1): wanted or held, and installed


@dataclass(frozen=True)
class Package:
    """An installed package: its version, and dpkg's two letters for what is wanted and what it is."""

    version: str
    status: str = "ii"


@dataclass(frozen=True)
class Spec:
    """A package as it is asked for: `name`, or `name=version`, both with the shell's wild cards."""

    name: str
    version: str = "*"

    @classmethod
    def of(cls, text: str) -> Spec:
        """Read `name` or `name=version`."""
        name, _, version = text.partition("=")
        return cls(name, version or "*")

    def matches(self, name: str, version: str) -> bool:
        """Whether a package is meant; a version's epoch (`1:`) need not be named."""
        versions = (version, version.partition(":")[2] or version)
        return fnmatch.fnmatchcase(name, self.name) and any(fnmatch.fnmatchcase(v, self.version) for v in versions)

    def __str__(self) -> str:
        return self.name if self.version == "*" else f"{self.name}={self.version}"


@dataclass(frozen=True)
class Foreseen:
    """What the package manager says that it would do: packages with their new versions, and those removed."""

    installs: Mapping[str, str]
    removes: Sequence[str] = ()


def missing(specs: Iterable[Spec], installed: Mapping[str, Package]) -> list[Spec]:
    """Those that are not installed whole in a version that is asked for."""
    return [
        spec
        for spec in specs
        if not any(one.status in WHOLE and spec.matches(name, one.version) for name, one in installed.items())
    ]


def half_done(installed: Mapping[str, Package]) -> list[str]:
    """Packages that an interruption left unpacked or half configured."""
    return sorted(name for name, one in installed.items() if one.status[1:2] in {"U", "F", "H", "W", "t"})


def to_hold(
    specs: Iterable[Spec], installed: Mapping[str, Package], foreseen: Foreseen, held: Iterable[str]
) -> list[str]:
    """Names that have to be held and are not yet, of what is and of what will be installed."""
    there = {name: one.version for name, one in installed.items() if one.status in WHOLE} | dict(foreseen.installs)
    wanted = {name for name, version in there.items() if any(spec.matches(name, version) for spec in specs)}
    return sorted(wanted - set(held) - set(foreseen.removes))


def refusals(
    specs: Iterable[Spec],
    installed: Mapping[str, Package],
    foreseen: Foreseen,
    allow_change: bool,
    pinned: Sequence[str] = (),
) -> list[str]:
    """Why what the package manager would do is refused: it removes packages, or changes one that was asked for.

    Args:
        specs: what was asked for.
        installed: what is there.
        foreseen: what the package manager would do.
        allow_change: whether what runs may be changed.
        pinned: names, with wild cards, that are kept at one version. With a change allowed they may be removed: the
            same software can be called otherwise in another version (NVIDIA's packages from branch 590 on).
    """
    found = []
    removes = [
        name
        for name in sorted(foreseen.removes)
        if not (allow_change and any(fnmatch.fnmatchcase(name, pattern) for pattern in pinned))
    ]
    if removes:
        found.append(
            f"it would remove {', '.join(removes)}; remove them by hand if that is meant, "
            "or leave the packages that are there alone"
        )
    changes = [
        f"{name} {installed[name].version} would become {version}"
        for name, version in sorted(foreseen.installs.items())
        if name in installed and installed[name].status in WHOLE and any(name == spec.name for spec in specs)
    ]
    if changes and not allow_change:
        found.append(f"{'; '.join(changes)}: a change of what runs is made only where it is allowed (allow_change)")
    return found


# ---- apt's texts -----------------------------------------------------------------------------------------------------

DPKG_FORMAT = "${Package}\\t${Version}\\t${db:Status-Abbrev}\\n"


def parse_dpkg(text: str) -> dict[str, Package]:
    """Read the answer of `dpkg-query -W -f=DPKG_FORMAT`; what is only known by name is left out.

    A package of two architectures stands twice; the one that is not whole tells more.
    """
    found: dict[str, Package] = {}
    for line in text.splitlines():
        name, _, rest = line.partition("\t")
        version, _, status = rest.partition("\t")
        if not version or status[1:2] in {"n", "c"}:
            continue
        if name not in found or status.strip() not in WHOLE:
            found[name] = Package(version, status.strip())
    return found


def parse_simulation(text: str) -> Foreseen:
    """Read what `apt-get -s install` prints: `Inst name [old] (new origin [arch])`, `Remv name [old]`."""
    installs = dict(re.findall(r"(?m)^Inst (\S+) (?:\[[^]]*\] )?\((\S+)", text))
    removes = [name for name in re.findall(r"(?m)^Remv (\S+)", text) if name not in installs]
    return Foreseen({_bare(name): version for name, version in installs.items()}, sorted(map(_bare, removes)))


def _bare(name: str) -> str:
    return name.partition(":")[0]


def apt_advice(lines: Sequence[str]) -> str:
    """What to do about a failure of apt or dpkg, from its last lines."""
    text = "\n".join(lines).lower()
    for pattern, advice in (
        ("no space left", "Free some space on the file system of /var, then run again: it goes on from there."),
        (
            "conflicting values set for option signed-by",
            "The node has that repository already with another file of its key (cuda-keyring?): take that source out.",
        ),
        ("could not get lock|lock-frontend", "Another package manager came between; run again."),
        (
            "not valid yet|not yet valid|not yet activated",
            "The node's clock is behind: set it by hand (see date), then run again: what keeps it comes by packages.",
        ),
        (
            "release file .* is expired",
            "The mirror was not renewed for long: repair it. Or the node's clock is ahead: see date.",
        ),
        (
            "expkeysig|keyexpired",
            "The repository's key has expired. If its vendor has extended it, remove the file that the source names "
            "with Signed-By and run again: then it is fetched anew.",
        ),
        (
            r"\b40[137] +(unauthorized|forbidden|proxy auth)",
            "The repository, or a proxy before it, refuses who asks: a login of its own goes into /etc/apt/auth.conf.d "
            "(mode 0600), a proxy's into apt's Acquire::http::Proxy.",
        ),
        (
            "certificate (verification|verify) failed|certificate is not trusted",
            "The repository's certificate is not trusted on the node: put its authority's into "
            "/usr/local/share/ca-certificates and run update-ca-certificates there, then run again.",
        ),
        ("no_pubkey|public key is not available", "The repository is signed with another key than the pinned one."),
        ("not signed|does not have a release file", "The repository has no signature: look at its URL and suites."),
        ("signatures? (were|was) invalid|badsig", "The repository's signature does not fit: it was changed."),
        ("hash sum mismatch|unexpected size", "The mirror is between two states; run again, or repair it."),
        (
            "unable to locate|no installation candidate|was not found",
            "No repository of the node has it: see what the mirror carries, and the version asked for.",
        ),
        ("unmet dependencies|held broken", "A held or foreign package is in the way: see `apt-get -s install` there."),
        (
            "could not resolve|unreachable|connection (refused|timed out|failed)|cannot initiate|failed to fetch",
            "The node did not reach the repository: look at its URL, the proxy and the mirror.",
        ),
        ("are you root|permission denied", "Root is needed: set ansible_become."),
    ):
        if re.search(pattern, text):
            return advice
    return "Run again: it goes on from there."


def dnf_advice(lines: Sequence[str]) -> str:
    """What to do about a failure of dnf or rpm, from its last lines."""
    text = "\n".join(lines).lower()
    for pattern, advice in (
        (
            r"no space left|more space needed on the|needs \S+b (more space )?on the .* filesystem",
            "Free some space on that file system (packages are fetched to /var/cache/dnf), then run again.",
        ),
        (r"superuser privileges|\(permission denied\)", "Root is needed: set ansible_become."),
        ("transaction lock|already locked by", "Another package manager came between; run again."),
        (
            "certificate is not yet valid",
            "The node's clock is behind: set it by hand (see date), then run again: what keeps it comes by packages.",
        ),
        (
            "ssl certificate problem|peer certificate",
            "The repository's certificate is not trusted on the node: put its authority's into "
            "/etc/pki/ca-trust/source/anchors and run update-ca-trust there, then run again. Or the node's clock is "
            "wrong: see date.",
        ),
        (
            r"already installed but they are not correct for this package|public key for \S+ is not installed",
            "The packages are signed with another key than the pinned one.",
        ),
        (
            "gpg signature is not available|is not signed",
            "The repository has no signature: look at its URL, and at what the mirror leaves out.",
        ),
        ("gpg check failed|gpg signature verification", "The signature does not fit: packages or lists were changed."),
        (
            "filtered out by modular filtering",
            "A module hides it: another stream than the wanted one is enabled (`dnf module list --enabled` there; `dnf "
            "module reset` lets it go), or a mirror has the packages without the module's metadata (modules.yaml).",
        ),
        (
            "filtered out by exclude filtering",
            "The node's own settings exclude it: see excludepkgs in /etc/dnf/dnf.conf and /etc/yum.repos.d, and `dnf "
            "versionlock list`.",
        ),
        (
            "nothing provides",
            "No repository of the node has what a package needs: see what the mirror carries. dkms is in EPEL, and "
            "what EPEL needs in CRB (CodeReady Builder).",
        ),
        (
            "allowerasing| conflicts with ",
            "What is installed is in the way: see `dnf install --assumeno --allowerasing` there for what would have to "
            "go, and remove that by hand if it is meant.",
        ),
        (
            "no match for argument|unable to find a match|none of the providers can be installed",
            "No repository of the node has it: see what the mirror carries, and the version asked for.",
        ),
        ("checksum doesn't match", "The mirror is between two states; run again, or repair it."),
        (
            r"status code: 40[137]\b",
            "The repository, or a proxy before it, refuses who asks: let it serve this node without a login; a proxy's "
            "goes into proxy_username and proxy_password of /etc/dnf/dnf.conf (mode 0600).",
        ),
        (
            r"status code: 404\b",
            "There is no such file: look at the repository's URL, and at the system's release and machine in it.",
        ),
        (
            "curl error|failed to download metadata|cannot download|all mirrors were tried",
            "The node did not reach the repository: look at its URL, the proxy and the mirror.",
        ),
    ):
        if re.search(pattern, text):
            return advice
    return "Run again: it goes on from there."
