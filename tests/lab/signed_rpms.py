"""A signed dnf repository on a node, as Red Hat's family has them: rpm, dnf, createrepo_c and gpg are the real ones.

Debian has all of them as packages, so that dnf runs for real where no image of Red Hat's systems is to be had. The
driver's packages are STAND-INS: real names and versions, nothing in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from real_lab import RealLab

TOOLS = "dnf dnf-plugins-core rpm createrepo-c gpg gpg-agent"
STREAM = "nvidia-driver:580-open"
FOLDER = "/root/rpms"

# Debian's dnf knows no release of Red Hat's, which module streams are for. What apt brought is told apart by the list.
PREPARE = f"""
dpkg-query -W -f '${{Package}}\\n' | sort > /root/before-dnf
export DEBIAN_FRONTEND=noninteractive
apt-get update -q > /dev/null && apt-get install -y -q --no-install-recommends {TOOLS} > /root/dnf.log 2>&1 || {{
  tail /root/dnf.log >&2; exit 1; }}
sed -i 's/^enabled *= *true/enabled = false/' /etc/dnf/plugins/local.conf
printf '[main]\\nmodule_platform_id=platform:el9\\ngpgcheck=1\\nbest=True\\n' > /etc/dnf/dnf.conf
mkdir -p /etc/dnf/vars /etc/yum.repos.d
echo 9 > /etc/dnf/vars/releasever
mv /usr/bin/apt-get /usr/bin/apt-get.away
"""
UNDO = f"""
[ ! -e /usr/bin/apt-get.away ] || mv /usr/bin/apt-get.away /usr/bin/apt-get
dpkg-query -W -f '${{Package}}\\n' | sort | comm -13 /root/before-dnf - > /root/more
DEBIAN_FRONTEND=noninteractive apt-get purge -y -q $(cat /root/more) > /dev/null
rm -rf {FOLDER} /root/before-dnf /root/more /root/dnf.log
rm -rf /etc/dnf /etc/yum.repos.d /etc/pki/rpm-gpg /var/lib/rpm /var/cache/dnf
"""
KEY = "STAND-IN good"
SIGN = (
    f"rpm --define '_gpg_name {KEY}' --define '__gpg_sign_cmd /usr/bin/gpg gpg --batch --no-armor --pinentry-mode "
    "loopback --passphrase \"\" -u \"%{_gpg_name}\" -sbo %{__signature_filename} --digest-algo sha256 "
    "%{__plaintext_filename}' --addsign"
)  # fmt: skip


@dataclass(frozen=True)
class StandIn:
    """An empty package of version and release, and what it depends on."""

    name: str
    version: str
    requires: str = ""
    release: str = "1.el9"

    @property
    def spec(self) -> str:
        """What rpmbuild takes."""
        requires = f"Requires: {self.requires}\n" if self.requires else ""
        return (
            f"Name: {self.name}\nVersion: {self.version}\nRelease: {self.release}\nLicense: none\nBuildArch: noarch\n"
            f"Summary: STAND-IN for {self.name}, empty, made by the tests\n{requires}%description\nSTAND-IN\n%files\n"
        )


def driver_packages(versions: Sequence[str]) -> list[StandIn]:
    """Stand-ins for what RHEL 9 gets of NVIDIA's repository, in some versions."""
    return [
        one
        for version in versions
        for one in (
            StandIn("libnvidia-ml", version),
            StandIn("nvidia-driver-cuda", version, f"libnvidia-ml = {version}"),
            StandIn("kmod-nvidia-open-dkms", version),
            StandIn("nvidia-persistenced", version),
        )
    ]


@contextmanager
def repository(lab: RealLab, node: str, packages: Sequence[StandIn]) -> Iterator[str]:
    """A node that has dnf and no apt, and a signed repository in `FOLDER`; yields the key's fingerprint.

    The packages are of the module stream `STREAM`. The node is put back as it was.
    """
    name, stream = STREAM.split(":")
    modules = (
        f"---\ndocument: modulemd\nversion: 2\ndata:\n  name: {name}\n  stream: {stream}\n  version: 20260101\n"
        "  context: 00000000\n  arch: x86_64\n  summary: STAND-IN\n  description: STAND-IN\n"
        "  license: {module: [none]}\n  artifacts:\n    rpms:\n"
        + "".join(f"    - {one.name}-0:{one.version}-{one.release}.noarch\n" for one in packages)
        + "...\n"
    )
    build = [f"set -eu\nmkdir -p {FOLDER}/repo\ncd {FOLDER}\n", f"cat > modules.yaml << 'END'\n{modules}END\n"]
    for place, one in enumerate(packages):
        build.append(f"cat > {place}.spec << 'END'\n{one.spec}END\n")
    build += [
        f"rpmbuild --quiet -bb --define '_topdir {FOLDER}/build' --define '_rpmdir {FOLDER}/repo' *.spec\n",
        f"export GNUPGHOME={FOLDER}/keys\nmkdir -m 700 $GNUPGHOME\n",
        f"gpg --batch --quiet --pinentry-mode loopback --passphrase '' --quick-gen-key '{KEY}' rsa2048 sign never\n",
        f"{SIGN} repo/noarch/*.rpm > sign.log 2>&1 || {{ cat sign.log >&2; exit 1; }}\n",
        "createrepo_c --quiet repo\nmodifyrepo_c --mdtype=modules modules.yaml repo/repodata > /dev/null\n",
        "gpg --batch --armor --export > repo/key.asc\ngpgconf --kill gpg-agent\n",
        "gpg --batch --quiet --with-colons --list-keys | awk -F: '/^fpr/ {print $10; exit}'\n",
    ]
    try:
        lab.ssh(node, PREPARE)
        yield lab.ssh(node, "".join(build)).stdout.split()[-1]
    finally:
        lab.ssh(node, UNDO)
