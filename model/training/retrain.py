"""From new data to a published artifact, or to the reason why not: `python -m model.training.retrain`.

train → quantize → export → model.compare → publish, each of which goes on where it was interrupted. What is served it
never touches: it ends with a digest, and a person or a pipeline promotes.
"""

import argparse
import json
import os
import posixpath
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.artifact.manifest import MANIFEST, read_artifact
from app.artifact.signature import verify_signature
from app.errors import ConfigError
from model.compare import Row, add_thresholds, compare, read_rows, thresholds_of, write
from model.compare.command import DO_NOT_PROMOTE, summary
from model.fetch import Source, add_public_key, fetch
from model.package.distribution import least_predictions, record_reference
from model.training import quantize, train
from model.training.corpus import evaluation_sets, file_digests
from model.training.distributed import Processes, join
from model.training.export import LABELS, NAME, from_checkpoint
from model.training.job import CHECKPOINT_MINUTES, corpus, exit_codes
from model.training.recipe import add_recipe, recipe_of
from model.training.record import RUN_FILE, Run, file_digest
from model.training.storage import Store

# Of the bundled model, chosen on its evaluation sets.
POSITIVE_BIAS = -0.15
WORK = "retrain-"


def retrain(args: argparse.Namespace, data: Path, processes: Processes) -> int:
    """The exit code: 0 published, DO_NOT_PROMOTE. Raises StartupError, and SystemExit where it is interrupted."""
    store, thresholds, recipe = Store(args.publish), thresholds_of(args), recipe_of(args)
    pinned = read_rows(args.evaluation) if args.evaluation else None
    numbers = {**asdict(recipe), "bias": args.bias}
    run = Run("model.training.retrain", file_digests(data), numbers, {"champion": args.champion_digest})
    work: Path = args.checkpoints / f"{WORK}{run.fingerprint}"
    work.mkdir(parents=True, exist_ok=True)
    # What a run on older data left will not be gone on with.
    for old in args.checkpoints.glob(f"{WORK}*"):
        if old != work:
            shutil.rmtree(old)
    champion, source = work / "champion", Source(args.champion)
    if source.scheme == "file":
        champion = Path(source.address(""))
    else:
        fetch(args.champion, champion, args.champion_digest, public_key=args.public_key)
    if args.public_key is not None:
        verify_signature(champion, args.public_key)
    read_artifact(champion, args.champion_digest)

    job: dict[str, Any] = {"checkpoints": None, "checkpoint_minutes": args.checkpoint_minutes}
    base, finished, artifact = work / "base", work / "int8", work / "artifact"
    backbone = args.backbone or train.backbone_folder()
    train.train(data, recipe, processes, backbone=backbone, out=str(base), **job)
    refine: dict[str, Any] = {"checkpoint": base, "percentile": quantize.PERCENTILE}
    quantize.quantize(data, quantize.RECIPE, processes, out=str(finished), **refine, **job)
    shutil.rmtree(artifact, ignore_errors=True)
    version = args.version or run.fingerprint
    from_checkpoint(finished, artifact, "int8", version=version, bias=args.bias, evaluation={})

    file = args.evaluation or work / "evaluation.jsonl"
    if pinned is None:
        write_rows(file, evaluation_rows(data))
    rows = pinned or read_rows(file)
    if len(rows) >= least_predictions(LABELS):
        record_reference(artifact, [row.text for row in rows], file.name)
    told: dict[str, str | int] = {"file": file.name, "sha256": file_digest(file)}
    found = compare((champion, artifact), rows, told, thresholds)
    digest = found.candidate.digest
    comparison = artifact if found.promote else work / "refused"
    write(found, comparison)
    address = posixpath.join(args.publish, NAME, *(() if found.promote else ("refused",)), digest)
    print("\n".join(summary(found, address)), flush=True)
    if found.promote:
        publish(artifact, Store(address), MANIFEST)
    else:
        shutil.copy(artifact / RUN_FILE, comparison)
        publish(comparison, Store(address), RUN_FILE)
    shutil.rmtree(work)
    print(f"digest {digest}" if found.promote else f"nothing is published to promote; {store} keeps what it had")
    return 0 if found.promote else DO_NOT_PROMOTE


def publish(folder: Path, store: Store, name: str) -> None:
    """What has the name of its own digest is the same wherever it is there already. name: a file that says it is."""
    if store.finished(name) is None:
        store.put(folder)
    print(f"{store}: published", flush=True)


def evaluation_rows(data: Path) -> list[Row]:
    """The development sets of the corpus, each of them a slice. They chose the checkpoint as well, so they flatter the
    candidate: `--evaluation` names a set that did not."""
    sets = evaluation_sets(data)
    pairs = ((name, label, text) for name, rows in sets.items() for label, text in rows)
    return [Row(number, text, LABELS[label], name) for number, (name, label, text) in enumerate(pairs, start=1)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """As JSONL."""
    lines = (json.dumps({"text": row.text, "label": row.label, "slice": row.slice}) + "\n" for row in rows)
    path.write_text("".join(lines))


def main() -> None:
    """Command line of `python -m model.training.retrain`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.training.retrain",
        description="Trains, quantizes and exports a candidate, holds it to the champion, and publishes it at "
        "PUBLISH/NAME/DIGEST if it may take the champion's place. Prints the digest last. Exit code 10: it may not; "
        "75: interrupted, run it again.",
        epilog="example: python -m model.training.retrain --data s3://data/1 --champion s3://models/sentiment/1 "
        "--publish s3://models --checkpoints /checkpoints",
    )
    parser.add_argument("--data", required=True, metavar="URL|DIR", help="folder with the rated TSV files")
    parser.add_argument("--champion", required=True, metavar="URL|DIR", help="artifact that is served")
    parser.add_argument("--champion-digest", default="", metavar="SHA256", help="that its manifest.json must have")
    add_public_key(parser)
    parser.add_argument("--publish", required=True, metavar="URL|DIR", help="folder of all models")
    parser.add_argument(
        "--checkpoints", type=Path, required=True, metavar="DIR", help="where it works, and goes on from"
    )
    parser.add_argument("--checkpoint-minutes", type=float, default=CHECKPOINT_MINUTES, metavar="N")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="pinned rows (default: the development sets)")
    parser.add_argument("--version", help="of the artifact (default: follows from data, recipe and champion)")
    parser.add_argument("--bias", type=float, default=POSITIVE_BIAS, help="added to the positive logit")
    train.add_backbone(parser)
    add_thresholds(parser)
    add_recipe(parser, train.RECIPE)
    args = parser.parse_args()
    with exit_codes("model.training.retrain"):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("WORLD_SIZE: expected one process; torchrun is for model.training.train")
        with join() as processes, corpus(args.data) as data:
            sys.exit(retrain(args, data, processes))


if __name__ == "__main__":
    main()
