"""What the images hold: licences that are allowed, and an audit that says what it did not look up."""

import subprocess
import sys

import pytest

from docker.audit import verdict
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
