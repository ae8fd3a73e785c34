"""What a model is, for who keeps inventories: `python -m model.bom DIR` writes a CycloneDX 1.6 ML-BOM of an artifact.

Name, version, digest, licence, files, data and evaluation are the manifest's, as they are there. Exit 0; 2 bad usage; 3
what is there is not a valid artifact.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from app import NAME
from app.artifact.integrity import verify_files
from app.artifact.manifest import MANIFEST, Artifact, TensorSpec, read_artifact
from app.errors import ConfigError, StartupError

Json = dict[str, Any]
SPEC_VERSION = "1.6"


def bom(artifact: Artifact, licence: str = "") -> Json:
    """A BOM of the model alone. The same artifact is the same BOM, byte for byte."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": uuid5(NAMESPACE_URL, f"sha256:{artifact.digest}").urn,
        "version": 1,
        "metadata": {"component": component(artifact, licence)},
    }


def component(artifact: Artifact, licence: str = "") -> Json:
    """The model as a component with a model card. licence: its SPDX identifier, if the manifest's lineage has none."""
    manifest = artifact.manifest
    licence = str(manifest.lineage.get("license") or licence)
    files = {MANIFEST: artifact.digest} | {name: entry.sha256 for name, entry in manifest.files.items()}
    known = {"precision": manifest.precision, "labels": ", ".join(manifest.labels)}
    known |= {f"lineage:{'.'.join(path)}": str(value) for path, value in leaves(manifest.lineage)}
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{manifest.name}@{manifest.version}",
        "name": manifest.name,
        "version": manifest.version,
        # The sha256 of manifest.json, which is what a server pins, and which has those of all other files.
        "hashes": [{"alg": "SHA-256", "content": artifact.digest}],
        **({"licenses": [{"license": {"id": licence}}]} if licence else {}),
        "modelCard": {
            "modelParameters": {
                "task": manifest.task,
                "datasets": [{"type": "dataset", "name": name} for name in datasets(manifest.lineage.get("data"))],
                "inputs": [{"format": shown(spec)} for spec in manifest.inputs],
                "outputs": [{"format": shown(spec)} for spec in manifest.outputs],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(metrics(manifest.evaluation))},
        },
        "components": [
            {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": sha256}]}
            for name, sha256 in files.items()
        ],
        "properties": [{"name": f"{NAME}:{name}", "value": value} for name, value in known.items() if value],
    }


def shown(spec: TensorSpec) -> str:
    """A tensor as one line."""
    return f"{spec.name} {spec.datatype} {spec.shape}"


def datasets(data: object) -> list[str]:
    """The data sets that the lineage tells of: as text with semicolons between them, as a list, or as an object."""
    if isinstance(data, str):
        return [part.strip() for part in data.split(";") if part.strip()]
    if isinstance(data, dict):
        return [f"{name} {value}" if isinstance(value, str) else name for name, value in data.items()]
    return [each if isinstance(each, str) else json.dumps(each) for each in data] if isinstance(data, list) else []


def metrics(evaluation: Json) -> Iterator[Json]:
    """Each number of the evaluation record, by its own name; where it stands is its slice."""
    for path, value in leaves(evaluation):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            where = {"slice": ".".join(path[:-1])} if path[1:] else {}
            yield {"type": path[-1], "value": str(value), **where}


def leaves(node: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Place and value of everything in nested objects that is no object itself."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, (*path, name))
    else:
        yield path, node


def merged(image: object, model: Json) -> Json:
    """An image's BOM with the model among its components. Raises ConfigError for what is no BOM of this version."""
    if not isinstance(image, dict) or (image.get("bomFormat"), image.get("specVersion")) != ("CycloneDX", SPEC_VERSION):
        raise ConfigError(f"--into: expected a BOM in JSON, CycloneDX {SPEC_VERSION}, found something else")
    others = [each for each in image.get("components", []) if each.get("bom-ref") != model["bom-ref"]]
    return image | {"components": [*others, model]}


def main() -> None:
    """Command line of `python -m model.bom`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.bom",
        description="Writes what the manifest says of a model as a CycloneDX ML-BOM, or into an image's BOM.",
        epilog="example: python -m model.bom my-model --licence Apache-2.0 > my-model.cdx.json",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="artifact folder")
    parser.add_argument(
        "--licence", default="", metavar="SPDX", help="of the model, where its lineage has no `license`"
    )
    parser.add_argument("--into", type=Path, metavar="BOM", help="an image's BOM, which gets the model as a component")
    args = parser.parse_args()
    try:
        artifact = read_artifact(args.folder)
        verify_files(artifact)
        if args.into is None:
            print(json.dumps(bom(artifact, args.licence), indent=2))
            return
        whole = merged(json.loads(args.into.read_text()), component(artifact, args.licence))
        args.into.write_text(json.dumps(whole, indent=2) + "\n")
    except (StartupError, OSError, ValueError) as error:
        print(f"model.bom: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
