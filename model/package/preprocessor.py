"""Hugging Face's preprocessor_config.json → the manifest's `image`: how a picture becomes the model's input.

What it asks for and the server does not do is an error, never left out.
"""

import json
from pathlib import Path
from typing import Any

from app.artifact.manifest import ImageSpec, TensorSpec
from app.errors import ArtifactError

PREPROCESSOR = "preprocessor_config.json"
# Pillow's numbers.
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# Steps that the server does not take, where they are on.
OTHER_STEPS = (
    "do_pad",
    "do_thumbnail",
    "do_align_long_axis",
    "do_reduce_labels",
    "do_flip_channel_order",
    "include_top",
    "rescale_offset",
)
# Those that take other steps, whatever their file says; and one whose single size is of both sides.
OTHER_KINDS, SQUARES = ("Levit", "Perceiver", "PoolFormer"), "DeiT"
# ConvNeXt's, which cut by `crop_pct` without saying so in `do_center_crop`, up to this size.
CROPS_BY_PERCENT, PERCENT_BELOW = "ConvNext", 384


def read_preprocessor(path: Path, model: Path, inputs: list[TensorSpec]) -> ImageSpec:
    """What the file at `path` says. inputs: the model's, for the layout. Raises ArtifactError."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ArtifactError(
            f"{path}: expected a JSON object that says how images are resized and normalized, such as "
            '{"size": {"height": 224, "width": 224}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}; '
            "name one with --preprocessor"
        )
    try:
        return _spec(path, config, layout_of(model, inputs))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(f"{path}: cannot be understood: {type(error).__name__}: {error}") from None


def layout_of(model: Path, inputs: list[TensorSpec]) -> str:
    """NCHW or NHWC. Raises ArtifactError if the model does not take RGB images."""
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or not {3, -1} & {shape[1], shape[3]}:
        found = {spec.name: spec.shape for spec in inputs}
        raise ArtifactError(
            f"{model}: inputs: expected one of [rows, 3, height, width] or [rows, height, width, 3] for task "
            f"image-classification, found {found}: serve it with --task tensors"
        )
    # Where no size is fixed, as PyTorch has it.
    return "NHWC" if shape[3] == 3 and shape[1] != 3 else "NCHW"


def _spec(path: Path, config: dict[str, Any], layout: str) -> ImageSpec:
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    other = [name for name in OTHER_STEPS if config.get(name)] + [kind] * kind.startswith(OTHER_KINDS)
    if other:
        raise ArtifactError(
            f"{path}: {', '.join(other)}: the server does not do that; serve the model with --task tensors"
        )
    if config.get("do_resize") is False:
        raise ArtifactError(f"{path}: do_resize: expected true, since requests bring images of any size")
    size = config["size"]
    short = size.get("shortest_edge") if isinstance(size, dict) else None
    height, width = _sides(size)
    if kind.startswith(CROPS_BY_PERCENT):
        # Above, the whole image is squeezed into a square.
        short = int(height / config.get("crop_pct", 224 / 256)) if height < PERCENT_BELOW else None
    elif config.get("do_center_crop"):
        short = short or (size if isinstance(size, int) and not kind.startswith(SQUARES) else None)
        if short is None:
            raise ArtifactError(
                f"{path}: size: expected shortest_edge beside do_center_crop, found {size}: the server does not "
                "squeeze an image and cut it; serve the model with --task tensors"
            )
        height, width = _sides(config["crop_size"])
    elif short is not None:
        raise ArtifactError(f"{path}: size: expected height and width, or do_center_crop, found {size}")
    normalize = config.get("do_normalize", True)
    return ImageSpec(
        height=height,
        width=width,
        shorter_side=short,
        resample=FILTERS[int(config.get("resample", 2))],  # type: ignore[arg-type]
        rescale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
        mean=_three(config["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=_three(config["image_std"]) if normalize else (1.0, 1.0, 1.0),
        layout=layout,  # type: ignore[arg-type]
    )


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])
