"""Signed artifacts: what is accepted, what must never be, and random damage."""

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from app.artifact.integrity import LOST_AND_FOUND
from app.artifact.manifest import MANIFEST, read_artifact
from app.artifact.signature import SIGNATURE, read_public_keys, verify_signature
from app.errors import ArtifactError, ConfigError
from app.runtime.loading import load_model
from model.package import file_entry
from model.sign import envelope, sign
from tests.process import ROOT
from tests.signing import (
    KEY,
    OTHER,
    REFUSALS,
    Refusal,
    edit_bundle,
    edit_statement,
    named,
    private_pem,
    public_file,
    public_pem,
    put,
    signed_copy,
    unlist,
)
from tests.unit.artifact.test_manifest import write
from tests.unit.runtime.test_loading import good_artifacts


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return good_artifacts(tmp_path_factory.mktemp("good"))


@pytest.fixture
def artifact(good, tmp_path) -> Path:
    """Signed with KEY."""
    return signed_copy(good["text"], tmp_path / "artifact")


@pytest.fixture
def keys(tmp_path) -> Path:
    """KEY's public half."""
    return public_file(tmp_path, KEY)


def test_what_was_signed_passes_the_gate_and_the_signature_is_its_first_stage(artifact, keys):
    stages: list[str] = []
    model = load_model(artifact, public_key=keys, on_stage=stages.append)
    assert stages == ["signature", "verifying", "loading", "warming"]
    assert list(model.stage_seconds) == stages


def test_without_keys_a_signature_is_not_looked_at(artifact):
    (artifact / SIGNATURE).write_text("anything")
    (artifact / "more").write_text("anything")
    assert "signature" not in load_model(artifact).stage_seconds


def test_every_file_is_listed_and_its_digest_known(artifact, keys):
    found = verify_signature(artifact, keys)
    assert found.keys() == {MANIFEST, "model.onnx", "tokenizer.json", "licences/LICENCE.txt"}
    assert found == {name: file_entry(artifact / name).sha256 for name in found}


@pytest.mark.parametrize("refusal", **named(REFUSALS))
def test_it_is_refused_with_one_line_that_says_what_and_where(artifact, keys, refusal: Refusal):
    refusal.damage(artifact)
    with pytest.raises(ArtifactError) as caught:
        load_model(artifact, public_key=keys)
    line = str(caught.value)
    assert line.splitlines() == [line]
    assert line.isprintable()
    assert refusal.says in line
    assert str(artifact) in line


def test_the_signature_is_checked_before_the_pinned_digest_and_that_before_the_files(artifact, keys):
    with (artifact / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match=r"model\.onnx: sha256 mismatch: .* as signed"):
        load_model(artifact, digest="0" * 64, public_key=keys)
    sign_anyway = edit_statement(put_digest("model.onnx", file_entry(artifact / "model.onnx").sha256))
    sign_anyway(artifact)
    with pytest.raises(ArtifactError, match="digest pin mismatch"):
        load_model(artifact, digest="0" * 64, public_key=keys)
    with pytest.raises(ArtifactError, match=r"model\.onnx: size mismatch"):
        load_model(artifact, public_key=keys)


def put_digest(name: str, digest: str):
    """What is signed, with another sha256 of one file."""

    def change(statement: dict) -> None:
        resources = statement["predicate"]["resources"]
        next(each for each in resources if each["name"] == name)["digest"] = digest
        together = b"".join(bytes.fromhex(each["digest"]) for each in resources)
        statement["subject"][0]["digest"]["sha256"] = hashlib.sha256(together).hexdigest()

    return change


@contextmanager
def counted(monkeypatch) -> Iterator[list[str]]:
    """Names of the files that are hashed meanwhile."""
    names: list[str] = []
    real = hashlib.file_digest

    def count(file, algorithm):
        names.append(Path(file.name).name)
        return real(file, algorithm)

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", count)
        yield names


def test_each_file_is_read_once_for_its_signature_and_its_checksum(artifact, keys, monkeypatch):
    with counted(monkeypatch) as names:
        load_model(artifact, public_key=keys)
    assert sorted(names) == ["LICENCE.txt", MANIFEST, "model.onnx", "tokenizer.json"]


def test_a_manifest_that_is_exchanged_after_its_signature_was_checked_does_not_pass(artifact, keys, monkeypatch):
    def exchange(folder: Path, digest: str):
        (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b"\n")
        return read_artifact(folder, digest)

    monkeypatch.setattr("app.runtime.loading.read_artifact", exchange)
    with pytest.raises(ArtifactError, match="not the one that the signature lists"):
        load_model(artifact, public_key=keys)


def test_a_file_that_the_signer_left_out_is_held_to_the_manifests_checksum(artifact, keys):
    edit_statement(unlist("model.onnx"))(artifact)
    load_model(artifact, public_key=keys)
    data = bytearray((artifact / "model.onnx").read_bytes())
    data[-1] ^= 1
    (artifact / "model.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx: sha256 mismatch"):
        load_model(artifact, public_key=keys)


