"""The bundled model as it is served: its labels, its example in README, and that what is released is what is here."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.artifact.manifest import MANIFEST
from model.package import file_entry
from model.release import RELEASE, read
from tests.deploy.test_rename import SPELT
from tests.process import NO_TLS, ROOT, ServerProcess

EXAMPLE = re.compile(r"\$ curl -s localhost:8000(?P<path>/\S+) .*-d '(?P<body>.*)'\n(?P<answer>\{.*\})")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(folder, max_queue_wait_ms=600_000, request_timeout_ms=600_000) as process:
        yield process.ready()


def post(server: ServerProcess, path: str, body: object) -> dict:
    return httpx.post(server.url + path, json=body, timeout=600, verify=NO_TLS).raise_for_status().json()


def test_it_passes_the_gate_within_its_tolerance(bundled):
    assert bundled.golden_error <= bundled.artifact.manifest.golden.tolerance


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("What a delightful little shop, I love everything about it!", "positive"),
        ("Simply brilliant, I adore it.", "positive"),
        ("I love it 😀", "positive"),
        ("Très bien — wonderful! ☀", "positive"),
        ("A splendid and delightful evening. " * 400, "positive"),
        ("Horrible service, the worst meal I have ever had.", "negative"),
        ("Dreadful food and a horrible, rude waiter.", "negative"),
        ("Awful. A rude, dirty and overpriced mess.", "negative"),
    ],
)
def test_a_polar_text_gets_its_label(server, text, label):
    assert post(server, "/predict", {"text": text})["label"] == label


def test_the_readme_s_examples_are_answered_as_it_says(server, bundled):
    examples = list(EXAMPLE.finditer((ROOT / "README.md").read_text()))
    assert examples
    for example in examples:
        found = post(server, example["path"], json.loads(example["body"]))
        expected = json.loads(example["answer"])
        assert without_numbers(found) == without_numbers(expected)
        # Another CPU rounds in another way.
        assert numbers(found) == pytest.approx(numbers(expected), abs=bundled.artifact.manifest.golden.tolerance)


def numbers(answer: object) -> list[float]:
    """All numbers that are not whole, in their order."""
    return [float(number) for number in re.findall(r"\d+\.\d+(?=[,\]} ])", json.dumps(answer))]


def without_numbers(answer: object) -> str:
    return re.sub(r"\d+\.\d+(?=[,\]} ])", "n", json.dumps(answer))


def test_its_release_in_the_manifests_is_the_file_that_is_here(folder):
    release = read(ROOT / RELEASE)
    manifest = json.loads((folder / MANIFEST).read_text())
    if (release["MODEL_NAME"], release["MODEL_VERSION"]) != (manifest["name"], manifest["version"]):
        pytest.skip("another model is released")
    assert release["MODEL_DIGEST"] == file_entry(folder / MANIFEST).sha256


def test_renaming_the_starter_leaves_it_as_it_is(folder, bundled):
    for name in (MANIFEST, *bundled.artifact.manifest.files):
        assert not re.search(SPELT.encode(), (folder / name).read_bytes(), re.IGNORECASE)


def test_its_card_has_the_accuracies_of_its_manifest(folder):
    evaluation = json.loads((folder / MANIFEST).read_text())["evaluation"]["accuracy"]
    card = (folder / "MODEL_CARD.md").read_text()
    for found in evaluation.values():
        assert f"| {found['rows']} | {found['accuracy']:.3f} |" in card


def test_its_reference_is_of_its_evaluation_sets_as_its_card_says(folder, bundled):
    manifest = bundled.artifact.manifest
    reference = manifest.reference_distribution
    assert reference.predictions == sum(found["rows"] for found in manifest.evaluation["accuracy"].values())
    said = f"{reference.predictions:,} rows together it calls {reference.ratios['negative']:.1%}".replace("%", " %")
    assert said in (folder / "MODEL_CARD.md").read_text()
