"""Where Python packages come from on a node, as pip's and uv's own files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stepladder.environment import node_helper

# What a line of ~/.netrc is made of.
NETRC = ("host", "user", "password")
ORDINALS = ("the first", "the second", "the third")
HEAD = "# Written by stepladder; a rerun writes it again.\n"


@dataclass(frozen=True)
class Sources:
    """The site's package indexes.

    Args:
        index_url: the main index; empty leaves the tools' own.
        extra_index_urls: further ones, the most trusted first.
        find_links: folders or pages with files.
        certificate: file of certificate authorities on the node.
        trusted_hosts: hosts that are asked without TLS or with any certificate.
    """

    index_url: str = ""
    extra_index_urls: Sequence[str] = ()
    find_links: Sequence[str] = ()
    certificate: str = ""
    trusted_hosts: Sequence[str] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Sources:
        """From a role's variables; what is not set is none, and what is not written into these files is left out."""
        return cls(**{name: value for name, value in values.items() if value and name in cls.__dataclass_fields__})


def problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the indexes that are named, and with their `credentials`; no password is in the text."""
    found = _credential_problems(values.get("credentials") or [])
    if not isinstance(values.get("index_url") or "", str):
        return [*found, "python_mirror_index_url: give one address; further ones are python_mirror_extra_index_urls"]
    sources, pip = Sources.of(values), node_helper("pip_config")
    named = {
        "python_mirror_index_url": filter(None, [sources.index_url]),
        "python_mirror_extra_index_urls": sources.extra_index_urls,
        "python_mirror_find_links": sources.find_links,
    }
    for name, url in ((name, url) for name, urls in named.items() for url in urls):
        parts = urlsplit(pip.redact(url))
        if not re.match(r"(https?|file):/|/|~", url):
            found.append(
                f"{name}: '{pip.redact(url)}' is neither an address (https://...) nor a folder (/...), and pip would "
                "take it for a folder of where it runs"
            )
        if pip.carries_login(url):
            found.append(
                f"the address of {parts.hostname} carries a password or a user, and every user reads pip's and uv's "
                "files: name them in python_mirror_credentials (host, user, password; keep them in a vault) and leave "
                "them out"
            )
        if parts.scheme == "http" and not {parts.hostname, parts.netloc} & {*sources.trusted_hosts}:
            found.append(
                f"http://{parts.hostname} has no TLS, so pip refuses it: use https, or name it in "
                "python_mirror_trusted_hosts (what is pinned by hash is safe then, nothing else is)"
            )
    if sources.extra_index_urls and not sources.index_url:
        found.append("python_mirror_extra_index_urls without python_mirror_index_url: name the main index too")
    return found


def _credential_problems(credentials: Sequence[Mapping[str, Any]]) -> list[str]:
    """What ~/.netrc could not be written of, or would never be asked for."""
    found = []
    for number, one in enumerate(credentials):
        place = f"python_mirror_credentials, {ORDINALS[number] if number < len(ORDINALS) else f'number {number + 1}'}"
        lacking = [name for name in NETRC if one.get(name) in (None, "")]
        strange = [name for name in one if name not in NETRC]
        told = [f"no {', '.join(lacking)}"] if lacking else []
        told += [f"unknown: {', '.join(strange)}"] if strange else []
        spaced = [name for name in NETRC if re.search(r"\s", str(one.get(name) or ""))]
        told += [f"white space in {', '.join(spaced)}, at which ~/.netrc parts words"] if spaced else []
        host = str(one.get("host") or "")
        alone = urlsplit(host if "://" in host else f"//{host}").hostname or ""
        if alone.lower() != host.lower() and "host" not in spaced:
            told.append(
                f"host is '{node_helper('pip_config').redact(host)}', and ~/.netrc is asked by the name alone: {alone}"
            )
        found += [f"{place}: {'; '.join(told)}"] if told else []
    return found


def pip_conf(values: Mapping[str, Any]) -> str:
    """`/etc/pip.conf`; empty where nothing is named.

    pip takes the best version of any index, whatever their order. What Stepladder installs is pinned by hash.
    """
    sources = Sources.of(values)
    options = {
        "index-url": [sources.index_url] if sources.index_url else [],
        "extra-index-url": list(sources.extra_index_urls),
        "find-links": list(sources.find_links),
        "cert": [sources.certificate] if sources.certificate else [],
        "trusted-host": list(sources.trusted_hosts),
    }
    lines = [f"{name} = {_value(entries)}\n" for name, entries in options.items() if entries]
    return f"{HEAD}[global]\n{''.join(lines)}" if lines else ""


def uv_toml(values: Mapping[str, Any]) -> str:
    """`/etc/uv/uv.toml`; empty where nothing is named.

    uv asks the further indexes first and the main one last, and takes a name from the first that has it: nobody who
    puts a package of a private name onto a public index is heard.
    """
    sources = Sources.of(values)
    if not (sources.index_url or sources.find_links):
        return ""
    lines = ['index-strategy = "first-index"']
    if sources.find_links:
        lines.append(f"find-links = [{', '.join(_quoted(each) for each in sources.find_links)}]")
    if sources.trusted_hosts:
        lines.append(f"allow-insecure-host = [{', '.join(_quoted(each) for each in sources.trusted_hosts)}]")
    for url in sources.extra_index_urls:
        lines += ["", "[[index]]", f"url = {_quoted(url)}"]
    if sources.index_url:
        lines += ["", "[[index]]", f"url = {_quoted(sources.index_url)}", "default = true"]
    return HEAD + "\n".join(lines) + "\n"


def _value(entries: Sequence[str]) -> str:
    return entries[0] if len(entries) == 1 else "\n    ".join(["", *entries])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
