"""The token that the role ray_cluster leaves on the nodes of a cluster."""

from __future__ import annotations

from testinfra.host import Host

SECRETS = "/var/lib/stepladder/deployments/lab/secrets"


def test_all_nodes_have_the_same_token_and_nobody_else_reads_it(hosts: dict[str, Host]) -> None:
    tokens = set()
    for name in ("node1", "node2"):
        token = hosts[name].file(f"{SECRETS}/ray-token")
        assert (token.user, token.mode, token.size) == ("root", 0o400, 64)
        assert hosts[name].file(SECRETS).mode == 0o700
        tokens.add(token.content_string)
    assert len(tokens) == 1
