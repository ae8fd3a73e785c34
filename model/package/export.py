"""A folder of Hugging Face's → its ONNX file: one that is there, or one that Optimum makes of the weights, in a process
of its own. Packaging itself imports neither Optimum nor PyTorch."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from app.errors import ArtifactError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# As Optimum calls what the model is to answer.
OPTIMUM_TASKS = {
    "text-classification": "text-classification",
    "text-pair": "text-classification",
    "text-regression": "text-classification",
    "token-classification": "token-classification",
    "text-embedding": "feature-extraction",
    "image-classification": "image-classification",
}
INSTALL = "pip install 'optimum[onnx]'"


def find_onnx(folder: Path) -> Path | None:
    """The ONNX file in a folder or its `onnx` folder. Raises ArtifactError if there are several, none called
    model.onnx."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: expected a folder with config.json and a model; download it first")
    for place in (folder, folder / "onnx"):
        if (place / "model.onnx").is_file():
            return place / "model.onnx"
    found = sorted([*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])
    if len(found) > 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found)
        raise ArtifactError(
            f"{folder}: holds {names}: name one as the first argument, python -m model.package FILE.onnx …"
        )
    return found[0] if found else None


def export_onnx(folder: Path, task: str, out: Path, *, modules: set[str]) -> Path:
    """Exports the weights in `folder` into the folder `out`. modules: of a sentence-transformers model.

    Raises ArtifactError if there are none, Optimum is not installed, or it fails.
    """
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        raise ArtifactError(f"{folder}: expected an ONNX file or {' or '.join(WEIGHTS)}, found neither")
    if task not in OPTIMUM_TASKS:
        raise ArtifactError(f"{folder}: task {task}: expected an ONNX file: export it as your framework does")
    if not _installed("optimum.exporters.onnx"):
        raise ArtifactError(
            f"{folder}: holds weights and no ONNX file: {INSTALL} and run this again, or export it elsewhere: "
            f"optimum-cli export onnx --model {folder} --task {OPTIMUM_TASKS[task]} OUT"
        )
    # Pooling and normalizing are the server's; what comes between them only sentence-transformers knows.
    whole = bool(modules - {"Transformer", "Pooling", "Normalize"})
    library = ["--library", "sentence_transformers" if whole else "transformers"]
    options = ["--model", str(folder), "--task", OPTIMUM_TASKS[task], *library, str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "optimum.exporters.onnx", *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not (out / "model.onnx").is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise ArtifactError(f"{folder}: Optimum cannot export it: {lines[-1].strip()[:300]}")
    return out / "model.onnx"


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
