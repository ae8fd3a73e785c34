"""Proves that an artifact's files and its manifest are what was packaged: sizes, sha256, the manifest's checksum."""

import hashlib

from app.artifact.manifest import MANIFEST, Artifact
from app.errors import ArtifactError

CHUNK_BYTES = 1 << 20


def verify_files(artifact: Artifact) -> None:
    """Compares every listed file's size and sha256, streamed. Raises ArtifactError at the first that differs."""
    for name, entry in artifact.manifest.files.items():
        path = artifact.path(name)
        checksum = hashlib.sha256()
        size = 0
        try:
            with path.open("rb") as file:
                found = path.stat().st_size
                if found != entry.bytes:
                    raise ArtifactError(f"{path}: size mismatch: expected {entry.bytes} bytes, found {found}")
                while chunk := file.read(CHUNK_BYTES):
                    checksum.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
        if checksum.hexdigest() != entry.sha256:
            raise ArtifactError(f"{path}: sha256 mismatch: expected {entry.sha256}, found {checksum.hexdigest()}")


def checksum_of(raw: bytes, digits: str) -> str:
    """sha256 of a manifest without the digits of its own checksum."""
    return hashlib.sha256(raw.replace(digits.encode(), b"", 1)).hexdigest()


def verify_manifest(artifact: Artifact) -> None:
    """Raises ArtifactError if manifest.json is not as it was written. One without a checksum may be."""
    expected = artifact.manifest.checksum
    if expected is not None and (found := checksum_of(artifact.raw, expected)) != expected:
        raise ArtifactError(
            f"{artifact.folder / MANIFEST}: checksum: expected {expected}, found {found}; it is damaged, or edited: "
            "then take `checksum` out"
        )
