"""A lab's names, addresses, record, containers and inventory."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import pytest
import yaml

from stepladder.lab import addresses, cluster, image, inventory, places, record
from stepladder.lab.cluster import Wish
from stepladder.lab.machine import Packages
from stepladder.lab.places import LabError
from stepladder.lab.record import Fault, Lab, Node
from stepladder.lab.verbs import parser

ROOT = Path(__file__).resolve().parents[2]


def lab(**changes: object) -> Lab:
    nodes = [
        Node("node1", "198.18.0.11", "eth0", "198.18.1.11", "eth1", "/s/disks/node1.img"),
        Node("node2", "198.18.0.12", "lan0"),
    ]
    whole = {"name": "l", "token": "0123456789abcdef", "host": "unix:///d", "own_engine": True,
             "subnet": "198.18.0.0/24", "storage_subnet": "198.18.1.0/24", "image": "i", "inventory": "/i",
             "nodes": nodes}  # fmt: skip
    return Lab(**(whole | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("taken", "count", "expected"),
    [
        ([], 1, ["198.18.0.0/24"]),
        (["default", "198.18.0.5", "192.0.2.0/24", "fe80::/64"], 1, ["198.18.1.0/24"]),
        (["198.18.0.0/23", "198.18.3.0/24"], 2, ["198.18.2.0/24", "198.18.4.0/24"]),
        (["198.18.0.0/16"], 1, ["198.19.0.0/24"]),
    ],
)
def test_first_free_subnets(taken: list[str], count: int, expected: list[str]) -> None:
    assert addresses.free_subnets(taken, count) == expected


def test_no_subnet_is_free_where_a_route_covers_all() -> None:
    with pytest.raises(LabError, match=r"no /24 of 198\.18\.0\.0/15 is free: routes of this machine cover it"):
        addresses.free_subnets(["198.18.0.0/15"], 1)


def test_subnets_of_docker_inside_nodes_stay_free() -> None:
    with pytest.raises(LabError, match="is free"):
        addresses.free_subnets(["198.18.0.0/16", "198.19.0.0/17"], 1)


def test_neighbours_call_their_interfaces_differently() -> None:
    primary = [addresses.interface(number) for number in range(1, 6)]
    assert all(one != two for one, two in itertools.pairwise(primary))
    assert primary[:2] == ["eth0", "lan0"]
    storage = [addresses.interface(number, storage=True) for number in range(1, 6)]
    assert not set(primary) & set(storage)


@pytest.mark.parametrize(
    ("path", "start"), [("/home/me/Step Ladder", "step-ladder-"), ("/", "clone-"), ("/w/" + "x" * 50, "x" * 20 + "-")]
)
def test_default_name_follows_the_clone(path: str, start: str) -> None:
    name = places.default_name(Path(path))
    assert name.startswith(start)
    assert places.checked_name(name) == name
    assert name != places.default_name(Path(path) / "other")


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a/b", "x" * 32])
def test_names_that_nothing_can_be_called(name: str) -> None:
    with pytest.raises(LabError, match="cannot be called"):
        places.checked_name(name)


def test_folders_follow_xdg_and_sockets_stay_short() -> None:
    found = places.places({"XDG_STATE_HOME": "/s" * 60, "XDG_CACHE_HOME": "/c"}, Path("/home/me"))
    assert found.state == Path("/s" * 60 + "/stepladder/lab")
    assert found.cache == Path("/c/stepladder/lab")
    # SSH adds a digest and a suffix of its own to the folder of its sockets
    assert len(str(found.sockets("0" * 16))) < 60
    assert places.places({}, Path("/home/me")).state == Path("/home/me/.local/state/stepladder/lab")


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = lab(faults=[Fault("cut", "node1", "node2"), Fault("slow", "node1", settings={"rate": "1gbit"})])
    record.save(written, tmp_path)
    assert record.load(tmp_path) == written
    assert record.load(tmp_path / "none") is None
    assert [path.name for path in tmp_path.iterdir()] == ["lab.json"]


@pytest.mark.parametrize(("content", "message"), [("{", "is not readable"), ('{"format": 9}', "by another release")])
def test_record_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "lab.json").write_text(content)
    with pytest.raises(LabError, match=message):
        record.load(tmp_path)


def test_unknown_node_is_told_with_those_there_are() -> None:
    with pytest.raises(LabError) as raised:
        lab().node("node9")
    assert str(raised.value) == "lab 'l' has no node 'node9'. Nodes: node1, node2"


def test_everything_carries_the_labs_name_and_fits() -> None:
    found = lab(name="x" * 31)
    assert found.container("node1") == f"sl-{'x' * 31}-node1"
    assert found.network() != found.network(storage=True)
    assert {len(found.bridge()), len(found.bridge(storage=True))} == {10}
    assert found.bridge() != found.bridge(storage=True)


def test_container_of_a_node() -> None:
    found = lab(cpus="1.5", memory="2g")
    command = cluster.create_command(found, found.nodes[0], ["SYS_RESOURCE", "SYS_TIME"], ["/opt/wheels"])
    dropped = [value for flag, value in itertools.pairwise(command) if flag == "--cap-drop"]
    assert dropped == ["SYS_MODULE", "SYS_RAWIO", "SYS_TIME", "SYS_RESOURCE"]
    pairs = set(itertools.pairwise(command))
    assert {
        ("--label", "stepladder.lab=0123456789abcdef"), ("--ip", "198.18.0.11"), ("--hostname", "node1"),
        ("--volume", "/opt/wheels:/opt/wheels:ro"), ("--mount", "type=bind,source=/s/disks/node1/var,target=/var"),
        ("--shm-size", "1g"), ("--cpus", "1.5"), ("--memory", "2g"),
    } <= pairs  # fmt: skip
    assert command[-2:] == ["i", "/sbin/stepladder-lab-boot"]
    assert "--privileged" not in command
    plain = cluster.create_command(lab(), found.nodes[1], [], [])
    assert not {"--volume", "--mount", "--cpus", "--memory"} & set(plain)


def test_own_name_is_a_loopback_address_as_debian_writes_it() -> None:
    files = cluster.settings_files(lab().nodes[0], "ssh-ed25519 AAAA lab\n")
    assert "127.0.1.1\tnode1\n" in files["/etc/stepladder-lab/hosts"][0].decode()
    assert files["/etc/stepladder-lab/interfaces"][0] == b"198.18.0.11 eth0\n198.18.1.11 eth1\n"
    assert files["/root/.ssh/authorized_keys"] == (b"ssh-ed25519 AAAA lab\n", 0o600)


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        (Wish(2, Path("/i")), []),
        (Wish(3, Path("/i"), gpu="cpu"), []),
        (Wish(1, Path("/i")), ["--nodes 1: it has 2"]),
        (
            Wish(2, Path("/i"), gpu="h100", docker=True, cpus="2"),
            ["--gpu h100: its nodes have cpu", "--cpus 2: its nodes have no limit",
             "--docker: its nodes have no Docker engine"],
        ),
    ],
)  # fmt: skip
def test_what_a_lab_cannot_become(wish: Wish, told: list[str]) -> None:
    assert cluster.different(lab(), wish) == told


def test_a_lab_without_a_second_network_does_not_get_one() -> None:
    wish = Wish(2, Path("/i"), second_network=True)
    assert cluster.different(lab(storage_subnet=""), wish) == ["--second-network: its nodes have one network"]


@pytest.mark.parametrize(
    ("gpu", "group", "variables"),
    [("h20-96", "h20", {}), ("cpu", "cpu", {}), ("mi300x", "mi300x", {}),
     ("h20-x", "h20_x", {"deployment_gpu": "h20-x"})],
)  # fmt: skip
def test_group_of_a_gpu_type(gpu: str, group: str, variables: dict[str, str]) -> None:
    assert inventory.gpu_group(gpu, ROOT / "group_vars") == (group, variables)


def test_inventory_is_ordinary_ssh_with_pinned_keys() -> None:
    folder = Path("/st ate/l")
    content = inventory.text(lab(), folder, Path("/run/x"), "mi300x", {"deployment_gpu": "mi300x"})
    assert all(len(line) <= 160 for line in content.splitlines())
    everything = yaml.safe_load(content)["all"]
    variables = everything["vars"]
    assert variables["ansible_user"] == "root"
    assert variables["ansible_ssh_private_key_file"] == "/st ate/l/key"
    options = shlex.split(variables["ansible_ssh_common_args"])
    assert "StrictHostKeyChecking=yes" in options
    assert 'UserKnownHostsFile="/st ate/l/known_hosts"' in options
    assert "StrictHostKeyChecking=no" not in content
    assert everything["hosts"] == {
        "node1": {"ansible_host": "198.18.0.11", "lab_storage_address": "198.18.1.11"},
        "node2": {"ansible_host": "198.18.0.12"},
    }
    groups = everything["children"]
    assert list(groups["engines"]["hosts"]) == ["node1", "node2"]
    assert groups["mi300x"]["vars"] == {"deployment_gpu": "mi300x"}
    assert list(groups["rehearsal_hub"]["hosts"]) == ["node1"]


def test_inventory_comes_and_goes_and_spares_others(tmp_path: Path) -> None:
    group_vars, folder = tmp_path / "group_vars", tmp_path / "lab-l"
    group_vars.mkdir()
    content = inventory.text(lab(), tmp_path, tmp_path, "cpu", {})
    inventory.write(folder, content, lab(), group_vars)
    assert (folder / "group_vars").resolve() == group_vars
    inventory.write(folder, content, lab(), group_vars)
    with pytest.raises(LabError, match="was not written for lab 'other'"):
        inventory.write(folder, content, lab(name="other"), group_vars)
    inventory.remove(folder, lab(name="other"))
    assert (folder / "hosts.yml").exists()
    inventory.remove(folder, lab())
    assert not folder.exists()
    assert group_vars.is_dir()


def test_root_file_systems_name_follows_what_it_is_made_from(tmp_path: Path) -> None:
    found = Packages("bookworm", ["deb http://a.example bookworm main"], [], [], {})
    (tmp_path / "boot").write_text("1")
    names = {image.digest(found, False, tmp_path), image.digest(found, True, tmp_path)}
    names.add(image.digest(Packages("bookworm", ["deb http://b.example bookworm main"], [], [], {}), False, tmp_path))
    (tmp_path / "boot").write_text("2")
    names.add(image.digest(found, False, tmp_path))
    assert len(names) == 4
    assert image.digest(found, False, tmp_path) in names


def test_bootstrap_takes_settings_from_a_file_and_not_from_its_arguments() -> None:
    command = image.bootstrap_command("bookworm", True, Path("/t.tar"), Path("/s/apt.conf"), [Path("/s/a.list")])
    assert command[0] == "mmdebstrap"
    assert "--aptopt=/s/apt.conf" in command
    assert command[-3:] == ["bookworm", "/t.tar", "/s/a.list"]
    assert any("docker.io" in part for part in command)


def test_rules_of_the_machine_are_about_the_labs_bridge_alone() -> None:
    for rule in cluster.machine_rules("sl01234567", "198.18.0.0/24"):
        assert "sl01234567" in rule
        assert cluster.rule_command("-C", rule)[:4] == ["iptables", "-w", "10", "-t"]
        assert cluster.rule_command("-C", rule)[5] == "-C"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("up --nodes 0", "'0' is no number from 1 to 200"),
        ("up --nodes many", "'many' is no number from 1 to 200"),
        ("", "the following arguments are required: VERB"),
        ("fill node1", "the following arguments are required: path"),
        ("cut a b --all --peers-only", "not allowed with argument"),
    ],
)
def test_wrong_command_lines(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parser().parse_args(line.split())
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line() -> None:
    found = parser().parse_args(["ssh", "--name", "x", "node1", "ls", "-l", "--json"])
    assert (found.name, found.node, found.command) == ("x", "node1", ["ls", "-l", "--json"])
    found = parser().parse_args(["cut", "node1"])
    assert (found.node, found.peer, found.all) == ("node1", "", False)
    assert parser().parse_args(["up"]).name == places.default_name(ROOT)


def test_committed_variables_need_no_address() -> None:
    content = yaml.safe_load((ROOT / "inventories/lab/group_vars/engines.yml").read_text())
    assert content["deployment_name"] == "lab"
    assert "198." not in json.dumps(content)
