"""Images: files in, pixels against Pillow and NumPy by hand; bounds, and files that are none."""

import struct
import sys
import zlib
from io import BytesIO

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image, ImageOps

from app.artifact.manifest import ImageSpec, read_artifact
from app.errors import ArtifactError, BodyTooLarge, Invalid
from app.runtime.loading import load_model
from app.runtime.tasks import open_task
from app.runtime.tasks.image_classification import ImageClassification
from tests import task_models
from tests.task_models import picture
from tests.unit.runtime.test_loading_tasks import changed

SPEC = ImageSpec(8, 8, shorter_side=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
PLAIN = ImageSpec(8, 8, resample="bicubic", rescale=2 / 255, mean=(1, 1, 1), layout="NHWC")


def by_hand(file: bytes, spec: ImageSpec) -> np.ndarray:
    """The pixels of one file, as the manifest says, in float64."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(file))).convert("RGB")
    resample = Image.Resampling[spec.resample.upper()]
    if spec.shorter_side is None:
        image = image.resize((spec.width, spec.height), resample)
    else:
        width, height = image.size
        if width < height:
            image = image.resize((spec.shorter_side, int(spec.shorter_side * height / width)), resample)
        else:
            image = image.resize((int(spec.shorter_side * width / height), spec.shorter_side), resample)
        top, left = (image.height - spec.height) // 2, (image.width - spec.width) // 2
        image = Image.fromarray(np.asarray(image)[top : top + spec.height, left : left + spec.width])
    pixels = (np.asarray(image, np.float64) * spec.rescale - np.array(spec.mean)) / np.array(spec.std)
    return pixels.transpose(2, 0, 1) if spec.layout == "NCHW" else pixels


FILES = {
    "wide png": picture(40, 13),
    "tall png": picture(9, 31),
    "square": picture(8, 8),
    "jpeg": picture(33, 21, "JPEG", quality=80),
    "grey": picture(12, 30, mode="L"),
    "palette": picture(12, 30, mode="P"),
    "transparent": picture(12, 30, mode="RGBA"),
    "cmyk": picture(12, 30, "JPEG", mode="CMYK"),
    "progressive": picture(50, 40, "JPEG", progressive=True),
}


def turned() -> bytes:
    """A photo taken with the camera on its side."""
    image, exif, file = Image.open(BytesIO(picture(50, 40))), Image.Exif(), BytesIO()
    exif[0x0112] = 6
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


FILES["turned"] = turned()


@pytest.fixture(scope="module", params=[SPEC, PLAIN], ids=["cropped NCHW", "plain NHWC"])
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageClassification:
    folder = task_models.images(tmp_path_factory.mktemp("images") / "artifact", request.param)
    made = load_model(folder).task
    assert isinstance(made, ImageClassification)
    return made


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow_and_numpy_by_hand(task, name):
    (unit,) = task.encode([FILES[name]])
    assert (unit.payload.nbytes, unit.length, unit.rows) == (8 * 8 * 3, 1, 1)
    pixels = task.assemble([unit.payload])["pixels"]
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0], by_hand(FILES[name], task._image), rtol=1e-5, atol=1e-6)


def test_probabilities_are_those_of_plain_onnx_runtime_alone_and_beside_others(tmp_path):
    folder = task_models.images(tmp_path / "artifact", SPEC)
    model, session = load_model(folder), ort.InferenceSession(folder / "model.onnx")
    units = model.task.encode(list(FILES.values()))
    together = model.task.respond(units, model.run([unit.payload for unit in units]))["probabilities"]
    for file, unit, beside in zip(FILES.values(), units, together, strict=True):
        (logits,) = session.run(None, {"pixels": by_hand(file, SPEC)[None].astype(np.float32)})
        powers = np.exp(logits[0])
        expected = powers / powers.sum()
        alone = model.task.respond([unit], model.run([unit.payload]))["probabilities"][0]
        np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(beside, expected, rtol=1e-4, atol=1e-6)


def test_a_model_may_take_bytes_as_they_are(tmp_path):
    spec = ImageSpec(8, 8, rescale=1)
    folder = task_models.images(tmp_path / "artifact", spec)
    inputs = [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, 8, 8]}]
    made = open_task(read_artifact(changed(folder, inputs=inputs)), 8)
    (unit,) = made.encode([FILES["square"]])
    pixels = made.assemble([unit.payload])["pixels"]
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels[0], np.asarray(Image.open(BytesIO(FILES["square"]))).transpose(2, 0, 1))


def large_png(width: int, height: int) -> bytes:
    """The head of a PNG of this size, and next to nothing of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(4097, 4096), (1 << 24, 2), (1 << 30, 1 << 30)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_unpacked(task, size, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(BodyTooLarge, match=r"^image 0: expected at most 16777216 pixels"):
        task.encode([large_png(*size)])


def test_an_image_that_would_grow_too_large_is_refused(tmp_path):
    folder = task_models.images(tmp_path / "artifact", ImageSpec(8, 8, shorter_side=1024))
    made = open_task(read_artifact(folder), 8)
    with pytest.raises(BodyTooLarge, match="sides less different, found 2 x 4000 pixels"):
        made.encode([picture(2, 4000)])


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        FILES["wide png"][:-30],
        FILES["jpeg"][:100],
        FILES["jpeg"][: len(FILES["jpeg"]) // 2],
        picture(kind="GIF"),
        picture(kind="BMP"),
        large_png(64, 64),
    ],
    ids=["empty", "no image", "a head", "cut png", "cut jpeg head", "cut jpeg", "gif", "bmp", "too few pixels"],
)
def test_what_is_no_whole_jpeg_or_png_is_invalid_by_its_place(task, file):
    with pytest.raises(Invalid, match=r"^image 1: expected a whole JPEG or PNG file$"):
        task.encode([FILES["square"], file])


def test_images_come_as_one_tensor_of_binary_data(task):
    file = FILES["square"]
    assert task.read({"image": np.array([file, file], object)}) == [file, file]
    for tensors in (
        {},
        {"picture": np.array([file], object)},
        {"image": np.array(["text"], object)},
        {"image": np.array([[file]], object)},
        {"image": np.zeros(2)},
    ):
        with pytest.raises(Invalid):
            task.read(tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": None}, "`image`: expected a value for task image-classification, found none"),
        (
            {"image": {"height": 8, "width": 9}},
            r"inputs: expected one, float or UINT8 \[-1, 3, 8, 9\], as `image` says",
        ),
        ({"image": {"height": 8, "width": 8, "layout": "NHWC"}}, r"expected one, float or UINT8 \[-1, 8, 8, 3\]"),
        ({"image": {"height": 8, "width": 8, "shorter_side": 7}}, "image.shorter_side: expected at least 8, found 7"),
        ({"image": {"height": 8, "width": 8, "std": [1, 0, 1]}}, "image.std: expected no 0"),
        ({"inputs": [{"name": "pixels", "datatype": "INT64", "shape": [-1, 3, 8, 8]}]}, "inputs: expected one, float"),
        ({"labels": []}, "`labels`: expected"),
        ({"scores": "sigmoid"}, "`scores`: expected logits or probabilities"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, said):
    folder = changed(task_models.images(tmp_path / "artifact"), **change)
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{said}"):
        open_task(read_artifact(folder), 8)


def test_without_pillow_the_task_says_what_to_install(tmp_path, monkeypatch):
    folder = task_models.images(tmp_path / "artifact")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ArtifactError, match=r"takes Pillow; install the `image` extra$"):
        open_task(read_artifact(folder), 8)


@pytest.mark.parametrize(
    "arrays",
    [
        {"output.probabilities": np.zeros((0, 3))},
        {"output.probabilities": np.zeros((1, 2)), "input.image.0": np.zeros(3, np.uint8)},
        {"output.probabilities": np.zeros((2, 3)), "input.image.0": np.zeros(3, np.uint8)},
        {"output.probabilities": np.zeros((1, 3)), "input.image.0": np.zeros(3)},
        {"input.image.0": np.zeros(3, np.uint8)},
        {"output.probabilities": np.zeros((1, 3)), "input.image.0": np.zeros(3, np.uint8)},
    ],
    ids=["none", "other labels", "one missing", "no bytes", "no outputs", "no image"],
)
def test_a_golden_file_that_proves_nothing_is_refused(tmp_path, arrays):
    folder = task_models.images(tmp_path / "artifact")
    np.savez(folder / "golden.npz", **arrays)
    with pytest.raises(ArtifactError, match=r"golden\.npz: .*expected"):
        open_task(read_artifact(folder), 8).golden()
