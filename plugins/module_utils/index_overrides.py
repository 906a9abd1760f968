"""What goes before the site's package indexes on a node: a user's own files, and variables, that pip and uv read later.

Sources: pip's configuration (global, then the user's files, then variables) and uv's configuration files (the user's go
before the system's, lists are joined with the user's first). Python 3.9 and the standard library only.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from pathlib import Path

PIP_FILE, UV_FILE, ENVIRONMENT_FILE = "/etc/pip.conf", "/etc/uv/uv.toml", "/etc/environment"
# Settings of uv that name indexes, and its variables that do the same.
_UV_KEYS = ("index-url", "extra-index-url", "find-links", "no-index", "index-strategy")
_UV_VARIABLES = {
    "UV_DEFAULT_INDEX": "index",
    "UV_INDEX_URL": "index",
    "UV_INDEX": "index",
    "UV_EXTRA_INDEX_URL": "index",
    "UV_FIND_LINKS": "find-links",
    "UV_INDEX_STRATEGY": "index-strategy",
}
# With one of these the tool does not read the file that we write, or reads another one after it.
_INSTEAD = {"PIP_CONFIG_FILE": PIP_FILE, "UV_CONFIG_FILE": UV_FILE, "UV_NO_CONFIG": UV_FILE}


def pip_options(text: str) -> dict[str, str]:
    """The options of a pip.conf that an installation goes by, with white space in values as single blanks.

    Raises:
        configparser.Error: pip cannot read it either.
    """
    parser = configparser.RawConfigParser()
    parser.read_string(text)
    found: dict[str, str] = {}
    for section in ("global", "install"):
        if parser.has_section(section):
            found.update({name.replace("_", "-"): " ".join(value.split()) for name, value in parser.items(section)})
    return found


def uv_settings(text: str) -> dict[str, str]:
    """The settings of a uv.toml that say where packages come from; `index` has the addresses of all tables."""
    found: dict[str, str] = {}
    table = ""
    for line in text.splitlines():
        if heading := re.match(r"\s*\[+([^\]]+)\]", line):
            table = heading[1].strip()
        elif setting := re.match(r"\s*([A-Za-z-]+)\s*=\s*(.*?)\s*(?:#.*)?$", line):
            name, value = setting[1], setting[2].strip("\"'")
            if table == "index" and name == "url":
                found["index"] = f"{found.get('index', '')} {value}".strip()
            elif table in ("", "pip") and name in (*_UV_KEYS, "index"):
                found[name] = value
    return found


def variables(text: str) -> dict[str, str]:
    """The variables of /etc/environment (pam_env(8)): `NAME=value`, also behind `export`, quoted or not."""
    rows = re.findall(r"(?m)^\s*(?:export\s+)?([A-Za-z_]\w*)=(.*?)\s*$", text)
    return {name: value.strip("\"'") for name, value in rows}


def of_pip(path: str, text: str, ours: Mapping[str, str]) -> list[str]:
    """What a user's pip.conf sets otherwise than ours."""
    try:
        theirs = pip_options(text)
    except configparser.Error:
        return [f"pip cannot read {path}, and installs nothing until it is mended or removed"]
    return _told(path, _others(theirs, ours), PIP_FILE)


def of_uv(path: str, text: str, ours: Mapping[str, str]) -> list[str]:
    """What a user's uv.toml sets otherwise than ours; a table `[[index]]` with one of our addresses does not count."""
    theirs = uv_settings(text)
    if set(theirs.get("index", "").split()) <= set(ours.get("index", "").split()):
        theirs.pop("index", None)
    named = [name for name, value in theirs.items() if value != ours.get(name)]
    return _told(path, named, UV_FILE)


def of_variables(place: str, given: Mapping[str, str], pip: Mapping[str, str], uv: Mapping[str, str]) -> list[str]:
    """What variables set otherwise than our files."""
    options = {f"PIP_{name.upper().replace('-', '_')}": name for name in (*pip, "no-index")}
    theirs = {name: " ".join(value.split()) for name, value in given.items() if value.strip()}
    for_pip = [name for name in theirs if name in options and _others({options[name]: theirs[name]}, pip)]
    for_uv = [
        name for name, key in _UV_VARIABLES.items() if name in theirs and not _is_ours(theirs[name], uv.get(key, ""))
    ]
    instead = {file: [n for n, of in _INSTEAD.items() if n in theirs and of == file] for file in (PIP_FILE, UV_FILE)}
    return [
        *(_told(place, [*for_pip, *instead[PIP_FILE]], PIP_FILE) if pip else []),
        *(_told(place, [*for_uv, *instead[UV_FILE]], UV_FILE) if uv else []),
    ]


def _others(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Of their options those that ours have with another value, and the one that switches all indexes off."""
    switched_off = theirs.get("no-index", "").lower() in {"1", "true", "yes", "on"}
    found = [name for name, value in theirs.items() if name in ours and value != ours[name]]
    return [*found, *(["no-index"] if switched_off else [])]


def _is_ours(value: str, ours: str) -> bool:
    return set(value.split()) <= set(ours.split())


def _told(place: str, names: list[str], file: str) -> list[str]:
    """One line without any value: an address may have a password in it."""
    if not names:
        return []
    goes, what = ("goes", "it") if len(names) == 1 else ("go", "them")
    return [f"{place} sets {', '.join(names)}, which {goes} before {file}: take {what} out there"]


def overrides(pip_conf: str, uv_toml: str, home: Path, environ: Mapping[str, str], root: Path = Path("/")) -> list[str]:
    """All on the node that goes before the files that we write, for the user that asks; a line each, without values.

    Args:
        pip_conf, uv_toml: our files' texts, empty where we write none.
        home: of the user.
        environ: the variables that programs get here.
        root: of the file system.
    """  # fmt: skip
    pip, uv = pip_options(pip_conf), uv_settings(uv_toml)
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    found = []
    for path in (home / ".pip/pip.conf", config / "pip/pip.conf") if pip else ():
        found += of_pip(str(path), path.read_text(errors="replace"), pip) if path.is_file() else []
    path = config / "uv/uv.toml"
    found += of_uv(str(path), path.read_text(errors="replace"), uv) if uv and path.is_file() else []
    place = root / ENVIRONMENT_FILE.lstrip("/")
    for_all = variables(place.read_text(errors="replace")) if place.is_file() else {}
    others = {name: value for name, value in environ.items() if name not in for_all}
    return [
        *found,
        *of_variables(ENVIRONMENT_FILE, for_all, pip, uv),
        *of_variables("the environment of logins", others, pip, uv),
    ]


def here(pip_conf: str, uv_toml: str) -> list[str]:
    """`overrides` of this node for the user that runs this."""
    return overrides(pip_conf, uv_toml, Path.home(), os.environ)
