"""Proves that an artifact is what the holder of a key signed: OpenSSF Model Signing, a Sigstore bundle whose in-toto
statement lists the sha256 of every file. Knows nothing of what the files are; imports `cryptography` only to check one.

The format has no expiry and no revocation: take a key out of the public keys, or pin the digest.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from app.artifact.integrity import verify_contents
from app.artifact.manifest import Sha256, path_inside, require_folder
from app.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

SIGNATURE = "model.sig"
# 20,000 files.
MAX_SIGNATURE_BYTES = 4 << 20
MAX_KEYS_BYTES = 1 << 20
PEM_KEY = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
# Curves of the format, and the hash that goes with each.
HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


class KeyIdentifier(Struct, frozen=True, forbid_unknown_fields=True):
    """hint: sha256 of the public key in PEM."""

    hint: str = ""


class VerificationMaterial(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    public_key: KeyIdentifier
    tlog_entries: Annotated[list[Any], Meta(max_length=0)] = []


class DsseSignature(Struct, frozen=True, forbid_unknown_fields=True):
    sig: str
    keyid: str = ""


class Envelope(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """DSSE: `payload` and `sig` are base64."""

    payload: str
    payload_type: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[list[DsseSignature], Meta(min_length=1, max_length=1)]


class Bundle(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """The signature file."""

    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verification_material: VerificationMaterial
    dsse_envelope: Envelope


class RootDigest(Struct, frozen=True):
    sha256: Sha256


class Subject(Struct, frozen=True):
    """The artifact as one: `digest` is the sha256 of its files' digests, in the order of `resources`."""

    name: str
    digest: RootDigest


class Resource(Struct, frozen=True):
    name: str
    algorithm: Literal["sha256"]
    digest: Sha256


class Serialization(Struct, frozen=True):
    method: Literal["files"]
    hash_type: Literal["sha256"]
    allow_symlinks: bool = False
    ignore_paths: list[str] = []


class Predicate(Struct, frozen=True):
    serialization: Serialization
    resources: list[Resource]

    def files(self) -> dict[str, str]:
        """sha256 by name."""
        return {each.name: each.digest for each in self.resources}


class Statement(Struct, frozen=True, rename={"type": "_type", "predicate_type": "predicateType"}):
    """What is signed. Of its fields, those that are not named here are for others, says the format."""

    type: Literal["https://in-toto.io/Statement/v1"]
    subject: Annotated[list[Subject], Meta(min_length=1, max_length=1)]
    predicate_type: Literal["https://model_signing/signature/v1.0"]
    predicate: Predicate


def verify_signature(folder: Path, public_keys: Path) -> dict[str, str]:
    """sha256 of each file in `folder`, by name: those that the signature in it lists, each unchanged, and no others.

    public_keys: a file of PEM, one key or several. Raises ConfigError for it, and ArtifactError for everything else.
    """
    signed = read_signature(folder, public_keys)
    return verify_contents(folder, signed.files(), [*signed.serialization.ignore_paths, SIGNATURE])


def read_signature(folder: Path, public_keys: Path) -> Predicate:
    """What the signature in `folder` says, once it is proved to be by one of the keys. Raises as `verify_signature`."""
    keys = read_public_keys(public_keys)
    require_folder(folder)
    path = path_inside(folder, SIGNATURE)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SIGNATURE_BYTES + 1)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no signature found, which {public_keys} asks for") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_SIGNATURE_BYTES:
        raise ArtifactError(f"{path}: signature: expected at most {MAX_SIGNATURE_BYTES} bytes, found more")
    try:
        bundle = msgspec.json.decode(raw, type=Bundle)
        envelope = bundle.dsse_envelope
        payload, signature = _base64(envelope.payload), _base64(envelope.signatures[0].sig)
        hint, message = bundle.verification_material.public_key.hint, signed_bytes(envelope.payload_type, payload)
        named = [key for key in keys if hint in ("", hint_of(key))]
        if not named:
            raise ArtifactError(f"{path}: signed with another key ({hint[:64]}) than the {len(keys)} in {public_keys}")
        if not any(_is_signed_by(key, signature, message) for key in named):
            raise ArtifactError(f"{path}: signature mismatch: it is not of this content by a key in {public_keys}")
        statement = msgspec.json.decode(payload, type=Statement)
        _check_consistent(statement)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not a signature as OpenSSF Model Signing 1.0 has it: {error or type(error).__name__}"
        ) from None
    return statement.predicate


def read_public_keys(path: Path) -> "list[ec.EllipticCurvePublicKey]":
    """Raises ConfigError unless `path` holds public keys in PEM, all on a curve that the format takes."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise ConfigError(f"{path}: to check signatures, install the extra `sign`: cryptography is missing") from None
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_KEYS_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: public keys cannot be read: {error.strerror}") from None
    blocks = PEM_KEY.findall(raw)
    if not blocks or raw.count(b"-----BEGIN") != len(blocks):
        raise ConfigError(f"{path}: expected public keys in PEM (BEGIN PUBLIC KEY), found none, or something else too")
    try:
        keys = [load_pem_public_key(block) for block in blocks]
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: expected public keys in PEM, found one that is damaged") from None
    curves = [key for key in keys if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in HASHES]
    if len(curves) < len(keys):
        raise ConfigError(f"{path}: expected keys on P-256, P-384 or P-521, found another kind")
    return curves


def algorithm(curve: "ec.EllipticCurve") -> "ec.ECDSA":
    """How a key on this curve signs."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.ECDSA(getattr(hashes, HASHES[curve.name])())


def hint_of(key: "ec.EllipticCurvePublicKey") -> str:
    """By what a bundle names the key."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def signed_bytes(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what the key signs."""
    return f"DSSEv1 {len(payload_type.encode())} {payload_type} {len(payload)} ".encode() + payload


def root_digest(resources: Sequence[Resource]) -> str:
    """The one digest of all files."""
    return hashlib.sha256(b"".join(bytes.fromhex(each.digest) for each in resources)).hexdigest()


def _base64(text: str) -> bytes:
    """Raises ValueError unless it is what an encoder would write: no other bytes may stand for the same."""
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        raise ValueError(f"base64: {error}") from None
    if base64.b64encode(data).decode() != text:
        raise ValueError("base64: not as it is written")
    return data


def _is_signed_by(key: "ec.EllipticCurvePublicKey", signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message, algorithm(key.curve))
    except InvalidSignature:
        return False
    return True


def _check_consistent(statement: Statement) -> None:
    """Raises ValueError for names that are not plain paths inside the folder, or are there twice, and for a root digest
    that is not of these files."""
    resources = statement.predicate.resources
    for name in (*(each.name for each in resources), *statement.predicate.serialization.ignore_paths):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or "\0" in name:
            raise ValueError(f"name {name!r}: expected a path inside the folder")
    if len({each.name for each in resources}) != len(resources):
        raise ValueError("a name is there twice")
    if root_digest(resources) != statement.subject[0].digest.sha256:
        raise ValueError("the digest of the whole is not that of its files")
