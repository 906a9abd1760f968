"""The gateway in the plan, its configuration's text, its secrets, and what is read from HAProxy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.stepladder.core.plugins.action.gateway import ActionModule
from ansible_collections.stepladder.core.plugins.module_utils import haproxy
from cryptography.x509.oid import ExtendedKeyUsageOID
from gateway_certificate import make_certificate

from stepladder import gateway
from stepladder.catalogue import Catalogue
from stepladder.errors import PlanRefusedError
from stepladder.gateway_secrets import GatewayFileError, certificate_pem, keys_map
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import GatewayWish, parse_request
from stepladder.role_docs import ROLES
from stepladder.show import gateway_rows, human, markdown

CATALOGUE = Catalogue()
HOST = {"name": "n0", "address": "198.18.0.1"}


def plan_for(wish: dict[str, Any] | None, address: str = "198.18.0.1", **deployment: Any) -> Plan:
    """Two replicas of Flash on one H200 node."""
    flash = {"model": "step-3.5-flash", "variant": "fp8", "parallel": "TP4+EP", "replicas": 2, "engine": "vllm"}
    nodes = [{"name": "n0", "address": address, "gpu": "h200"}]
    if wish is not None:
        wish = {"hosts": [HOST], "open": True, **wish}
    return make_plan(parse_request({"deployment": flash | deployment, "nodes": nodes, "gateway": wish}), CATALOGUE)


def text_for(wish: dict[str, Any], **deployment: Any) -> str:
    document = plan_for(wish, **deployment).as_document()
    return gateway.configuration(document["gateway"], "step", "/var/lib/stepladder/gateway/step", True)


def test_no_gateway_where_the_inventory_has_no_host_for_it() -> None:
    assert plan_for(None).gateway is None
    assert plan_for({"hosts": []}).gateway is None
    older = {key: value for key, value in plan_for(None).as_document().items() if key != "gateway"}
    assert Plan.from_document(older).gateway is None


def test_the_plan_names_endpoint_replicas_and_limits() -> None:
    plan = plan_for({"api_keys_file": "keys", "certificate_file": "crt", "private_key_file": "key", "port": 443})
    assert plan.gateway
    assert [node.base_url for node in plan.gateway.nodes] == ["https://198.18.0.1:443/v1"]
    assert [(s.replica, s.address, s.port) for s in plan.gateway.servers] == [
        (0, "198.18.0.1", 8000), (1, "198.18.0.1", 8001),
    ]  # fmt: skip
    text = human(plan)
    assert "  endpoints    https://198.18.0.1:443/v1 (n0)\n  access       TLS, API keys; GET /v1/models, " in text
    assert "| access | TLS, API keys;" in markdown(plan)
    assert "crt" not in plan.to_json().replace("description", "")
    assert Plan.from_document(plan.as_document()) == plan


ENGINE = "An engine asks for no key and answers anyone who reaches its port"
ACCESS = [
    pytest.param(None, {}, f"{ENGINE}: keep it on a private network, or put the gateway in front", id="none"),
    pytest.param(
        {}, {"bind_address": "0.0.0.0"}, f"{ENGINE}: set deployment_bind_address to 'private'", id="everywhere"
    ),
    pytest.param({}, {"address": "n0.site"}, f"{ENGINE}: set deployment_bind_address to 'private'", id="name"),
    pytest.param({}, {}, f"{ENGINE}: it listens on its node's own address alone", id="own"),
    pytest.param({}, {}, "gateway_api_keys_file is not set: the gateway answers anyone", id="no-keys"),
    pytest.param({"api_keys_file": "k"}, {}, "keys and prompts cross the network as plain text", id="no-tls"),
]


@pytest.mark.parametrize(("wish", "deployment", "text"), ACCESS)
def test_what_stays_open_is_said(wish: dict[str, Any] | None, deployment: dict[str, Any], text: str) -> None:
    plan = plan_for(wish, **deployment)
    assert any(text in note.text for note in plan.notes if note.kind == "warning")


def test_a_deploy_that_waits_less_than_the_gateway_allows_is_warned_of() -> None:
    plan = plan_for({"hosts": [{"name": "gw", "address": "198.18.0.1"}]}, replicas=2).as_document()
    assert gateway.drain_warning(plan, 600) == (
        "Warning: an answer may be silent for 3600 s (gateway_answer_seconds), and a deploy waits 600 s for those of a "
        "replica (deploy_drain_seconds): one that takes longer stops it before that replica, with exit status 23. To "
        "wait as long: -e deploy_drain_seconds=3600"
    )
    assert gateway.drain_warning(plan, 3600) == ""
    assert gateway.drain_warning({**plan, "deployment": {"replicas": 1}}, 600) == ""
    assert gateway.drain_warning({**plan, "gateway": None}, 600) == ""


def test_what_a_gateway_has_otherwise_than_the_release_that_is_back() -> None:
    point = {"node": "n0"}
    kept = {
        "plan_id": "old",
        "endpoints": [{**point, "replica": n, "base_url": f"http://198.18.0.1:{8000 + n}/v1"} for n in range(2)],
    }

    def told(*places: tuple[int, str]) -> str:
        servers = [{"replica": number, "place": place} for number, place in places]
        silent = [{"item": "dead", "unreachable": True}, {"item": "none", "gateway": None}]
        return gateway.apart({"results": [{"item": "gw", "gateway": {"servers": servers}}, *silent]}, kept)

    assert told((0, "198.18.0.1:8000"), (1, "198.18.0.1:8001")) == ""
    assert told() == "", "it is not there, or does not say"
    assert told((0, "198.18.0.1:9000"), (2, "198.18.0.1:8002")).splitlines() == [
        "Release old runs and answers, but the gateway was made for another one:",
        "  gw: it has replica 0 at 198.18.0.1:9000, and it answers at 198.18.0.1:8000",
        "  gw: it does not know replica 1, which answers at 198.18.0.1:8001",
        "  gw: it still has replica 2, which the release has not",
        "Put into the inventory what this release has, and run 'deploy', which starts nothing that runs so already, or "
        "'gateway' where the nodes are frozen. Until then clients get 503 where no replica is at its place.",
    ]


def test_a_gateway_is_taken_along_to_a_release_and_keeps_its_own_settings() -> None:
    before = plan_for({"max_body_bytes": 1000, "affinity_header": "x-session"}).as_document()
    agent = {"argv": ["agent"], "digest": "1"}
    kept = gateway.gateway_slice(before["gateway"], "step", "/gw", "/usr/sbin/haproxy", agent)
    other = plan_for({}, replicas=1, port=9000, engine="sglang", parallel="TP8+EP")
    (release,) = other.slices().values()
    told = gateway.in_front_of(kept, release)
    assert told["gateway"] == {
        **before["gateway"],
        "check_path": "/ready",
        "servers": [{"replica": 0, "node": "n0", "address": "198.18.0.1", "port": 9000}],
    }
    assert (told["deployment"], told["nodes"]) == (release["deployment"], [release["node"]])
    point = {"replica": 0, "node": "n1", "base_url": "http://GPU-Node1:9000/v1"}
    told = gateway.in_front_of(kept, {**release, "endpoints": [point]})
    assert told["gateway"]["servers"] == [{"replica": 0, "node": "n1", "address": "GPU-Node1", "port": 9000}]
    point = {"replica": 0, "node": "n1", "base_url": "http://127.0.0.1:9000/v1"}
    with pytest.raises(PlanRefusedError, match=r"n0 cannot reach replica 0: it answers on 127\.0\.0\.1 of n1 alone"):
        gateway.in_front_of(kept, {**release, "endpoints": [point]})
    del kept["gateway"]
    with pytest.raises(PlanRefusedError, match="made by a version that did not keep its plan"):
        gateway.in_front_of(kept, release)


@pytest.mark.parametrize(
    ("wish", "deployment", "host"),
    [
        ({}, {}, "198.18.0.1"),
        ({}, {"bind_address": "private"}, "198.18.0.1"),
        ({}, {"bind_address": "0.0.0.0"}, "0.0.0.0"),
        (None, {}, "0.0.0.0"),
        ({"hosts": []}, {}, "0.0.0.0"),
        # The node may take a name for its own loopback, where no gateway of another node reaches it.
        ({}, {"address": "n0.site"}, "0.0.0.0"),
        ({}, {"address": "127.0.0.1"}, "127.0.0.1"),
        (None, {"address": "127.0.0.1"}, "127.0.0.1"),
    ],
)
def test_where_engines_listen(wish: dict[str, Any] | None, deployment: dict[str, Any], host: str) -> None:
    plan = plan_for(wish, **deployment)
    assert f"--host {host} --port 8001" in " ".join(plan.nodes[0].processes[1].argv)
    reached = deployment.get("address", "198.18.0.1") if host == "0.0.0.0" else host
    assert plan.endpoints[1].base_url == f"http://{reached}:8001/v1"


def test_an_ipv6_address_stands_in_brackets_where_a_port_follows() -> None:
    """A port could not be told from the address; gateways and rollouts compare the two by their text."""
    plan = plan_for({"hosts": [{"name": "n0", "address": "fd00::5"}]}, bind_address="fd00::1")
    assert plan.gateway
    assert [point.base_url for point in plan.endpoints] == ["http://[fd00::1]:8000/v1", "http://[fd00::1]:8001/v1"]
    assert plan.gateway.nodes[0].base_url == "http://[fd00::5]:8080/v1"
    document = plan.as_document()
    addresses = haproxy.configured_addresses(gateway.configuration(document["gateway"], "d", "/g", as_root=False))
    assert {name: addresses[f"replica-{name}"] for name in (0, 1)} == {0: "[fd00::1]:8000", 1: "[fd00::1]:8001"}
    servers = [{"replica": number, "place": addresses[f"replica-{number}"]} for number in (0, 1)]
    seen = {"results": [{"item": "n0", "gateway": {"servers": servers}}]}
    assert gateway.apart(seen, {"plan_id": "p", "endpoints": document["endpoints"]}) == ""
    shown = human(plan)
    assert "replica 1 [fd00::1]:8001" in shown
    listens = plan_for({"bind_address": "fd00::9", "metrics_address": "fd00::9"}).gateway
    assert listens
    assert listens.nodes[0].base_url == "http://[fd00::9]:8080/v1"
    assert "http://[fd00::9]:8405/metrics" in dict(gateway_rows(listens))["metrics"]


@pytest.mark.parametrize(
    ("bind", "hosts"), [(None, ["198.18.0.1", "198.18.0.2"]), ("private", ["198.18.1.1", "198.18.1.2"])]
)
def test_each_rank_listens_on_an_address_of_its_own_node(bind: str | None, hosts: list[str]) -> None:
    """The network that joins the nodes is another than the one that the gateway reaches them over."""
    nodes = [
        {
            "name": f"n{rank}",
            "address": f"198.18.1.{rank + 1}",
            "client_address": f"198.18.0.{rank + 1}",
            "gpu": "h20-141",
        }
        for rank in range(2)
    ]
    step3 = {"model": "step3", "engine": "sglang", "topology": "dist_init", "parallel": "TP16", "bind_address": bind}
    wish = {"hosts": [HOST], "open": True}
    plan = make_plan(parse_request({"deployment": step3, "nodes": nodes, "gateway": wish}), CATALOGUE)
    argv = [node.processes[0].argv for node in plan.nodes]
    assert [words[words.index("--host") + 1] for words in argv] == hosts
    assert [next(p.host for p in node.processes[0].ports if p.scope == "clients") for node in plan.nodes] == hosts
    assert plan.gateway
    assert [server.address for server in plan.gateway.servers] == hosts[:1]


REFUSED = [
    pytest.param(
        {"open": False}, {}, "gateway: it would listen on 0.0.0.0:8080 and answer anyone, for it has no keys. Set "
        "gateway_api_keys_file, or gateway_open to true where whoever reaches it may ask.",
    ),
    pytest.param({"open": False, "bind_address": "198.18.0.1"}, {}, "it would listen on 198.18.0.1:8080 and answer"),
    pytest.param({"port": 8001}, {}, "gateway_port is 8001, which vllm-1 has on n0. Set another gateway_port."),
    pytest.param({"metrics_port": 8406}, {}, "gateway_metrics_port and gateway_agent_port are both 8406."),
    pytest.param({"metrics_address": "0.0.0.0"}, {}, "variable gateway_metrics_address: found '0.0.0.0'. Value"),
    pytest.param({"metrics_address": "8.8.8.8"}, {}, "expected a private address of the gateway's hosts"),
    pytest.param({"paths": []}, {}, "variable gateway_paths: found"),
    pytest.param({"paths": ["/v1/models"]}, {}, "variable gateway_paths: found '/v1/models'. String should match"),
    pytest.param({"paths": ["GET /x\n  acl y"]}, {}, "variable gateway_paths: found"),
    pytest.param({"affinity_header": "x) y"}, {}, "variable gateway_affinity_header: found 'x) y'"),
    pytest.param({"certificate_file": "a"}, {}, "gateway_certificate_file and gateway_private_key_file go together"),
    pytest.param(
        {"hosts": [HOST, {"name": "gw", "address": "198.18.0.9"}]}, {"bind_address": "127.0.0.1"},
        "gateway: gw cannot reach replica 0: it answers on 127.0.0.1 of n0 alone. Set deployment_bind_address to",
    ),
]  # fmt: skip


def test_a_gateway_needs_no_keys_where_only_its_own_host_reaches_it() -> None:
    for wish in ({"open": False, "bind_address": "127.0.0.1"}, {"open": False, "api_keys_file": "k"}):
        assert plan_for(wish).gateway


@pytest.mark.parametrize(("wish", "deployment", "message"), REFUSED)
def test_what_is_refused(wish: dict[str, Any], deployment: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanRefusedError) as error:
        plan_for(wish, **deployment)
    assert message in str(error.value)


def test_the_roles_defaults_are_the_plans() -> None:
    defaults = yaml.safe_load((ROLES / "gateway/defaults/main.yml").read_text())
    for name, field in GatewayWish.model_fields.items():
        wanted = field.default if name != "hosts" else []
        assert defaults[f"gateway_{name}"] == (list(wanted) if isinstance(wanted, tuple) else wanted), name


def test_the_configuration_says_what_the_plan_says() -> None:
    text = text_for({"api_keys_file": "k", "certificate_file": "c", "private_key_file": "p", "answer_seconds": 77})
    for line in (
        "bind 0.0.0.0:8080 ssl crt tls.pem alpn h2,http/1.1",
        "timeout server 77s",
        "hard-stop-after 77s",
        "acl allowed_post path -m str /v1/completions",
        "unless METH_GET allowed_get || METH_POST allowed_post",
        "balance leastconn",
        "option httpchk GET /health",
        'server replica-1 198.18.0.1:8001 agent-send "1\\n"',
        "user haproxy",
        "description @GENERATION@",
    ):
        assert line in text
    assert text_for({}) == text_for({})
    assert "keys.map" not in text_for({})
    assert "balance hdr(x-session)\n    hash-type consistent\n    hash-balance-factor 150" in text_for(
        {"affinity_header": "x-session"}
    )
    # SGLang's /health waits behind the queue for a token.
    assert "option httpchk GET /ready" in text_for({}, engine="sglang")


def test_keys_become_hashes() -> None:
    text = keys_map(f"# team keys\nalice {'a' * 32}\n\nbob\t{'b' * 32}\n", "keys")
    assert text.splitlines() == sorted(text.splitlines())
    assert "3ba3f5f43b92602683c19aee62a20342b084dd5971ddd33808d81a328879a547 alice" in text
    assert "a" * 32 not in text


KEY_FAULTS = [
    pytest.param("", "gateway_api_keys_file keys: there is no key in it."),
    pytest.param("alice short", "the key of alice has 5 characters, it needs 24"),
    pytest.param("justonekeyofmanycharacters", "line 1 is not 'NAME KEY'"),
    pytest.param(f"a {'k' * 30}\na {'l' * 30}", "the name a stands in lines 1 and 2"),
    pytest.param(f"a {'k' * 30}\nb {'k' * 30}", "lines 1 and 2 have the same key"),
    pytest.param("x y z\nb short", "line 1 is not 'NAME KEY'; the key of b has 5 characters, it needs 24."),
]


@pytest.mark.parametrize(("text", "message"), KEY_FAULTS)
def test_wrong_keys_are_named_by_line_and_never_shown(text: str, message: str) -> None:
    with pytest.raises(GatewayFileError) as error:
        keys_map(text, "keys")
    assert message in str(error.value)
    assert "justonekey" not in str(error.value)


def test_a_certificate_and_its_key_are_joined() -> None:
    certificate, key = make_certificate()
    pem, warning = certificate_pem(certificate, key)
    assert (pem, warning) == (f"{certificate.strip()}\n{key.strip()}\n", "")
    assert "in 4 days" in certificate_pem(*make_certificate(days=4.5))[1]


def test_what_clients_would_refuse_is_refused() -> None:
    (certificate, key), (_, other_key) = make_certificate(), make_certificate()
    cases = [
        ((certificate, other_key), "gateway_private_key_file does not belong to gateway_certificate_file"),
        ((key, certificate), "cannot be read as PEM"),
        ((certificate, "nonsense"), "cannot be read as PEM"),
        (make_certificate(days=-1), "certificate has expired. Nothing was changed."),
        (make_certificate(usage=ExtendedKeyUsageOID.CLIENT_AUTH), "unsuitable certificate purpose"),
    ]
    for pair, message in cases:
        with pytest.raises(GatewayFileError) as error:
            certificate_pem(*pair)
        assert message in str(error.value), message
        assert "PRIVATE KEY" not in str(error.value)


STATE_HEAD = "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight srv_port"
STATE = f"""1
{STATE_HEAD}
2 engines 1 replica-0 198.18.0.1 2 0 100 100 8000
2 engines 2 replica-1 198.18.0.1 0 8 100 100 8001
2 engines 3 replica-2 198.18.0.2 2 0 20 100 8000
2 engines 4 replica-3 198.18.0.2 2 8 100 100 8001
2 engines 5 replica-4 198.18.0.3 0 0 100 100 8001
2 engines 6 replica-5 198.18.0.3 3 8 100 100 8002
3 others 1 replica-1 198.18.0.1 2 8 100 100 9000
"""


def test_what_is_drained_down_or_reweighted_is_kept_with_the_new_addresses() -> None:
    """HAProxy 2.6.12's columns, the middle ones left out; the file would win over the configuration's addresses."""
    addresses = {"replica-0": "198.18.0.1:8000", "replica-1": "[fd00::1]:9001", "replica-2": "198.18.0.2:8000"}
    addresses |= {"replica-4": "198.18.0.3:8001", "replica-5": "198.18.0.3:8002"}
    assert haproxy.kept_state(STATE, addresses).splitlines() == [
        "1",
        STATE_HEAD,
        "2 engines 2 replica-1 fd00::1 0 8 100 100 9001",
        "2 engines 3 replica-2 198.18.0.2 2 0 20 100 8000",
        "2 engines 5 replica-4 198.18.0.3 0 0 100 100 8001",
        "2 engines 6 replica-5 198.18.0.3 2 8 100 100 8002",
    ]


def test_what_haproxy_says_is_read() -> None:
    # show proc of HAProxy 2.6.12, 2026-11
    assert haproxy.parse_workers(
        "#<PID>          <type>          <reloads>       <uptime>        <version>      \n"
        "27561           master          1 [failed: 0]   0d00h00m26s     2.6.12-1+deb12u4\n"
        "# workers\n28690           worker          0               0d00h00m01s     2.6.12-1+deb12u4\n"
        "# old workers\n27576           worker          1               0d00h00m26s     2.6.12-1+deb12u4\n"
    ) == [28690, 27576]
    assert haproxy.check_version("HAProxy version 2.6.12-1+deb12u4 2026/10/17") == ""
    assert haproxy.check_version("HA-Proxy version 2.4.24-0ubuntu0.22.04.1") == (
        "HAProxy version 2.4 is too old: 2.6 or newer is needed (Debian 12 and Ubuntu 24.04 have it)"
    )
    assert "set stepladder_state_directory to a shorter path" in haproxy.check_directory("/" + "x" * 90)


def reader(password: str = "") -> Any:
    """The action plugin, as far as it reads files."""
    loader = DataLoader()
    if password:
        loader.set_vault_secrets([("default", VaultSecret(password.encode()))])
    return ActionModule(None, None, None, loader, None, None)


def test_the_files_of_the_controller_are_read_and_vault_opens_them(tmp_path: Path) -> None:
    certificate, key = make_certificate()
    files = {"certificate_file": certificate, "private_key_file": key, "api_keys_file": f"alice {'a' * 32}\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600 if name != "certificate_file" else 0o644)
    places = {name: str(tmp_path / name) for name in files}
    plain = reader()._secrets(places)
    assert plain["certificate"] == f"{certificate.strip()}\n{key.strip()}\n"
    assert plain["keys_map"].endswith(" alice\n")

    vault = VaultLib([("default", VaultSecret(b"pass"))])
    (tmp_path / "private_key_file").write_bytes(vault.encrypt(key))
    (tmp_path / "private_key_file").chmod(0o644)
    assert reader("pass")._secrets(places) == plain
    with pytest.raises(GatewayFileError, match=r"gateway_private_key_file .*vault"):
        reader()._secrets(places)


def test_all_that_is_wrong_with_the_files_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("x")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(GatewayFileError) as error:
        reader()._secrets({
            "certificate_file": str(tmp_path / "none"),
            "private_key_file": str(tmp_path / "key"),
            "api_keys_file": str(tmp_path / "key"),
        })  # fmt: skip
    lines = str(error.value).splitlines()
    assert f"gateway_certificate_file {tmp_path}/none: No such file or directory: name a readable file" in lines[0]
    assert f"gateway_private_key_file {tmp_path}/key is readable by others (mode 0644): run: chmod 0400" in lines[1]
    assert "gateway_api_keys_file" in lines[2]
