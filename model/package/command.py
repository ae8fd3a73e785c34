"""Command line of `python -m model.package`: the artifact, moved into place when it has passed the gate, and what was
found on the way."""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from app.artifact.manifest import MANIFEST, Manifest, read_artifact
from app.errors import ArtifactError, StartupError
from app.runtime.tasks import TASKS
from model.package.artifact import MODEL_FILE, check_name
from model.package.distribution import read_reference, record_reference
from model.package.embedding import find_embedding
from model.package.huggingface import TOKENIZER
from model.package.image import package_image
from model.package.reference import Origin
from model.package.report import report
from model.package.source import EMBEDDING, IMAGE, PAIR, TENSORS, TEXT, Source, find_source
from model.package.tensors import package_tensors
from model.package.text import package_text
from model.package.texts import GOLDEN_PAIRS, GOLDEN_TEXTS, Text, read_texts
from model.package.zipmap import without_zipmap

DEFAULT_TOLERANCE, DEFAULT_SIZE, DEFAULT_THRESHOLD = 1e-3, 8, 0.5
CLASSES = {"text-classification", "token-classification", IMAGE}
# The tasks that an option says something of.
OPTIONS = {
    "inputs": {TENSORS},
    "size": {TENSORS},
    "tokenizer": TEXT,
    "max_tokens": TEXT,
    "texts": TEXT,
    "output": TEXT,
    "labels": CLASSES | {"text-regression"},
    "scores": CLASSES | {PAIR},
    "problem_type": {"text-classification", IMAGE},
    "threshold": {"text-classification", IMAGE},
    "pooling": {EMBEDDING},
    "normalize": {EMBEDDING},
    "preprocessor": {IMAGE},
    "images": {IMAGE},
    "reference": CLASSES,
}
EXAMPLES = """\
examples: any model (tabular, tensors):
  python -m model.package churn.onnx --name churn --version 1 --inputs rows.npz
a text classifier, with Hugging Face's config.json and tokenizer.json beside it:
  python -m model.package toxic/model.onnx --name toxic --version 1
the same from its weights (takes: pip install 'optimum[onnx]'):
  python -m model.package --from-huggingface toxic --name toxic --version 1
"""


def main() -> None:
    """Ends the process with 1 if the output exists, 2 for wrong usage, 3 for a model that does not fit."""
    args = argument_parser().parse_args()
    # Errors are about what people know: their own files, and the folder they asked for.
    names: dict[str, str] = {}
    try:
        _check_values(args)
        out: Path = args.out or Path(args.name)
        if out.exists():
            sys.exit(f"model.package: {out} exists; name another folder with --out or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        # Moved into place when it has passed the gate: a failed run leaves nothing half-written.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".package-") as staging:
            folder, exported = Path(staging) / "artifact", Path(staging) / "export"
            folder.mkdir()
            names = {f"{folder}": f"{out}", f"{exported}": f"{args.from_huggingface}"}
            source = find_source(
                args.model,
                exported,
                task=TENSORS if args.inputs and not args.task else args.task,
                folder=args.from_huggingface,
                config=args.config,
                tokenizer=args.tokenizer,
            )
            _check_options(args, source.task)
            names |= {f"{folder / name}": f"{source.model}" for name in (MODEL_FILE, MANIFEST)}
            names[f"{folder / TOKENIZER}"] = f"{source.tokenizer}"
            try:
                manifest = _package(args, source, source.model, folder)
            except ArtifactError as error:
                if "seq(map" not in str(error):
                    raise
                without = without_zipmap(source.model, Path(staging) / "without.onnx")
                names[f"{without}"] = f"{source.model}"
                source.notes.append("the file's ZipMap, a list of dictionaries, is taken out")
                manifest = _package(args, source, without, folder)
            if args.reference:
                manifest = record_reference(folder, read_reference(args.reference, source.task), f"{args.reference}")
            folder.rename(out)
    except (StartupError, OSError) as error:
        message = str(error)
        for staged, known in sorted(names.items(), key=lambda pair: -len(pair[0])):
            message = message.replace(staged, known)
        print(f"model.package: {message}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", ArtifactError.exit_code))
    print("\n".join(report(out, manifest, source, read_artifact(out).digest)))


