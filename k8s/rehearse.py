"""A release, a candidate beside it, promotion and rollback on staging, each verified. It works on a copy of the
manifests, and changes nothing but the namespace of the overlay."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from diagnosis.cluster import KubectlError, conditions, labels, name_of, read, template_labels
from diagnosis.network import backends
from promotion.tracks import Track, tracks
from promotion.traffic import EvidenceError

K8S = Path(__file__).resolve().parent
APP = "sentiment-inference"
LOADTEST = f"{APP}-loadtest-master"
# Where the candidate's model is from: the component for the candidate, and the one for the stable Pods.
SOURCES = {
    "image": (),
    "image-volume": ("canary/from-image-volume", "model-image-volume"),
    "bucket": ("canary/from-bucket", "model-fetch"),
    "claim": ("canary/from-claim", "model-pvc"),
}


class RehearsalError(Exception):
    """A step that did not end as it should. One line."""


class Rehearsal:
    def __init__(self, given: argparse.Namespace, copy: Path) -> None:
        self.given, self.copy = given, copy
        self.options = [f"--context={given.context}"] if given.context else []
        self.overlay = copy / "k8s" / "overlays" / given.overlay
        # It prints YAML, and Python brings no parser of it.
        built = self.kubectl("kustomize", str(self.overlay), plain=True)
        self.has_route = "\nkind: HTTPRoute\n" in built
        found = re.search(r"^  namespace: (\S+)$", built, re.MULTILINE)
        if not found:
            raise RehearsalError(f"the overlay {given.overlay} names no namespace")
        self.namespace = found[1]

    def kubectl(self, *arguments: str, plain: bool = False) -> str:
        command = ["kubectl", *([] if plain else [*self.options, "-n", self.namespace]), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise RehearsalError(f"kubectl {' '.join(arguments)}: {' '.join(done.stderr.split())[-500:]}")
        return done.stdout

    def apply(self, folder: Path) -> None:
        # No -n: kubectl refuses one that is not the objects' own.
        self.kubectl(*self.options, "apply", "-k", str(folder), plain=True)

    def rolled_out(self, name: str) -> Track:
        """The track, once its rollout is done and every Pod is what its workload says."""
        track = self.track(name)
        workload = name_of(track.workload).lower()
        self.kubectl("rollout", "status", workload, f"--timeout={self.given.timeout}s")
        track = self.track(name)
        wanted = template_labels(track.workload)
        if not track.endpoints:
            raise RehearsalError(f"{workload} is rolled out, and its Service has no ready endpoint")
        if stale := [name_of(pod) for pod in track.pods if not wanted.items() <= labels(pod).items()]:
            raise RehearsalError(f"{', '.join(stale)}: not of the release that {workload} has")
        return track

    def track(self, name: str) -> Track:
        found = {each.name: each for each in tracks(read(self.namespace, self.options), APP)}
        if name not in found:
            raise RehearsalError(f"there is no Deployment with track {name}")
        return found[name]

    def kustomization(self, name: str, **content: object) -> Path:
        folder = self.copy / "k8s" / "rehearsal" / name
        folder.mkdir(parents=True)
        (folder / "kustomization.yaml").write_text(json.dumps({"namespace": self.namespace, **content}))
        return folder

    def around(self, name: str, components: list[str]) -> Path:
        """A kustomization around the overlay: with these components, and the candidate's images, wherever they are."""
        route = [] if self.has_route else ["gateway"]
        given = ((f"{APP}-candidate", self.given.image), (f"{APP}-candidate-model", self.given.model_image))
        return self.kustomization(
            name,
            resources=[f"../../overlays/{self.given.overlay}"],
            components=[f"../../components/{each}" for each in (*route, *components)],
            images=[{"name": each, **reference(text)} for each, text in given if text],
        )

    def load(self, service: str) -> None:
        """The load test against one Service. It fails if the objective is violated."""
        host = [
            {"name": f"{APP}-loadtest-options", "behavior": "merge", "literals": [f"LOCUST_HOST=http://{service}:8000"]}
        ]
        gate = f"../../overlays/{self.given.overlay}/gate"
        folder = self.kustomization(f"load-{service}", resources=[gate], configMapGenerator=host)
        # A Job that has run cannot run again.
        self.kubectl(*self.options, "delete", "-k", str(folder), "--ignore-not-found", plain=True)
        self.apply(folder)
        deadline = time.monotonic() + self.given.timeout
        while time.monotonic() < deadline:
            job = json.loads(self.kubectl("get", "job", LOADTEST, "-o", "json"))
            ended = {kind for kind, each in conditions(job).items() if each["status"] == "True"}
            if "Failed" in ended:
                raise RehearsalError(
                    f"the load test of {service} failed: kubectl -n {self.namespace} logs job/{LOADTEST}"
                )
            if "Complete" in ended:
                return
            time.sleep(self.given.poll)
        raise RehearsalError(f"the load test of {service} did not end in {self.given.timeout} s")

    def weights(self, stable: int, candidate: int) -> None:
        path = "/spec/rules/0/backendRefs/{}/weight"
        patch = [{"op": "replace", "path": path.format(n), "value": each} for n, each in enumerate((stable, candidate))]
        self.kubectl("patch", "httproute", APP, "--type", "json", "-p", json.dumps(patch))

    def evidence(self) -> None:
        # All since the Pods started, because the load tests came one after the other. Their texts are made up, so what
        # the model says of them is no evidence.
        command = [sys.executable, str(K8S / "evidence.py"), "-n", self.namespace, "--max-stability-index", "100"]
        command += ["--prometheus", self.given.prometheus] if self.given.prometheus else ["--seconds", "0"]
        done = subprocess.run([*command, *self.options], check=False)  # noqa: S603
        if done.returncode:
            self.weights(100, 0)
            raise RehearsalError(
                f"the evidence does not say promote (exit code {done.returncode}); the weight is 0 again"
            )


