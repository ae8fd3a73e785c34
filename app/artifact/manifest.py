"""The artifact on disk: what manifest.json says, and reading it. Knows nothing of ONNX Runtime, tokenizers or tasks.

That the files are the ones it names is `app.artifact.integrity`'s to prove.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from app.artifact.datatypes import Datatype
from app.errors import ArtifactError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
# A window must hold the two tokens that mark a text's ends, and one between them.
MIN_TOKENS = 3
# Rounded shares need not sum to 1.
RATIO_TOLERANCE = 0.01

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0)]


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output. `shape` has -1 where a dimension may vary."""

    name: Annotated[str, Meta(min_length=1)]
    datatype: Datatype
    shape: list[Annotated[int, Meta(ge=-1)]]


class GoldenText(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A text and what the task must answer to it. text_pair: the second text of a pair.

    outputs: values of the task's outputs by name, flat, as `data` of the Open Inference Protocol has them.
    probabilities: short for the output of that name, in the order of `labels`.
    """

    text: str
    probabilities: list[float] = []
    text_pair: str | None = None
    outputs: dict[str, list[float | str]] = {}


class Golden(Struct, frozen=True, forbid_unknown_fields=True):
    """What the model must answer before it may serve. `examples` for text; `file`, an .npz with arrays named
    `input.NAME` and `output.NAME`, for tensors and images."""

    tolerance: Annotated[float, Meta(ge=0)]
    examples: list[GoldenText] = []
    file: str | None = None


class ImageSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """How an RGB image becomes the model's input: resized, rescaled, then less `mean` and divided by `std`.

    shorter_side: that side is resized to it, then height x width is cut from the centre; None: resized to height x
    width, whatever its proportions. resample: a filter of Pillow's.
    """

    height: Annotated[int, Meta(ge=1, le=8192)]
    width: Annotated[int, Meta(ge=1, le=8192)]
    shorter_side: Annotated[int, Meta(ge=1, le=8192)] | None = None
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bilinear"
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    layout: Literal["NCHW", "NHWC"] = "NCHW"


class ReferenceDistribution(Struct, frozen=True, forbid_unknown_fields=True):
    """What the model predicted of inputs like those it will be asked: how many labels in all, and each one's share."""

    predictions: Annotated[int, Meta(ge=1)]
    ratios: dict[str, Annotated[float, Meta(ge=0, le=1)]]


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """manifest.json. `files` maps each path inside the folder to its size and sha256."""

    manifest_version: int
    name: Name
    version: Name
    # One that `app.runtime.tasks` knows, which also checks what it needs of the rest.
    task: str
    precision: str
    model_file: str
    files: dict[str, FileEntry]
    inputs: Annotated[list[TensorSpec], Meta(min_length=1)]
    outputs: Annotated[list[TensorSpec], Meta(min_length=1)]
    golden: Golden
    # Whether rows of different requests may share a run, stacked along the first axis.
    batching: bool = True
    # Tensors only, where an axis beside the rows may vary: of one row, over all inputs. None: 8 times as many as the
    # golden one has, and 2,048 if that is more.
    max_row_elements: Annotated[int, Meta(ge=1)] | None = None
    # Text.
    tokenizer_file: str | None = None
    max_tokens: Annotated[int, Meta(ge=MIN_TOKENS, le=1_000_000)] | None = None
    # Labels, and what the first output holds of them; threshold: of several labels, those that are answered.
    labels: list[str] = []
    problem_type: Literal["single_label", "multi_label"] = "single_label"
    scores: Literal["probabilities", "logits", "sigmoid"] = "probabilities"
    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    # Embeddings: how a text's tokens become one vector, and whether that has length 1.
    pooling: Literal["none", "mean", "cls"] = "none"
    normalize: bool = True
    image: ImageSpec | None = None
    lineage: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    reference_distribution: ReferenceDistribution | None = None
    # sha256 of manifest.json without these digits: what damages it shows even where no digest is pinned.
    checksum: Sha256 | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """A parsed manifest, the folder it describes, its own sha256, and its bytes."""

    folder: Path
    manifest: Manifest
    digest: str
    raw: bytes = b""

    def path(self, name: str) -> Path:
        """Path of a file of the artifact. Raises ArtifactError if `files` does not list it or it leaves the folder."""
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.folder / MANIFEST}: {name!r} is used but not listed in `files`")
        return path_inside(self.folder, name)


def require_folder(folder: Path) -> None:
    """Raises ArtifactError unless it is there."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: model folder not found; set APP_MODEL_DIR to an artifact folder")


def path_inside(folder: Path, name: str) -> Path:
    """Path of a file in an artifact's folder. Raises ArtifactError if it leaves the folder or is of a kind that is read
    without end."""
    path = folder / name
    # Resolved on both sides: a volume may itself be mounted through a link (Kubernetes does that for ConfigMaps), a
    # file of the artifact may not lead out of it.
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        special = path.exists() and not path.is_file() and not path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a link to itself, a null byte
        raise ArtifactError(f"{folder / MANIFEST}: path {name!r} cannot be followed: {error}") from None
    if Path(name).is_absolute() or ".." in Path(name).parts or not inside:
        raise ArtifactError(f"{folder / MANIFEST}: path {name!r} leaves the artifact folder")
    if special:
        raise ArtifactError(f"{path}: expected a file, found a pipe or device")
    return path


def read_artifact(folder: Path, pinned_digest: str = "") -> Artifact:
    """Reads and checks manifest.json. pinned_digest: as people paste it, in any case, `sha256:` before it or not.

    Raises ArtifactError naming the file or field, what was expected and what was found.
    """
    require_folder(folder)
    path = path_inside(folder, MANIFEST)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(raw).hexdigest()
    pinned = pinned_digest.lower().removeprefix("sha256:")
    if pinned and digest != pinned:
        raise ArtifactError(f"{path}: digest pin mismatch: expected sha256 {pinned}, found {digest}")
    try:
        version = msgspec.json.decode(raw, type=_VersionOnly).manifest_version
        if version != MANIFEST_VERSION:
            raise ArtifactError(f"{path}: manifest_version: expected {MANIFEST_VERSION}, found {version}")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path}: {error or type(error).__name__}") from None
    artifact = Artifact(folder, manifest, digest, raw)
    _check_meaning(artifact)
    return artifact


class _VersionOnly(Struct):
    manifest_version: int


def _check_meaning(artifact: Artifact) -> None:
    """What the types alone do not say. Raises ArtifactError."""
    manifest, where = artifact.manifest, artifact.folder / MANIFEST
    for name in manifest.files:
        artifact.path(name)
    artifact.path(manifest.model_file)
    for kind, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        if len({spec.name for spec in specs}) != len(specs):
            raise ArtifactError(f"{where}: `{kind}` names a tensor twice")
    if (reference := manifest.reference_distribution) and abs(sum(reference.ratios.values()) - 1) > RATIO_TOLERANCE:
        found = sum(reference.ratios.values())
        raise ArtifactError(f"{where}: reference_distribution.ratios: expected a sum of 1, found {found:.4g}")
