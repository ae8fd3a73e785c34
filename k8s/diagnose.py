"""From what Kubernetes recorded in one namespace to causes and next commands. It reads, and changes nothing."""

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from diagnosis.causes import CAUSES, runbook
from diagnosis.cluster import KubectlError, read
from diagnosis.finding import PAIN, Finding
from diagnosis.rules import findings


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Causes of what is wrong in a namespace, most user pain first.",
        epilog="Exit code: 0 well, 1 something is wrong, 2 it cannot say.",
    )
    parser.add_argument("-n", "--namespace")
    parser.add_argument("--kubeconfig", help="passed on to kubectl")
    parser.add_argument("--context", help="passed on to kubectl")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--runbook", action="store_true", help="print the table of causes as Markdown and end")
    given = parser.parse_args()
    if given.runbook:
        print(runbook())
        return 0
    if not given.namespace:
        parser.error("-n NAMESPACE is missing")
    options = [f"--{name}={value}" for name in ("kubeconfig", "context") if (value := getattr(given, name)) is not None]
    try:
        cluster = read(given.namespace, options)
    except KubectlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if (
        not cluster.all("Pod", "Deployment", "StatefulSet", "DaemonSet", "Job")
        and "deployments.apps" not in cluster.unread
    ):
        print(f"error: no workload in the namespace {given.namespace}: is it the right one?", file=sys.stderr)
        return 2
    found, notes = findings(cluster)
    kubectl = shlex.join(["kubectl", *options, "-n", given.namespace])
    if given.json:
        answer = {
            "namespace": given.namespace,
            "well": not found,
            "findings": [each.as_json(kubectl) for each in found],
            "notes": notes,
            "unread": cluster.unread,
        }
        print(json.dumps(answer, indent=2))
    else:
        for number, each in enumerate(found, 1):
            show(each, kubectl, number)
        for note in notes:
            print(f"note: {note}")
        for kind, why in cluster.unread.items():
            print(f"not read: {kind}: {why}")
        if not found:
            print("Nothing wrong in what was read.")
    return 1 if found else 0


def show(found: Finding, kubectl: str, number: int) -> None:
    each = found.as_json(kubectl)
    print(f"{number}. {each['workload']}: {each['title']}  [{PAIN[found.pain]}]")
    for evidence in each["evidence"]:
        print(f"   {evidence['object']}  {evidence['field']} = {evidence['value']}")
    if found.also:
        print(f"   and {found.also} more with the same cause")
    for consequence in found.consequences:
        print(f"   so: {CAUSES[consequence.cause].title}")
        for evidence in consequence.as_json(kubectl)["evidence"]:
            print(f"       {evidence['object']}  {evidence['field']} = {evidence['value']}")
    print(f"   do: {each['do']}\n   next: {each['next']}\n")


if __name__ == "__main__":
    sys.exit(main())
