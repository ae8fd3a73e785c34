"""What is released: `python -m model.release DIR` writes an artifact's name, version and digest to an env file of k8s/,
once it has passed the gate. Kustomize carries them to settings, labels and annotations from there.
"""

import argparse
import re
import sys
from pathlib import Path

from app.artifact.manifest import Artifact
from app.errors import ArtifactError, StartupError
from app.runtime.loading import load_model

BASE = Path("k8s/base/release.env")
# They become labels, and Kubernetes takes no others.
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def values(artifact: Artifact) -> dict[str, str]:
    """The lines of release.env. Raises ArtifactError if the name or the version cannot be a label."""
    manifest = artifact.manifest
    for field, value in (("name", manifest.name), ("version", manifest.version)):
        if not LABEL.fullmatch(value):
            raise ArtifactError(
                f"{field} {value!r} cannot be a label in Kubernetes: expected up to 63 letters, digits, '.', '_' and "
                "'-', the first and the last a letter or digit"
            )
    return {"MODEL_NAME": manifest.name, "MODEL_VERSION": manifest.version, "APP_MODEL_DIGEST": artifact.digest}


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
        description="Writes an artifact's name, version and digest to k8s/, once it has passed the gate.",
        epilog="example: python -m model.release my-model, then kubectl diff -k k8s/overlays/cpu",
    )
    parser.add_argument("folder", type=Path, help="artifact folder")
    parser.add_argument(
        "--to", type=Path, default=BASE, metavar="FILE", help="env file to write (default: %(default)s)"
    )
    args = parser.parse_args()
    try:
        artifact = load_model(args.folder).artifact
        changes = write(args.to, values(artifact))
    except (StartupError, OSError) as error:
        print(f"model.release: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    print(f"{args.folder} passes the gate; {args.to}:", *changes, sep="\n  ")


if __name__ == "__main__":
    main()
