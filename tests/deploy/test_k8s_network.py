"""Where Pods may connect to: names wherever a cluster answers them, and the outside without the cluster's addresses."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from tests.manifests import K8S

POLICIES = [yaml.safe_load(path.read_text()) for path in sorted(K8S.rglob("networkpolicy.yaml"))]
NODE_LOCAL_CACHE, CLOUD_DNS = "169.254.20.10", "169.254.169.254"
OUTSIDE = ("52.216.0.1", "8.8.8.8", "2600:1f18::1")
PODS_SERVICES_NODES = (
    *("10.96.0.1", "172.16.0.1", "172.31.255.1", "192.168.1.1", "100.64.0.1", "100.127.9.9"),
    *(CLOUD_DNS, "fd00::1", "fe80::1"),
)


def rules(port: int) -> list[tuple[str, list[Any]]]:
    """Of each egress rule for this port: the policy's name, and the peers."""
    return [
        (policy["metadata"]["name"], rule["to"])
        for policy in POLICIES
        for rule in policy["spec"].get("egress", [])
        if port in [each["port"] for each in rule["ports"]]
    ]


def reaches(peers: list[Any], address: str) -> bool:
    """Whether one of the blocks among them has this address."""
    found, blocks = ip_address(address), [peer["ipBlock"] for peer in peers if "ipBlock" in peer]
    return any(
        found in ip_network(block["cidr"]) and not any(found in ip_network(each) for each in block.get("except", []))
        for block in blocks
    )


@pytest.mark.parametrize(("name", "peers"), rules(53), ids=lambda value: value if isinstance(value, str) else "")
def test_names_are_asked_of_kube_dns_of_a_cache_on_the_node_and_of_cloud_dns_and_of_nobody_else(
    name: str, peers: list[Any]
) -> None:
    assert any("namespaceSelector" in peer for peer in peers)
    assert reaches(peers, NODE_LOCAL_CACHE)
    assert reaches(peers, CLOUD_DNS)
    assert not any(reaches(peers, address) for address in (*OUTSIDE, "10.96.0.1"))


@pytest.mark.parametrize(("name", "peers"), rules(443), ids=lambda value: value if isinstance(value, str) else "")
def test_what_may_reach_storage_outside_reaches_nothing_of_the_cluster(name: str, peers: list[Any]) -> None:
    assert all(reaches(peers, address) for address in OUTSIDE)
    assert not any(reaches(peers, address) for address in PODS_SERVICES_NODES)
