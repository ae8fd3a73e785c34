"""An artifact → its signature: `python -m model.sign DIR --key KEY.pem` writes DIR/model.sig, OpenSSF Model Signing.

Exit 0; 2 bad usage or key; 3 what is there is not a valid artifact. What the public key is, `openssl` says.
"""

import argparse
import base64
import sys
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from app.artifact.integrity import files_in, sha256_of, verify_files
from app.artifact.manifest import Artifact, read_artifact
from app.artifact.signature import (
    HASHES,
    SIGNATURE,
    Bundle,
    DsseSignature,
    Envelope,
    KeyIdentifier,
    Predicate,
    Resource,
    RootDigest,
    Serialization,
    Statement,
    Subject,
    VerificationMaterial,
    algorithm,
    hint_of,
    root_digest,
    signed_bytes,
)
from app.errors import ConfigError, StartupError

# What version control keeps beside the files is no part of the model; the signature cannot be part of itself.
IGNORED = [".git", ".gitattributes", ".github", ".gitignore", SIGNATURE]


def sign(folder: Path, key: ec.EllipticCurvePrivateKey) -> Predicate:
    """Writes the signature of everything in `folder`, and returns what it says. Raises ArtifactError."""
    artifact = read_artifact(folder)
    digests = {name: sha256_of(path) for name, path in files_in(folder, IGNORED)}
    verify_files(artifact, digests)
    signed = statement(artifact, digests)
    payload = msgspec.json.format(msgspec.json.encode(signed))
    bundle = Bundle(
        "application/vnd.dev.sigstore.bundle.v0.3+json",
        VerificationMaterial(KeyIdentifier(hint_of(key.public_key()))),
        envelope(payload, key),
    )
    (folder / SIGNATURE).write_bytes(msgspec.json.encode(bundle))
    return signed.predicate


def statement(artifact: Artifact, digests: dict[str, str]) -> Statement:
    """What is signed of files with these sha256."""
    # By parts, as paths are compared: the digest of the whole depends on the order.
    names = sorted(digests, key=PurePosixPath)
    resources = [Resource(name, "sha256", digests[name]) for name in names]
    return Statement(
        "https://in-toto.io/Statement/v1",
        [Subject(artifact.manifest.name, RootDigest(root_digest(resources)))],
        "https://model_signing/signature/v1.0",
        Predicate(Serialization("files", "sha256", ignore_paths=IGNORED), resources),
    )


def envelope(payload: bytes, key: ec.EllipticCurvePrivateKey) -> Envelope:
    """DSSE around a statement."""
    kind: Literal["application/vnd.in-toto+json"] = "application/vnd.in-toto+json"
    signature = key.sign(signed_bytes(kind, payload), algorithm(key.curve))
    return Envelope(_text(payload), kind, [DsseSignature(_text(signature))])


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises ConfigError unless `path` holds a private key in PEM, without a password, on a curve of the format."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{path}: key cannot be read: {error.strerror}") from None
    # TypeError: it has a password.
    except (TypeError, ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: expected a private key in PEM, without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in HASHES:
        raise ConfigError(f"{path}: expected a key on P-256, P-384 or P-521, found another kind")
    return key


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main() -> None:
    """Command line of `python -m model.sign`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.sign",
        description=f"Writes DIR/{SIGNATURE}: every file of the artifact, signed as OpenSSF Model Signing has it.",
        epilog="example: openssl ecparam -name prime256v1 -genkey -noout -out key.pem && "
        "openssl ec -in key.pem -pubout -out public.pem && python -m model.sign my-model --key key.pem",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="artifact folder")
    parser.add_argument("--key", type=Path, required=True, help="private key in PEM: P-256, P-384 or P-521")
    args = parser.parse_args()
    try:
        key = read_private_key(args.key)
        signed = sign(args.folder, key)
    except (StartupError, OSError) as error:
        print(f"model.sign: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    print(f"{args.folder / SIGNATURE}: {len(signed.resources)} files, signed by key {hint_of(key.public_key())}")


if __name__ == "__main__":
    main()
