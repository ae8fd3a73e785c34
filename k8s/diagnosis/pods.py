"""What is wrong with one Pod, from its status and its own events."""

import re
from collections.abc import Iterator

from .causes import CAUSES
from .cluster import Cluster, Object, conditions, ready
from .finding import Evidence

# (cause, where and what, container)
Fault = tuple[str, list[Evidence], str]

# What a start may take before it is worth a word.
GRACE_SECONDS = 30
# A container that is well again: how long its end is news.
RECENT_SECONDS = 1800

# In this order: the scheduler asks for taints and labels first, so a node that is only too small passed those.
SCHEDULER_SAYS = (
    ("claim-unbound", r"persistentvolumeclaim|PersistentVolume|volume node affinity|persistent volumes to bind"),
    ("no-gpu", r"Insufficient [\w.-]+/\S*|resource ?claim|cannot allocate all claims"),
    ("no-cpu", r"Insufficient cpu"),
    ("no-memory", r"Insufficient memory"),
    ("no-room", r"Insufficient |Too many pods|free ports"),
    ("node-selector", r"node affinity/selector|node selector|topology spread|affinity rules"),
    ("taint", r"untolerated taint|unschedulable"),
)
IMAGE = {
    "ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
    "RegistryUnavailable", "SignatureValidationFailed",
}  # fmt: skip
CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError"}
WRONG_ARCH = re.compile(r"exec format error|no match for platform|no matching manifest", re.IGNORECASE)


def faults(cluster: Cluster, pod: Object) -> Iterator[Fault]:
    status, found = pod.get("status", {}), conditions(pod)
    scheduled = found.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        yield _pending(pod, scheduled)
        return
    any_yet = False
    for kind in ("initContainerStatuses", "containerStatuses"):
        for index, each in enumerate(status.get(kind) or []):
            fault = _container(cluster, pod, each, f"status.{kind}[{index}]")
            if fault:
                any_yet = True
                yield fault
    if any_yet or ready(pod) or status.get("phase") in ("Succeeded", "Failed"):
        return
    not_ready = found.get("Ready", {})
    since = not_ready.get("lastTransitionTime") or pod["metadata"].get("creationTimestamp")
    waiting = [
        each
        for kind in ("initContainerStatuses", "containerStatuses")
        for each in status.get(kind) or []
        if "waiting" in each.get("state", {})
    ]
    old = cluster.age_seconds(since) > GRACE_SECONDS
    if waiting or status.get("phase") == "Pending":
        for cause, reasons in (
            ("mount", ("FailedMount", "FailedAttachVolume", "FailedMapVolume")),
            ("stuck-creating", ("FailedCreatePodSandBox", "NetworkNotReady", "FailedPodSandBoxStatus")),
        ):
            events = cluster.events(pod, *reasons)
            if events and (old or events[0].get("count", 1) > 2):
                yield cause, [_event(pod, event) for event in _different(events)[:2]], _first(pod)
                return
        running_init = any("running" in each.get("state", {}) for each in status.get("initContainerStatuses") or [])
        if old and not running_init and cluster.age_seconds(since) > 2 * GRACE_SECONDS:
            yield "stuck-creating", [condition_of(pod, not_ready)], _first(pod)
    elif old:
        yield "not-ready", [condition_of(pod, not_ready)], _first(pod)


def ended(cluster: Cluster, pod: Object, each: Object, terminated: Object, path: str) -> Fault:
    """Why a container ended."""
    code, message = terminated.get("exitCode"), terminated.get("message", "")
    evidence = [Evidence(pod, f"{path}.reason", f"{terminated.get('reason', 'Error')}, exit code {code}")]
    if message:
        evidence.append(Evidence(pod, f"{path}.message", message))
    if each.get("restartCount"):
        evidence.append(Evidence(pod, "restartCount", f"{each['restartCount']} of container {each['name']}"))
    name = each["name"]
    if terminated.get("reason") == "OOMKilled":
        return ("oom-load" if _never_ready(cluster, pod) else "oom-payload"), evidence, name
    if WRONG_ARCH.search(message):
        return "image-arch", evidence, name
    if terminated.get("reason") in ("StartError", "ContainerCannotRun"):
        return "container-config", evidence, name
    # The kubelet's word for why it ended it. The exit code says only how it went.
    for event in cluster.events(pod, "Killing", "Unhealthy"):
        said = event.get("message", "")
        about = event["involvedObject"].get("fieldPath", "")
        if about and not about.endswith(f"{{{name}}}"):
            continue
        for probe in ("startup", "liveness"):
            killed = f"failed {probe} probe" in said and event["reason"] == "Killing"
            if killed and code in (0, 1, 137, 143):
                evidence += [_event(pod, event), *_probe_event(cluster, pod, probe)]
                return f"{probe}-probe", evidence, name
    if code in range(1, 6):
        evidence[0].value += f" ({CAUSES[f'exit-{code}'].looks.split(':', 1)[-1].strip()})"
        return f"exit-{code}", evidence, name
    return "crash", evidence, name