def test_a_bundle_without_a_hint_is_tried_with_every_key(artifact, tmp_path):
    edit_bundle(put("verificationMaterial", "publicKey", value={}))(artifact)
    verify_signature(artifact, public_file(tmp_path, OTHER, KEY))
    with pytest.raises(ArtifactError, match="signature mismatch"):
        verify_signature(artifact, public_file(tmp_path, OTHER))


def test_a_signed_field_that_is_not_of_this_version_is_for_others(artifact, keys):
    edit_statement(put("predicate", "card", value={"any": "thing"}))(artifact)
    verify_signature(artifact, keys)


def test_what_version_control_keeps_is_no_part_of_the_model(artifact, keys):
    (artifact / ".git").mkdir()
    (artifact / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (artifact / ".gitattributes").write_text("*.onnx binary\n")
    verify_signature(artifact, keys)
    (artifact / "licences" / ".gitignore").write_text("")
    with pytest.raises(ArtifactError, match="an extra file"):
        verify_signature(artifact, keys)


def test_the_root_of_a_volume_may_have_a_folder_of_the_file_system_that_nobody_can_read(artifact, keys, monkeypatch):
    (artifact / LOST_AND_FOUND).mkdir()
    (artifact / LOST_AND_FOUND / "#1").write_text("")
    with pytest.raises(ArtifactError, match="an extra file"):
        verify_signature(artifact, keys)
    real = os.scandir

    def denied(path):
        if Path(path).name in (LOST_AND_FOUND.name, "secret"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    verify_signature(artifact, keys)
    (artifact / "secret").mkdir()
    with pytest.raises(ArtifactError, match="secret: cannot be read: Permission denied"):
        verify_signature(artifact, keys)


def test_folders_deeper_than_python_can_call_itself_are_an_error_like_others(artifact, keys):
    deep = "/".join("d" * 1200)
    try:
        subprocess.run(["mkdir", "-p", deep], cwd=artifact, check=True)
        (artifact / deep / "file").write_text("")
        with pytest.raises(ArtifactError, match="an extra file"):
            verify_signature(artifact, keys)
    finally:  # which pytest could not remove
        subprocess.run(["rm", "-rf", "d"], cwd=artifact, check=True)


def test_the_folder_itself_may_be_a_link(artifact, keys, tmp_path):
    (tmp_path / "current").symlink_to(artifact)
    verify_signature(tmp_path / "current", keys)


def test_a_folder_that_is_not_there_is_said_as_without_keys(tmp_path, keys):
    with pytest.raises(ArtifactError, match="model folder not found; set APP_MODEL_DIR"):
        load_model(tmp_path / "nowhere", public_key=keys)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_keys_may_be_on_any_curve_of_the_format(good, tmp_path, curve):
    key = ec.generate_private_key(curve)
    folder = signed_copy(good["tensors"], tmp_path / "artifact", key)
    verify_signature(folder, public_file(tmp_path, OTHER, key))


def test_keys_change_without_a_moment_in_which_nothing_passes(good, tmp_path):
    """Old → old and new → artifact signed anew → new: at each step the Pods that are up and those that start agree."""
    old, new = KEY, OTHER
    of_old = signed_copy(good["tensors"], tmp_path / "of-old", old)
    both = public_file(tmp_path, old, new)
    verify_signature(of_old, both)
    of_new = signed_copy(good["tensors"], tmp_path / "of-new", new)
    for folder in (of_old, of_new):
        verify_signature(folder, both)
    only_new = public_file(tmp_path, new)
    verify_signature(of_new, only_new)
    with pytest.raises(ArtifactError, match="signed with another key"):
        verify_signature(of_old, only_new)


def other_kind(key) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "found none"),
        (b"# Put the keys here.\n", "found none"),
        (private_pem(KEY), "found none, or something else too"),
        (public_pem(KEY) + private_pem(KEY), "found none, or something else too"),
        (public_pem(KEY) + public_pem(OTHER)[:60], "found none, or something else too"),
        (public_pem(KEY).replace(b"MFk", b"MFj"), "found one that is damaged"),
        (other_kind(ed25519.Ed25519PrivateKey.generate()), "found another kind"),
        (other_kind(rsa.generate_private_key(65537, 2048)), "found another kind"),
        (other_kind(ec.generate_private_key(ec.SECP256K1())), "found another kind"),
    ],
    ids=["empty", "comment", "private", "private-beside", "cut", "damaged", "ed25519", "rsa", "curve"],
)
def test_a_file_that_is_not_of_public_keys_is_a_bad_setting(artifact, tmp_path, content, says):
    path = tmp_path / "keys.pem"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        load_model(artifact, public_key=path)
    assert str(path) in str(caught.value)
    assert "PRIVATE" not in str(caught.value)


@pytest.mark.parametrize("name", [".", "nowhere.pem"])
def test_a_file_of_keys_that_cannot_be_read_is_a_bad_setting(artifact, tmp_path, name):
    with pytest.raises(ConfigError, match="public keys cannot be read"):
        load_model(artifact, public_key=tmp_path / name)


def test_text_between_the_keys_is_for_people(tmp_path):
    path = tmp_path / "keys.pem"
    path.write_bytes(b"# 2026\n" + public_pem(KEY) + b"# 2027\r\n" + public_pem(OTHER))
    assert len(read_public_keys(path)) == 2


