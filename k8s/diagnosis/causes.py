"""What can be wrong: one table, from which findings are printed and the runbook in k8s/README.md is made."""

from typing import NamedTuple


class Cause(NamedTuple):
    title: str
    looks: str
    meaning: str
    # With {pod}, {container}, {kind}, {name} and {node} of the finding; the namespace is added after `kubectl`.
    command: str


POD = "kubectl describe pod {pod}"
OWN = "kubectl describe {kind} {name}"
PREVIOUS = "kubectl logs {pod} -c {container} --previous"
UNDO = "kubectl rollout undo {kind}/{name}"

CAUSES = {
    "no-cpu": Cause(
        "no room: CPU", "Pending, `Insufficient cpu`", "add nodes, or lower requests or `maxReplicas`", POD
    ),
    "no-memory": Cause("no room: memory", "Pending, `Insufficient memory`", "add nodes, or lower the request", POD),
    "no-gpu": Cause(
        "no free GPU",
        "Pending, `Insufficient nvidia.com/gpu`, or a device claim that cannot be allocated",
        "add GPU nodes, or check the device plugin or driver that announces them",
        "kubectl get nodes -o custom-columns='NODE:.metadata.name,GPU:.status.allocatable.nvidia\\.com/gpu'",
    ),
    "no-room": Cause("no room", "Pending, `Insufficient …` or `Too many pods`", "add nodes, or lower the request", POD),
    "node-selector": Cause(
        "no node has the labels that are asked for",
        "Pending, `didn't match Pod's node affinity/selector` or topology constraints",
        "label the nodes, or correct nodeSelector and affinity",
        "kubectl get nodes --show-labels",
    ),
    "taint": Cause(
        "every node is tainted or cordoned",
        "Pending, `untolerated taint` or `unschedulable`",
        "add a toleration, remove the taint, or uncordon",
        "kubectl get nodes -o custom-columns='NODE:.metadata.name,TAINTS:.spec.taints[*].key'",
    ),
    "claim-unbound": Cause(
        "a volume claim is missing or not bound",
        "Pending, `persistentvolumeclaim … not found` or `unbound`; claim Pending or Lost",
        "make the claim, or give it a storage class that exists; a volume in another zone cannot be reached",
        "kubectl get persistentvolumeclaims,events",
    ),
    "pending": Cause("not scheduled", "Pending for another reason", "the scheduler's message names it", POD),
    "quota": Cause(
        "the quota refuses Pods",
        "no Pod, FailedCreate, `exceeded quota`",
        "raise the quota with `maxReplicas`",
        "kubectl describe resourcequota",
    ),
    "admission": Cause(
        "admission refuses Pods",
        "no Pod, FailedCreate, `violates PodSecurity`, a webhook's refusal, or an account that is missing",
        "the message names the field: correct your patch",
        OWN,
    ),
    "image-pull": Cause(
        "the image cannot be pulled",
        "ImagePullBackOff, ErrImagePull, InvalidImageName, ErrImageNeverPull",
        "correct `images:` in the overlay, or `imagePullSecrets`; on `local`, load the image into the node",
        POD,
    ),
    "image-arch": Cause(
        "the image is for another CPU architecture",
        "`exec format error`, `no match for platform`",
        "build for the node's architecture, or select nodes by `kubernetes.io/arch`",
        "kubectl get nodes -L kubernetes.io/arch",
    ),
    "container-config": Cause(
        "the container cannot be made",
        "CreateContainerConfigError, CreateContainerError, RunContainerError, StartError",
        "a ConfigMap or Secret that is missing, or a setting that the runtime refuses; the message names it",
        POD,
    ),
    "exit-1": Cause(
        "exit code 1",
        "of this service: a process of several was lost, or an error nobody foresaw",
        "read the last lines",
        PREVIOUS,
    ),
    "exit-2": Cause(
        "exit code 2: bad configuration",
        "exit code 2; the message names the setting",
        "correct it in `settings.env` or your patch",
        UNDO,
    ),
    "exit-3": Cause(
        "exit code 3: the artifact is invalid",
        "exit code 3: missing file, checksum, signature, schema, golden outputs, or not the pinned digest",
        "undo the rollout; publish again, or `make release` what you meant",
        UNDO,
    ),
    "exit-4": Cause(
        "exit code 4: the execution provider is unavailable",
        "exit code 4: driver, runtime class, or the CPU image on a GPU setting",
        "check that the image's name ends in `-gpu`, and `nvidia.com/gpu` on the node",
        "kubectl describe node {node}",
    ),
    "exit-5": Cause(
        "exit code 5: not fetched or not stored",
        "exit code 5; the message names object or permission",
        "correct the URL, grant the permission, or let the egress through",
        PREVIOUS,
    ),
    "oom-load": Cause(
        "out of memory before it was ever ready",
        "OOMKilled; the Pod was never Ready",
        "the model does not fit the limit: raise it, or undo the rollout",
        POD,
    ),
    "oom-payload": Cause(
        "out of memory under requests",
        "OOMKilled; the Pod had been Ready",
        "raise the limit, or lower `APP_MAX_BATCH_TOKENS` or `APP_MAX_BODY_BYTES`",
        POD,
    ),
    "startup-probe": Cause(
        "the startup probe fails",
        "`Startup probe failed`; Running, not started",
        "slow disk or CPU (`/ready` names the stage), or the probe's path or port is wrong",
        POD,
    ),
    "readiness-probe": Cause(
        "the readiness probe fails",
        "`Readiness probe failed`; Running, not Ready",
        "`/ready` names the stage; or the probe's path or port is wrong",
        POD,
    ),
    "liveness-probe": Cause(
        "the liveness probe ends the container",
        "`Liveness probe failed`, restarts with exit code 0, 137 or 143",
        "a run hung longer than `APP_RUNNER_TIMEOUT_SECONDS` (GPU: Xid in the node's kernel log), "
        "or the probe's path or port is wrong",
        PREVIOUS,
    ),
    "crash": Cause(
        "the container ends", "CrashLoopBackOff or restarts with another exit code", "read the last lines", PREVIOUS
    ),
    "mount": Cause(
        "a volume cannot be mounted",
        "ContainerCreating, FailedMount, FailedAttachVolume, `Multi-Attach`",
        "the message names the volume: another node holds it, or the ConfigMap, Secret or claim is missing",
        POD,
    ),
    "stuck-creating": Cause(
        "the Pod is not set up",
        "ContainerCreating, FailedCreatePodSandBox, or nothing recorded",
        "the node's network plugin or runtime",
        POD,
    ),
    "not-ready": Cause("not ready", "Ready False for another reason", "the recorded reason names it", POD),
    "too-few": Cause(
        "too few Pods are available", "Available False, fewer ready than wanted", "see what it waits for", OWN
    ),
    "rollout-stuck": Cause(
        "the rollout is stuck", "ProgressDeadlineExceeded", "old Pods serve on: mend, or undo", UNDO
    ),
    "rollout-paused": Cause(
        "the rollout is paused", "`spec.paused`", "changes are not rolled out", "kubectl rollout resume {kind}/{name}"
    ),
    "scaled-to-zero": Cause(
        "scaled to zero behind a Service or an autoscaler",
        "`spec.replicas` 0",
        "an HPA does not bring it back: scale it",
        "kubectl scale {kind}/{name} --replicas=1",
    ),
    "label-drift": Cause(
        "the Service selects no Pod",
        "no endpoints; Pods exist with other labels",
        "make selector and Pod labels agree: `kubectl apply -k` again",
        "kubectl get pods --show-labels",
    ),
    "port-drift": Cause(
        "the Service's targetPort is no port of its Pods",
        "Pods Ready, clients get no connection",
        "name a port that the containers have",
        OWN,
    ),
    "no-endpoints": Cause(
        "the Service has no ready endpoint",
        "EndpointSlices without a ready address",
        "see its Pods",
        "kubectl get endpointslices -l kubernetes.io/service-name={name}",
    ),
    "canary-no-endpoints": Cause(
        "a route's backend has no ready endpoint",
        "HTTPRoute backend with a weight (or about to get one), EndpointSlices empty",
        "its share of requests fails: set its weight to 0 until its Pods are ready",
        "kubectl get httproutes,endpointslices",
    ),
    "route-refused": Cause(
        "the Gateway does not accept the route",
        "HTTPRoute Accepted or ResolvedRefs False, or no status",
        "the reason names Gateway, listener or backend",
        OWN,
    ),
    "network-policy": Cause(
        "NetworkPolicies shut every client out",
        "Pods Ready, clients time out; no ingress rule admits anyone on the Service's port",
        "policies add up: apply one that admits the clients",
        "kubectl describe networkpolicy",
    ),
    "hpa-unknown": Cause(
        "the autoscaler cannot scale",
        "HPA ScalingActive or AbleToScale False, target `<unknown>`",
        "install or mend metrics-server or the adapter; the target must exist",
        OWN,
    ),
    "hpa-maximum": Cause(
        "the autoscaler is at its maximum",
        "HPA ScalingLimited, TooManyReplicas",
        "raise `maxReplicas`, the quota and the node pool together",
        OWN,
    ),
    "scaler": Cause(
        "the ScaledObject cannot read its metric",
        "ScaledObject Ready False, Fallback True, health Failing",
        "check trigger address, credentials and target",
        OWN,
    ),
    "worker-zero": Cause(
        "no worker, and work waits",
        "ScaledObject active or paused, replicas 0",
        "remove the pause, or see KEDA's operator",
        OWN,
    ),
    "pdb-blocks": Cause(
        "the disruption budget never lets a Pod go",
        "ALLOWED DISRUPTIONS 0 with every Pod healthy needed",
        "node drains hang: use `maxUnavailable: 1`, or more replicas",
        OWN,
    ),
    "job-failed": Cause(
        "the Job gave up",
        "BackoffLimitExceeded, FailedIndexes, DeadlineExceeded, PodFailurePolicy",
        "mend what the exit code names, delete the Job and apply it again",
        OWN,
    ),
    "job-retrying": Cause(
        "the Job's Pods fail, and it retries",
        "Job with failed Pods, not finished",
        "mend it before the retries are out",
        OWN,
    ),
    "stuck-terminating": Cause(
        "a Pod does not go", "deletionTimestamp long past", "finalizers, or a node that is lost", POD
    ),
    "condition": Cause(
        "a condition says no", "any other condition that is False or Unknown", "the reason names it", OWN
    ),
}


def runbook() -> str:
    """The table as Markdown."""
    rows = [
        f"| {each.title} | {each.looks} | {each.meaning} | `{each.command.format_map(_Names())}` |"
        for each in CAUSES.values()
    ]
    return "\n".join(["| it is | what it looks like | do | next command |", "| --- | --- | --- | --- |", *rows])


class _Names(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return key.upper()