def _container(cluster: Cluster, pod: Object, each: Object, path: str) -> Fault | None:
    state, last = each.get("state", {}), each.get("lastState", {}).get("terminated")
    if waiting := state.get("waiting"):
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        evidence = [Evidence(pod, f"{path}.state.waiting", f"{reason}: {message}")]
        if WRONG_ARCH.search(message):
            return "image-arch", evidence, each["name"]
        if reason in IMAGE:
            return "image-pull", [*evidence, Evidence(pod, f"{path}.image", each.get("image"))], each["name"]
        if reason in CONFIG:
            return "container-config", evidence, each["name"]
        if last and (reason == "CrashLoopBackOff" or cluster.age_seconds(last.get("finishedAt")) < RECENT_SECONDS):
            return ended(cluster, pod, each, last, f"{path}.lastState.terminated")
        if reason not in ("ContainerCreating", "PodInitializing", ""):
            return "crash", evidence, each["name"]
        return None
    is_init = "initContainerStatuses" in path
    if (done := state.get("terminated")) and pod["status"].get("phase") not in ("Succeeded", "Failed"):
        always = pod["spec"].get("restartPolicy", "Always") == "Always" and not is_init
        if done.get("exitCode") or always:
            return ended(cluster, pod, each, done, f"{path}.state.terminated")
        return None
    running = state.get("running")
    if not running:
        return None
    if last and (last.get("exitCode") or not is_init):
        recent = cluster.age_seconds(last.get("finishedAt")) < RECENT_SECONDS
        if recent or not (each.get("ready") or is_init):
            return ended(cluster, pod, each, last, f"{path}.lastState.terminated")
    return None if each.get("ready") or is_init else _probes(cluster, pod, each, path)


def _probes(cluster: Cluster, pod: Object, each: Object, path: str) -> Fault | None:
    """Running and not ready, and it never ended."""
    if cluster.age_seconds(each["state"]["running"].get("startedAt")) < GRACE_SECONDS:
        return None
    since = conditions(pod).get("Ready", {}).get("lastTransitionTime")
    if each.get("started") and cluster.age_seconds(since) < GRACE_SECONDS:
        return None
    probe = "readiness" if each.get("started") else "startup"
    field, value = ("ready", each.get("ready")) if probe == "readiness" else ("started", each.get("started"))
    evidence = [Evidence(pod, f"{path}.{field}", value), *_probe_event(cluster, pod, probe)]
    return f"{probe}-probe", evidence, each["name"]


def _pending(pod: Object, scheduled: Object) -> Fault:
    message = scheduled.get("message", "")
    # What follows is about making room by ending other Pods, in the same words.
    said = message.split("preemption:")[0]
    cause = next((cause for cause, pattern in SCHEDULER_SAYS if re.search(pattern, said)), "pending")
    return cause, [condition_of(pod, scheduled)], _first(pod)


def _never_ready(cluster: Cluster, pod: Object) -> bool:
    """The condition Ready was set False when the Pod came, and turned False again later only if it was ever True."""
    condition, start = conditions(pod).get("Ready", {}), pod["status"].get("startTime")
    if condition.get("status") == "True" or not start:
        return False
    return cluster.age_seconds(start) - cluster.age_seconds(condition.get("lastTransitionTime")) <= 2


def _probe_event(cluster: Cluster, pod: Object, probe: str) -> list[Evidence]:
    said = [
        event
        for event in cluster.events(pod, "Unhealthy")
        if event.get("message", "").startswith(f"{probe.capitalize()} probe")
    ]
    return [_event(pod, said[0])] if said else []


def _different(events: list[Object]) -> list[Object]:
    return list({event.get("message"): event for event in reversed(events)}.values())[::-1]


def _event(item: Object, event: Object) -> Evidence:
    return Evidence(item, f"event {event['reason']}", f"{event.get('message')} (x{event.get('count') or 1})")


def condition_of(item: Object, condition: Object) -> Evidence:
    said = [condition.get("status", "unknown"), condition.get("reason"), condition.get("message")]
    return Evidence(item, f"condition {condition.get('type', 'Ready')}", ": ".join(each for each in said if each))


def _first(pod: Object) -> str:
    return str(pod["spec"]["containers"][0]["name"])
