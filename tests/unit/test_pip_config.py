"""pip's configuration as uv reads it; locks in parts."""

from pathlib import Path

import pytest

from stepladder.environment import node_helper

pip_config = node_helper("pip_config")

# `pip config list`, pip 23.2.1, with a file and variables; values are Python literals.
LISTING = r"""
:env:.cert='/etc/ssl/own.pem'
:env:.find-links='~/wheels wheels /missing'
global.cert='/etc/ssl/other.pem'
global.extra-index-url='\nhttps://one.example/simple\nfile:///opt/two/simple'
global.index-url='https://user:s3cret@mirror.example/simple'
global.timeout='60'
install.timeout='180.0'
install.trusted-host='mirror.example one.example:8443'
freeze.timeout='1'
"""


def settings(options: dict[str, str], *there: str) -> object:
    return pip_config.uv_settings(options, Path("/base"), Path("/home/me"), exists=lambda path: path in there)


def test_listing_takes_the_source_that_pip_would() -> None:
    options = pip_config.parse_listing(LISTING)
    assert options["cert"] == "/etc/ssl/own.pem"
    assert options["timeout"] == "180.0"
    assert options["extra-index-url"].split() == ["https://one.example/simple", "file:///opt/two/simple"]


def test_listing_order_does_not_matter() -> None:
    backwards = "\n".join(reversed(LISTING.splitlines()))
    assert pip_config.parse_listing(backwards) == pip_config.parse_listing(LISTING)


def test_whole_listing_becomes_uvs_environment() -> None:
    result = settings(pip_config.parse_listing(LISTING), "/home/me/wheels", "/base/wheels", "/etc/ssl/own.pem")
    assert result.environment == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://user:s3cret@mirror.example/simple",
        "UV_INDEX": "https://one.example/simple file:///opt/two/simple",
        "UV_FIND_LINKS": "/home/me/wheels,/base/wheels",
        "SSL_CERT_FILE": "/etc/ssl/own.pem",
        "UV_INSECURE_HOST": "mirror.example one.example:8443",
        "UV_HTTP_TIMEOUT": "180",
    }
    assert result.arguments == []
    assert result.notes == ["pip's find-links names /missing, which is not there; it is left out"]


@pytest.mark.parametrize(
    ("options", "environment", "arguments"),
    [
        ({}, {}, []),
        ({"index-url": "/opt/my simple"}, {"UV_DEFAULT_INDEX": "file:///opt/my%20simple"}, []),
        ({"extra-index-url": "mirror/simple"}, {"UV_INDEX": "file:///base/mirror/simple"}, []),
        ({"extra-index-url": " \n "}, {}, []),
        ({"find-links": "https://wheels.example/"}, {"UV_FIND_LINKS": "https://wheels.example/"}, []),
        ({"no-index": "yes"}, {}, ["--no-index"]),
        ({"no-index": "false"}, {}, []),
        ({"cert": "/gone.pem"}, {}, []),
        ({"client-cert": "me.pem"}, {"SSL_CLIENT_CERT": "/base/me.pem"}, []),
        ({"proxy": "p:3128"}, {"HTTP_PROXY": "http://p:3128", "HTTPS_PROXY": "http://p:3128"}, []),
        ({"default-timeout": "soon"}, {}, []),
    ],
)
def test_one_option(options: dict[str, str], environment: dict[str, str], arguments: list[str]) -> None:
    result = settings(options)
    assert result.environment == {"UV_INDEX_STRATEGY": "unsafe-best-match", **environment}
    assert result.arguments == arguments


def test_the_systems_certificates_are_trusted_where_there_are_some() -> None:
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    assert settings({}, bundle).environment["UV_SYSTEM_CERTS"] == "true"
    assert "UV_SYSTEM_CERTS" not in settings({"cert": "/own.pem"}, bundle, "/own.pem").environment


def test_variables_count_where_pip_cannot_be_asked(tmp_path: Path) -> None:
    environ = {"PIP_EXTRA_INDEX_URL": "https://one.example", "PIP_NO_INDEX": "", "HOME": "/root"}
    assert pip_config.configured_options([str(tmp_path / "pip")], environ) == {"extra-index-url": "https://one.example"}
    assert pip_config.configured_options(["false"], environ) == {"extra-index-url": "https://one.example"}


def test_what_the_user_set_for_uv_stays() -> None:
    found = settings({"index-url": "https://pip.example", "extra-index-url": "https://more.example"})
    merged = pip_config.merged_environment({"UV_DEFAULT_INDEX": "https://uv.example", "UV_INDEX": "", "A": "b"}, found)
    assert merged["UV_DEFAULT_INDEX"] == "https://uv.example"
    assert merged["UV_INDEX"] == "https://more.example"
    assert merged["A"] == "b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fetching https://me:s3cret@mirror.example/simple/x", "fetching https://***@mirror.example/simple/x"),
        ("https://token@a.example and http://u:p@ss@b.example/", "https://***@a.example and http://***@b.example/"),
        ("bad port: https://me:s3c/r?t@mirror.example:8080/x", "bad port: https://***@mirror.example:8080/x"),
        (
            "https://mirror.example:8080/x@1 and http://[fe80::1]/x",
            "https://mirror.example:8080/x@1 and http://[fe80::1]/x",
        ),
        ("mail me@example about https://a.example/x@1", "mail me@example about https://a.example/x@1"),
    ],
)
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert pip_config.redact(text) == shown
    assert pip_config.carries_login(text) is (shown != text)


LOCK = """\
# a comment
Typing_Extensions==4.1 ; sys_platform == 'linux' \\
    --hash=sha256:aa \\
    --hash=sha256:bb
uv==0.13.8 \\
    --hash=sha256:cc
bare[extra]==1.0
"""


def test_lock_is_read_entry_by_entry() -> None:
    found = [(entry.name, entry.version, entry.hashes) for entry in pip_config.lock_entries(LOCK)]
    assert found == [("typing-extensions", "4.1", 2), ("uv", "0.13.8", 1), ("bare", "1.0", 0)]
    assert pip_config.lock_entry(LOCK, "UV") == "uv==0.13.8 \\\n    --hash=sha256:cc\n"


def test_one_name_of_a_lock_can_be_missing() -> None:
    with pytest.raises(ValueError, match=r"^the lock does not pin 'torch'$"):
        pip_config.lock_entry(LOCK, "torch")


@pytest.mark.parametrize(
    ("line", "shown"),
    [("requests>=2", "requests>=2"), ("--index-url https://u:p@m.example", "--index-url https://***@m.example")],
)
def test_a_lock_holds_pins_only(line: str, shown: str) -> None:
    with pytest.raises(ValueError) as caught:
        pip_config.lock_entries(line + "\n")
    assert str(caught.value) == f"the lock's entry '{shown}' is not of the form name==version"
