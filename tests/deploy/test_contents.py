"""What the images hold: licences that are allowed, an audit that says what it did not look up, a built image's BOM."""

import subprocess
import sys

import pytest

from docker.audit import verdict
from docker.image_sbom import merged
from docker.licences import NOT_INSTALLED, judged, licence_of, packages
from tests.process import ROOT

LOCKS = [ROOT / "docker" / f"requirements-{name}.txt" for name in ("cpu", "queue", "sign", "fetch", "scoring", "image")]


def test_every_dependency_of_the_images_has_a_licence_that_is_allowed():
    found = {name: licence_of(name) for name in packages(LOCKS)}
    assert {"numpy", "onnxruntime", "redis", "cryptography", "s3fs", "pyarrow", "pillow"} <= found.keys()
    assert {name: licence for name, licence in found.items() if not judged(licence)} == {}


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 AND MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT OR AGPL-3.0-only", False),
        ("MIT AND (Apache-2.0 OR BSD-2-Clause)", True),
        ("(GPL-3.0-only OR MIT) AND MIT", False),
        ("AGPL-3.0-only", False),
        ("unknown", False),
        ("", False),
    ],
)
def test_an_expression_is_judged_by_what_is_allowed(expression, allowed):
    assert judged(expression) is allowed


def test_the_command_lists_all_and_fails_for_one_that_is_not_allowed(tmp_path):
    site = tmp_path / "strange-1.dist-info"
    site.mkdir()
    (site / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: strange\nVersion: 1\nLicense-Expression: GPL-3.0-only\n"
    )
    (tmp_path / "lock.txt").write_text("strange[extra]==1 \\\n    --hash=sha256:00\nnumpy==2\nnot-there==1\n")
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "licences.py", tmp_path / "lock.txt"],
        env={"PYTHONPATH": str(tmp_path), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "strange                          GPL-3.0-only  ← not allowed" in done.stdout
    assert f"3 packages: 2 judged, 1 {NOT_INSTALLED}, 1 not allowed" in done.stdout


def package(name: str, *vulnerabilities: str, **more: object) -> dict:
    """As pip-audit tells of it."""
    found = [{"id": each, "fix_versions": ["2.0"]} for each in vulnerabilities]
    return {"name": name, "version": "1.0", "vulns": found, **more}


SKIPPED = {"name": "private", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "complete", "code", "says"),
    [
        ([package("sound"), package("sound")], True, 0, "1 packages checked, 0 with vulnerabilities"),
        ([package("bad", "CVE-1"), package("sound")], True, 1, "bad 1.0: CVE-1, fixed in 2.0"),
        ([package("bad", "CVE-1"), SKIPPED], True, 1, "did not answer: private"),
        ([package("sound"), SKIPPED], True, 2, "did not answer: private"),
        ([package("sound")], False, 2, "not checked"),
        ([SKIPPED], True, 2, "no database of vulnerabilities could be reached: nothing was checked"),
        ([], False, 2, "no database of vulnerabilities could be reached: nothing was checked"),
    ],
)
def test_an_audit_passes_only_what_a_database_knows_and_knows_nothing_bad_of(packages, complete, code, says):
    lines, found = verdict(packages, complete)
    assert found == code
    assert says in "\n".join(lines)


def bom(*components: dict, tool: str, needs: dict[str, list[str]] | None = None) -> dict:
    """As cyclonedx-py and syft write one."""
    labels = {"syft:image:labels:org.opencontainers.image." + name: name for name in ("title", "version")}
    return {
        "metadata": {
            "tools": {"components": [{"name": tool}]},
            "component": {"bom-ref": "root"},
            "properties": [{"name": name, "value": value} for name, value in labels.items()],
        },
        "components": list(components),
        "dependencies": [{"ref": ref, "dependsOn": others} for ref, others in (needs or {}).items()],
    }


def locked(name: str, version: str, **more: object) -> dict:
    hashes = [{"alg": "SHA-256", "content": name}]
    return {"type": "library", "bom-ref": f"lock-{name}", "name": name, "version": version, "hashes": hashes, **more}


def found(name: str, version: str, kind: str = "pypi", **more: object) -> dict:
    """A package that syft found in a file system."""
    purl = f"pkg:{kind}/{name}@{version}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, **more}


def image_bom() -> tuple[dict, list[str], list[str]]:
    return merged(
        bom(
            locked("some-lib", "1.0"),
            locked("other", "2.0"),
            locked("gone", "3.0"),
            {"type": "machine-learning-model", "bom-ref": "model", "name": "m"},
            tool="cyclonedx-py",
            needs={"root": ["lock-some-lib", "lock-gone"]},
        ),
        bom(
            found("Some_Lib", "1.0", licenses=[{"license": {"id": "MIT"}}]),
            found("other", "2.1", properties=[{"name": "syft:cpe23", "value": "a"}, {"name": "b", "value": "c"}]),
            found("libc6", "2.41-12", "deb/debian"),
            {"type": "file", "bom-ref": "file", "name": "/etc/hosts"},
            tool="syft",
            needs={"pkg:pypi/Some_Lib@1.0": ["pkg:deb/debian/libc6@2.41-12", "file"]},
        ),
    )


def test_an_images_bom_is_what_its_file_system_has_with_the_hashes_of_its_locks():
    whole, _, _ = image_bom()
    by_name = {each["name"]: each for each in whole["components"]}
    assert by_name.keys() == {"Some_Lib", "other", "libc6", "m"}
    assert by_name["Some_Lib"]["hashes"] == [{"alg": "SHA-256", "content": "some-lib"}]
    assert by_name["Some_Lib"]["licenses"] == [{"license": {"id": "MIT"}}]
    assert by_name["other"]["version"] == "2.1"
    assert by_name["other"]["properties"] == [{"name": "b", "value": "c"}]
    assert "hashes" not in by_name["other"]
    assert [each["name"] for each in whole["metadata"]["tools"]["components"]] == ["cyclonedx-py", "syft"]
    subject = {"bom-ref": "root", "type": "container", "name": "title", "version": "version"}
    assert whole["metadata"]["component"] == subject


def test_an_images_bom_says_which_of_its_packages_no_lock_has_and_which_of_a_lock_are_not_there():
    assert image_bom()[1:] == (["other 2.1"], ["gone 3.0", "other 2.0"])


def test_who_needs_whom_in_an_image_is_of_what_is_there():
    needs = {each["ref"]: each.get("dependsOn", []) for each in image_bom()[0]["dependencies"]}
    assert needs["root"] == ["pkg:pypi/Some_Lib@1.0"]
    assert needs["pkg:pypi/Some_Lib@1.0"] == ["pkg:deb/debian/libc6@2.41-12"]


def test_the_same_image_has_the_same_bom():
    first, second = image_bom()[0], image_bom()[0]
    assert first == second
    assert first["serialNumber"].startswith("urn:uuid:")