def reference(image: str) -> dict[str, str]:
    """As Kustomize's `images` has it: NAME:TAG or NAME@DIGEST."""
    if "@" in image:
        name, _, digest = image.partition("@")
        return {"newName": name, "digest": digest}
    name, colon, tag = image.rpartition(":")
    if not colon or "/" in tag:
        return {"newName": image}
    return {"newName": name, "newTag": tag}


def adopt(release: Path) -> None:
    """Gives the stable Pods what the candidate's lines of the release say."""
    text = release.read_text("utf-8")
    for name, value in re.findall(r"^CANARY_(\w+)=(.*)$", text, re.MULTILINE):
        text = re.sub(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
    release.write_text(text, "utf-8")


def rehearse(run: Rehearsal) -> None:
    source = SOURCES[run.given.source]
    release = run.copy / "k8s" / "release" / "release.env"
    before = release.read_text("utf-8")

    say("release")
    run.apply(run.overlay)
    first = run.rolled_out("stable")
    run.load(first.services[0]["metadata"]["name"])
    say(f"  {first.release}: rolled out, and the load test holds")

    say("candidate")
    components = ["canary", *source[:1]]
    run.apply(run.around("candidate", components))
    candidate = run.rolled_out("canary")
    if candidate.model == first.model and not (run.given.image or run.given.model_image):
        raise RehearsalError("the candidate is what is released: make release MODEL=DIR FOR=canary, or give --image")
    if run.track("stable").release != first.release:
        raise RehearsalError("the candidate changed the stable Pods")
    run.weights(100 - run.given.weight, run.given.weight)
    run.load(candidate.services[0]["metadata"]["name"])
    say(f"  {candidate.release}: rolled out, and the load test holds; weight {run.given.weight}")

    say("evidence")
    run.evidence()

    say("promotion")
    adopt(release)
    run.apply(run.around("promoted", list(source[1:])))
    promoted = run.rolled_out("stable")
    if promoted.release != candidate.release:
        raise RehearsalError(f"the stable Pods have {promoted.release}, not the candidate's model")
    service = candidate.services[0]
    if service["metadata"]["name"] in backends(read(run.namespace, run.options)):
        raise RehearsalError("the route still names the candidate's Service")
    run.kubectl("delete", name_of(candidate.workload).lower(), name_of(service).lower())
    say(f"  {promoted.release}: rolled out; the candidate is gone, and the route is the stable Pods'")

    say("rollback")
    run.kubectl("rollout", "undo", name_of(promoted.workload).lower())
    if (back := run.rolled_out("stable")).release != first.release:
        raise RehearsalError(f"after the undo the stable Pods have {back.release}, not {first.release}")
    # What git has: or the next apply would bring the promoted release back.
    release.write_text(before, "utf-8")
    run.apply(run.around("restored", []))
    if (back := run.rolled_out("stable")).release != first.release:
        raise RehearsalError(f"the next apply brings {back.release} back")
    say(f"  {back.release}: as before, and the next apply leaves it so")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Release, candidate, evidence, promotion and rollback on staging. The candidate's model is the one "
        "that the release has for it: make release MODEL=DIR FOR=canary.",
        epilog="Exit code: 0 rehearsed, 1 a step did not end as it should, 2 bad usage.",
    )
    parser.add_argument("--overlay", default="staging", help="under k8s/overlays (%(default)s)")
    parser.add_argument("--image", default="", help="the candidate's server image, NAME:TAG or NAME@DIGEST")
    parser.add_argument("--source", choices=SOURCES, default="image", help="where its model is from (%(default)s)")
    parser.add_argument("--model-image", default="", help="for --source image-volume: NAME:TAG or NAME@DIGEST")
    parser.add_argument("--weight", type=int, choices=range(1, 100), default=5, metavar="PERCENT", help="(%(default)s)")
    parser.add_argument("--prometheus", metavar="URL", help="for evidence.py")
    parser.add_argument("--context", help="passed on to kubectl")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one rollout or load test may take")
    parser.add_argument("--poll", type=float, default=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not (K8S / "overlays" / given.overlay / "gate").is_dir():
        parser.error(f"--overlay {given.overlay}: there is no k8s/overlays/{given.overlay}/gate")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("k8s", "loadtest"):
            shutil.copytree(K8S.parent / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        try:
            rehearse(Rehearsal(given, copy))
        except (RehearsalError, KubectlError, EvidenceError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    say("rehearsed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
