"""Both ways with the official tool of OpenSSF Model Signing: `make test-sign`, in an environment that has it."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from app.artifact.manifest import MANIFEST
from app.artifact.signature import SIGNATURE, verify_signature
from app.errors import ArtifactError
from app.runtime.loading import load_model
from model.sign import sign
from tests.signing import KEY, OTHER, REFUSALS, Refusal, named, private_pem, public_file, signed_copy
from tests.text_model import text_model

if find_spec("model_signing") is None:
    pytest.skip("the official tool is not installed: make test-sign", allow_module_level=True)

TOOL = Path(sys.executable).parent / "model_signing"
CURVES = [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()]
each_curve = pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
# Of what we refuse; beyond it we are stricter in how a bundle is written, and about the manifest.
BOTH_REFUSE = {
    "another key",
    "changed file",
    "changed manifest",
    "missing file",
    "extra file",
    "second signature",
    "link",
    "no JSON",
    "media type",
    "other payload",
    "payload type",
    "predicate type",
    "digest of the whole",
    "name leaves",
}


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


def accepts(folder: Path, keys: Path) -> bool:
    done = tool("verify", "key", folder, "--signature", folder / SIGNATURE, "--public_key", keys)
    return done.returncode == 0


def sign_officially(folder: Path, key: ec.EllipticCurvePrivateKey, *options: object) -> None:
    private = folder.parent / "private.pem"
    private.write_bytes(private_pem(key))
    done = tool("sign", "key", folder, "--signature", folder / SIGNATURE, "--private_key", private, *options)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def artifact(tmp_path) -> Path:
    """Signed by us, with names that sort differently as text and as paths."""
    folder = signed_copy(text_model(), tmp_path / "artifact")
    for name in ("licences-a.txt", "licences/b.txt", "licences/sub/é.txt", "Z.txt"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (folder / ".gitignore").write_text("")
    sign(folder, KEY)
    return folder


@each_curve
def test_the_official_tool_accepts_what_we_sign(artifact, tmp_path, curve):
    key = ec.generate_private_key(curve)
    sign(artifact, key)
    assert accepts(artifact, public_file(tmp_path, key))
    assert not accepts(artifact, public_file(tmp_path, OTHER))


@each_curve
def test_we_accept_what_the_official_tool_signs(artifact, tmp_path, curve):
    key = ec.generate_private_key(curve)
    (artifact / SIGNATURE).unlink()
    sign_officially(artifact, key)
    assert load_model(artifact, public_key=public_file(tmp_path, key)).stage_seconds["signature"] > 0
    with pytest.raises(ArtifactError, match="signed with another key"):
        load_model(artifact, public_key=public_file(tmp_path, OTHER))


def test_what_either_signs_lists_the_same_files_with_the_same_digests(artifact, tmp_path):
    keys = public_file(tmp_path, KEY)
    ours = verify_signature(artifact, keys)
    sign_officially(artifact, KEY)
    assert verify_signature(artifact, keys) == ours


def test_we_leave_out_what_the_official_tool_was_told_to_leave_out(artifact, tmp_path):
    sign_officially(artifact, KEY, "--ignore-paths", artifact / "licences", "--ignore-paths", artifact / "Z.txt")
    found = verify_signature(artifact, public_file(tmp_path, KEY))
    assert found.keys() == {MANIFEST, "model.onnx", "tokenizer.json", "licences-a.txt"}


def test_we_refuse_links_even_where_the_official_tool_was_told_to_follow_them(artifact, tmp_path):
    (artifact / "link").symlink_to("Z.txt")
    sign_officially(artifact, KEY, "--allow_symlinks")
    with pytest.raises(ArtifactError, match="found a link"):
        verify_signature(artifact, public_file(tmp_path, KEY))


@pytest.mark.parametrize("refusal", **named([each for each in REFUSALS if each.what in BOTH_REFUSE]))
def test_the_official_tool_refuses_what_we_refuse(artifact, tmp_path, refusal: Refusal):
    folder = shutil.copytree(artifact, tmp_path / "copy")
    refusal.damage(folder)
    assert not accepts(folder, public_file(tmp_path, KEY))
