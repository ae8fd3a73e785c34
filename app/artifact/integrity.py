"""Proves that an artifact's files and its manifest are what was packaged: sizes, sha256, the manifest's checksum; and
that a folder holds what a signature lists."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from app.artifact.manifest import MANIFEST, Artifact
from app.errors import ArtifactError

# What ext4 puts at the root of a volume, which an artifact may be; nobody but root can read it.
LOST_AND_FOUND = PurePosixPath("lost+found")


def verify_files(artifact: Artifact, known: Mapping[str, str] | None = None) -> None:
    """Compares every listed file's size and sha256, streamed. Raises ArtifactError at the first that differs.

    known: sha256 by name of files, the manifest among them, that were read just before: they are not read again.
    """
    if known is not None and known.get(MANIFEST) != artifact.digest:
        raise ArtifactError(f"{artifact.folder / MANIFEST}: not the one that the signature lists")
    for name, entry in artifact.manifest.files.items():
        path = artifact.path(name)
        try:
            with path.open("rb") as file:
                found = path.stat().st_size
                if found != entry.bytes:
                    raise ArtifactError(f"{path}: size mismatch: expected {entry.bytes} bytes, found {found}")
                digest = (known or {}).get(name) or hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
        if digest != entry.sha256:
            raise ArtifactError(f"{path}: sha256 mismatch: expected {entry.sha256}, found {digest}")


def verify_contents(folder: Path, expected: Mapping[str, str], ignored: Sequence[str]) -> dict[str, str]:
    """sha256 by name of the files below `folder`, but for those `ignored`. Raises ArtifactError unless they are
    `expected`, none missing and none more."""
    found = dict(files_in(folder, ignored))
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ArtifactError(f"{folder / name}: not found; the signature lists it")
        if name not in expected:
            raise ArtifactError(f"{folder / name}: an extra file: the signature does not list it")
    digests = {name: sha256_of(path) for name, path in found.items()}
    for name, digest in digests.items():
        if digest != expected[name]:
            raise ArtifactError(f"{found[name]}: sha256 mismatch: expected {expected[name]} as signed, found {digest}")
    return digests


def files_in(folder: Path, ignored: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Name and path of each file below `folder`, but for those `ignored` and what is below them. Raises ArtifactError
    for what is neither file nor folder."""
    left_out = {PurePosixPath(name) for name in ignored}
    folders = [PurePosixPath()]
    while folders:
        inside = folders.pop()
        try:
            with os.scandir(folder / inside) as found:
                entries = list(found)
            for entry in entries:
                name = inside / entry.name
                if entry.is_symlink():
                    raise ArtifactError(f"{entry.path}: expected a file, found a link, which cannot be signed")
                if name in left_out:
                    continue
                if entry.is_dir():
                    folders.append(name)
                elif entry.is_file():
                    yield name.as_posix(), folder / name
                else:
                    raise ArtifactError(f"{entry.path}: expected a file, found a pipe or device")
        except OSError as error:
            if inside != LOST_AND_FOUND or not isinstance(error, PermissionError):
                raise ArtifactError(f"{folder / inside}: cannot be read: {error.strerror}") from None


def sha256_of(path: Path) -> str:
    """Of a file, streamed. Raises ArtifactError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None


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
