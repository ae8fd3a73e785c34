"""Image classification: JPEG or PNG files → pixels as the manifest's `image` says → scores of each label.

A payload is UINT8 pixels [height, width, 3], a quarter of what the model's input takes while they wait; a result is
float32 probabilities [labels]. Takes Pillow, which the extra `image` installs.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from app.artifact.datatypes import DTYPES, Array, Tensors
from app.artifact.manifest import MANIFEST, Artifact, TensorSpec
from app.errors import ArtifactError, BodyTooLarge, Invalid
from app.runtime.tasks import Encoded, GoldenCase, run_key
from app.runtime.tasks.scores import LabelScores
from app.runtime.tasks.tensors import load_arrays

if TYPE_CHECKING:
    from PIL.Image import Image

# Small files may hold large images: each pixel takes four bytes when it is unpacked, and so many images are at once.
MAX_PIXELS = 1 << 24
DECODED_AT_ONCE = 2


class ImageClassification:
    """See `app.runtime.tasks.Task`."""

    counts_tokens = False
    # Its rows are the only axis, which Triton's batching would leave out of the shapes.
    batched, by_rows = False, True
    inputs: Sequence[TensorSpec] = (TensorSpec("image", "BYTES", [-1]),)

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError for a manifest that does not fit, or without Pillow."""
        manifest, where = artifact.manifest, artifact.folder / MANIFEST
        try:
            import PIL.Image
        except ImportError:
            raise ArtifactError(f"{where}: task {manifest.task} takes Pillow; install the `image` extra") from None
        if manifest.image is None or manifest.golden.file is None:
            field = "image" if manifest.image is None else "golden.file"
            raise ArtifactError(f"{where}: `{field}`: expected a value for task {manifest.task}, found none")
        image, self._pillow, (spec, *more) = manifest.image, PIL.Image, manifest.inputs
        size = [image.height, image.width]
        shape = [-1, 3, *size] if image.layout == "NCHW" else [-1, *size, 3]
        kind = DTYPES[spec.datatype]
        fits = len(spec.shape) == 4 and all(
            -1 in pair or len({*pair}) == 1 for pair in zip(spec.shape, shape, strict=True)
        )
        if more or not fits or (kind.kind != "f" and kind != np.uint8):
            found = [(each.name, each.datatype, each.shape) for each in manifest.inputs]
            raise ArtifactError(
                f"{where}: inputs: expected one, float or UINT8 {shape}, as `image` says, found {found}"
            )
        if image.shorter_side is not None and image.shorter_side < max(size):
            raise ArtifactError(
                f"{where}: image.shorter_side: expected at least {max(size)}, found {image.shorter_side}"
            )
        if 0 in image.std:
            raise ArtifactError(f"{where}: image.std: expected no 0")
        self._image, self._input, self._dtype, self._shared = image, spec.name, kind, manifest.batching
        self._filter = PIL.Image.Resampling[image.resample.upper()]
        self._mean, self._std = np.array(image.mean, np.float32), np.array(image.std, np.float32)
        self._decoding = threading.BoundedSemaphore(DECODED_AT_ONCE)
        self._labels, self._golden_path = LabelScores(artifact), artifact.path(manifest.golden.file)
        self.labels, self.outputs = self._labels.labels, self._labels.outputs
        self.split, self.predictions, self.respond = self._labels.split, self._labels.predictions, self._labels.respond

    def read(self, tensors: Tensors) -> list[bytes]:
        """The files of the input `image`, BYTES [rows] as binary data: JSON has no place for them."""
        files = tensors.get("image")
        if files is None or len(tensors) != 1:
            raise Invalid("inputs: expected one, named image")
        found: list[Any] = list(files)
        if files.ndim != 1 or not all(isinstance(file, bytes) for file in found):
            raise Invalid("input image: expected BYTES [rows] as binary data")
        return found

    def rows(self, inputs: Sequence[bytes]) -> int:
        return len(inputs)

    def encodes_slowly(self, inputs: Sequence[bytes]) -> bool:
        return True

    def encode(self, inputs: Sequence[bytes]) -> list[Encoded]:
        """One unit per file, in order. Raises Invalid for what is no JPEG or PNG, BodyTooLarge for too many pixels."""
        return [
            Encoded(self._pixels(index, file), 1, 1, run_key(shared=self._shared)) for index, file in enumerate(inputs)
        ]

    def _pixels(self, index: int, file: bytes) -> Array:
        from PIL.ImageOps import exif_transpose

        try:
            # Reads no pixels yet.
            with self._decoding, self._pillow.open(BytesIO(file), formats=("JPEG", "PNG")) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BodyTooLarge(f"image {index}: expected at most {MAX_PIXELS} pixels, found {width} x {height}")
                return np.array(self._resized(exif_transpose(image).convert("RGB")), np.uint8)
        except BodyTooLarge:
            raise
        except self._pillow.DecompressionBombError:
            raise BodyTooLarge(f"image {index}: expected at most {MAX_PIXELS} pixels") from None
        # What a damaged file raises depends on where it is damaged.
        except Exception:
            raise Invalid(f"image {index}: expected a whole JPEG or PNG file") from None

    def _resized(self, image: "Image") -> "Image":
        spec = self._image
        if spec.shorter_side is None:
            return image.resize((spec.width, spec.height), self._filter)
        short = min(image.size)
        width, height = (int(spec.shorter_side * side / short) for side in image.size)
        if width * height > MAX_PIXELS:
            raise BodyTooLarge(f"image: expected sides less different, found {image.size[0]} x {image.size[1]} pixels")
        left, top = (width - spec.width) // 2, (height - spec.height) // 2
        scaled = image.resize((width, height), self._filter)
        return scaled.crop((left, top, left + spec.width, top + spec.height))

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        """The pixels rescaled and normalized, in the model's layout."""
        pixels = (np.stack(payloads) * np.float32(self._image.rescale) - self._mean) / self._std
        if self._image.layout == "NCHW":
            pixels = pixels.transpose(0, 3, 1, 2)
        return {self._input: np.ascontiguousarray(pixels, self._dtype)}

    def warm_up(self, batch_rows: int, batch_tokens: int) -> tuple[list[Encoded], list[Encoded]]:
        """The first golden image alone, and as often as a run takes it."""
        units = self.golden()[0].units
        return units, units * (batch_rows if self._shared else 1)

    def check(self, infer: Callable[[Tensors], Tensors]) -> None:
        """Raises ArtifactError unless golden images' scores are what the manifest says they are."""
        units = [unit for case in self.golden() for unit in case.units]
        self._labels.check([infer(self.assemble([unit.payload]))[self._labels.output] for unit in units])

    def golden(self) -> list[GoldenCase]:
        """The files `input.image.0`, … of the golden file, and `output.probabilities` [images, labels].

        Raises ArtifactError if they are not there.
        """
        return self._golden_cases

    @cached_property
    def _golden_cases(self) -> list[GoldenCase]:
        arrays, path = load_arrays(self._golden_path), self._golden_path
        expected = arrays.get("output.probabilities", np.zeros((0, 0)))
        files = [arrays.get(f"input.image.{index}") for index in range(len(expected))]
        if (
            not files
            or expected.shape[1:] != (len(self._labels.labels),)
            or any(file is None or file.dtype != np.uint8 for file in files)
        ):
            raise ArtifactError(
                f"{path}: expected output.probabilities [images, {len(self._labels.labels)}] and for each image "
                f"input.image.0, … as UINT8, found {sorted(arrays)}"
            )
        try:
            units = self.encode([file.tobytes() for file in files if file is not None])
        except (Invalid, BodyTooLarge) as error:
            raise ArtifactError(f"{path}: {error}") from None
        return [
            GoldenCase(f"{path.name}: image {index}", [unit], {"probabilities": expected[index : index + 1]})
            for index, unit in enumerate(units)
        ]
