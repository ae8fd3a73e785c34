"""What the cluster says of a release: rollout, faults, endpoints, weight, restarts."""

from collections.abc import Iterator

from diagnosis.causes import CAUSES
from diagnosis.cluster import Object, conditions, name_of

from .evidence import BAD, OK, WAIT, Check, Evidence
from .tracks import Track

# Restarts longer ago than this are no news.
RECENT_SECONDS = 3600
# Faults that time does not mend.
LASTING = {
    "exit-1", "exit-2", "exit-3", "exit-4", "exit-5", "oom-load", "oom-payload", "crash", "image-arch", "rollout-stuck",
    "liveness-probe", "label-drift", "port-drift",
}  # fmt: skip
# Not of autoscalers and budgets, which the release is not to blame for.
FAULTY = ("Deployment", "ReplicaSet", "Pod", "Service")


def pod_checks(evidence: Evidence) -> Iterator[Check]:
    yield _rollout(evidence)
    yield _faults(evidence)
    yield _endpoints(evidence)
    yield from _weight(evidence)
    yield _restarts(evidence)


def _progress(track: Track) -> tuple[str, str]:
    """State and what it waits for."""
    workload, status = track.workload, track.workload.get("status", {})
    progressing = conditions(workload).get("Progressing", {})
    if progressing.get("reason") == "ProgressDeadlineExceeded":
        return BAD, "the rollout is stuck (ProgressDeadlineExceeded)"
    if not track.wanted:
        return WAIT, "it is scaled to zero"
    seen = status.get("observedGeneration", 0) >= workload["metadata"].get("generation", 0)
    counts = [status.get(f"{kind}Replicas", 0) for kind in ("updated", "available")]
    if not seen or min(counts) < track.wanted or status.get("replicas", 0) > status.get("updatedReplicas", 0):
        return WAIT, "the rollout goes on"
    return OK, ""


def _rollout(evidence: Evidence) -> Check:
    values = {
        each.name: f"{each.workload.get('status', {}).get('availableReplicas', 0)} of {each.wanted} available"
        for each in evidence.tracks
    }
    state, reason = _progress(evidence.judged)
    if state == OK and evidence.stable and _progress(evidence.stable)[0] != OK:
        state, reason = WAIT, "the stable Pods' own rollout is not done"
    return Check("rollout", values, "all, updated", state, reason)


def _faults(evidence: Evidence) -> Check:
    """What diagnose.py finds in them."""
    causes = {}
    for track in evidence.tracks:
        names = {name_of(track.workload), *map(name_of, track.services)}
        causes[track.name] = [
            each.cause for each in evidence.findings if name_of(each.workload) in names and each.item["kind"] in FAULTY
        ]
    values = {name: "; ".join(CAUSES[each].title for each in found) or "none" for name, found in causes.items()}
    state, reason = OK, ""
    if found := causes[evidence.judged.name]:
        state, reason = (BAD if LASTING & set(found) else WAIT), values[evidence.judged.name]
    elif evidence.stable and causes[evidence.stable.name]:
        state, reason = WAIT, f"the stable Pods are not well: {values[evidence.stable.name]} (k8s/diagnose.py)"
    return Check("faults", values, "none", state, reason)


def _endpoints(evidence: Evidence) -> Check:
    values = {each.name: each.endpoints for each in evidence.tracks}
    state, reason = OK, ""
    if not evidence.judged.endpoints:
        rolled_out = _progress(evidence.judged)[0] == OK
        state, reason = (BAD if rolled_out else WAIT), "no endpoint is ready"
    return Check("endpoints", values, "at least 1", state, reason)


def _weight(evidence: Evidence) -> Iterator[Check]:
    if evidence.stable is None or evidence.judged.weight is None:
        return
    values = {each.name: each.weight for each in evidence.tracks}
    waits = not evidence.judged.weight and not evidence.of_judged().requests
    yield Check("weight", values, "above 0", WAIT if waits else OK, "the route sends it nothing" if waits else "")


def _restarts(evidence: Evidence) -> Check:
    def recent(pod: Object) -> int:
        return sum(
            evidence.cluster.age_seconds(ended["finishedAt"]) < RECENT_SECONDS
            for each in pod.get("status", {}).get("containerStatuses") or []
            if (ended := each.get("lastState", {}).get("terminated")) and ended.get("finishedAt")
        )

    values = {each.name: sum(map(recent, each.pods)) for each in evidence.tracks}
    bad = values[evidence.judged.name] > 0
    return Check("restarted", values, "none in 1 h", BAD if bad else OK, "containers restarted" if bad else "")
