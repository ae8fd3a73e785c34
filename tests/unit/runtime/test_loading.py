"""The readiness gate: what must not pass, what must, and random damage."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.artifact.manifest import MANIFEST, TensorSpec
from app.errors import ArtifactError, ProviderError
from app.runtime import loading
from app.runtime.loading import check_schema, load_model
from app.runtime.session import Model, Session
from model.package import file_entry, package_tensors, package_text
from tests import onnx_models
from tests.unit.runtime.tasks.test_text import word_tokenizer

TOLERANCE = 1e-4
TEXTS = ["good day", "bad", "a fine day and a good one, fine"]
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Failure:
    """One way to break an artifact that was good, and what the gate must say of it."""

    what: str
    damage: Damage
    says: tuple[str, ...]
    kind: str = "tensors"
    # Whether sizes and checksums are made right again after the damage, so that a later check has to find it.
    sealed: bool = False
    digest: str = ""
    provider: str = "cpu"
    exit_code: int = 3
    # Whether a library writes to stderr itself when this happens, which nothing in Python can hold back.
    noisy: bool = False

    @property
    def error(self) -> type[Exception]:
        return {3: ArtifactError, 4: ProviderError}[self.exit_code]

    def apply(self, good: dict[str, Path], folder: Path) -> Path:
        """A copy of the good artifact of this kind at `folder`, broken."""
        if self.provider == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
            pytest.skip("CUDA is available here")
        shutil.copytree(good[self.kind], folder)
        self.damage(folder)
        if self.sealed:
            seal(folder)
        return folder


def good_artifacts(root: Path) -> dict[str, Path]:
    """A small good artifact of each kind, in folders under `root`."""
    sources, text, tensors = root / "sources", root / "text", root / "tensors"
    for folder in (sources, text, tensors):
        folder.mkdir(parents=True)
    package_tensors(
        onnx_models.mlp(sources / "mlp.onnx"),
        tensors,
        name="numbers",
        version="1",
        inputs=None,
        size=8,
        tolerance=TOLERANCE,
    )
    package_text(
        onnx_models.classifier(sources / "classifier.onnx"),
        word_tokenizer(sources / "tokenizer.json"),
        text,
        name="words",
        version="1",
        labels=["no", "yes"],
        max_tokens=16,
        scores="logits",
        tolerance=TOLERANCE,
        texts=TEXTS,
    )
    return {"text": text, "tensors": tensors}


def seal(folder: Path) -> None:
    """Makes the manifest's sizes and checksums those of the files as they are now."""

    def renew(manifest: dict) -> None:
        for name in manifest["files"]:
            entry = file_entry(folder / name)
            manifest["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}

    edit(renew)(folder)


def edit(change: Callable[[dict], object]) -> Damage:
    """Changes the manifest, parsed."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest.pop("checksum", None)
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def put(*place: str | int, value: object) -> Damage:
    """Sets one value of the manifest."""

    def change(manifest: dict) -> None:
        node = manifest
        for step in place[:-1]:
            node = node[step]  # type: ignore[index]
        node[place[-1]] = value  # type: ignore[index]

    return edit(change)


def without(field: str) -> Damage:
    return edit(lambda manifest: manifest.pop(field))


def content(name: str, data: bytes) -> Damage:
    """Replaces a whole file."""
    return lambda folder: (folder / name).write_bytes(data)


def flip(name: str, place: int) -> Damage:
    """Flips one bit of the byte at `place`."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1
        (folder / name).write_bytes(data)

    return damage


def cut(name: str, part: float) -> Damage:
    """Leaves only the first `part` of a file."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * part)])

    return damage


def append(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + data)


def outside(folder: Path) -> Path:
    """A folder beside the artifact, that nothing in it may reach."""
    other = folder.with_name(f"{folder.name}-outside")
    other.mkdir(exist_ok=True)
    return other


def link_out(name: str) -> Damage:
    """Moves a file out and leaves a link: the very same bytes are read, from outside."""

    def damage(folder: Path) -> None:
        shutil.move(folder / name, outside(folder) / name)
        (folder / name).symlink_to(outside(folder) / name)

    return damage


def link_folder_out(folder: Path) -> None:
    shutil.move(folder / "model.onnx", outside(folder) / "model.onnx")
    (folder / "sub").symlink_to(outside(folder))
    rename_file("model.onnx", "sub/model.onnx")(folder)


def link_to(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def rename_file(name: str, other: str) -> Damage:
    """Calls a file something else wherever the manifest names it; the file stays where it is."""

    def change(manifest: dict) -> None:
        manifest["files"][other] = manifest["files"].pop(name)
        manifest["model_file"] = other

    return edit(change)


def absolute(folder: Path) -> None:
    rename_file("model.onnx", str((folder / "model.onnx").resolve()))(folder)


def leaving(folder: Path) -> None:
    shutil.copy(folder / "model.onnx", outside(folder) / "model.onnx")
    rename_file("model.onnx", f"../{outside(folder).name}/model.onnx")(folder)


def detour(folder: Path) -> None:
    rename_file("model.onnx", f"../{folder.name}/model.onnx")(folder)


def golden(**arrays: np.ndarray | None) -> Damage:
    """Changes arrays of golden.npz; None takes one out. `__` stands for the dot in their names."""

    def damage(folder: Path) -> None:
        with np.load(folder / "golden.npz") as file:
            kept = {name: file[name] for name in file.files}
        kept |= {name.replace("__", "."): array for name, array in arrays.items()}  # type: ignore[misc]
        np.savez(folder / "golden.npz", **{name: array for name, array in kept.items() if array is not None})

    return damage


def graph(change: Callable[[onnx.ModelProto], object]) -> Damage:
    """Changes the ONNX file, parsed."""

    def damage(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        change(model)
        onnx.save(model, folder / "model.onnx")

    return damage


def tokenizer(change: Callable[[dict], object]) -> Damage:
    """Changes tokenizer.json, parsed."""

    def damage(folder: Path) -> None:
        parsed = json.loads((folder / "tokenizer.json").read_text())
        change(parsed)
        (folder / "tokenizer.json").write_text(json.dumps(parsed))

    return damage


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def negate_weights(model: onnx.ModelProto) -> None:
    for weights in model.graph.initializer:
        if weights.name == "table":
            weights.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weights), "table"))


def three_labels_of_an_output_of_any_size(manifest: dict) -> None:
    manifest["labels"] = ["a", "b", "c"]
    manifest["outputs"][0]["shape"] = [-1, -1]
    for example in manifest["golden"]["examples"]:
        example["probabilities"] = [0.2, 0.3, 0.5]


def rename_in_file(name: str, other: str) -> Damage:
    """Renames a tensor in the ONNX file's raw bytes; both names have one length."""
    old, new = name.encode(), other.encode("latin-1")
    assert len(old) == len(new)
    return lambda folder: (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes().replace(old, new))


def replace_model(build: Callable[[Path], Path]) -> Damage:
    return lambda folder: build(folder / "model.onnx")


def no_damage(_: Path) -> None: ...


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def become_a_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def become_a_pipe(name: str) -> Damage:
    """Whoever opens it waits for a writer that never comes."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


FIRST, LAST = 0, -1
ELSEWHERE = "0" * 64

FAILURES = [
    # The folder and its files.
    Failure("missing folder", shutil.rmtree, ("model folder not found", "APP_MODEL_DIR")),
    Failure("folder is a file", become_a_file, ("model folder not found", "APP_MODEL_DIR")),
    Failure("missing manifest", remove(MANIFEST), (MANIFEST, "No such file")),
    Failure("manifest is a folder", become_a_folder(MANIFEST), (MANIFEST, "Is a directory")),
    Failure("missing model", remove("model.onnx"), ("model.onnx", "No such file")),
    Failure("missing golden file", remove("golden.npz"), ("golden.npz", "No such file")),
    Failure("missing tokenizer", remove("tokenizer.json"), ("tokenizer.json", "No such file"), "text"),
    Failure("model is a folder", become_a_folder("model.onnx"), ("model.onnx", "Is a directory")),
    Failure("manifest is a pipe", become_a_pipe(MANIFEST), (MANIFEST, "expected a file")),
    Failure("model is a pipe", become_a_pipe("model.onnx"), ("model.onnx", "expected a file")),
    # The manifest's form.
    Failure("manifest is not JSON", content(MANIFEST, b"name: model\n"), (MANIFEST, "malformed")),
    Failure("manifest is empty", content(MANIFEST, b""), (MANIFEST, "truncated")),
    Failure("manifest is cut", cut(MANIFEST, 0.5), (MANIFEST, "truncated")),
    Failure("manifest is a list", content(MANIFEST, b"[]"), (MANIFEST, "Expected `object`, got `array`")),
    Failure("manifest is not UTF-8", content(MANIFEST, b'{"manifest_version": 1, "name": "\xff"}'), (MANIFEST,)),
    Failure("manifest is too deep", content(MANIFEST, b'{"manifest_version":1,"lineage":' + b"[" * 99999), (MANIFEST,)),
    Failure("unknown version", put("manifest_version", value=2), ("manifest_version", "expected 1", "found 2")),
    Failure("no version", without("manifest_version"), ("manifest_version", "missing")),
    Failure("version is a string", put("manifest_version", value="1"), ("manifest_version", "`int`", "`str`")),
    Failure("missing field", without("model_file"), ("missing required field `model_file`",)),
    Failure("unknown field", put("modle_file", value="x"), ("unknown field `modle_file`",)),
    Failure("name is a number", put("name", value=7), ("$.name", "`str`", "`int`")),
    Failure("name is not a name", put("name", value="a/b"), ("$.name", "matching regex")),
    Failure("name ends in a new line", put("name", value="a\n"), ("$.name", "matching regex")),
    Failure("unknown task", put("task", value="guess"), ("`task`", "expected one of", "'guess'")),
    Failure("files is a list", put("files", value=["model.onnx"]), ("$.files", "`object`", "`array`")),
    Failure("bytes is negative", put("files", "model.onnx", "bytes", value=-1), ("$.files", ">= 0")),
    Failure("bytes is a string", put("files", "model.onnx", "bytes", value="9"), ("$.files", "`int`", "`str`")),
    Failure("checksum is short", put("files", "model.onnx", "sha256", value="ab"), ("$.files", "matching regex")),
    Failure("no inputs", put("inputs", value=[]), ("$.inputs", "length >= 1")),
    Failure("unknown datatype", put("inputs", 0, "datatype", value="FP8"), ("$.inputs[0].datatype", "'FP8'")),
    Failure("shape has a name", put("inputs", 0, "shape", value=["rows", 4]), ("$.inputs[0].shape", "`int`", "`str`")),
    Failure("shape below -1", put("inputs", 0, "shape", value=[-2, 4]), ("$.inputs[0].shape", ">= -1")),
    Failure("labels are numbers", put("labels", value=[0, 1]), ("$.labels", "`str`", "`int`"), "text"),
    Failure("tolerance is negative", put("golden", "tolerance", value=-1), ("$.golden.tolerance", ">= 0")),
    Failure("tolerance is a string", put("golden", "tolerance", value="0"), ("$.golden.tolerance", "`str`")),
    Failure("no tokens", put("max_tokens", value=0), ("$.max_tokens", ">= 3"), "text"),
    Failure("too many tokens", put("max_tokens", value=2**70), ("max_tokens",), "text"),
    Failure("unknown scores", put("scores", value="odds"), ("$.scores", "'odds'"), "text"),
    Failure("no tokenizer named", without("tokenizer_file"), ("`tokenizer_file`", "expected", "found none"), "text"),
    Failure("no window named", without("max_tokens"), ("`max_tokens`", "expected", "found none"), "text"),
    # Sizes and checksums.
    *(
        Failure(
            f"one bit of {name} at {place}", flip(name, place), (name, "sha256 mismatch", "expected", "found"), kind
        )
        for kind, name in (("tensors", "model.onnx"), ("tensors", "golden.npz"), ("text", "tokenizer.json"))
        for place in (FIRST, LAST)
    ),
    *(
        Failure(f"{name} is cut to {part}", cut(name, part), (name, "size mismatch", "expected", "found"), kind)
        for kind, name in (("tensors", "model.onnx"), ("tensors", "golden.npz"), ("text", "tokenizer.json"))
        for part in (0, 0.5)
    ),
    Failure("one byte more", append("model.onnx", b"\0"), ("model.onnx", "size mismatch", "expected", "found")),
    Failure(
        "other size in the manifest",
        put("files", "model.onnx", "bytes", value=1),
        ("model.onnx", "size mismatch", "expected 1 ", "found"),
    ),
    Failure(
        "other checksum in the manifest",
        put("files", "model.onnx", "sha256", value=ELSEWHERE),
        ("model.onnx", "sha256 mismatch", f"expected {ELSEWHERE}", "found"),
    ),
    Failure(
        "digest pin mismatch",
        no_damage,
        (MANIFEST, "digest pin mismatch", f"expected sha256 {ELSEWHERE}", "found"),
        digest=ELSEWHERE,
    ),
    # Paths.
    Failure("path leaves by ..", leaving, (MANIFEST, "model.onnx", "leaves the artifact folder")),
    Failure("path leaves and comes back", detour, (MANIFEST, "model.onnx", "leaves the artifact folder")),
    Failure("path is absolute", absolute, (MANIFEST, "model.onnx", "leaves the artifact folder")),
    Failure("manifest is a channel out", link_out(MANIFEST), (f"'{MANIFEST}'", "leaves the artifact folder")),
    Failure("file is a channel out", link_out("model.onnx"), ("'model.onnx'", "leaves the artifact folder")),
    Failure("golden is a channel out", link_out("golden.npz"), ("'golden.npz'", "leaves the artifact folder")),
    Failure("folder is a channel out", link_folder_out, ("'sub/model.onnx'", "leaves the artifact folder")),
    Failure("link to nothing outside", link_to("model.onnx", "../nothing"), ("'model.onnx'", "leaves the artifact")),
    Failure("link to nothing inside", link_to("model.onnx", "nothing"), ("model.onnx", "No such file")),
    Failure("link to itself", link_to("model.onnx", "model.onnx"), ("model.onnx",)),
    Failure("path has a null", put("files", "a\0b", value={"sha256": ELSEWHERE, "bytes": 1}), (MANIFEST, "a\\x00b")),
    Failure("path has a new line", put("files", "a\nb", value={"sha256": ELSEWHERE, "bytes": 1}), ()),
    Failure("path is the folder", put("files", ".", value={"sha256": ELSEWHERE, "bytes": 1}), ("cannot be read",)),
    Failure("model not listed", put("model_file", value="other.onnx"), ("'other.onnx'", "not listed in `files`")),
    Failure("golden not listed", put("golden", "file", value="o.npz"), ("'o.npz'", "not listed in `files`")),
    Failure("tokenizer not listed", put("tokenizer_file", value="o.json"), ("'o.json'", "not listed"), "text"),
    # The ONNX file.
    Failure("model is not ONNX", content("model.onnx", b"not ONNX" * 99), ("model.onnx", "cannot load"), sealed=True),
    Failure("model is empty", content("model.onnx", b""), ("model.onnx",), sealed=True),
    Failure("model is cut and sealed", cut("model.onnx", 0.6), ("model.onnx", "cannot load"), sealed=True),
    Failure("unknown operator", graph(unknown_operator), ("model.onnx", "NoSuchOperator"), sealed=True),
    Failure("name is not UTF-8", rename_in_file("scores", "scor\xff\xfe"), ("model.onnx",), sealed=True),
    # Inputs and outputs.
    Failure("input name", put("inputs", 0, "name", value="pixels"), ("inputs", "['pixels']", "['features']")),
    Failure("output name", put("outputs", 0, "name", value="odds"), ("outputs", "['odds']", "['scores']")),
    Failure(
        "input dtype", put("inputs", 0, "datatype", value="FP64"), ("'features'", "datatype", "FP64", "found FP32")
    ),
    Failure(
        "output dtype", put("outputs", 0, "datatype", value="FP16"), ("'scores'", "datatype", "FP16", "found FP32")
    ),
    Failure("input rank", put("inputs", 0, "shape", value=[-1, 4, 1]), ("'features'", "rank", "expected 3", "found 2")),
    Failure("output rank", put("outputs", 0, "shape", value=[-1]), ("'scores'", "rank", "expected 1", "found 2")),
    Failure("input size", put("inputs", 0, "shape", value=[-1, 5]), ("'features'", "shape", "[-1, 5]", "[-1, 4]")),
    Failure("output size", put("outputs", 0, "shape", value=[-1, 2]), ("'scores'", "shape", "[-1, 2]", "[-1, 3]")),
    Failure(
        "one input more",
        edit(lambda m: m["inputs"].append({"name": "mask", "datatype": "FP32", "shape": [-1]})),
        ("inputs", "['features', 'mask']", "['features']"),
    ),
    Failure("an input twice", edit(lambda m: m["inputs"].append(m["inputs"][0])), ("`inputs`", "twice")),
    Failure("an output twice", edit(lambda m: m["outputs"].append(m["outputs"][0])), ("`outputs`", "twice")),
    Failure(
        "another model's file",
        replace_model(onnx_models.two_outputs),
        ("model.onnx", "inputs", "['features']", "['a', 'b']"),
        sealed=True,
    ),
    # Labels.
    Failure("too many labels", put("labels", value=["a", "b", "c"]), ("`labels`", "expected 2", "found 3"), "text"),
    Failure("one label", put("labels", value=["a"]), ("`labels`", "expected 2", "found 1"), "text"),
    Failure("no labels", put("labels", value=[]), ("`labels`", "expected", "found none"), "text"),
    Failure("equal labels", put("labels", value=["a", "a"]), ("`labels`", "different"), "text"),
    Failure(
        "labels fit the manifest but not the file",
        edit(lambda m: m.update(labels=["a", "b", "c"], outputs=[m["outputs"][0] | {"shape": [-1, 3]}])),
        ("'logits'", "shape", "[-1, 3]", "[-1, 2]"),
        "text",
    ),
    Failure(
        "labels fit no output, whose size is left open",
        edit(three_labels_of_an_output_of_any_size),
        ("expected", "3)", "found", "2)"),
        "text",
    ),
    Failure(
        "output is no list of scores",
        put("outputs", 0, "datatype", value="INT64"),
        ("'logits'", "datatype", "expected INT64", "found FP32"),
        "text",
    ),
    # The tokenizer.
    Failure("tokenizer is not JSON", content("tokenizer.json", b"{"), ("tokenizer.json", "not load"), "text", True),
    Failure("tokenizer is empty", content("tokenizer.json", b""), ("tokenizer.json", "not load"), "text", True),
    Failure("tokenizer is other JSON", content("tokenizer.json", b"{}"), ("tokenizer.json", "not load"), "text", True),
    Failure("tokenizer is bytes", content("tokenizer.json", b"\xff\0"), ("tokenizer.json", "not load"), "text", True),
    Failure("tokenizer is cut", cut("tokenizer.json", 0.5), ("tokenizer.json", "not load"), "text", True),
    Failure(
        "tokenizer gives ids that the model has not",
        tokenizer(lambda t: t["model"]["vocab"].update(good=5000)),
        ("run failed on golden inputs",),
        "text",
        True,
    ),
    Failure(
        "tokenizer gives other ids",
        tokenizer(lambda t: t["model"]["vocab"].update(good=5, bad=4)),
        ("golden.examples[", "]: probabilities: outside tolerance", "expected", "found"),
        "text",
        True,
    ),
    Failure(
        "tokenizer panics",
        tokenizer(lambda t: t["post_processor"]["special_tokens"].pop("[SEP]")),
        ("tokenizer.json",),
        "text",
        True,
        noisy=True,
    ),
    # Golden outputs.
    Failure(
        "text answers otherwise",
        put("golden", "examples", 1, "probabilities", value=[0.5, 0.5]),
        ("golden.examples[1]: probabilities: ", "outside tolerance", "expected 0.5", "found"),
        "text",
    ),
    Failure("no examples", put("golden", "examples", value=[]), ("`golden.examples`", "found none"), "text"),
    Failure(
        "an example of too many numbers",
        put("golden", "examples", 0, "probabilities", value=[0.1, 0.2, 0.7]),
        ("golden",),
        "text",
    ),
    Failure(
        "examples of too few numbers",
        edit(lambda m: [example.update(probabilities=[1.0]) for example in m["golden"]["examples"]]),
        ("golden.examples", "expected 2"),
        "text",
    ),
    Failure("a blank example", put("golden", "examples", 0, "text", value=" "), ("golden", "blank"), "text"),
    Failure(
        "other weights",
        graph(negate_weights),
        ("golden.examples[", "]: probabilities: outside tolerance"),
        "text",
        True,
    ),
    Failure("no golden file named", put("golden", "file", value=None), ("`golden.file`", "expected", "found none")),
    Failure(
        "tensors answer otherwise",
        golden(output__scores=np.zeros((3, 3), np.float32)),
        ("golden.npz: scores: ", "outside tolerance", "expected 0", "found"),
        sealed=True,
    ),
    Failure(
        "not a number is expected",
        golden(output__scores=np.full((3, 3), np.nan, np.float32)),
        ("golden.npz: scores: ", "expected nan", "found"),
        sealed=True,
    ),
    Failure(
        "infinity is expected",
        golden(output__scores=np.full((3, 3), np.inf, np.float32)),
        ("golden.npz: scores: ", "expected inf", "found"),
        sealed=True,
    ),
    Failure(
        "golden output has another shape",
        golden(output__scores=np.zeros((3, 2), np.float32)),
        ("golden.npz: scores: ", "expected shape [3, 2]", "found [3, 3]"),
        sealed=True,
    ),
    Failure("golden output is text", golden(output__scores=np.full((3, 3), "x")), ("golden",), sealed=True),
    Failure("golden input is missing", golden(input__features=None), ("golden.npz", "input.features"), sealed=True),
    Failure("golden output is missing", golden(output__scores=None), ("golden.npz", "output.scores"), sealed=True),
    Failure("golden input has another rank", golden(input__features=np.zeros(4)), ("golden", "features"), sealed=True),
    Failure("golden input has no rows", golden(input__features=np.zeros((0, 4))), ("golden",), sealed=True),
    Failure("golden input is text", golden(input__features=np.full((3, 4), "x")), ("golden",), sealed=True),
    Failure("golden file is not one", content("golden.npz", b"PK"), ("golden.npz", "expected an .npz"), sealed=True),
    Failure("golden file is empty", content("golden.npz", b""), ("golden.npz", "expected an .npz"), sealed=True),
    Failure("golden file is cut", cut("golden.npz", 0.5), ("golden.npz", "expected an .npz"), sealed=True),
    Failure(
        "golden file needs unpickling",
        golden(input__features=np.array([[{}] * 4] * 3, object)),
        ("golden.npz", "expected an .npz"),
        sealed=True,
    ),
    # The provider.
    Failure("CUDA is not here", no_damage, ("APP_PROVIDER=cuda", "CPUExecutionProvider"), provider="cuda", exit_code=4),
]


def named(failures: list[Failure]) -> dict:
    """Arguments of a parametrised test over failures."""
    return {"argvalues": failures, "ids": [failure.what.replace(" ", "-") for failure in failures]}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return good_artifacts(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("failure", **named(FAILURES))
def test_the_gate_refuses_with_one_line_that_says_what_and_where(good, tmp_path, failure):
    folder = failure.apply(good, tmp_path / "artifact")
    with pytest.raises(failure.error) as caught:
        load_model(folder, digest=failure.digest, provider=failure.provider)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert [part for part in failure.says if part not in message] == [], message


@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_undamaged_artifacts_pass(good, kind):
    model = load_model(good[kind])
    assert model.provider == "cpu"
    assert model.golden_error <= TOLERANCE
    assert model.tokens_per_second > 0


def test_a_model_passes_with_its_digest_pinned(good):
    digest = load_model(good["text"]).artifact.digest
    assert load_model(good["text"], digest=digest).artifact.digest == digest


def test_stages_are_told_in_order_and_timed(good):
    stages: list[str] = []
    model = load_model(good["text"], on_stage=stages.append)
    assert stages == ["verifying", "loading", "warming"]
    assert list(model.stage_seconds) == stages
    assert all(seconds >= 0 for seconds in model.stage_seconds.values())


@pytest.mark.parametrize(
    ("damage", "sealed", "last"),
    [
        (flip("model.onnx", FIRST), False, "verifying"),
        (content("model.onnx", b"junk"), True, "loading"),
        (golden(output__scores=np.zeros((3, 3), np.float32)), True, "warming"),
    ],
    ids=["checksum", "load", "golden"],
)
def test_a_failure_stops_at_its_own_stage(good, tmp_path, damage, sealed, last):
    stages: list[str] = []
    folder = Failure("", damage, (), sealed=sealed).apply(good, tmp_path / "artifact")
    with pytest.raises(ArtifactError):
        load_model(folder, on_stage=stages.append)
    assert stages[-1] == last


@pytest.mark.parametrize(("asked", "given"), [("auto", 8), (3, 3), (100, 100)])
def test_batches_have_the_size_asked_for_or_the_providers(good, asked, given):
    assert load_model(good["tensors"], max_batch_rows=asked).batch_rows == given


@pytest.mark.parametrize(("asked", "given"), [("auto", (512, 8)), (3, (3, 3)), (10_000, (10_000, 10_000))])
def test_batches_have_the_tokens_asked_for_or_the_providers_or_as_many_as_rows(good, asked, given):
    found = [load_model(good[kind], max_batch_tokens=asked).batch_tokens for kind in ("text", "tensors")]
    assert tuple(found) == given


@pytest.mark.parametrize(
    ("asked", "threads", "given"), [("auto", "auto", 5), ("auto", 2, 5), (3, "auto", 3), (3, 2, 3)]
)
def test_there_are_as_many_runners_as_asked_for_or_as_the_quota_allows(good, monkeypatch, asked, threads, given):
    monkeypatch.setattr(loading, "cpu_quota", lambda: 5)
    assert load_model(good["tensors"], runners=asked, runner_threads=threads).runners == given


def test_threads_and_memory_of_a_session_are_those_asked_for(good, monkeypatch):
    asked = []

    def note(path: Path, provider: str, **options: int) -> Session:
        asked.append((options["threads"], options["gpu_memory_bytes"]))
        return open_session(path, "cpu", threads=options["threads"])

    open_session = Session.open
    monkeypatch.setattr(Session, "open", note)
    load_model(good["tensors"])
    load_model(good["tensors"], runner_threads=3, gpu_memory_bytes=1 << 30)
    assert asked == [(1, 0), (3, 1 << 30)]


def test_on_cuda_auto_means_few_runners_and_large_batches(good, monkeypatch):
    def pretend(path: Path, provider: str, *, may_fall_back: bool, **_: int) -> Session:
        assert (provider, may_fall_back) == ("cuda", True)
        session = open_session(path, "cpu")
        session.provider = "cuda"
        return session

    open_session = Session.open
    monkeypatch.setattr(Session, "open", pretend)
    model = load_model(good["text"], provider="auto")
    assert (model.provider, model.runners, model.batch_rows, model.batch_tokens) == ("cuda", 2, 128, 16384)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_provider_asked_for_by_name_may_not_be_another(good, monkeypatch, provider):
    asked = []

    def note(path: Path, provider: str, *, may_fall_back: bool, **_: int) -> Session:
        asked.append((provider, may_fall_back))
        return open_session(path, "cpu")

    open_session = Session.open
    monkeypatch.setattr(Session, "open", note)
    load_model(good["tensors"], provider=provider)
    assert asked == [(provider, False)]


SCHEMA = [TensorSpec("features", "FP32", [-1, 4]), TensorSpec("mask", "BOOL", [-1])]


def test_a_schema_agrees_with_itself_in_any_order():
    check_schema(Path("m.onnx"), "input", SCHEMA, SCHEMA)
    check_schema(Path("m.onnx"), "input", SCHEMA[::-1], SCHEMA)


@pytest.mark.parametrize("shape", [[-1, 4], [-1, -1], [3, 4]])
def test_a_dimension_that_may_vary_on_either_side_agrees_with_any_size(shape):
    check_schema(Path("m.onnx"), "input", [TensorSpec("features", "FP32", shape)], SCHEMA[:1])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (TensorSpec("x", "FP32", [-1, 4]), r"inputs: expected \['x'\] as in the manifest, found \['features'\]"),
        (TensorSpec("features", "INT64", [-1, 4]), "'features': datatype: expected INT64 .* found FP32"),
        (TensorSpec("features", "FP32", [-1]), "'features': rank: expected 1 .* found 2"),
        (TensorSpec("features", "FP32", [-1, 7]), r"'features': shape: expected \[-1, 7\] .* found \[-1, 4\]"),
    ],
    ids=["name", "datatype", "rank", "size"],
)
def test_a_schema_other_than_the_files_is_refused(spec, said):
    with pytest.raises(ArtifactError, match=rf"^m\.onnx: (input )?{said}"):
        check_schema(Path("m.onnx"), "input", [spec], SCHEMA[:1])


def test_the_smallest_and_the_largest_batch_are_run_before_the_model_may_serve(good, monkeypatch):
    rows: set[int] = set()
    run = Model.run

    def recording(self: Model, payloads: list) -> list:
        rows.add(sum(len(payload["features"]) for payload in payloads))
        return run(self, payloads)

    monkeypatch.setattr(Model, "run", recording)
    load_model(good["tensors"], max_batch_rows=5)
    assert {1, 5} <= rows


@pytest.mark.parametrize("tolerance", [0.01, 0.06])
def test_an_answer_as_far_off_as_the_tolerance_allows_passes(good, tmp_path, tolerance):
    def change(manifest: dict) -> None:
        manifest["golden"]["tolerance"] = tolerance
        first, second = manifest["golden"]["examples"][0]["probabilities"]
        manifest["golden"]["examples"][0]["probabilities"] = [first + 0.05, second - 0.05]

    folder = Failure("", edit(change), (), "text").apply(good, tmp_path / "artifact")
    if tolerance > 0.05:
        assert load_model(folder).golden_error == pytest.approx(0.05, abs=1e-3)
    else:
        with pytest.raises(ArtifactError, match=r"off by 0\.05"):
            load_model(folder)


@pytest.mark.parametrize("recorded", ["alone", "together"])
def test_a_text_model_whose_answer_depends_on_its_neighbours_does_not_pass(good, tmp_path, recorded):
    def forget_the_mask(model: onnx.ModelProto) -> None:
        # Padding then counts like any other token.
        for node in model.graph.node:
            if node.op_type == "Mul":
                node.op_type = "Max"

    def damage(folder: Path) -> None:
        graph(forget_the_mask)(folder)
        session = ort.InferenceSession(folder / "model.onnx")
        examples = []
        for text, ids in {"good day": [2, 4, 7, 3], "bad": [2, 5, 3]}.items():
            padding = [0] * (4 - len(ids)) if recorded == "together" else []
            mask = [1] * len(ids) + [0] * len(padding)
            (logits,) = session.run(None, {"input_ids": [ids + padding], "attention_mask": [mask]})
            powers = np.exp(logits[0] - logits[0].max())
            examples.append({"text": text, "probabilities": (powers / powers.sum()).tolist()})
        put("golden", "examples", value=examples)(folder)

    folder = Failure("", damage, (), "text", sealed=True).apply(good, tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"golden\.examples\[1\]: probabilities: outside tolerance"):
        load_model(folder)
    if recorded == "alone":
        load_model(folder, max_batch_rows=1)


def test_a_batchable_model_must_answer_one_row_for_each(good, tmp_path):
    def average_over_rows(path: Path) -> Path:
        return onnx_models.save(
            path,
            [onnx.helper.make_node("ReduceMean", ["features"], ["scores"], axes=[0], keepdims=1)],
            [onnx_models.tensor("features", ["rows", 4])],
            [onnx_models.tensor("scores", ["one", 4])],
        )

    def damage(folder: Path) -> None:
        replace_model(average_over_rows)(folder)
        put("outputs", 0, "shape", value=[-1, 4])(folder)

    folder = Failure("", damage, (), sealed=True).apply(good, tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"expected (1|8) rows"):
        load_model(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_model_that_answers_what_is_not_finite_passes_when_that_is_golden(good, tmp_path, value):
    def constant(path: Path) -> Path:
        return onnx_models.save(
            path,
            [
                onnx.helper.make_node("Mul", ["features", "zero"], ["nothing"]),
                onnx.helper.make_node("Add", ["nothing", "value"], ["scores"]),
            ],
            [onnx_models.tensor("features", ["rows", 4])],
            [onnx_models.tensor("scores", ["rows", 4])],
            zero=np.zeros(4, np.float32),
            value=np.full(4, value, np.float32),
        )

    def damage(folder: Path) -> None:
        replace_model(constant)(folder)
        put("outputs", 0, "shape", value=[-1, 4])(folder)
        golden(output__scores=np.full((3, 4), value, np.float32))(folder)

    load_model(Failure("", damage, (), sealed=True).apply(good, tmp_path / "artifact"))


def test_the_model_that_passed_answers_batches_as_single_rows(good):
    model = load_model(good["text"])
    units = model.task.encode(TEXTS)
    together = model.run([unit.payload for unit in units])
    alone = [model.run([unit.payload])[0] for unit in units]
    assert np.allclose(together, alone, atol=1e-6)


@dataclass(frozen=True)
class Corruption:
    """Random damage to the bytes of one file. Every number is taken modulo what the file allows."""

    file: int
    how: str
    place: int
    bit: int
    extra: bytes

    def of(self, data: bytes) -> bytes:
        place = self.place % len(data)
        if self.how == "flip":
            return data[:place] + bytes([data[place] ^ 1 << self.bit]) + data[place + 1 :]
        if self.how == "truncate":
            return data[:place]
        if self.how == "insert":
            return data[:place] + self.extra + data[place:]
        # Zeros, as a disk leaves them behind.
        return data[:place] + bytes(len(data) - place)


CORRUPTIONS = st.builds(
    Corruption,
    file=st.integers(0, 100),
    how=st.sampled_from(["flip", "truncate", "insert", "zero"]),
    place=st.integers(0, 2**20),
    bit=st.integers(0, 7),
    extra=st.binary(min_size=1, max_size=8),
)


@contextmanager
def corrupted(path: Path, corruption: Corruption) -> Iterator[bool]:
    """The file, corrupted for a while. Yields whether that changed anything."""
    whole = path.read_bytes()
    path.write_bytes(corruption.of(whole))
    try:
        yield corruption.of(whole) != whole
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", ["text", "tensors"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(corruption=CORRUPTIONS)
def test_no_corruption_of_any_file_passes_when_the_digest_is_pinned(good, kind, corruption):
    files = sorted(good[kind].iterdir())
    digest = file_entry(good[kind] / MANIFEST).sha256
    with corrupted(files[corruption.file % len(files)], corruption) as changed:
        if changed:
            with pytest.raises(ArtifactError) as caught:
                load_model(good[kind], digest=digest)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "tensors"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(corruption=CORRUPTIONS)
def test_no_corruption_of_the_manifest_passes_without_a_pin_either(good, kind, corruption):
    with corrupted(good[kind] / MANIFEST, corruption) as changed:
        if changed:
            with pytest.raises(ArtifactError) as caught:
                load_model(good[kind])
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_a_manifest_without_a_checksum_may_be_edited(good, tmp_path, kind):
    folder = shutil.copytree(good[kind], tmp_path / "edited")
    put("version", value="2")(folder)
    assert load_model(folder).artifact.manifest.version == "2"