def _package(args: argparse.Namespace, source: Source, model: Path, folder: Path) -> Manifest:
    common = {"name": args.name, "version": args.version, "tolerance": args.tolerance}
    classes = {"problem_type": source.problem_type(args.problem_type), "scores": args.scores}
    classes |= {"threshold": DEFAULT_THRESHOLD if args.threshold is None else args.threshold}
    if args.scores:
        source.why.setdefault("problem_type", "--scores")
    if source.task == TENSORS:
        return package_tensors(model, folder, inputs=args.inputs, size=args.size or DEFAULT_SIZE, **common)
    if source.task == IMAGE:
        labels, preprocessor = source.labels(args.labels), source.preprocessor(args.preprocessor)
        return package_image(model, preprocessor, folder, labels=labels, images=args.images, **common, **classes)
    pairs = source.task == PAIR
    built_in: Sequence[Text] = GOLDEN_PAIRS if pairs else GOLDEN_TEXTS
    texts = read_texts(args.texts, pairs=pairs) if args.texts else built_in
    more = {"output": args.output} | classes
    if source.task == EMBEDDING:
        found = find_embedding(model, source.files, output=args.output, pooling=args.pooling, normalize=args.normalize)
        more |= {"output": found.output, "pooling": found.pooling, "normalize": found.normalize}
    elif pairs:
        more["scores"] = args.scores or (source.files.activation if source.files else None)
    else:
        more["labels"] = source.labels(args.labels)
    window = source.window(args.max_tokens)
    assert source.tokenizer is not None
    origin: Origin = "given" if args.texts else "built-in"
    return package_text(
        model,
        source.tokenizer,
        folder,
        task=source.task,
        max_tokens=window,
        texts=texts,
        origin=origin,
        **more,
        **common,
    )


def _check_values(args: argparse.Namespace) -> None:
    check_name("--name", args.name)
    check_name("--version", args.version)
    if not 0 <= args.tolerance < math.inf:
        raise ArtifactError(f"--tolerance {args.tolerance}: expected a number of at least 0")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ArtifactError(f"--threshold {args.threshold}: expected 0 to 1")
    if args.size is not None and args.size < 1:
        raise ArtifactError(f"--size {args.size}: expected at least 1")


def _check_options(args: argparse.Namespace, task: str) -> None:
    """Raises ArtifactError for an option that would be left out."""
    for option, tasks in OPTIONS.items():
        if getattr(args, option) is not None and task not in tasks:
            raise ArtifactError(
                f"--{option.replace('_', '-')}: means nothing for task {task}, only for {', '.join(sorted(tasks))}: "
                "leave it out, or name another --task"
            )


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.package",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Makes an artifact folder of an ONNX model: finds out what it takes and answers, records golden\n"
        "outputs that every replica must answer before it is ready, and proves that the server can serve it.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", type=Path, nargs="?", help="ONNX file; files that it keeps weights in come along")
    parser.add_argument("--from-huggingface", type=Path, metavar="DIR", help="a model's folder: ONNX or safetensors")
    parser.add_argument("--name", required=True, help="in addresses, metrics and the X-Model header")
    parser.add_argument("--version", required=True)
    parser.add_argument("--out", type=Path, help="artifact folder to create (default: ./NAME)")
    parser.add_argument(
        "--tolerance", type=float, default=DEFAULT_TOLERANCE, help="absolute, on golden outputs (0.001)"
    )
    parser.add_argument("--task", choices=sorted(TASKS), help="default: what config.json says, else tensors")
    parser.add_argument("--config", type=Path, help="Hugging Face's config.json (default: the one beside the model)")
    tensors = parser.add_argument_group("task tensors: any inputs and outputs")
    tensors.add_argument("--inputs", type=Path, help=".npz with one array for each input (default: generated)")
    tensors.add_argument("--size", type=int, help="generated size of dimensions that may vary (8)")
    text = parser.add_argument_group("tasks with text")
    text.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: the one beside the model)")
    text.add_argument("--max-tokens", type=int, help="window (default: the smallest that the model's files say)")
    text.add_argument(
        "--texts", type=Path, help="golden texts, one a line; text-pair: query, tab, text (default: built in)"
    )
    text.add_argument("--output", help="the output that the task reads (default: logits, or the first)")
    classes = parser.add_argument_group("tasks with labels or scores")
    classes.add_argument("--labels", help="comma-separated (default: id2label of config.json)")
    classes.add_argument(
        "--problem-type", choices=("single_label", "multi_label"), help="one label holds, or any of them may"
    )
    classes.add_argument(
        "--scores",
        choices=("probabilities", "logits", "sigmoid"),
        help="what the output holds: probabilities, or logits for softmax or the sigmoid (default: found out)",
    )
    classes.add_argument("--threshold", type=float, help="multi_label: the probability a label holds from (0.5)")
    classes.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="inputs like production's, whose predictions later ones are compared with: one text a line, .jsonl with "
        "`text`, or a folder of images (default: none)",
    )
    embedding = parser.add_argument_group("task text-embedding")
    embedding.add_argument(
        "--pooling", choices=("none", "mean", "cls"), help="default: what 1_Pooling/config.json says"
    )
    embedding.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="default: what modules.json says")
    image = parser.add_argument_group("task image-classification")
    image.add_argument("--preprocessor", type=Path, help="preprocessor_config.json (default: the one beside the model)")
    image.add_argument("--images", type=Path, metavar="DIR", help="golden JPEG and PNG files (default: generated)")
    return parser
