"""What the example Roles let a team do, and what not, as the API server judges rules: verb, group and resource."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests import K8S, Variation, kustomize, of_kind

Rules = list[dict[str, list[str]]]
WRITES = ("create", "update", "patch", "delete", "deletecollection")
# Beyond what any of them may do.
NEVER = (
    *((verb, "", "secrets") for verb in ("get", "list", "watch", *WRITES)),
    *(("create", "", resource) for resource in ("pods", "pods/exec", "pods/attach", "pods/ephemeralcontainers")),
    *((verb, "rbac.authorization.k8s.io", kind) for verb in WRITES for kind in ("roles", "rolebindings")),
    *((verb, "", kind) for verb in WRITES for kind in ("namespaces", "resourcequotas", "limitranges", "nodes")),
    ("create", "", "serviceaccounts/token"),
    ("impersonate", "", "users"),
    ("escalate", "rbac.authorization.k8s.io", "roles"),
    ("bind", "rbac.authorization.k8s.io", "roles"),
)
# What an apply of a team makes: not what only an administrator does (guardrails, priority).
APPLIED = Variation("base", ("gateway", "canary", "monitoring", "autoscale-keda", "tracing"))


@pytest.fixture(scope="module")
def roles() -> dict[str, Rules]:
    built = list(yaml.load_all(kustomize(K8S / "roles"), yaml.CSafeLoader))
    return {each["metadata"]["name"].rpartition("-")[2]: each["rules"] for each in of_kind(built, "Role")}


def can(rules: Rules, verb: str, group: str, resource: str) -> bool:
    """As RBAC judges: some rule has all three. No rule here has a wildcard or names of objects, which a test holds."""
    return any(verb in rule["verbs"] and group in rule["apiGroups"] and resource in rule["resources"] for rule in rules)


def kinds(objects: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Group and resource of each."""
    found = set()
    for each in objects:
        group = each["apiVersion"].rpartition("/")[0]
        kind = each["kind"].lower()
        found.add((group, kind.removesuffix("y") + "ies" if kind.endswith("y") else kind + "s"))
    return found


def test_no_rule_has_a_wildcard(roles: dict[str, Rules]):
    for rules in roles.values():
        for rule in rules:
            assert "*" not in (*rule["verbs"], *rule["apiGroups"], *rule["resources"])
            assert "resourceNames" not in rule


@pytest.mark.parametrize("role", ["viewer", "deployer", "releaser"])
def test_none_reads_secrets_runs_commands_or_changes_what_it_may_do(roles: dict[str, Rules], role: str):
    assert [each for each in NEVER if can(roles[role], *each)] == []


def test_a_viewer_changes_nothing(roles: dict[str, Rules]):
    assert {verb for rule in roles["viewer"] for verb in rule["verbs"]} == {"get", "list", "watch"}
    assert can(roles["viewer"], "get", "", "pods/log")


def test_a_viewer_may_read_all_that_diagnose_reads(roles: dict[str, Rules]):
    source = "".join(path.read_text() for path in Path(K8S / "diagnosis").glob("*.py"))
    for group, resource in (
        ("", "pods"),
        ("", "services"),
        ("", "events"),
        ("", "resourcequotas"),
        ("apps", "deployments"),
        ("apps", "replicasets"),
        ("batch", "jobs"),
        ("autoscaling", "horizontalpodautoscalers"),
        ("policy", "poddisruptionbudgets"),
        ("networking.k8s.io", "networkpolicies"),
        ("discovery.k8s.io", "endpointslices"),
    ):
        assert resource in source
        assert can(roles["viewer"], "list", group, resource)


def test_deployer_and_releaser_may_apply_what_a_team_applies(roles: dict[str, Rules]):
    deployer = roles["viewer"] + roles["deployer"]  # its group is bound to both
    for group, resource in kinds(APPLIED.objects()):
        for verb in ("get", "create", "patch"):
            assert can(deployer, verb, group, resource), (verb, group, resource)
            assert can(roles["releaser"], verb, group, resource), (verb, group, resource)


def test_the_release_robot_deletes_nothing_and_reaches_into_no_pod(roles: dict[str, Rules]):
    rules = roles["releaser"]
    assert not {"delete", "deletecollection"} & {verb for rule in rules for verb in rule["verbs"]}
    assert not {"pods/log", "pods/portforward"} & {resource for rule in rules for resource in rule["resources"]}


def test_a_deployer_undoes_rollouts_scales_and_deletes_pods_but_no_entrance(roles: dict[str, Rules]):
    rules = roles["deployer"]
    assert can(rules, "patch", "apps", "deployments")
    assert can(rules, "patch", "apps", "deployments/scale")
    assert can(rules, "delete", "", "pods")
    for group, resource in (("", "services"), ("gateway.networking.k8s.io", "httproutes")):
        assert not can(rules, "delete", group, resource)


def test_groups_are_bound_to_their_roles():
    built = list(yaml.load_all(kustomize(K8S / "roles"), yaml.CSafeLoader))
    bound = {
        (each["roleRef"]["name"].rpartition("-")[2], subject["name"].rpartition("-")[2])
        for each in of_kind(built, "RoleBinding")
        for subject in each["subjects"]
    }
    assert bound == {
        ("viewer", "viewers"), ("viewer", "deployers"), ("deployer", "deployers"), ("releaser", "releaser")
    }  # fmt: skip
