"""What a built image holds: `python docker/image_sbom.py ARCHIVE BOM`, as docker/build.sh does with SBOM=BOM.

ARCHIVE is the image as docker and podman save it, BOM what its lock files say (`make sbom-cpu`). Syft looks through the
file system: BOM gets all packages of Debian and Python that are there, with the hashes of those that are locked. What
no lock has is said on stderr, as are packages that are locked but not there, which go. The same image is the same BOM.
"""

# ruff: noqa: S603 - it runs syft
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

Json = dict[str, Any]
SYFT = Path(sys.executable).with_name("syft")
# Whole packages; syft also lists their files.
TYPES = ("library", "application", "operating-system")
PYTHON = "pkg:pypi/"
LABEL = "syft:image:labels:org.opencontainers.image."
# Guesses at names in a vulnerability database, and layers of the base, which are others in each build of it.
LEFT_OUT = re.compile(r"syft:cpe23|syft:location:\d+:layerID")


def scan(archive: Path) -> Json:
    """Syft's BOM of an image's file system, all layers as one. It asks nobody for anything."""
    command = [SYFT, "scan", f"docker-archive:{archive}", "--quiet", "--output", "cyclonedx-json@1.6"]
    quiet = os.environ | {"SYFT_CHECK_FOR_APP_UPDATE": "false"}
    return dict(json.loads(subprocess.run(command, env=quiet, stdout=subprocess.PIPE, check=True).stdout))


def identity(component: Json) -> tuple[str, str]:
    """Which package it is, however its name is written."""
    return re.sub(r"[-_.]+", "-", component["name"]).lower(), component.get("version", "")


def merged(locked: Json, found: Json) -> tuple[Json, list[str], list[str]]:
    """The image's BOM; Python packages that no lock has; those that are locked but not there."""
    libraries = {identity(each): each for each in locked["components"] if each["type"] == "library"}
    others = [each for each in locked["components"] if each["type"] != "library"]
    components, unlocked, renamed = dict[str, Json](), list[str](), dict[str, str]()
    for each in found["components"]:
        if each["type"] not in TYPES:
            continue
        of_lock: Json = {}
        if each.get("purl", "").startswith(PYTHON):
            of_lock = libraries.pop(identity(each), {})
            if of_lock:
                renamed[of_lock["bom-ref"]] = each["bom-ref"]
            else:
                unlocked.append(f"{each['name']} {each.get('version', '')}")
        properties = [*of_lock.get("properties", []), *each.get("properties", [])]
        told = [one for one in properties if not LEFT_OUT.fullmatch(one["name"])]
        components[each["bom-ref"]] = of_lock | each | {"properties": told}
    absent = sorted(f"{each['name']} {each['version']}" for each in libraries.values())
    labels = {one["name"].removeprefix(LABEL): one["value"] for one in found["metadata"]["properties"]}
    root = locked["metadata"]["component"]
    subject = {"type": "container", "name": labels["title"], "version": labels["version"]}
    tools = [*locked["metadata"]["tools"]["components"], *found["metadata"]["tools"]["components"]]
    told_needs = [*locked["dependencies"], *found["dependencies"]]
    whole = locked | {
        "metadata": locked["metadata"] | {"component": root | subject, "tools": {"components": tools}},
        "components": [*(components[ref] for ref in sorted(components)), *others],
        "dependencies": dependencies(told_needs, {root["bom-ref"], *components}, renamed),
    }
    whole["serialNumber"] = uuid5(NAMESPACE_URL, json.dumps(whole, sort_keys=True)).urn
    return whole, sorted(unlocked), absent


def dependencies(told: list[Json], there: set[str], renamed: dict[str, str]) -> list[Json]:
    """Who needs whom, of what is there."""
    needs: dict[str, set[str]] = {ref: set() for ref in there}
    for each in told:
        ref = renamed.get(each["ref"], each["ref"])
        if ref in there:
            needs[ref] |= {renamed.get(other, other) for other in each.get("dependsOn", [])} & there
    return [{"ref": ref, **({"dependsOn": sorted(others)} if others else {})} for ref, others in sorted(needs.items())]


def main() -> None:
    """Command line: rewrites BOM."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    archive, path = map(Path, sys.argv[1:])
    try:
        whole, unlocked, absent = merged(json.loads(path.read_text()), scan(archive))
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
        sys.exit(f"docker/image_sbom.py: {archive} and {path}: {type(error).__name__}: {error}")
    path.write_text(json.dumps(whole, indent=2) + "\n")
    for what, names in (("in no lock file", unlocked), ("locked, but not in the image", absent)):
        if names:
            print(f"{path}: {what}: {', '.join(names)}", file=sys.stderr)
    print(f"{path}: {len(whole['components'])} components")


if __name__ == "__main__":
    main()