def test_without_the_library_the_setting_says_what_to_install(artifact, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(ConfigError, match="install the extra `sign`"):
        load_model(artifact, public_key=keys)


def test_the_library_is_not_imported_where_no_keys_are_configured():
    asked = "import sys, app.artifact.signature, app.settings; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
BUNDLES = [(), ("mediaType",), ("verificationMaterial",), ("verificationMaterial", "publicKey"), ("dsseEnvelope",)]
BUNDLES += [("dsseEnvelope", name) for name in ("payload", "payloadType", "signatures")]
BUNDLES += [("dsseEnvelope", "signatures", 0), ("dsseEnvelope", "signatures", 0, "sig")]
STATEMENTS = [
    (),
    ("_type",),
    ("subject",),
    ("subject", 0),
    ("subject", 0, "digest"),
    ("predicateType",),
    ("predicate",),
]
STATEMENTS += [("predicate", name) for name in ("serialization", "resources")]
STATEMENTS += [("predicate", "resources", 0, name) for name in ("name", "algorithm", "digest")]
SEVERAL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def with_value(parsed: dict, place: tuple, value: object) -> object:
    if not place:
        return value
    put(*place, value=value)(parsed)
    return parsed


@SEVERAL
@given(place=st.sampled_from(BUNDLES), value=ANYTHING)
def test_any_json_in_any_place_of_a_bundle_is_refused(artifact, keys, place, value):
    assume((place[-1:], value) != (("publicKey",), {}))  # no hint is needed
    path = artifact / SIGNATURE
    before = path.read_bytes()
    try:
        path.write_text(json.dumps(with_value(json.loads(before), place, value)))
        with pytest.raises(ArtifactError):
            verify_signature(artifact, keys)
    finally:
        path.write_bytes(before)


@SEVERAL
@given(place=st.sampled_from(STATEMENTS), value=ANYTHING)
def test_any_json_in_any_place_of_a_statement_is_refused_even_if_it_is_signed(artifact, keys, place, value):
    path = artifact / SIGNATURE
    before = path.read_bytes()
    try:
        bundle = json.loads(before)
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        made = envelope(json.dumps(with_value(statement, place, value)).encode(), KEY)
        bundle["dsseEnvelope"] |= {"payload": made.payload, "signatures": [{"sig": made.signatures[0].sig}]}
        path.write_text(json.dumps(bundle))
        with pytest.raises(ArtifactError):
            verify_signature(artifact, keys)
    finally:
        path.write_bytes(before)


def corrupt(folder: Path, others: dict[str, Path], random: random.Random) -> str:
    """Spoils the artifact in one way, and says which. others: signed folders whose signatures are not of this one."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    how = random.choice(["byte", "byte", "byte", "removed byte", "cut", "appended", "swapped", "renamed", "other"])
    if how == "other":
        other = random.choice(sorted(others))
        shutil.copy(others[other] / SIGNATURE, folder / SIGNATURE)
        return f"signature of {other}"
    name = random.choice(names)
    path = folder / name
    data = bytearray(path.read_bytes())
    place = random.randrange(len(data))
    if how == "byte":
        data[place] ^= random.randrange(1, 256)
    elif how == "removed byte":
        del data[place]
    elif how == "cut":
        del data[place:]
    elif how == "appended":
        # White space after JSON is the same JSON.
        data += bytes([random.randrange(33, 256)])
    elif how == "swapped":
        other_name = random.choice([each for each in names if each != name])
        path.rename(folder / "aside")
        (folder / other_name).rename(path)
        (folder / "aside").rename(folder / other_name)
        return f"{name} and {other_name} exchanged"
    else:
        path.rename(path.with_name("renamed"))
        return f"{name} renamed"
    path.write_bytes(data)
    return f"{name}: {how} at {place}"


def test_no_artifact_that_was_corrupted_passes(good, keys, tmp_path, pytestconfig):
    clean = signed_copy(good["text"], tmp_path / "clean")
    others = {
        "another key": signed_copy(good["text"], tmp_path / "other-key", OTHER),
        "another artifact": signed_copy(good["tensors"], tmp_path / "other-artifact"),
        "another version": signed_copy(good["text"], tmp_path / "other-version"),
    }
    (others["another version"] / "licences" / "LICENCE.txt").write_text("Do not.\n")
    sign(others["another version"], KEY)
    chance = random.Random(2026)
    for number in range(pytestconfig.getoption("corruptions")):
        folder = shutil.copytree(clean, tmp_path / "corrupted")
        how = corrupt(folder, others, chance)
        try:
            load_model(folder, public_key=keys)
            pytest.fail(f"{number}: passed with {how}")
        except ArtifactError:
            shutil.rmtree(folder)
    load_model(clean, public_key=keys)


def test_what_is_signed_needs_no_manifest_with_all_files(tmp_path, keys):
    sign(write(tmp_path / "artifact"), KEY)
    assert verify_signature(tmp_path / "artifact", keys).keys() == {MANIFEST, "golden.npz", "model.onnx"}
