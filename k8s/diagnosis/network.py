"""What stands between clients and ready Pods: selectors, ports, routes and NetworkPolicies. Only what objects prove."""

from collections.abc import Iterator

from .cluster import Cluster, Object, container_ports, labels, name_of, ready, selects, template_labels
from .finding import NO_ANSWER, SOME_FAIL, Evidence, Finding


def backends(cluster: Cluster) -> dict[str, tuple[int, int]]:
    """For each Service that a route names: its weight, and the weight of the other backends beside it."""
    found: dict[str, tuple[int, int]] = {}
    for route in cluster.all("HTTPRoute"):
        for rule in route["spec"].get("rules") or []:
            given = {each["name"]: each.get("weight", 1) for each in rule.get("backendRefs") or []}
            for name, weight in given.items():
                found[name] = max(found.get(name, (0, 0)), (weight, sum(given.values()) - weight))
    return found


def no_endpoints(cluster: Cluster, service: Object, pain: int, evidence: list[Evidence]) -> Finding:
    """No Pod has the labels: the workload that is nearest tells which label differs."""
    selector = service["spec"]["selector"]
    evidence = [*evidence, Evidence(service, "spec.selector", selector)]

    def shared(item: Object) -> int:
        return len(selector.items() & (template_labels(item) or labels(item)).items())

    others = [*cluster.all("Deployment", "StatefulSet", "DaemonSet"), *cluster.live_pods()]
    nearest = max(others, key=shared, default=None)
    if nearest is not None:
        its_labels = template_labels(nearest) or labels(nearest)
        differ = {key: its_labels.get(key, "no such label") for key in selector if its_labels.get(key) != selector[key]}
        evidence.append(Evidence(nearest, "labels of its Pods that differ", differ))
    return Finding("label-drift", pain, service, service, evidence)


def _pods(cluster: Cluster, service: Object) -> list[Object]:
    selector = service["spec"].get("selector")
    if not selector:
        return []
    return [pod for pod in cluster.live_pods() if selects({"matchLabels": selector}, labels(pod)) and ready(pod)]


def port_findings(cluster: Cluster, service: Object) -> Iterator[Finding]:
    pods = _pods(cluster, service)
    known = container_ports(pods)
    if not known:
        return
    for port in service["spec"].get("ports") or []:
        target = port.get("targetPort", port["port"])
        names = (
            [each.get("name") for each in known]
            if isinstance(target, str)
            else [each["containerPort"] for each in known]
        )
        if target not in names:
            evidence = [
                Evidence(service, "spec.ports.targetPort", target),
                Evidence(pods[0], "containerPorts", [(each.get("name"), each["containerPort"]) for each in known][:4]),
            ]
            yield Finding("port-drift", NO_ANSWER, service, service, evidence)


def network_findings(cluster: Cluster, notes: list[str]) -> Iterator[Finding]:
    """Policies add up: nobody is admitted only if no rule of any of them admits anybody."""
    for service in cluster.all("Service"):
        pods = _pods(cluster, service)
        policies = [
            policy
            for policy in cluster.all("NetworkPolicy")
            if pods
            and "Ingress" in policy["spec"].get("policyTypes", ["Ingress"])
            and selects(policy["spec"].get("podSelector") or {}, labels(pods[0]))
        ]
        if not policies:
            continue
        evidence = [
            Evidence(policy, "spec.ingress", policy["spec"].get("ingress") or "no rule: nobody") for policy in policies
        ]
        ports = [number for port in service["spec"].get("ports") or [] for number in _numbers(port, pods)]
        rules = [
            rule
            for policy in policies
            for rule in policy["spec"].get("ingress") or []
            if any(_admits_port(rule, each, pods) for each in ports)
        ]
        if not rules:
            yield Finding("network-policy", NO_ANSWER, service, service, evidence)
            continue
        mark = f"{labels(pods[0]).get('app.kubernetes.io/name', '')}-client"
        peers = [peer for rule in rules for peer in rule.get("from") or []]
        if any(not rule.get("from") for rule in rules):
            continue
        # Whoever carries the service's client label says that it is a client.
        shut_out = [
            pod
            for pod in cluster.live_pods()
            if labels(pod).get(mark) == "true" and not any(_admits(cluster, peer, pod) for peer in peers)
        ]
        if shut_out:
            client = Evidence(shut_out[0], f"label {mark}", "true, and no rule admits it")
            yield Finding("network-policy", SOME_FAIL, service, service, [client, *evidence])
        elif all("podSelector" in peer and "namespaceSelector" not in peer for peer in peers) and not any(
            _admits(cluster, peer, pod) for peer in peers for pod in cluster.live_pods()
        ):
            notes.append(f"{name_of(service)}: its NetworkPolicies admit only Pods with labels that no Pod here has")


def _numbers(port: Object, pods: list[Object]) -> list[int]:
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return [target]
    return sorted({each["containerPort"] for each in container_ports(pods) if each.get("name") == target})


def _admits_port(rule: Object, number: int, pods: list[Object]) -> bool:
    names = {each.get("name") for each in container_ports(pods) if each["containerPort"] == number}
    for port in rule.get("ports") or [{}]:
        given = port.get("port")
        if port.get("protocol", "TCP") != "TCP":
            continue
        if given is None or given in names:
            return True
        if isinstance(given, int) and given <= number <= port.get("endPort", given):
            return True
    return False


def _admits(cluster: Cluster, peer: Object, pod: Object) -> bool:
    """Whether a peer admits a Pod of this namespace; an address block may, so it does."""
    if "ipBlock" in peer:
        return True
    if "namespaceSelector" in peer:
        spaces = cluster.all("Namespace")
        if not spaces:
            return True
        if not selects(peer["namespaceSelector"] or {}, labels(spaces[0])):
            return False
    return selects(peer.get("podSelector") or {}, labels(pod))
