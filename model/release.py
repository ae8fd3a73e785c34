"""What is released: `python -m model.release DIR` writes server, images and an artifact's name, version and digest to
k8s/release/release.env, once the artifact has passed the gate. Kustomize carries them to every workload from there.
"""

import argparse
import re
import sys
from pathlib import Path

from app import __version__
from app.artifact.manifest import Artifact
from app.errors import ArtifactError, StartupError
from app.runtime.loading import load_model

RELEASE = Path("k8s/release/release.env")
# Who may serve something else than the rest, and how their lines begin.
PREFIXES = {"gpu": "GPU_", "canary": "CANARY_"}
IDENTITY = ("SERVER_VERSION", "MODEL_NAME", "MODEL_VERSION", "MODEL_DIGEST")
# They become labels, and Kubernetes takes no others.
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def read(path: Path) -> dict[str, str]:
    """An env file's values. Raises ValueError for a line that is none."""
    found = {}
    for line in path.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"{path}: {line!r}: expected NAME=VALUE")
            found[name] = value
    return found


def retagged(image: str, tag: str) -> str:
    """`image` with this tag. A digest belongs to the tag it was pushed with, and goes with it."""
    name, _, _ = image.partition("@")
    repository, colon, old = name.rpartition(":")
    if not colon or "/" in old:  # a port's colon
        repository, old = name, ""
    return image if old == tag else f"{repository}:{tag}"


def identity(artifact: Artifact) -> dict[str, str]:
    """What is said of server and model. Raises ArtifactError if the name or the version cannot be a label."""
    manifest = artifact.manifest
    for field, value in (("name", manifest.name), ("version", manifest.version)):
        if not LABEL.fullmatch(value):
            raise ArtifactError(
                f"{field} {value!r} cannot be a label in Kubernetes: expected up to 63 letters, digits, '.', '_' and "
                "'-', the first and the last a letter or digit"
            )
    return dict(zip(IDENTITY, (__version__, manifest.name, manifest.version, artifact.digest), strict=True))


def of(prefix: str, values: dict[str, str]) -> dict[str, str]:
    """The lines that begin so, without it; of no prefix, those that begin with none."""
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if next((known for known in PREFIXES.values() if name.startswith(known)), "") == prefix
    }


def released(artifact: Artifact, before: dict[str, str], prefix: str, pushed: dict[str, str]) -> dict[str, str]:
    """The lines with this prefix: `artifact` and this server, and of the images those that were pushed, else by tag."""
    new = identity(artifact)
    for name, image in of(prefix, before).items():
        if name.endswith("_IMAGE"):
            model_tag = f"{new['MODEL_VERSION']}-{new['MODEL_DIGEST'][:12]}"
            new[name] = pushed.get(name, retagged(image, model_tag if name == "MODEL_IMAGE" else __version__))
    return {prefix + name: value for name, value in new.items()}


def changes_to(artifact: Artifact, before: dict[str, str], pool: str, images: dict[str, str]) -> dict[str, str]:
    """What to write for `pool`: gpu, canary, or nothing, which is all that had the same identity as the rest.

    Raises ValueError for an image that is none of the release's.
    """
    if unknown := images.keys() - before.keys():
        raise ValueError(f"{min(unknown)} is no image of the release: expected one of {', '.join(images_of(before))}")
    stable, prefix = of("", images), PREFIXES.get(pool, "")
    if pool == "canary":
        return released(artifact, before, prefix, stable | of(prefix, images))
    of_artifact = {name: image for name, image in stable.items() if name == "MODEL_IMAGE"}
    if pool:
        return released(artifact, before, prefix, of_artifact | of(prefix, images))
    new = released(artifact, before, "", stable)
    for follower in PREFIXES.values():
        if all(before[follower + name] == before[name] for name in IDENTITY):
            new |= released(artifact, before, follower, of_artifact | of(follower, images))
    return new


def stale(before: dict[str, str], new: dict[str, str]) -> list[str]:
    """Images by digest that stay while the model of their Pods changes."""
    return [
        prefix + "SERVER_IMAGE"
        for prefix in ("", *PREFIXES.values())
        if "@" in new.get(prefix + "SERVER_IMAGE", "")
        and new[prefix + "SERVER_IMAGE"] == before[prefix + "SERVER_IMAGE"]
        and new[prefix + "MODEL_DIGEST"] != before[prefix + "MODEL_DIGEST"]
    ]


def images_of(values: dict[str, str]) -> list[str]:
    """Names of the lines that are images."""
    return [name for name in values if name.endswith("_IMAGE")]


def write(path: Path, new: dict[str, str]) -> list[str]:
    """Sets these values in an env file, and leaves its other lines. Returns a line for each: what it was and is."""
    text, changes = path.read_text("utf-8"), []
    for name, value in new.items():
        line = re.compile(rf"^{name}=(.*)$", re.MULTILINE)
        found = line.search(text)
        before = found[1] if found else ""
        changes.append(f"{name}: {value}" if before == value else f"{name}: {before or 'nothing'} → {value}")
        text = line.sub(f"{name}={value}", text) if found else f"{text}{name}={value}\n"
    path.write_text(text, "utf-8")
    return changes


def main() -> None:
    """Command line of `python -m model.release`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.release",
        description="Writes to k8s/ that this server and an artifact are released, once it has passed the gate. What "
        "GPU Pods and the canary serve changes with it as long as it is the same.",
        epilog="example: python -m model.release my-model, then kubectl diff -k k8s/overlays/cpu",
    )
    parser.add_argument("folder", type=Path, help="artifact folder")
    parser.add_argument("--for", dest="pool", choices=list(PREFIXES), default="", help="only for these Pods")
    parser.add_argument(
        "--images", type=Path, metavar="FILE", help="images that were pushed, as lines of SERVER_IMAGE=NAME:TAG@DIGEST"
    )
    parser.add_argument(
        "--to", type=Path, default=RELEASE, metavar="FILE", help="env file to write (default: %(default)s)"
    )
    args = parser.parse_args()
    try:
        artifact = load_model(args.folder).artifact
        before, images = read(args.to), read(args.images) if args.images else {}
        new = changes_to(artifact, before, args.pool, images)
        changes = write(args.to, new)
    except (StartupError, OSError, ValueError) as error:
        print(f"model.release: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1))
    print(f"{args.folder} passes the gate; {args.to}:", *changes, sep="\n  ")
    for name in stale(before, new):
        print(f"{name} is the image of before: if the model is in it, push another and give IMAGES=FILE")
    for pool, prefix in PREFIXES.items():
        if not args.pool and prefix + "MODEL_NAME" not in new:
            print(f"{pool} keeps what it has: make release MODEL=DIR FOR={pool} gives it this or another")


if __name__ == "__main__":
    main()
