"""What is wrong in a namespace: roots first, and what only follows from them listed under them."""

from collections.abc import Iterator

from .cluster import Cluster, Object, conditions, labels, name_of, ready, selects, template_labels
from .finding import AT_RISK, COST, DEGRADED, NO_ANSWER, SOME_FAIL, Evidence, Finding
from .network import backends, network_findings, no_endpoints, port_findings
from .pods import GRACE_SECONDS, RECENT_SECONDS, condition_of, ended, faults

FAIL_UNDER_LOAD = {"oom-payload", "liveness-probe", "crash", "exit-1"}
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet")


class Report:
    """Findings by workload, so that a consequence finds its root."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.roots: list[Finding] = []
        self.notes: list[str] = []

    def of(self, workload: Object) -> list[Finding]:
        return [each for each in self.roots if name_of(each.workload) == name_of(workload)]

    def add(self, finding: Finding) -> None:
        for each in self.of(finding.workload):
            if each.cause == finding.cause and each.item["kind"] == finding.item["kind"]:
                each.also += 1
                each.pain = min(each.pain, finding.pain)
                return
        self.roots.append(finding)

    def follows(self, finding: Finding, workload: Object) -> None:
        """A consequence, if its workload has a root; else a root."""
        roots = sorted(self.of(workload), key=lambda each: each.pain)
        if not roots:
            self.add(finding)
            return
        roots[0].consequences.append(finding)
        roots[0].pain = min(roots[0].pain, finding.pain)


def findings(cluster: Cluster) -> tuple[list[Finding], list[str]]:
    """Most user pain first, and notes on what may be meant."""
    report = Report(cluster)
    for job in cluster.all("Job"):
        _job(report, job)
    for pod in cluster.all("Pod"):
        _pod(report, pod)
    for workload in cluster.all(*WORKLOADS):
        _refused(report, workload)
        _workload(report, workload)
    for claim in cluster.all("PersistentVolumeClaim"):
        _claim(report, claim)
    # Before the Services: a worker at zero explains them, and the other way round it does not.
    for scaled in cluster.all("ScaledObject"):
        _scaled_object(report, scaled)
    for service in cluster.all("Service"):
        _service(report, service)
    for finding in network_findings(cluster, report.notes):
        report.add(finding)
    for route in cluster.all("HTTPRoute"):
        _route(report, route)
    for scaler in cluster.all("HorizontalPodAutoscaler"):
        _autoscaler(report, scaler)
    for budget in cluster.all("PodDisruptionBudget"):
        _budget(report, budget)
    report.roots.sort(key=lambda each: (each.pain, name_of(each.workload)))
    return report.roots, report.notes


def pods_of(cluster: Cluster, workload: Object) -> list[Object]:
    return [pod for pod in cluster.live_pods() if name_of(cluster.owner(pod)) == name_of(workload)]


def _pain(cluster: Cluster, workload: Object, cause: str) -> int:
    """What its clients feel while Pods of this workload are not ready."""
    if any(ready(pod) for pod in pods_of(cluster, workload)):
        return SOME_FAIL if cause in FAIL_UNDER_LOAD else DEGRADED
    its_labels = template_labels(workload) or labels(workload)
    services = [
        service
        for service in cluster.all("Service")
        if service["spec"].get("selector") and selects({"matchLabels": service["spec"]["selector"]}, its_labels)
    ]
    if not services or workload["kind"] == "Job":
        return DEGRADED
    return min(SOME_FAIL if cluster.endpoints(each) else _pain_of_service(cluster, each) for each in services)


def _pain_of_service(cluster: Cluster, service: Object) -> int:
    """Without endpoints. Beside another backend of a route, its weight says what share fails."""
    share = backends(cluster).get(service["metadata"]["name"])
    if share is None or share[1] == 0:
        return NO_ANSWER
    return SOME_FAIL if share[0] else AT_RISK


def _pod(report: Report, pod: Object) -> None:
    cluster, workload = report.cluster, report.cluster.owner(pod)
    if deleted := pod["metadata"].get("deletionTimestamp"):
        # The time by which it was to be gone.
        if cluster.age_seconds(deleted) > 120:
            due = Evidence(pod, "metadata.deletionTimestamp", deleted)
            held = Evidence(pod, "metadata.finalizers", pod["metadata"].get("finalizers") or "none")
            report.add(Finding("stuck-terminating", COST, workload, pod, [due, held]))
        return
    if workload["kind"] == "Job" and {"Failed", "Complete", "SuccessCriteriaMet"} & set(conditions(workload)):
        return
    if workload["kind"] == "Pod" and pod["status"].get("phase") == "Failed":
        report.notes.append(f"{name_of(pod)} ended: {pod['status'].get('reason', 'Failed')}; nothing owns it")
    for cause, evidence, container in faults(cluster, pod):
        if cause == "claim-unbound":
            evidence += _claims(cluster, pod)
        report.add(Finding(cause, _pain(cluster, workload, cause), workload, pod, evidence, container))


def _claims(cluster: Cluster, pod: Object) -> list[Evidence]:
    names = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["spec"].get("volumes") or []
        if "persistentVolumeClaim" in volume
    ]
    evidence = []
    for claim in filter(None, (cluster.find("PersistentVolumeClaim", name) for name in names)):
        evidence.append(Evidence(claim, "status.phase", claim["status"].get("phase")))
        said = cluster.events(claim, "ProvisioningFailed", "FailedBinding")
        evidence += [Evidence(claim, f"event {each['reason']}", each.get("message")) for each in said[:1]]
    return evidence


def _claim(report: Report, claim: Object) -> None:
    seen = {name for each in report.roots for evidence in each.evidence for name in [evidence.object]}
    if name_of(claim) in seen:
        return
    failed = report.cluster.events(claim, "ProvisioningFailed", within_seconds=600)
    phase = claim["status"].get("phase")
    if phase == "Lost" or (phase == "Pending" and failed):
        evidence = [Evidence(claim, "status.phase", phase)]
        evidence += [Evidence(claim, f"event {each['reason']}", each.get("message")) for each in failed[:1]]
        report.add(Finding("claim-unbound", AT_RISK, claim, claim, evidence))


def _refused(report: Report, workload: Object) -> None:
    """Pods that were never made: no Pod tells of it."""
    cluster = report.cluster
    told: list[tuple[Object, str, str]] = []
    makers = [workload, *(each for each in cluster.all("ReplicaSet") if cluster.owner(each) is workload)]
    for maker in makers:
        if (maker["spec"].get("replicas") or 0) == 0 and workload["kind"] != "DaemonSet":
            continue
        failure = conditions(maker).get("ReplicaFailure", {})
        if failure.get("status") == "True":
            told.append((maker, "condition ReplicaFailure", f"{failure.get('reason')}: {failure.get('message')}"))
        elif _lacks(workload):
            events = cluster.events(maker, "FailedCreate", within_seconds=RECENT_SECONDS)
            told += [(maker, "event FailedCreate", each.get("message", "")) for each in events[:1]]
    if told:
        item, field, said = told[-1]
        cause = "quota" if "exceeded quota" in said else "admission"
        pain = _pain(cluster, workload, cause)
        report.add(Finding(cause, pain, workload, workload, [Evidence(item, field, said)]))


def _lacks(workload: Object) -> bool:
    status = workload.get("status", {})
    wanted = workload["spec"].get("replicas", status.get("desiredNumberScheduled", 0))
    return bool(status.get("replicas", status.get("currentNumberScheduled", 0)) < wanted)


def _workload(report: Report, workload: Object) -> None:
    cluster, found = report.cluster, conditions(workload)
    if workload["spec"].get("paused"):
        evidence = [Evidence(workload, "spec.paused", "true")]
        report.add(Finding("rollout-paused", AT_RISK, workload, workload, evidence))
    progressing = found.get("Progressing", {})
    if progressing.get("status") == "False":
        pain = _pain(cluster, workload, "rollout-stuck")
        evidence = [condition_of(workload, progressing)]
        report.follows(Finding("rollout-stuck", pain, workload, workload, evidence), workload)
    available = found.get("Available", {})
    old = cluster.age_seconds(available.get("lastTransitionTime")) > 2 * GRACE_SECONDS
    if available.get("status") == "False" and old:
        pain = _pain(cluster, workload, "too-few")
        report.follows(Finding("too-few", pain, workload, workload, [condition_of(workload, available)]), workload)
    for kind, each in found.items():
        if kind not in ("Progressing", "Available", "ReplicaFailure") and each.get("status") == "Unknown":
            report.add(Finding("condition", AT_RISK, workload, workload, [condition_of(workload, each)]))


def _job(report: Report, job: Object) -> None:
    cluster, found = report.cluster, conditions(job)
    if found.get("Complete", {}).get("status") == "True":
        return
    failed = next(
        (found[kind] for kind in ("Failed", "FailureTarget") if found.get(kind, {}).get("status") == "True"), None
    )
    ends = sorted(_ends(cluster, job), key=lambda each: each[0])
    last = ends[-1][1] if ends else []
    if failed:
        evidence = [condition_of(job, failed)]
        if indexes := job["status"].get("failedIndexes"):
            evidence.append(Evidence(job, "status.failedIndexes", indexes))
        report.add(Finding("job-failed", DEGRADED, job, job, [*evidence, *last]))
    elif job["status"].get("failed"):
        evidence = [
            Evidence(
                job, "status.failed", f"{job['status']['failed']} of backoffLimit {job['spec'].get('backoffLimit', 6)}"
            )
        ]
        report.add(Finding("job-retrying", DEGRADED, job, job, [*evidence, *last]))
    elif job["spec"].get("suspend"):
        report.notes.append(f"{name_of(job)} is suspended (spec.suspend)")
    if not job["status"].get("active") and (
        refused := cluster.events(job, "FailedCreate", within_seconds=RECENT_SECONDS)
    ):
        said = refused[0].get("message", "")
        cause = "quota" if "exceeded quota" in said else "admission"
        report.add(Finding(cause, DEGRADED, job, job, [Evidence(job, "event FailedCreate", said)]))


def _ends(cluster: Cluster, job: Object) -> Iterator[tuple[str, list[Evidence]]]:
    for pod in pods_of(cluster, job):
        for kind in ("initContainerStatuses", "containerStatuses"):
            for index, each in enumerate(pod["status"].get(kind) or []):
                for state in ("state", "lastState"):
                    done = each.get(state, {}).get("terminated")
                    if done and done.get("exitCode"):
                        path = f"status.{kind}[{index}].{state}.terminated"
                        yield done.get("finishedAt") or "", ended(cluster, pod, each, done, path)[1]


def _service(report: Report, service: Object) -> None:
    cluster = report.cluster
    for finding in port_findings(cluster, service):
        report.add(finding)
    selector = service["spec"].get("selector")
    if not selector or cluster.endpoints(service) or "endpointslices.discovery.k8s.io" in cluster.unread:
        return
    pain = _pain_of_service(cluster, service)
    share = backends(cluster).get(service["metadata"]["name"])
    empty = "canary-no-endpoints" if share and share[1] else "no-endpoints"
    matching = [
        each for each in cluster.all(*WORKLOADS, "Job") if selects({"matchLabels": selector}, template_labels(each))
    ]
    pods = [pod for pod in cluster.live_pods() if selects({"matchLabels": selector}, labels(pod))]
    evidence = [Evidence(service, "ready endpoints", 0)]
    if share:
        evidence.append(Evidence(service, "HTTPRoute backendRefs weight", share[0]))
    if not matching and not pods:
        report.add(no_endpoints(cluster, service, pain, evidence))
        return
    if matching and all(each["kind"] == "Job" for each in matching):
        return
    for workload in matching:
        if workload["spec"].get("replicas") == 0 and not report.of(workload):
            at_zero = [Evidence(workload, "spec.replicas", 0)]
            report.add(Finding("scaled-to-zero", pain, workload, workload, at_zero))
    explained = next((each for each in matching if report.of(each)), None)
    young = all(cluster.age_seconds(pod["metadata"].get("creationTimestamp")) < GRACE_SECONDS for pod in pods)
    if explained:
        report.follows(Finding(empty, pain, service, service, evidence), explained)
    elif not (pods and young):
        evidence += [Evidence(pod, "condition Ready", ready(pod)) for pod in pods[:2]]
        report.add(Finding(empty, pain, service, service, evidence))


def _route(report: Report, route: Object) -> None:
    parents = route.get("status", {}).get("parents") or []
    if not parents and report.cluster.age_seconds(route["metadata"].get("creationTimestamp")) > GRACE_SECONDS:
        evidence = [Evidence(route, "status.parents", "empty: no controller took it; is there such a Gateway?")]
        report.add(Finding("route-refused", SOME_FAIL, route, route, evidence))
    for parent in parents:
        refused = [each for each in parent.get("conditions") or [] if each["status"] != "True"]
        if refused:
            evidence = [condition_of(route, each) for each in refused]
            report.add(Finding("route-refused", SOME_FAIL, route, route, evidence))


def _autoscaler(report: Report, scaler: Object) -> None:
    target, found = scaler["spec"]["scaleTargetRef"], conditions(scaler)
    workload = report.cluster.find(target["kind"], target["name"]) or scaler
    for kind in ("AbleToScale", "ScalingActive"):
        each = found.get(kind, {})
        if each.get("status") not in ("False", "Unknown"):
            continue
        finding = Finding("hpa-unknown", DEGRADED, scaler, scaler, [condition_of(scaler, each)])
        if each.get("reason") == "ScalingDisabled":
            owned_by_keda = any(own["kind"] == "ScaledObject" for own in scaler["metadata"].get("ownerReferences", []))
            if not owned_by_keda and not report.of(workload):
                evidence = [Evidence(workload, "spec.replicas", 0), condition_of(scaler, each)]
                report.add(Finding("scaled-to-zero", DEGRADED, workload, workload, evidence))
        elif any(
            words in each.get("message", "") for words in ("did not receive metrics", "no metrics returned", "unready")
        ):
            report.follows(finding, workload)
        elif report.cluster.age_seconds(each.get("lastTransitionTime")) > GRACE_SECONDS:
            report.add(finding)
    limited = found.get("ScalingLimited", {})
    if limited.get("status") == "True" and limited.get("reason") == "TooManyReplicas":
        size = f"{scaler['status'].get('currentReplicas')} of at most {scaler['spec']['maxReplicas']}"
        evidence = [condition_of(scaler, limited), Evidence(scaler, "status.currentReplicas", size)]
        report.add(Finding("hpa-maximum", DEGRADED, scaler, scaler, evidence))


def _budget(report: Report, budget: Object) -> None:
    status = budget.get("status", {})
    allowed = conditions(budget).get("DisruptionAllowed", {})
    if allowed.get("reason") == "SyncFailed":
        report.add(Finding("condition", AT_RISK, budget, budget, [condition_of(budget, allowed)]))
        return
    expected, wanted, healthy = (status.get(key, 0) for key in ("expectedPods", "desiredHealthy", "currentHealthy"))
    if status.get("disruptionsAllowed", 0) or not expected:
        return
    counts = f"{healthy} healthy, {wanted} wanted, {expected} expected"
    evidence = [Evidence(budget, "status.disruptionsAllowed", f"0: {counts}")]
    finding = Finding("pdb-blocks", AT_RISK, budget, budget, evidence)
    if wanted >= expected:
        report.add(finding)
        return
    # It only waits for Pods that are not ready: their fault, not its own.
    for workload in report.cluster.all(*WORKLOADS):
        if selects(budget["spec"].get("selector") or {}, template_labels(workload)) and report.of(workload):
            report.follows(finding, workload)
            return


def _scaled_object(report: Report, scaled: Object) -> None:
    target, found, status = scaled["spec"]["scaleTargetRef"], conditions(scaled), scaled.get("status", {})
    workload = report.cluster.find(target.get("kind", "Deployment"), target["name"])
    zero = workload is not None and workload["spec"].get("replicas") == 0
    bad = [
        condition_of(scaled, found[kind])
        for kind, wrong in (("Ready", ("False", "Unknown")), ("Fallback", ("True",)))
        if kind in found and found[kind].get("status") in wrong
    ]
    bad += [
        Evidence(scaled, f"status.health.{name}", f"{health.get('status')}, {health.get('numberOfFailures')} failures")
        for name, health in (status.get("health") or {}).items()
        if health.get("status") == "Failing"
    ]
    if bad:
        pain = SOME_FAIL if zero else DEGRADED
        report.add(Finding("scaler", pain, workload or scaled, scaled, bad))
    if not zero or workload is None:
        return
    pauses = {
        key: value
        for key, value in (scaled["metadata"].get("annotations") or {}).items()
        if key.startswith("autoscaling.keda.sh/paused") and value != "false"
    }
    backlog = [
        Evidence(scaler, "status.currentMetrics", f"{metric['external']['metric']['name']} = {value}")
        for scaler in report.cluster.all("HorizontalPodAutoscaler")
        if scaler["spec"]["scaleTargetRef"]["name"] == target["name"]
        for metric in scaler.get("status", {}).get("currentMetrics") or []
        if metric.get("type") == "External"
        for value in [
            metric["external"]["current"].get("value") or metric["external"]["current"].get("averageValue", "0")
        ]
        if value not in ("0", "0m")
    ]
    active = found.get("Active", {})
    seconds = report.cluster.age_seconds(active.get("lastTransitionTime"))
    works = active.get("status") == "True" and seconds > GRACE_SECONDS
    if works or backlog or pauses:
        evidence = [Evidence(workload, "spec.replicas", 0)]
        evidence += [Evidence(scaled, f"annotation {key}", value) for key, value in pauses.items()]
        evidence += [condition_of(scaled, active)] if active else []
        report.follows(Finding("worker-zero", SOME_FAIL, workload, scaled, evidence + backlog), workload)
