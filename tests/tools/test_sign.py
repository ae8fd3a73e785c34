"""`python -m model.sign`, and the commands that check what it wrote."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from app.artifact.manifest import MANIFEST
from app.artifact.signature import SIGNATURE
from app.errors import ConfigError, StartupError
from model.fetch import fetch
from model.package import file_entry
from model.sign import main
from model.verify import main as verify_main
from tests.process import ROOT
from tests.signing import KEY, OTHER, edit_statement, flip, private_pem, public_file, public_pem, put, signed_copy
from tests.text_model import NAME, VERSION, text_model


@pytest.fixture
def artifact(tmp_path) -> Path:
    return shutil.copytree(text_model(), tmp_path / "artifact")


@pytest.fixture
def key(tmp_path) -> Path:
    path = tmp_path / "key.pem"
    path.write_bytes(private_pem(KEY))
    return path


@pytest.fixture
def keys(tmp_path) -> Path:
    return public_file(tmp_path, KEY)


def pem(key, encryption=None) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def test_what_it_signed_is_verified_by_the_gate_offline(command, artifact, key, keys, capfd):
    assert command(main, artifact, "--key", key) == 0
    assert f"{artifact / SIGNATURE}: 3 files, signed by key " in capfd.readouterr().out
    assert command(verify_main, artifact, "--public-key", keys) == 0
    assert f"{NAME} {VERSION} passes on cpu (signature " in capfd.readouterr().out


def test_signing_again_takes_the_place_of_the_signature(command, artifact, key, keys, tmp_path):
    for content in ("one", "two"):
        (artifact / "NOTES").write_text(content)
        assert command(main, artifact, "--key", key) == 0
        assert command(verify_main, artifact, "--public-key", keys) == 0
    assert sorted(path.name for path in artifact.iterdir() if path.name.startswith((".", "model.s"))) == [SIGNATURE]


def test_another_key_is_exit_code_3_and_one_line(command, artifact, key, tmp_path, capfd):
    command(main, artifact, "--key", key)
    capfd.readouterr()
    assert command(verify_main, artifact, "--public-key", public_file(tmp_path, OTHER)) == 3
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"model.verify: {artifact / SIGNATURE}: signed with another key")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        private_pem(KEY)[:-40],
        pem(ed25519.Ed25519PrivateKey.generate()),
        pem(ec.generate_private_key(ec.SECP256K1())),
        pem(KEY, BestAvailableEncryption(b"secret")),
        public_pem(KEY),
    ],
    ids=["empty", "cut", "ed25519", "curve", "password", "public"],
)
def test_a_key_that_cannot_sign_is_exit_code_2_and_one_line_without_it(command, artifact, tmp_path, capfd, content):
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    assert command(main, artifact, "--key", path) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"model.sign: {path}: expected a ")
    assert not (artifact / SIGNATURE).exists()


def test_a_key_that_is_not_there_is_exit_code_2(command, artifact, tmp_path, capfd):
    assert command(main, artifact, "--key", tmp_path / "none.pem") == 2
    assert "none.pem: key cannot be read: No such file or directory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip("model.onnx"), "sha256 mismatch"),
        (lambda folder: (folder / MANIFEST).unlink(), "cannot be read"),
        (lambda folder: (folder / "link").symlink_to(MANIFEST), "found a link, which cannot be signed"),
    ],
    ids=["damaged", "no-manifest", "link"],
)
def test_what_is_no_sound_artifact_is_not_signed(command, artifact, key, capfd, damage, says):
    damage(artifact)
    assert command(main, artifact, "--key", key) == 3
    assert says in capfd.readouterr().err
    assert not (artifact / SIGNATURE).exists()


def test_fetch_brings_all_that_is_signed_and_the_signature(tmp_path, keys):
    source, folder = signed_copy(text_model(), tmp_path / "source"), tmp_path / "fetched"
    environment = {**os.environ, "APP_MODEL_PUBLIC_KEY": str(keys)}
    fetching = [sys.executable, "-m", "model.fetch", str(source), str(folder)]
    done = subprocess.run(fetching, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {MANIFEST, SIGNATURE, "model.onnx", "tokenizer.json", "licences/LICENCE.txt"}


def test_fetch_downloads_nothing_where_the_signed_artifact_is_already(tmp_path, keys, capfd):
    folder = signed_copy(text_model(), tmp_path / "folder")
    fetch("/nowhere", folder, file_entry(folder / MANIFEST).sha256, public_key=keys)
    assert "already complete" in capfd.readouterr().out


def test_fetch_replaces_the_same_artifact_where_none_of_the_keys_signed_it(tmp_path, keys):
    source = signed_copy(text_model(), tmp_path / "source")
    folder = signed_copy(text_model(), tmp_path / "folder", OTHER)
    fetch(str(source), folder, file_entry(source / MANIFEST).sha256, public_key=keys)
    assert (folder / SIGNATURE).read_bytes() == (source / SIGNATURE).read_bytes()


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (lambda folder: (folder / SIGNATURE).unlink(), 5, f"{SIGNATURE}: not found"),
        (flip("licences/LICENCE.txt"), 3, "LICENCE.txt: sha256 mismatch"),
        (lambda folder: (folder / "licences/LICENCE.txt").unlink(), 5, "LICENCE.txt: not found"),
        (edit_statement(put("subject", 0, "name", value="another"), OTHER), 3, "signature mismatch"),
        (
            edit_statement(put("predicate", "resources", 0, "name", value="../x")),
            3,
            "expected a path inside the folder",
        ),
    ],
    ids=["no-signature", "changed", "missing", "other-key", "leaves"],
)
def test_fetch_leaves_nothing_of_what_is_not_as_signed(tmp_path, keys, damage, code, says):
    source, folder = signed_copy(text_model(), tmp_path / "source"), tmp_path / "there" / "fetched"
    damage(source)
    with pytest.raises(StartupError, match=re.escape(says)) as caught:
        fetch(str(source), folder, public_key=keys)
    assert caught.value.exit_code == code
    assert list(folder.parent.iterdir()) == []


def test_fetch_reads_the_keys_before_it_downloads_anything(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.pem: public keys cannot be read"):
        fetch("/nowhere", tmp_path / "fetched", public_key=tmp_path / "none.pem")
