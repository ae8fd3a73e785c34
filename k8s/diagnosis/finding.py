"""One fault with its evidence and what follows from it."""

import shlex
from dataclasses import dataclass, field
from typing import Any

from .causes import CAUSES
from .cluster import Object, name_of, one_line

# How much users feel it, worst first.
PAIN = ("clients get no answer", "some requests fail", "degraded", "at risk", "cost")
NO_ANSWER, SOME_FAIL, DEGRADED, AT_RISK, COST = range(len(PAIN))


@dataclass
class Evidence:
    object: str
    field: str
    value: str

    def __init__(self, item: Object, path: str, value: Any) -> None:
        self.object, self.field, self.value = name_of(item), path, one_line(value)[:600]


@dataclass
class Finding:
    cause: str
    pain: int
    # What people know it by: the Deployment of a Pod.
    workload: Object
    # Where it was seen.
    item: Object
    evidence: list[Evidence]
    container: str = "server"
    also: int = 0
    consequences: list["Finding"] = field(default_factory=list)

    def command(self, kubectl: str) -> str:
        item, spec = self.item, self.item.get("spec", {})
        names = {
            "pod": item["metadata"]["name"],
            "container": self.container,
            "kind": (self.workload if item["kind"] == "Pod" else item)["kind"].lower(),
            "name": (self.workload if item["kind"] == "Pod" else item)["metadata"]["name"],
            "node": spec.get("nodeName", ""),
        }
        template = CAUSES[self.cause].command
        if "rollout undo" in template and names["kind"] not in ("deployment", "statefulset", "daemonset"):
            template = "kubectl describe {kind} {name}"
        command = template.format(**{key: shlex.quote(value) if value else "" for key, value in names.items()})
        return command.replace("kubectl", kubectl, 1)

    def as_json(self, kubectl: str) -> dict[str, Any]:
        return {
            "cause": self.cause,
            "title": CAUSES[self.cause].title,
            "pain": PAIN[self.pain],
            "workload": name_of(self.workload),
            "object": name_of(self.item),
            "more_objects": self.also,
            "evidence": [vars(each) for each in self.evidence],
            "do": CAUSES[self.cause].meaning,
            "next": self.command(kubectl),
            "consequences": [each.as_json(kubectl) for each in self.consequences],
        }
