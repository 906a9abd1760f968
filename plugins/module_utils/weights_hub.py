"""What a hub lists of a revision, and which of it is wanted."""

from __future__ import annotations

import fnmatch
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any

from ansible_collections.stepladder.core.plugins.module_utils.weights_manifest import GIT_BLOB, Listed
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import (
    BOOKKEEPING,
    Request,
    WeightsError,
    endpoint_of,
)

NEXT_PAGE = re.compile(r'<([^>]+)>;\s*rel="next"')
ONE_TRY_SECONDS = 5.0  # where no answer is no failure
LISTING_LIMIT = 3000  # entries in one answer of the hub; the client calls it REPO_FILES_TRUNCATION_LIMIT


def listing_url(request: Request) -> str:
    """The address of the file listing.

    Sources: modelscope-hub 0.5.1, LegacyClient.list_repo_files; huggingface_hub, HfApi.list_repo_tree.
    """
    if request.source == "huggingface":
        revision = urllib.parse.quote(request.revision, safe="")
        return f"{endpoint_of(request)}/api/models/{request.model_id}/tree/{revision}?recursive=true&expand=false"
    query = urllib.parse.urlencode({"Revision": request.revision, "Recursive": "True"})
    return f"{endpoint_of(request)}/api/v1/models/{request.model_id}/repo/files?{query}"


def parse_listing(text: str, source: str) -> list[Listed]:
    """Read the hub's listing.

    Raises WeightsError when it is no listing, when it is cut off, or when a name in it would leave the directory.
    """
    try:
        entries = json.loads(text)["Data"]["Files"] or []
        blobs = [one for one in entries if one.get("Type") != "tree"]
        files = [Listed(one["Path"], int(one["Size"]), (one.get("Sha256") or "").lower()) for one in blobs]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{source} answered with something else than a file listing ({type(error).__name__}: {error}): "
            f"{text[:200]!r}. Check that endpoint is a model hub and no proxy answers in its place."
        ) from error
    if len(entries) >= LISTING_LIMIT:
        raise WeightsError(
            f"{source} listed {len(entries)} entries, and the hub cuts a listing off at {LISTING_LIMIT}: "
            "what it left out could not be proven. Choose the files with include."
        )
    refuse_unsafe(files, source)
    return files


def parse_tree(text: str, source: str) -> list[Listed]:
    """Read a page of HuggingFace's listing. It has the SHA-256 of large files, and git's own hash of small ones.

    Raises WeightsError when it is no listing, or when a name in it would leave the directory.
    """
    try:
        blobs = [one for one in json.loads(text) if one["type"] == "file"]
        files = [Listed(one["path"], int(one["size"]), _tree_hash(one)) for one in blobs]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{source} answered with something else than a file listing ({type(error).__name__}: {error}): "
            f"{text[:200]!r}. Check that endpoint is a model hub and no proxy answers in its place."
        ) from error
    refuse_unsafe(files, source)
    return files


def _tree_hash(entry: dict[str, Any]) -> str:
    large = entry.get("lfs")
    return str(large["oid"]).lower() if large else f"{GIT_BLOB}{entry['oid']}"


def refuse_unsafe(files: Sequence[Listed], source: str) -> None:
    """Raise WeightsError when a name in a listing leads out of the model's directory."""
    unsafe = [one.path for one in files if not safe_name(one.path)]
    if unsafe:
        raise WeightsError(f"{source} lists names that lead out of the model's directory: {', '.join(unsafe)}")


def safe_name(path: str) -> bool:
    """Whether a name from the hub stays inside the directory and off the bookkeeping."""
    parts = path.split("/")
    return not (path.startswith("/") or "\0" in path or {"", ".", ".."} & set(parts) or parts[0] == BOOKKEEPING)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Match as the client does (_download.py, _matches_patterns), its reading of `.*` included."""
    return any(
        fnmatch.fnmatch(path, pattern) or (".*" in pattern and fnmatch.fnmatch(path, pattern.replace(".*", "*")))
        for pattern in patterns
    )


def selected(files: Sequence[Listed], include: Sequence[str], exclude: Sequence[str]) -> list[Listed]:
    """Leave of the listing what the patterns ask for."""
    return [
        one
        for one in files
        if (not include or matches(one.path, include)) and not (exclude and matches(one.path, exclude))
    ]


def literal_pattern(path: str) -> str:
    """Write a name as a pattern that means this name; the client splits at commas, so a comma becomes `?`."""
    return re.sub(r"([\[*?])", r"[\1]", path).replace(",", "?")


class SameHost(urllib.request.HTTPRedirectHandler):
    """Follow a redirect without handing the token to another host."""

    def redirect_request(  # noqa: PLR0917  the base class's signature
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Drop the credentials when the host changes."""
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            new.headers = {key: value for key, value in new.headers.items() if key not in ("Authorization", "Cookie")}
        return new


def fetch_listing(request: Request, token: str) -> list[Listed]:
    """Ask the hub for the revision's files.

    Raises WeightsError when it refuses (at once), or cannot be reached in `retries` tries.
    """
    url = listing_url(request)
    text, following = ask_hub(request, token, url)
    if request.source == "modelscope":
        return parse_listing(text, url)
    files = parse_tree(text, url)
    while following:
        text, following = ask_hub(request, token, following)
        files += parse_tree(text, url)
    return files


def ask_hub(request: Request, token: str, url: str) -> tuple[str, str]:
    """One answer of the hub, and the address of the next page where it names one.

    Raises WeightsError when it refuses (at once), or cannot be reached in `retries` tries.
    """
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    opener = urllib.request.build_opener(SameHost)
    failure = ""
    for attempt in range(request.retries):
        if attempt:
            time.sleep(2.0**attempt)
        try:
            with opener.open(urllib.request.Request(url, headers=headers), timeout=60) as answer:  # noqa: S310  checked by problems()
                following = NEXT_PAGE.search(answer.headers.get("Link") or "")
                return answer.read().decode("utf-8", "replace"), following[1] if following else ""
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                may_read = f"check that the token in {request.token_file} may read it"
                raise WeightsError(
                    f"the hub answered {error.code} for {request.name} ({url}). Check model_id and revision; "
                    f"{may_read if token else 'if the model is private, give token_file'}."
                ) from error
            failure = f"HTTP {error.code}"
        except OSError as error:
            failure = str(getattr(error, "reason", error))
    raise WeightsError(
        f"the hub at {endpoint_of(request)} gave no listing of {request.name}, asked {request.retries} times: "
        f"{failure}. Check from this node: curl -sS '{url}'. "
        "Behind a proxy or a mirror, set endpoint or the proxy variables."
    )


def read_token(request: Request) -> str:
    """The hub's token, '' without a token file."""
    if not request.token_file:
        return ""
    try:
        token = Path(request.token_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise WeightsError(
            f"token_file {request.token_file} cannot be read: {error.strerror}. Put the hub's token there."
        ) from error
    if not token:
        raise WeightsError(
            f"token_file {request.token_file} is empty. Put the hub's token there, or leave token_file out."
        )
    return token


def wanted_files(request: Request, token: str) -> list[Listed]:
    """What the hub lists of the revision, less what the patterns leave out; WeightsError when nothing is left."""
    wanted = selected(fetch_listing(request, token), request.include, request.exclude)
    if not wanted:
        raise WeightsError(
            f"{request.name} has no files that include {list(request.include)} and exclude {list(request.exclude)} "
            "leave. Check the patterns: they match whole paths, * also across /."
        )
    return wanted
